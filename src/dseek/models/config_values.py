"""Reads single values out of a model's configuration and trusts none of them.

A `config.json` and the metadata of a GGUF file are both a mapping somebody else wrote. `ConfigValues` takes one value
at a time, checks its type and range and says, where it is wrong, which key held what, what was needed and what to do.
It knows nothing about families; the limits are given by the caller. A null counts as missing.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any

from dseek.core.errors import ConfigError


class ConfigValues:
    """Checked access to the values of one configuration.

    Args:
        values: the configuration, keys to JSON-like values.
        source: what to call it in messages, such as `config.json`.

    Raises:
        ConfigError: when `values` is no mapping.
    """

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        if not isinstance(values, Mapping):
            raise ConfigError(
                f"{source} is a {type(values).__name__}",
                needed="an object with named values",
                remedy="download the model's configuration again",
            )
        self.values = values
        self.source = source

    def get(self, key: str) -> Any:
        """Return the raw value of `key`, or None where it is missing or null."""
        return self.values.get(key)

    def has(self, key: str) -> bool:
        """Tell whether `key` is there with a value other than null."""
        return self.values.get(key) is not None

    def error(self, key: str, needed: str, remedy: str | None = None) -> ConfigError:
        """Build the error for a wrong or missing value.

        Args:
            key: the key at fault.
            needed: what would have been right.
            remedy: what to do; None gives the usual advice.

        Returns:
            The error, to be raised by the caller.
        """
        value = self.get(key)
        found = f"{self.source} has no {key}" if value is None else f"{self.source} has {key} = {shorten(value)}"
        return ConfigError(
            found, needed=needed, remedy=remedy or f"correct {key} in {self.source}, or download the model again"
        )

    def integer(self, key: str, *, minimum: int = 1, maximum: int, default: int | None = None, step: int = 1) -> int:
        """Read a whole number.

        Args:
            key: the key to read.
            minimum: smallest value allowed.
            maximum: largest value allowed.
            default: value of a missing key; None makes the key required.
            step: the value must be a multiple of this.

        Returns:
            The value as a plain int.

        Raises:
            ConfigError: missing without a default, not a whole number, or outside the limits.
        """
        needed = f"a whole number from {minimum} to {maximum}" + (f", a multiple of {step}" if step > 1 else "")
        value = self.get(key)
        if value is None:
            if default is None:
                raise self.error(key, needed)
            return default
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise self.error(key, needed)
        number = int(value)
        if not minimum <= number <= maximum or number % step:
            raise self.error(key, needed)
        return number

    def number(self, key: str, *, minimum: float, maximum: float, default: float | None = None) -> float:
        """Read a finite number; whole numbers count.

        Args:
            key: the key to read.
            minimum: smallest value allowed.
            maximum: largest value allowed.
            default: value of a missing key; None makes the key required.

        Returns:
            The value as a plain float.

        Raises:
            ConfigError: missing without a default, not a number, NaN, infinite, or outside the limits.
        """
        needed = f"a number from {minimum:g} to {maximum:g}"
        value = self.get(key)
        if value is None:
            if default is None:
                raise self.error(key, needed)
            return default
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise self.error(key, needed)
        # Compared before it is widened: an integer of a thousand digits does not fit a float. NaN compares false.
        if value < minimum or not value <= maximum:
            raise self.error(key, needed)
        return float(value)

    def flag(self, key: str, *, default: bool = False) -> bool:
        """Read true or false.

        Args:
            key: the key to read.
            default: value of a missing key.

        Returns:
            The value.

        Raises:
            ConfigError: anything but a boolean.
        """
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def text(self, key: str, *, default: str | None = None) -> str:
        """Read a string.

        Args:
            key: the key to read.
            default: value of a missing key; None makes the key required.

        Returns:
            The value.

        Raises:
            ConfigError: missing without a default, or no string.
        """
        value = self.get(key)
        if value is None:
            if default is None:
                raise self.error(key, "a name")
            return default
        if not isinstance(value, str):
            raise self.error(key, "a name")
        return value

    def section(self, key: str) -> ConfigValues | None:
        """Open a nested object.

        Args:
            key: the key that holds it.

        Returns:
            Its values, or None where it is missing, null or empty.

        Raises:
            ConfigError: the value is no object.
        """
        value = self.get(key)
        if value is None or value == {}:
            return None
        if not isinstance(value, Mapping):
            raise self.error(key, "an object with named values, or null")
        return ConfigValues(value, f"{self.source} ({key})")


def shorten(value: Any, limit: int = 60) -> str:
    """Show a value from a file in a message without flooding the terminal.

    Args:
        value: anything.
        limit: longest text returned, in characters.

    Returns:
        One printable line.
    """
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**40:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, str | bytes | list | tuple):
        value = value[:limit]
    elif isinstance(value, Mapping):
        value = dict(list(value.items())[:4])
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
