"""The environment variables dseek reads: one typed table, nothing else looks at `os.environ` for a `DSEEK_*` name.

A value is checked when it is asked for; a bad one is a `ConfigError` that lists the good ones. A variable that starts
with `DSEEK_` and is not in the table has no effect: `unknown_variables` finds those, and `dseek.core.logs` warns.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, overload

from dseek.core.errors import ConfigError

Value = str | int | Path | None

LOG_LEVELS = ("debug", "info", "warning", "error")
PRECISION_MODES = ("auto", "fp32", "bf16", "fp16", "int8", "int4")
TRANSPORTS = ("auto", "shared_memory", "mooncake", "tcp")
KERNEL_VARIANTS = ("auto", "torch", "generic", "avx2", "avx512", "amx")


@dataclass(frozen=True, kw_only=True, slots=True)
class Variable:
    """One environment variable: its name, what it is for, and how its text becomes a value."""

    name: str
    """Name in the environment, starting with `DSEEK_`."""
    summary: str
    """What it does, in a few words."""
    expected: str
    """The good values, for messages."""
    parse: Callable[[str], Value]
    """Text to value; raises ValueError on a bad text."""
    default: Callable[[Mapping[str, str]], Value]
    """The value where the variable is unset or empty, given the whole environment."""


def _choice(name: str, summary: str, values: tuple[str, ...], default: str) -> Variable:
    def parse(text: str) -> Value:
        lowered = text.strip().lower()
        if lowered not in values:
            raise ValueError(text)
        return lowered

    return Variable(
        name=name, summary=summary, expected="one of " + ", ".join(values), parse=parse, default=lambda _: default
    )


def _parse_threads(text: str) -> Value:
    count = int(text)
    if not 1 <= count <= 1024:
        raise ValueError(text)
    return count


def _parse_path(text: str) -> Value:
    if "\0" in text:
        raise ValueError(text)
    return Path(text).expanduser()


def _default_cache_dir(environ: Mapping[str, str]) -> Value:
    """`$XDG_CACHE_HOME/dseek`, or `~/.cache/dseek` (XDG base directory specification: a relative path is ignored)."""
    base = environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if base.startswith("/") else Path.home() / ".cache"
    return root / "dseek"


VARIABLES: dict[str, Variable] = {
    variable.name: variable
    for variable in (
        _choice("DSEEK_LOG_LEVEL", "least severity that is logged to stderr", LOG_LEVELS, "warning"),
        _choice(
            "DSEEK_PRECISION_MODE", "precision of a run unless --precision says otherwise", PRECISION_MODES, "auto"
        ),
        Variable(
            name="DSEEK_CACHE_DIR",
            summary="folder of pulled models and of the machine's measurements",
            expected="a folder's path",
            parse=_parse_path,
            default=_default_cache_dir,
        ),
        Variable(
            name="DSEEK_NUM_THREADS",
            summary="threads of a run unless --threads says otherwise",
            expected="a whole number from 1 to 1024",
            parse=_parse_threads,
            default=lambda _: None,
        ),
        _choice("DSEEK_KERNELS", "kernel variant; torch runs without the native kernels", KERNEL_VARIANTS, "auto"),
        Variable(
            name="DSEEK_LEASE",
            summary="file in which a supervised training process counts its steps; the supervisor sets it",
            expected="a file's path",
            parse=_parse_path,
            default=lambda _: None,
        ),
        _choice("DSEEK_TRANSPORT", "how ranks of the dseek process group are connected", TRANSPORTS, "auto"),
    )
}
"""Every variable, by name."""


@overload
def get(name: Literal["DSEEK_LOG_LEVEL", "DSEEK_PRECISION_MODE", "DSEEK_KERNELS", "DSEEK_TRANSPORT"]) -> str: ...
@overload
def get(name: Literal["DSEEK_CACHE_DIR"]) -> Path: ...
@overload
def get(name: Literal["DSEEK_NUM_THREADS"]) -> int | None: ...
@overload
def get(name: Literal["DSEEK_LEASE"]) -> Path | None: ...
def get(name: str) -> Value:
    """Return the checked value of a `DSEEK_*` variable, or its default.

    Args:
        name: a key of `VARIABLES`.

    Returns:
        str, int, Path or None, as the overloads say.

    Raises:
        ConfigError: the variable is set to a bad value.
    """
    variable = VARIABLES[name]
    text = os.environ.get(name, "")
    if not text.strip():
        return variable.default(os.environ)
    try:
        return variable.parse(text)
    except ValueError:
        raise ConfigError(
            f"environment variable {name} is {text!r}", needed=variable.expected, remedy=f"set it so, or unset {name}"
        ) from None


def unknown_variables() -> list[tuple[str, str | None]]:
    """List the `DSEEK_*` variables that are set and that dseek does not know.

    Returns:
        Pairs of the name met and the nearest known name (None where none is near).
    """
    found = []
    for name in sorted(os.environ):
        if name.startswith("DSEEK_") and name not in VARIABLES:
            import difflib  # for a misspelt name only

            near = difflib.get_close_matches(name, VARIABLES, n=1, cutoff=0.6)
            found.append((name, near[0] if near else None))
    return found
