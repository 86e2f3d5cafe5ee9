"""Errors meant for a person: what was found, what was needed, what to do.

Every error a user can cause derives from `DseekError`, which is a `ValueError`; the command line turns it into one
message on stderr and exit status 2. Broken invariants of our own stay `assert`.
"""

from __future__ import annotations


class DseekError(ValueError):
    """A user's error.

    Args:
        found: what was met, with the offending value.
        needed: what would have been right, or None where it is plain from `found`.
        remedy: what to do about it, or None.
    """

    exit_status = 2

    def __init__(self, found: str, *, needed: str | None = None, remedy: str | None = None) -> None:
        self.found = found
        self.needed = needed
        self.remedy = remedy
        parts = [found]
        if needed is not None:
            parts.append(f"needed: {needed}")
        if remedy is not None:
            parts.append(f"to do: {remedy}")
        super().__init__("; ".join(parts))


class ConfigError(DseekError):
    """A configuration (TOML, config.json, plan file, environment variable, flag) with a wrong or unknown value."""


class FileFormatError(DseekError):
    """A checkpoint, GGUF or tokenizer file that is truncated, inconsistent or over a limit."""


class UnsupportedModelError(DseekError):
    """A model family, encoding or feature that dseek does not run; names those that it does."""


class ModelNotFoundError(DseekError):
    """A model name that is no folder, no file, no alias and no reachable hub id."""


class RequestError(DseekError):
    """A request that cannot be served: token ids out of range, a prompt beyond the context, a bad sampling value."""


class NotFiniteError(RequestError):
    """A model whose logits are NaN or infinite; names the layer and the projection where that began."""


class PeerError(DseekError):
    """A rank that died, does not answer, or was given other work than its peers."""

    exit_status = 1


class MemoryLimitError(DseekError):
    """The plan foresees more memory than the machine (or the user's limit) has."""
