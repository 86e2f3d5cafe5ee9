"""Fetches a model from a Hugging Face hub (or a mirror: `HF_ENDPOINT`) into that library's own cache.

Only safetensors, GGUF and text files are asked for, never pickled weights or Python code. A repository with several
GGUF files holds the same model in several quantisations: the user names one, as `org/name/file.gguf`.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dseek.core.errors import FileFormatError, ModelNotFoundError

_PATTERNS = ["*.safetensors", "*.json", "*.jinja"]
_IGNORED = ["consolidated*", "*/*", "*.index.fp*.json"]
"""The same weights in another layout, and sub-folders (other exports of the model)."""
_GGUF_PART = re.compile(r"-\d{5}-of-(\d{5})(?=\.gguf$)")


def find_in_hub_cache(name: str) -> Path | None:
    """Find a model in the hub's local cache, without any network.

    Args:
        name: `org/name` or `org/name/file.gguf`.

    Returns:
        Its folder or file where it is there and whole, else None.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    repo, file_name = _split(name)
    try:
        # No pattern: the library would miss the files that were never wanted; what is needed is looked at below.
        folder = Path(snapshot_download(repo, local_files_only=True, allow_patterns=[]))
    except LocalEntryNotFoundError:
        return None
    if file_name is not None:
        return _whole_gguf(folder / file_name)
    return _whole_model(folder)


def fetch_from_hub(name: str, report: Callable[[str], None]) -> Path:
    """Download a model; files that are already in the cache are not fetched again.

    Args:
        name: `org/name` or `org/name/file.gguf`.
        report: told of each step.

    Returns:
        Its folder or file.

    Raises:
        ModelNotFoundError: the hub cannot be reached, or has no such model or does not show it.
        FileFormatError: the repository holds no weights that dseek reads, or several GGUF files and no choice.
    """
    repo, file_name = _split(name)
    report(f"asking the hub for {repo}")
    files = _ask_hub(name, lambda hub: [entry.rfilename for entry in hub.HfApi().model_info(repo).siblings])
    patterns = _choose(name, files, file_name)
    wanted = [file for file in files if any(fnmatch.fnmatch(file, pattern) for pattern in patterns)]
    report(f"downloading {repo}: {len(wanted)} files, those already here are kept")
    ignored = [] if file_name is not None else _IGNORED
    folder = Path(
        _ask_hub(name, lambda hub: hub.snapshot_download(repo, allow_patterns=patterns, ignore_patterns=ignored))
    )
    found = _whole_gguf(folder / file_name) if file_name is not None else _whole_model(folder)
    if found is None:
        raise FileFormatError(f"{name} is not whole after the download ({folder})", remedy="pull it again")
    report(f"{name}: {found}")
    return found


def _split(name: str) -> tuple[str, str | None]:
    """Split `org/name/file.gguf` into repository and file."""
    parts = name.split("/", 2)
    return "/".join(parts[:2]), parts[2] if len(parts) == 3 else None


def _choose(name: str, files: list[str], file_name: str | None) -> list[str]:
    """Name the files to fetch, as patterns."""
    ggufs = sorted({_GGUF_PART.sub("", file) for file in files if file.endswith(".gguf") and "/" not in file})
    shown = ", ".join(ggufs[:8]) + (" ..." if len(ggufs) > 8 else "")
    if file_name is not None:
        if file_name not in files:
            raise ModelNotFoundError(f"the hub has no file {name}", needed=f"one of {shown}" if ggufs else None)
        return [_escape_parts(file_name)]
    if any(file.endswith(".safetensors") and "/" not in file for file in files):
        return _PATTERNS
    if len(ggufs) == 1:
        first = next(file for file in files if _GGUF_PART.sub("", file) == ggufs[0])
        return [_escape_parts(first)]
    if ggufs:
        raise FileFormatError(f"{name} holds {len(ggufs)} GGUF files ({shown})", remedy=f"name one: {name}/FILE.gguf")
    raise FileFormatError(
        f"{name} holds no weights that dseek reads", needed="*.safetensors or *.gguf (pickled weights are never read)"
    )


def _escape(file_name: str) -> str:
    """A pattern that matches just this name."""
    return re.sub(r"([*?[])", r"[\1]", file_name)


def _escape_parts(file_name: str) -> str:
    """A pattern for all parts of a GGUF file in parts (for a whole file: itself)."""
    return _GGUF_PART.sub(r"-?????-of-\1", _escape(file_name))


def _whole_model(folder: Path) -> Path | None:
    """The model in a snapshot, or None where an interrupted download left it incomplete."""
    from dseek.models.folder_files import find_shards
    from dseek.models.locate import model_in_folder

    found = model_in_folder(folder)
    if found is None or not found.is_dir():
        return None if found is None else _whole_gguf(found)
    try:
        find_shards(found)
    except FileFormatError:
        return None
    return found if (found / "tokenizer.json").is_file() else None


def _whole_gguf(path: Path) -> Path | None:
    """The file where it and all further parts are there, else None."""
    match = _GGUF_PART.search(path.name)
    if match is None:
        return path if path.is_file() else None
    stem, count = path.name[: match.start()], int(match[1])
    parts = (path.with_name(f"{stem}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1))
    return path if all(part.is_file() for part in parts) else None


def _ask_hub(name: str, ask: Callable[[Any], Any]) -> Any:
    """Call the hub, turning its many errors into one of ours."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return ask(huggingface_hub)
    except (errors.GatedRepoError, errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise ModelNotFoundError(
            f"the hub has no model {name}, or does not show it ({type(error).__name__})",
            remedy="check the name; for a closed model accept its terms on the hub and log in (`hf auth login`)",
        ) from None
    except errors.HFValidationError as error:
        raise ModelNotFoundError(f"{name} is no name of the hub's ({error})") from None
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as error:
        raise ModelNotFoundError(
            f"the hub could not give {name} ({type(error).__name__}: {error})",
            needed="a reachable hub",
            remedy="check the network, HF_ENDPOINT and HF_HUB_OFFLINE, then try again",
        ) from None
    except Exception as error:
        if not type(error).__module__.startswith(("httpx", "httpcore")):
            raise
        raise ModelNotFoundError(
            f"the hub cannot be reached for {name} ({type(error).__name__}: {error})",
            needed="a reachable hub",
            remedy="check the network and HF_ENDPOINT, then try again",
        ) from None
