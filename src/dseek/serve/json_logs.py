"""Structured logs: one JSON object a line on stderr, with the id of the request that a line belongs to.

The id travels in a context variable, so that whatever logs on behalf of a request carries it. Prompts and answers are
never logged.
"""

from __future__ import annotations

import contextvars
import json
import logging
import re
import secrets
import time
from typing import Any

from dseek.core.logs import get_logger

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("dseek_request_id", default="")
"""Id of the request that is being answered; empty outside of one."""

_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def clean_request_id(given: str | None) -> str:
    """Take a client's id where it is harmless, else make one.

    Args:
        given: value of X-Request-Id, or None.

    Returns:
        The id: letters, digits and `._:-`, at most 128 of them, so that no line of a log can be forged with it.
    """
    if given is not None and _ID.fullmatch(given):
        return given
    return secrets.token_hex(16)


class JsonFormatter(logging.Formatter):
    """Writes a record as one line of JSON: time, level, logger, message, request id, and what `extra` holds."""

    def format(self, record: logging.LogRecord) -> str:
        """Format one record.

        Args:
            record: the record; its attribute `fields` (a dict) joins the object.
        """
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if current := request_id.get():
            line["request_id"] = current
        line.update(getattr(record, "fields", {}))
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure(*, requests: bool) -> None:
    """Send the logs of dseek and of uvicorn to stderr as JSON, from the level that `DSEEK_LOG_LEVEL` names on.

    Args:
        requests: log every request, and what becomes of the server, whatever the level.
    """
    root = get_logger("dseek")
    if requests:
        logging.getLogger("dseek.serve").setLevel("INFO")
    for handler in root.handlers:
        handler.setFormatter(JsonFormatter())
    theirs = logging.getLogger("uvicorn")
    theirs.handlers, theirs.propagate = list(root.handlers), False
    theirs.setLevel("WARNING")
