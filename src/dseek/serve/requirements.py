"""Makes sure that the extra `serve` is installed, and says how to install it where it is not.

Kept apart from everything that imports FastAPI, so that the message can be given at all.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from dseek.core.errors import ConfigError

SERVER = ("fastapi", "uvicorn", "pydantic", "prometheus_client")
"""What the server needs."""

ROUTER = ("httpx", "uvicorn", "prometheus_client")
"""What the router over several replicas needs."""

RAY = ("ray", "watchfiles", "opencensus")
"""What replicas on Ray need: Ray, and what only its extra `serve` brings."""

GRAMMAR = ("llguidance",)
"""What answers bound to a grammar need."""


def require(modules: Sequence[str] = SERVER, *, purpose: str = "dseek serve", extra: str = "serve") -> None:
    """Refuse to go on where a part of an extra is missing.

    Args:
        modules: names to look for; none is imported.
        purpose: what needs them, for the message.
        extra: the extra that brings them.

    Raises:
        ConfigError: one is not installed; names the pip command.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"{purpose} needs {', '.join(missing)}, which this Python does not have",
            needed=f"the extra `{extra}`",
            remedy=f"pip install 'dseek[{extra}]'",
        )
