"""A run whose numbers overflow says in which layer and projection that began; weights that are not finite never run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import dseek
from dseek.core.errors import ConfigError, FileFormatError, NotFiniteError
from dseek.engine import number_trace
from dseek.engine.finite import first_bad_row
from dseek.engine.llm import LLM
from dseek.models.files import open_model
from dseek.ops import native
from tests.engine.test_torch_runner import make_engine
from tests.models import tiny
from tests.plan.machines import machine

PROMPT = tiny.token_ids(20, seed=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("llama"))


def changed(folder: Path, target: Path, change: Callable[[dict[str, np.ndarray]], None]) -> Path:
    """A copy of the model with other weights."""
    shutil.copytree(folder, target)
    for path in target.glob("*.safetensors"):
        tensors = {name: values.copy() for name, values in load_file(path).items()}
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})
    return target


def scale(name: str, factor: float) -> Callable[[dict[str, np.ndarray]], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        if name in tensors:
            tensors[name] *= np.float32(factor)

    return change


def test_one_sum_finds_the_row() -> None:
    logits = np.zeros((4, 9), dtype=np.float32)
    assert first_bad_row(logits) is None and first_bad_row(logits[:0]) is None
    assert first_bad_row(np.full((2, 9), 3e38, dtype=np.float32)) is None  # only the sum overflows
    for value in (np.nan, np.inf, -np.inf):
        logits[:] = 0
        logits[2, 8], logits[3] = value, -value
        assert first_bad_row(logits) == 2


@pytest.mark.native
@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.1.mlp.down_proj", "layer 1, mlp.down_proj gives"),
        ("model.layers.0.mlp.up_proj", "layer 0, mlp.up_proj gives"),
        ("model.layers.1.self_attn.v_proj", "layer 1, self_attn.v_proj gives"),
        ("lm_head", "first, lm_head gives"),
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_native_engine_names_where_it_began(
    folder: Path, tmp_path: Path, name: str, place: str, precision: str
) -> None:
    broken = changed(folder, tmp_path / "broken", scale(name + ".weight", 2e38))
    with dseek.load(str(broken), machine=machine(), precision=precision, context=64) as llm:
        with pytest.raises(NotFiniteError, match="logits after token 19 are not finite") as caught:
            llm.generate([PROMPT], max_new_tokens=4, temperature=0.0)
        assert place in str(caught.value) and "from inputs of at most" in str(caught.value)
        # Other requests go on as before.
        with pytest.raises(NotFiniteError, match="logits after token 0 are"):
            llm.logits(PROMPT)
        assert not llm.engine.has_work


def test_the_torch_engine_names_where_it_began(folder: Path, tmp_path: Path) -> None:
    broken = changed(folder, tmp_path / "broken", scale("model.layers.1.mlp.gate_proj.weight", 5e4))
    with open_model(str(broken)) as files:
        engine = make_engine(files, precision="fp16", kernels="torch")
        with (
            LLM(files, engine.plan, engine.runner) as llm,
            pytest.raises(NotFiniteError, match=r"layer 1, mlp\.gate_proj gives -?inf at token"),
        ):
            llm.generate([PROMPT], max_new_tokens=2, temperature=0.0)
    with open_model(str(folder)) as files:
        engine = make_engine(files, precision="fp16", kernels="torch")
        assert number_trace.first_not_finite(files, engine.plan, PROMPT) is None


def test_a_failing_search_does_not_hide_the_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(number_trace, "first_not_finite", fail)
    with open_model(str(folder)) as files:
        engine = make_engine(files)
        monkeypatch.setattr(
            engine.runner, "forward", lambda batch: np.full((len(batch.logit_rows), 384), np.nan, dtype=np.float32)
        )
        with pytest.raises(NotFiniteError, match=r"could not be found \(MemoryError: no room\)"):
            list(engine.logits(PROMPT))
        monkeypatch.setattr(number_trace, "first_not_finite", lambda *_: None)
        with pytest.raises(NotFiniteError, match="the reference stays finite"):
            list(engine.logits(PROMPT))


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight"])
def test_weights_that_are_not_finite_are_refused_by_name(folder: Path, tmp_path: Path, name: str) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        if name in tensors:
            tensors[name].reshape(-1)[9] = np.nan

    broken = changed(folder, tmp_path / "broken", change)
    message = rf"tensor {name} holds nan at \[(0, )?9\]"
    if native.module() is not None:
        with pytest.raises(FileFormatError, match=message):
            dseek.load(str(broken), machine=machine(), precision="int8", context=64)
    with open_model(str(broken)) as files, pytest.raises(FileFormatError, match=message):
        make_engine(files)


def test_weights_that_a_dtype_cannot_hold_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    broken = changed(folder, tmp_path / "broken", scale("model.layers.0.self_attn.q_proj.weight", 1e6))
    with open_model(str(broken)) as files:
        with pytest.raises(ConfigError, match=r"q_proj\.weight holds .* torch\.float16 cannot hold"):
            make_engine(files, precision="fp16")
        make_engine(files, precision="bf16")
