"""The models of the rows, in the form each engine reads; prepared on first use and kept in dseek's cache.

All forms of one model come from the same weights: SmolLM2-135M-Instruct from its GGUF file, the others from a seed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.errors import BenchmarkError
from benchmarks.paths import REPOSITORY, work_dir
from benchmarks.peers.environments import interpreter

PREPARE_DIR = Path(__file__).resolve().parent / "prepare"


@dataclass(frozen=True, slots=True)
class BenchModel:
    """A model that rows run."""

    name: str
    """Folder name in the cache and name in messages."""
    sizes: dict[str, Any]
    """Fields of its `config.json` that say how large it is."""
    alias: str | None = None
    """dseek's alias for a model that is pulled; None for random weights."""
    seed: int = 1
    """Seed of random weights."""

    @property
    def num_block_weights(self) -> int:
        """Weights of all projections of all blocks."""
        width, inner = self.sizes["hidden_size"], self.sizes["intermediate_size"]
        kv_width = width * self.sizes["num_key_value_heads"] // self.sizes["num_attention_heads"]
        return int(self.sizes["num_hidden_layers"] * (2 * width * width + 2 * width * kv_width + 3 * width * inner))

    @property
    def num_head_weights(self) -> int:
        """Weights of the output head."""
        return int(self.sizes["vocab_size"] * self.sizes["hidden_size"])

    @property
    def kv_values_per_token(self) -> int:
        """Keys and values that one token leaves in the cache."""
        kv_width = self.sizes["hidden_size"] * self.sizes["num_key_value_heads"] // self.sizes["num_attention_heads"]
        return int(2 * self.sizes["num_hidden_layers"] * kv_width)

    def prefill_linear_operations(self, num_tokens: int) -> float:
        """Operations (multiply and add counted apart) of the projections of a prompt, with the head for one row."""
        return 2.0 * (self.num_block_weights * num_tokens + self.num_head_weights)

    def prefill_attention_operations(self, num_tokens: int, pairs: float | None = None) -> float:
        """Operations of attention over a prompt: of so many pairs of query and key, or of the causal half."""
        pairs = num_tokens * (num_tokens + 1) / 2 if pairs is None else pairs
        return 4.0 * pairs * int(self.sizes["hidden_size"]) * int(self.sizes["num_hidden_layers"])


SMOLLM2 = BenchModel(
    name="smollm2-135m",
    alias="smollm2",
    sizes={
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
)
LLAMA_1B = BenchModel(
    name="llama-1.1b-random",
    sizes={
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
)
LLAMA_TINY = BenchModel(
    name="llama-tiny-random",
    sizes={
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 32000,
    },
)
"""Stands for the 1.1B model where a run only has to show that everything works."""


def own_path(model: BenchModel) -> str:
    """What dseek is asked to load: the alias's file, or the folder with random weights."""
    return str(gguf_file(model)) if model.alias else str(hf_folder(model))


def gguf_file(model: BenchModel, kind: str | None = None) -> Path:
    """The model's GGUF file, pulled if need be, or its requantised copy.

    Args:
        model: a model that has an alias.
        kind: Q8_0 or Q4_0 for llama.cpp's requantised copy; None for the original.

    Returns:
        Path of the file.
    """
    if model.alias is None:
        raise BenchmarkError(f"{model.name} has no GGUF file")
    if kind is None:
        return _pull(model.alias)
    source = gguf_file(model)

    def requantise(target: Path) -> None:
        script = PREPARE_DIR / "requantise_gguf.py"
        _run([str(interpreter("llamacpp")), str(script), str(source), str(target / "model.gguf"), kind], target)

    return _made(model, f"gguf-{kind}", requantise) / "model.gguf"


def hf_folder(model: BenchModel) -> Path:
    """The model as a Hugging Face folder: widened to fp32 from its GGUF file, or random weights in bf16."""
    if model.alias is not None:
        source = gguf_file(model)

        def make(target: Path) -> None:
            _run([sys.executable, str(PREPARE_DIR / "widen_gguf.py"), str(source), str(target)], target)
    else:

        def make(target: Path) -> None:
            script = PREPARE_DIR / "random_llama.py"
            _run([sys.executable, str(script), str(target), json.dumps(model.sizes), str(model.seed)], target)

    return _made(model, "hf", make)


def off_grid_folder(model: BenchModel, seed: int, spread: float) -> Path:
    """A model that computes the same as the Hugging Face folder's from weights that no 4-bit grid holds.

    Args:
        model: the model.
        seed: of the factors (see `prepare/move_off_grid.py`).
        spread: largest factor.

    Returns:
        The folder.
    """
    source = hf_folder(model)

    def move(target: Path) -> None:
        script = PREPARE_DIR / "move_off_grid.py"
        _run([sys.executable, str(script), str(source), str(target), str(seed), str(spread)], target)

    return _made(model, f"hf-off-grid-{seed}-{spread:g}", move)


def quantised_folder(
    model: BenchModel, source: Path, form: str, options: Sequence[str], texts: Sequence[Sequence[Path]]
) -> Path:
    """A model as `dseek quantize` writes it.

    Args:
        model: the model.
        source: what is quantised: its GGUF file, or a folder.
        form: name of the result in the cache; different options or texts need different names.
        options: of `dseek quantize`, without the texts.
        texts: lists of files to calibrate with.

    Returns:
        The folder.
    """

    def quantise(target: Path) -> None:
        lists = [argument for paths in texts for argument in ("--text", *map(str, paths))]
        command = [sys.executable, "-m", "dseek.cli.main", "quantize", str(source), *options, *lists]
        _run([*command, "--out", str(target / "model")], target)

    return _made(model, form, quantise) / "model"


def openvino_folder(model: BenchModel) -> Path:
    """The model as OpenVINO's authors export it: int8 weights (asymmetric, per channel), with its tokenizer."""
    source = hf_folder(model)

    def export(target: Path) -> None:
        tool = interpreter("openvino").parent / "optimum-cli"
        arguments = ["--model", str(source), "--task", "text-generation-with-past", "--weight-format", "int8"]
        _run([str(tool), "export", "openvino", *arguments, str(target)], target)

    return _made(model, "openvino-int8", export)


def openvino_int4_folder(model: BenchModel, source: Path, form: str) -> Path:
    """A Hugging Face folder as OpenVINO's authors export it with int4 weights in groups of 32, all blocks of it.

    Args:
        model: the model.
        source: the folder.
        form: name of the result in the cache.

    Returns:
        The folder.
    """

    def export(target: Path) -> None:
        tool = interpreter("openvino").parent / "optimum-cli"
        arguments = ["--model", str(source), "--task", "text-generation-with-past", "--weight-format", "int4"]
        arguments += ["--group-size", "32", "--ratio", "1.0"]
        _run([str(tool), "export", "openvino", *arguments, str(target)], target)

    return _made(model, form, export)


def llamacpp_file(model: BenchModel, source: Path, kind: str, form: str) -> Path:
    """A Hugging Face folder as llama.cpp's own quantiser rounds it, from float32.

    Args:
        model: the model.
        source: the folder.
        kind: such as Q4_K_M.
        form: name of the result in the cache.

    Returns:
        The file.
    """

    def quantise(target: Path) -> None:
        wide = target / "wide.gguf"
        command = [sys.executable, "-m", "dseek.cli.main", "export", str(source), "--dtype", "float32"]
        _run([*command, "--out", str(wide)], target)
        script = PREPARE_DIR / "requantise_gguf.py"
        _run([str(interpreter("llamacpp")), str(script), str(wide), str(target / "model.gguf"), kind], target)
        wide.unlink()

    return _made(model, form, quantise) / "model.gguf"


def w8a8_folder(model: BenchModel) -> Path:
    """The model in the `compressed-tensors` W8A8 layout for vLLM."""
    source = hf_folder(model)

    def write(target: Path) -> None:
        _run([sys.executable, str(PREPARE_DIR / "write_w8a8.py"), str(source), str(target)], target)

    return _made(model, "w8a8", write)


def _made(model: BenchModel, form: str, make: Callable[[Path], None]) -> Path:
    """The folder of one form of a model, made under another name first so that a broken try is not taken for done."""
    folder = work_dir() / "models" / model.name / form
    if not folder.is_dir():
        unfinished = folder.with_name(folder.name + ".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        print(f"benchmarks: preparing {model.name} as {form}", file=sys.stderr)
        make(unfinished)
        (unfinished / "prepare.log").unlink(missing_ok=True)
        unfinished.rename(folder)
    return folder


def _run(command: list[str], target: Path) -> None:
    """Run one preparation; what it prints is kept only if it fails."""
    log_path = target / "prepare.log"
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY)}
    with log_path.open("w") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=variables, check=False)
    if done.returncode != 0:
        last = "\n".join(log_path.read_text(errors="replace").splitlines()[-8:])
        raise BenchmarkError(f"{' '.join(command[:3])} failed; {log_path} ends with:\n{last}")


def _pull(alias: str) -> Path:
    """Bring an embedded model to dseek's cache, as `dseek pull` does."""
    from dseek.models.locate import locate

    return locate(alias, lambda text: print(f"benchmarks: {text}", file=sys.stderr))
