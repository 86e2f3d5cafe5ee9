"""A worker that computes nothing: the harness's protocol without an engine."""

from __future__ import annotations

import os
import sys
import time

from benchmarks.peers.worker import Answer, Worker, serve


class FakeWorker(Worker):
    """Answers with what it was asked."""

    def load(self, path: str, threads: int, context_tokens: int, options: dict[str, object] | None = None) -> Answer:
        print("engines print to stdout")
        return {"path": path, "threads": threads, "omp": os.environ["OMP_NUM_THREADS"], "version": "0"}

    def generate(self, token_ids: list[int], num_tokens: int) -> Answer:
        return {"token_ids": token_ids[:1] * num_tokens, "first_token_s": 0.5, "token_s": 0.25}

    def start(self, **request: object) -> Answer:
        return {"first_token_at_s": time.monotonic(), "keeps_bytecode": not sys.dont_write_bytecode}

    def fail(self) -> Answer:
        raise RuntimeError("as asked")

    def die(self) -> Answer:
        os._exit(3)


if __name__ == "__main__":
    serve(FakeWorker())
