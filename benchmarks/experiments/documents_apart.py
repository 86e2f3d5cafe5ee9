"""What keeping documents apart costs a block of SmolLM2 in training: under one mask, and group by group.

`python -m benchmarks.experiments.documents_apart [--tokens 512 1024]` prints seconds of processor time of one thread
for a forward and a backward pass of one row, the least of some.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from benchmarks.errors import IncorrectError
from dseek.core.shape import ModelShape
from dseek.models.decoder import Decoder
from dseek.ops.attention.apart import group_documents
from dseek.ops.attention.reference import visible

SHAPE = ModelShape(
    family="llama",
    vocab_size=64,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=1,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    max_position_embeddings=8192,
)
LENGTHS = (32, 100, 300)
"""Tokens of each document."""


def main() -> None:
    """Print the times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024], help="tokens of the row")
    parser.add_argument("--rounds", type=int, default=5, help="passes of which the quickest counts")
    args = parser.parse_args()
    torch.set_num_threads(1)
    decoder = Decoder(SHAPE).train()
    block = decoder.model.layers[0]
    for num_tokens in args.tokens:
        x = torch.randn(1, num_tokens, SHAPE.hidden_size, requires_grad=True)
        places = torch.arange(num_tokens)
        rotation = decoder.model.rotary_emb(places, torch.float32)

        def run(mask: object, x: torch.Tensor = x, rotation: object = rotation) -> torch.Tensor:
            out: torch.Tensor = block(x, rotation, mask, mask is None, None)
            out.sum().backward()  # type: ignore[no-untyped-call]
            return out

        print(f"{num_tokens} tokens, one document: {_least(lambda run=run: run(None), args.rounds):.3f} s")  # type: ignore[misc]
        for length in LENGTHS:
            documents = (places // length)[None]
            seen = (documents[:, :, None] == documents[:, None]) & visible(places, places, None)
            whole = torch.zeros(seen.shape).masked_fill_(~seen, float("-inf"))[:, None]
            groups = group_documents(documents, None, torch.float32)
            if not torch.allclose(run(whole), run(groups), rtol=1e-4, atol=1e-5):
                raise IncorrectError("documents see each other")
            masked_s, apart_s = (_least(lambda mask=mask: run(mask), args.rounds) for mask in (whole, groups))  # type: ignore[misc]
            print(f"{num_tokens} tokens, documents of {length}: one mask {masked_s:.3f} s, groups {apart_s:.3f} s")


def _least(call: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds + 1):
        start_s = time.thread_time()
        call()
        times.append(time.thread_time() - start_s)
    return min(times[1:])


if __name__ == "__main__":
    main()
