"""What `dseek generate` imports before its first token: start-up time is part of the product."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.models import tiny
from tests.plan.machines import machine

SLOW = (
    "torch", "transformers", "rich", "jinja2", "asyncio", "importlib.metadata", "huggingface_hub", "gguf", "lm_eval",
    "numpy.random", "numpy.testing", "numpy.ma", "multiprocessing", "concurrent.futures", "unittest", "http.client",
    "email", "ssl", "safetensors",
)  # fmt: skip

CODE = """
import sys, types
import numpy as np

class Runner:
    num_pages = 8
    guard = None
    def forward(self, batch): return np.zeros((len(batch.logit_rows), 384), dtype=np.float32)
    def close(self): pass

build = types.ModuleType("dseek.engine.build")
build.build_runner = lambda files, plan: Runner()
sys.modules["dseek.engine.build"] = build
from dseek.cli import measuring
from dseek.cli.main import main
from dseek.hardware.machine import Machine
measuring.load_or_measure = lambda **_: Machine.from_json(open(sys.argv[2]).read())
status = main(["generate", sys.argv[1], "Hi", "--max-tokens", "3"])
print("SLOW", [name for name in {slow!r} if name in sys.modules])
sys.exit(status)
"""


def test_generate_imports_nothing_slow(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "tiny")
    machine().save(tmp_path / "machine.json")
    done = subprocess.run(
        [sys.executable, "-c", CODE.replace("{slow!r}", repr(SLOW)), str(folder), str(tmp_path / "machine.json")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "SLOW []"
