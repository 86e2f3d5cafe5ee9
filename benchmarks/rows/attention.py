"""Dense causal attention beside PyTorch's, on the same arrays in one process, in turn."""

from __future__ import annotations

import statistics

from benchmarks import limits
from benchmarks.contest import alternate, spread_of
from benchmarks.errors import IncorrectError
from benchmarks.result import Outcome
from benchmarks.rows import Settings

NUM_HEADS, HEAD_DIM = 8, 64

MAX_DIFFERENCE = 0.03
"""Largest absolute difference of results of size 1 and below, in bf16."""

MIN_COSINE = 0.9995
"""Least cosine of the two results as vectors."""


def attention_dense_16k(settings: Settings) -> Outcome:
    """16,384 tokens, 8 heads of 64, bf16; counted on the causal half."""
    num_tokens = settings.pick(16384, 512)
    with limits.Limits(threads=settings.threads, smoke=settings.smoke) as rates:

        def measure(_: int) -> dict[str, float]:
            rates.measure("bf16")
            return rates.process.call("attention", num_tokens=num_tokens, num_heads=NUM_HEADS, head_dim=HEAD_DIM)

        answers = alternate({"both": measure}, rounds=settings.rounds)["both"]
        rate = rates.rate("bf16")
        details = {
            "own_s": spread_of(answers, "own_s"),
            "torch_s": spread_of(answers, "torch_s"),
            "difference": answers[0]["difference"],
            "cosine": answers[0]["cosine"],
            "limits": rates.summary(),
        }
    for answer in answers:
        if not (answer["difference"] <= MAX_DIFFERENCE and answer["cosine"] >= MIN_COSINE):
            raise IncorrectError(
                f"attention differs from PyTorch's by {answer['error']:.4f}, cosine {answer['cosine']:.6f}; right are "
                f"{MAX_DIFFERENCE} and {MIN_COSINE}"
            )
    own_s = statistics.median(answer["own_s"] for answer in answers)
    torch_s = statistics.median(answer["torch_s"] for answer in answers)
    operations = 4.0 * HEAD_DIM * NUM_HEADS * num_tokens * (num_tokens + 1) / 2
    details["own_gflops"] = operations / own_s / 1e9
    return Outcome(
        value=own_s,
        unit="s",
        ratio=torch_s / own_s,
        limit_share=operations / own_s / rate,
        peer="PyTorch scaled_dot_product_attention",
        details=details,
    )
