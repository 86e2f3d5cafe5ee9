"""The side of a peer: serve one engine over JSON lines on stdin and stdout. Standard library only.

A worker runs in the peer's own environment, whose packages may be old, new or absent, so nothing is imported here but
the standard library. One request a line, one answer a line; an answer is `{"error": ...}` or the operation's fields.
Whatever the engine prints goes to stderr. Operations (a worker may lack some):

- `load` path, threads, context_tokens, options: make the engine ready.
- `generate` token_ids, num_tokens: greedy, end tokens ignored, nothing reused from earlier prompts; gives `token_ids`,
  `first_token_s` (prompt tokens ready, to the first token known) and `token_s` (steady seconds a token after that).
- `generate_many` prompts, num_tokens: the same for several prompts at once, by the engine's own batching; gives
  `token_ids` of each and `whole_s`, from the prompts' tokens being ready to the last token of all.
- `start` path, threads, context_tokens, prompt, options: load in a process that has done nothing but import the engine,
  and answer a text; gives `first_token_s` counted from before the load, `first_token_at_s` (the same moment on
  `time.monotonic`, which all processes of a Linux system share), and `token_ids` (or `token_id`).
- `nll` token_ids, window: score every token after the first of each window, nothing before the window known; gives
  `losses` in nats and `best`, the likeliest tokens.
- `memory`: `peak_bytes` and `now_bytes` of resident memory.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

Answer = dict[str, Any]


def resident_memory() -> Answer:
    """Resident memory of this process from the kernel's books.

    Returns:
        `peak_bytes` and `now_bytes`.
    """
    fields = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("VmHWM", "VmRSS"):
            fields[name] = int(value.split()[0]) * 1024
    return {"peak_bytes": fields["VmHWM"], "now_bytes": fields["VmRSS"]}


def steady_token_s(token_times_s: list[float]) -> float:
    """Seconds a token between the first and the last of a run of token times; 0 for fewer than two."""
    if len(token_times_s) < 2:
        return 0.0
    return (token_times_s[-1] - token_times_s[0]) / (len(token_times_s) - 1)


class Worker:
    """One engine behind the protocol; subclasses add methods named as the operations."""

    def memory(self) -> Answer:
        """See the module."""
        return resident_memory()


def serve(worker: Worker) -> None:
    """Answer requests until stdin closes.

    Args:
        worker: its public methods are the operations.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        operation: Callable[..., Answer] | None = getattr(worker, request.pop("op"), None)
        try:
            if operation is None:
                raise NotImplementedError("this worker has no such operation")
            started = time.perf_counter()
            answer = operation(**request)
            answer.setdefault("call_s", time.perf_counter() - started)
        except Exception as error:  # the harness gets every failure as an answer, with the trace on stderr
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
