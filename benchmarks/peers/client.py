"""The harness's side of a peer: start its worker, talk JSON lines, and freeze it while another engine is timed.

Idle engines are not always idle (thread pools spin), so a worker that is not being asked is stopped with SIGSTOP and
continued for its turn: nothing but the engine whose turn it is runs on the processor.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.errors import BenchmarkError
from benchmarks.paths import REPOSITORY, work_dir
from benchmarks.peers import environments

WORKERS = {
    "dseek": "benchmarks.peers.dseek_worker",
    "llamacpp": "benchmarks.peers.llamacpp_worker",
    "openvino": "benchmarks.peers.openvino_worker",
    "transformers": "benchmarks.peers.transformers_worker",
    "vllm": "benchmarks.peers.vllm_worker",
    "limits": "benchmarks.peers.limits_worker",
    "training": "benchmarks.peers.training_worker",
    "shards": "benchmarks.peers.shards_worker",
    "finetune": "benchmarks.peers.finetune_worker",
}
"""Module that serves each engine."""

OWN = ("dseek", "transformers", "limits", "training", "shards", "finetune")
"""Workers that run in the project's own environment."""

VARIABLES = {
    "vllm": {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "0-1",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    },
}
"""Environment variables of a worker, beside the common ones."""


class PeerProcess:
    """A running worker.

    Args:
        name: a key of `WORKERS`.
        threads: threads the engine may use.
        timeout_s: longest wait for one answer.

    Raises:
        BenchmarkError: from the constructor where the environment cannot be made, from calls where the worker fails.
    """

    def __init__(self, name: str, *, threads: int = 2, timeout_s: float = 1800.0) -> None:
        self.name = name
        self.threads = threads
        self.timeout_s = timeout_s
        self.log_path = work_dir() / "logs" / f"{name}.log"
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        python = environments.interpreter("dseek" if name in OWN else name)
        with self.log_path.open("a") as log:
            self.started_s = time.monotonic()
            """Just before the worker's process was made, on the clock of the workers' `..._at_s` figures."""
            self._process = subprocess.Popen(
                [str(python), "-m", WORKERS[name]],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=_variables(name, threads),
                cwd=work_dir(),
                start_new_session=True,
            )
        self._frozen = False

    def call(self, operation: str, **arguments: Any) -> dict[str, Any]:
        """Ask for one operation (see `worker`) and wait for its answer.

        Args:
            operation: name of the operation.
            **arguments: its arguments, as JSON can say them.

        Returns:
            The answer's fields.
        """
        self.resume()
        assert self._process.stdin is not None
        request = json.dumps({"op": operation, **arguments}) + "\n"
        try:
            self._process.stdin.write(request.encode())
            self._process.stdin.flush()
            line = self._read_line()
        except BrokenPipeError:
            line = b""
        if not line:
            self._process.wait()
            raise BenchmarkError(f"{self.name} ended during {operation}; its log is {self.log_path}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise BenchmarkError(f"{self.name}, {operation}: {answer['error']} (log: {self.log_path})")
        return answer

    def freeze(self) -> None:
        """Stop every thread of the worker until the next call."""
        if not self._frozen and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGSTOP)
            self._frozen = True

    def resume(self) -> None:
        """Let the worker run again."""
        if self._frozen:
            os.killpg(self._process.pid, signal.SIGCONT)
            self._frozen = False

    def close(self) -> None:
        """End the worker and everything it started. May be called twice."""
        self.resume()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read_line(self) -> bytes:
        """Read one answer, waiting no longer than `timeout_s` for each piece of it."""
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        pieces: list[bytes] = []
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, selectors.EVENT_READ)
            while not (pieces and pieces[-1].endswith(b"\n")):
                if not selector.select(self.timeout_s):
                    os.killpg(self._process.pid, signal.SIGKILL)
                    raise BenchmarkError(f"{self.name} did not answer within {self.timeout_s:.0f} s")
                piece = os.read(descriptor, 1 << 20)
                if not piece:
                    return b""
                pieces.append(piece)
        return b"".join(pieces)


def _variables(name: str, threads: int) -> dict[str, str]:
    """Environment of a worker: threads limited everywhere, no hub, and the harness found from any interpreter.

    Python keeps its bytecode, as in any installation: compiling one engine's sources anew in every process, and
    another's (installed by pip, which compiles them) not, would measure neither.
    """
    dropped = (environments.PEERS_DIR_VARIABLE, "PYTHONDONTWRITEBYTECODE")
    variables = {key: value for key, value in os.environ.items() if key not in dropped}
    for limit in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        variables[limit] = str(threads)
    variables.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1")
    variables.update(VARIABLES.get(name, {}))
    if name == "vllm":
        variables["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{threads - 1}"
    paths = [REPOSITORY, REPOSITORY / "src"] if name in OWN else [REPOSITORY]
    existing = [Path(part) for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part and name in OWN]
    variables["PYTHONPATH"] = os.pathsep.join(str(path) for path in dict.fromkeys([*existing, *paths]))
    return variables
