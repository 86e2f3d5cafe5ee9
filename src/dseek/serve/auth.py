"""API keys: only salted hashes are kept, and a key is compared with all of them in constant time.

A key has to be long (`MIN_KEY_CHARS`), as `new_key` makes them: against keys that nobody can guess one round of SHA-256
with a salt is enough, and a slow password hash would let strangers burn the processor with wrong keys.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable
from pathlib import Path

from dseek.core.errors import ConfigError

MIN_KEY_CHARS = 20
"""Shortest key that is hashed."""

MAX_KEY_CHARS = 512
MAX_FILE_BYTES = 1 << 20
_LINE = re.compile(r"sha256:([0-9a-f]{32}):([0-9a-f]{64})")


def new_key() -> str:
    """Make a key of 256 random bits, URL-safe."""
    return "dsk-" + secrets.token_urlsafe(32)


def hash_key(key: str, salt: bytes | None = None) -> str:
    """Hash a key for the key file.

    Args:
        key: at least `MIN_KEY_CHARS` visible ASCII characters.
        salt: 16 bytes; None draws them.

    Returns:
        `sha256:SALT:DIGEST`, in hexadecimal.

    Raises:
        ConfigError: the key is too short, too long, or has spaces or characters that no header carries.
    """
    if not MIN_KEY_CHARS <= len(key) <= MAX_KEY_CHARS:
        raise ConfigError(
            f"the key has {len(key)} characters",
            needed=f"{MIN_KEY_CHARS} to {MAX_KEY_CHARS}",
            remedy="leave it empty to have one made",
        )
    if not all("!" <= character <= "~" for character in key):
        raise ConfigError("the key has a space or a character outside ASCII", needed="visible ASCII characters")
    salt = secrets.token_bytes(16) if salt is None else salt
    return f"sha256:{salt.hex()}:{_digest(salt, key.encode()).hex()}"


def read_key_file(path: str | Path) -> tuple[str, ...]:
    """Read the hashes of a key file: one a line, a name after a space and lines that begin with # are for people.

    Args:
        path: the file.

    Returns:
        The hashes, at least one.

    Raises:
        ConfigError: the file cannot be read, is too large, has a line of another form, or no hash.
    """
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"the key file {path} cannot be read: {error.strerror or error}") from None
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"the key file {path} has over {MAX_FILE_BYTES} bytes")
    hashes = []
    for number, line in enumerate(data.decode("utf-8", errors="replace").splitlines(), start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        entry = text.split()[0]
        if not _LINE.fullmatch(entry):
            raise ConfigError(
                f"line {number} of {path} is no hash of a key",
                needed="sha256:SALT:DIGEST",
                remedy="make it with `dseek serve --hash-key`; never put the key itself into the file",
            )
        hashes.append(entry)
    if not hashes:
        raise ConfigError(f"the key file {path} has no hash", needed="at least one line of `dseek serve --hash-key`")
    return tuple(hashes)


class KeyRing:
    """The keys that are let in.

    Args:
        hashes: lines as `hash_key` writes them; none lets everybody in.
    """

    def __init__(self, hashes: Iterable[str]) -> None:
        self._entries = []
        for line in hashes:
            match = _LINE.fullmatch(line)
            if match is None:
                raise ConfigError("a hash of another form", needed="sha256:SALT:DIGEST")
            self._entries.append((bytes.fromhex(match[1]), bytes.fromhex(match[2])))

    @property
    def is_open(self) -> bool:
        """Everybody is let in."""
        return not self._entries

    def admits(self, authorization: str | None) -> bool:
        """Judge an Authorization header; the time taken does not depend on which key matches, or how much of it.

        Args:
            authorization: the header's value, `Bearer KEY`, or None.
        """
        if self.is_open:
            return True
        scheme, _, key = (authorization or "").partition(" ")
        given = key.strip()[:MAX_KEY_CHARS].encode("utf-8", errors="surrogateescape")
        matches = [hmac.compare_digest(_digest(salt, given), digest) for salt, digest in self._entries]
        return any(matches) and scheme.lower() == "bearer"


def _digest(salt: bytes, key: bytes) -> bytes:
    return hashlib.sha256(salt + key).digest()
