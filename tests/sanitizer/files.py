"""Damaged weight files: each is refused by its reader, or goes through packing and the kernels for a few tokens.

Run as `python -m tests.sanitizer.files KIND PATH COUNT` by `test_sanitizer.py`. KIND is gguf, safetensors or json (the
meaning of a safetensors header); PATH is a whole model, a file or a folder, and is overwritten.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np

from dseek import plan as planning
from dseek.core.errors import DseekError
from dseek.engine.batch import Batch
from dseek.engine.build import build_runner
from dseek.models.files import ModelFiles, open_model
from dseek.models.gguf_files import GgufFiles
from tests.models.test_fuzz_files import mutate, mutate_json
from tests.plan.machines import machine
from tests.sanitizer.process import load

PRECISIONS = ("fp32", "bf16", "fp16", "int8", "int4")
CONTEXT_TOKENS = 32
BODY_SHARE = 0.3
"""Share of the mutations that damage the weights rather than what describes them."""


def run(files: ModelFiles, number: int) -> None:
    """Pack a model and compute the logits of five tokens, then of one more."""
    plan = planning.make(
        files.shape,
        machine(),
        planning.Objective(context_tokens=min(CONTEXT_TOKENS, files.shape.max_position_embeddings), batch=1),
        encodings=files.encodings(),
        precision=PRECISIONS[number % len(PRECISIONS)],
        num_threads=2,
    )
    runner = build_runner(files, plan)
    try:
        last = files.shape.vocab_size - 1
        for start, num_rows in ((0, 5), (5, 1)):
            rows = np.arange(num_rows, dtype=np.int32)
            batch = Batch(np.minimum(rows, last), rows + start, np.int32([0, num_rows]), np.int32([[0]]), rows[-1:])
            assert runner.forward(batch).shape == (1, files.shape.vocab_size)
    finally:
        runner.close()


def main(kind: str, path: Path, count: int) -> None:
    """Damage the model `count` times; print how many ran all the same."""
    load()
    np.seterr(all="ignore")  # weights may be any number
    target = path if kind == "gguf" else path / "model.safetensors"
    whole = target.read_bytes()
    if kind == "gguf":
        header_bytes = min(tensor.offset for tensor in GgufFiles("m", path)._parts[0].tensors.values())
    else:
        header_bytes = 8 + int.from_bytes(whole[:8], "little")

    def damaged(rng: random.Random) -> bytes:
        if kind == "json":
            return mutate_json(whole, rng)
        return mutate(whole, rng, len(whole) if rng.random() < BODY_SHARE else header_bytes)

    num_run = refused = 0
    for number in range(count):
        target.write_bytes(damaged(random.Random(number)))
        try:
            with open_model(str(path)) as files:
                run(files, number)
            num_run += 1
        except DseekError:
            refused += 1
        except Exception as error:
            error.add_note(f"mutation {number}")
            raise
    print(num_run, refused)
    assert num_run > 0.02 * count and refused > 0.2 * count, "mutations should reach both ends"


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
