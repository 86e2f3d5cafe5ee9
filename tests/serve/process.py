"""A server as users start it: `dseek serve`, a process of its own, over a small real model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dseek import plan as planning
from dseek.models.files import open_model
from tests.models import tiny
from tests.plan.machines import machine

CONTEXT_TOKENS = 1024
"""Positions of the small model: room for the description of tools."""


def save_model(folder: Path) -> tuple[Path, Path]:
    """Write a small model, and a plan that runs it on the kernels in one thread; return both paths."""
    model = tiny.save("llama", folder / "tiny")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": CONTEXT_TOKENS}))
    with open_model(str(model)) as files:
        plan = planning.make(
            files.shape,
            machine(with_torch=True),
            planning.Objective(context_tokens=CONTEXT_TOKENS, batch=8),
            encodings=files.encodings(),
            precision="fp32",
            kernels="native",
            num_threads=1,
        )
    plan.save(folder / "plan.json")
    return model, folder / "plan.json"


@dataclass
class Server:
    """A running server."""

    process: subprocess.Popen[str]
    url: str
    log: Path

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait for the end; return the exit status."""
        self.process.send_signal(number)
        return self.process.wait(60)


@contextmanager
def running(model: Path, plan: Path, log: Path, arguments: Sequence[str] = ()) -> Iterator[Server]:
    """Start a server on a free port and stop it at the end."""
    command = [sys.executable, "-m", "dseek.cli.main", "serve", str(model), "--plan", str(plan), "--port", "0"]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [*command, "--served-model-name", "tiny", *arguments],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=environment,
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert " is served at " in line, f"{line}{log.read_text()}"
        yield Server(process, line.split(" is served at ")[1].split()[0], log)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
