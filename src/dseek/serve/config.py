"""`ServeConfig`: what a server allows, and where it listens. Plain data that the command line fills."""

from __future__ import annotations

from dataclasses import dataclass

from dseek.core.errors import ConfigError

LOOPBACK_HOSTS = frozenset({"127.0.0.1", "::1", "localhost"})
"""Addresses that only this machine reaches."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """A server's settings; checked when they are made."""

    model_names: tuple[str, ...]
    """Names that requests may use for the model; the first one is shown."""
    host: str = "127.0.0.1"
    """Address to listen on; the default is reached from this machine only."""
    port: int = 8000
    """Port; 0 takes a free one."""
    uds: str | None = None
    """Path of a Unix socket to listen on instead."""
    allowed_hosts: tuple[str, ...] = ()
    """Names that the Host header may carry; empty allows any, except on a loopback address, where only loopback names
    are, so that no web page can reach the server through a name of its own (DNS rebinding)."""
    max_body_bytes: int = 4 * 2**20
    """Longest request body, counted while it is read."""
    max_prompt_tokens: int | None = None
    """Longest prompt; None takes what the context leaves."""
    max_concurrent: int = 64
    """Requests in work or waiting at a time; more are answered 429 with Retry-After."""
    max_choices: int = 16
    """Largest `n`, and most prompts of one completion request."""
    request_timeout_s: float = 600.0
    """Longest time from a request's first byte to its last token."""
    header_timeout_s: float = 10.0
    """Longest time a connection may take for a request's line and headers."""
    body_timeout_s: float = 30.0
    """Longest time for a request's body."""
    keep_alive_s: float = 15.0
    """Idle time after which a connection is closed."""
    drain_s: float = 30.0
    """Time that running answers get after SIGTERM or Ctrl-C."""
    api_key_hashes: tuple[str, ...] = ()
    """Lines of `--hash-key`; empty lets everybody in."""
    page: bool = True
    """Serve the web page at `/`."""
    tool_parser: str = "hermes"
    """How tool calls are read from an answer: hermes (`<tool_call>{...}</tool_call>`)."""

    def __post_init__(self) -> None:
        if not self.model_names or not all(self.model_names):
            raise ConfigError("the model has no name to be served under", needed="at least one name")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port {self.port}", needed="0 (a free one) to 65535")
        for name in ("max_body_bytes", "max_concurrent", "max_choices"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}", needed="at least 1")
        for name in ("request_timeout_s", "header_timeout_s", "body_timeout_s", "keep_alive_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} is {getattr(self, name)}", needed="a number of seconds above 0")
        if not 0 <= self.drain_s < float("inf"):
            raise ConfigError(f"drain_s is {self.drain_s}", needed="a number of seconds, 0 or more")
        if self.max_prompt_tokens is not None and self.max_prompt_tokens < 1:
            raise ConfigError(f"max_prompt_tokens is {self.max_prompt_tokens}", needed="at least 1")

    @property
    def loopback(self) -> bool:
        """Whether only this machine reaches the server."""
        return self.uds is not None or self.host in LOOPBACK_HOSTS
