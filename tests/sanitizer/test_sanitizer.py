"""`make sanitize`: the kernels under AddressSanitizer and UndefinedBehaviorSanitizer.

Every test is a process of its own with the sanitized build loaded. A finding, an exception or a result that is wrong
ends that process with another status than 0, and its report is the failure.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models import gguf_building, tiny
from tests.sanitizer.process import run

pytestmark = pytest.mark.sanitizer

NUM_CALLS = 4000
NUM_MUTATIONS = 1500
"""Of each model; there are two of either format."""


def check(module: str, *arguments: str) -> None:
    """Run a module of this folder and ask that nothing was found."""
    finished = run(f"tests.sanitizer.{module}", *arguments)
    assert finished.returncode == 0, f"{arguments}\n" + finished.stdout[-2000:] + finished.stderr[-8000:]


def test_a_step_past_the_end_is_found() -> None:
    """The sanitizer is loaded, and knows where the memory of a result ends, before and behind."""
    for step in ("inside", "before", "behind"):
        finished = run("tests.sanitizer.overstep", step)
        if step == "inside":
            assert finished.returncode == 0, finished.stderr[-8000:]
        else:
            assert finished.returncode == 99
            assert "use-after-poison" in finished.stderr


def test_kernels() -> None:
    listed = run("tests.sanitizer.kernels", "--list")
    assert "generic" in listed.stdout.split(), listed.stderr
    for variant in listed.stdout.split():
        check("kernels", variant)


def test_ranks_over_shared_memory() -> None:
    check("transport")


@pytest.mark.parametrize("seed", range(2))
def test_hostile_calls(seed: int) -> None:
    check("calls", str(seed), str(NUM_CALLS))


@pytest.mark.parametrize("encoding", ["Q4_1", "Q8_0"])
def test_damaged_gguf(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "m.gguf"
    gguf_building.write_model(path, encoding=encoding)
    check("files", "gguf", str(path), str(NUM_MUTATIONS))


@pytest.mark.parametrize("kind", ["safetensors", "json"])
def test_damaged_safetensors(tmp_path: Path, kind: str) -> None:
    folder = tiny.save("llama-16-mqa-tied", tmp_path / "m", dtype="bfloat16")
    check("files", kind, str(folder), str(NUM_MUTATIONS))
