"""Logging to stderr at the level `DSEEK_LOG_LEVEL` names; results go to stdout, so that they can be piped.

Loggers are the standard library's, under the name `dseek`. Where the program that uses dseek has set up logging of its
own, its handlers get the records and ours keeps quiet.
"""

from __future__ import annotations

import logging
import sys

from dseek.core import environment

_ROOT_NAME = "dseek"


class _StderrHandler(logging.Handler):
    """Writes to whatever `sys.stderr` is at that moment, unless the root logger has handlers."""

    def emit(self, record: logging.LogRecord) -> None:
        if logging.getLogger().handlers:
            return
        try:
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()
        except (OSError, ValueError, TypeError):
            self.handleError(record)


def get_logger(name: str) -> logging.Logger:
    """Return the logger of a module, having set up logging on the first call.

    Args:
        name: the module's `__name__`; names outside `dseek` are put under it.

    Raises:
        ConfigError: `DSEEK_LOG_LEVEL` has a bad value.
    """
    _configure_once()
    if name != _ROOT_NAME and not name.startswith(_ROOT_NAME + "."):
        name = f"{_ROOT_NAME}.{name}"
    return logging.getLogger(name)


def _configure_once() -> None:
    root = logging.getLogger(_ROOT_NAME)
    if any(isinstance(handler, _StderrHandler) for handler in root.handlers):
        return
    level = environment.get("DSEEK_LOG_LEVEL")
    handler = _StderrHandler()
    handler.setFormatter(logging.Formatter("%(name)s: %(levelname)s: %(message)s"))
    root.addHandler(handler)
    root.setLevel(level.upper())
    for name, near in environment.unknown_variables():
        hint = f" (did you mean {near}?)" if near else ""
        root.warning("environment variable %s is unknown and has no effect%s", name, hint)
