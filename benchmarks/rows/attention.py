"""Attention, dense and dynamic, beside PyTorch's dense one, on the same arrays in one process, in turn."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks import limits
from benchmarks.contest import alternate, spread_of
from benchmarks.errors import IncorrectError
from benchmarks.result import Outcome
from benchmarks.rows import Settings
from benchmarks.rows.pattern import TOP_BLOCKS, WINDOW_TOKENS
from dseek.core.attention_pattern import BLOCK_TOKENS

NUM_HEADS, HEAD_DIM = 8, 64

MAX_DIFFERENCE = 0.03
"""Largest absolute difference of results of size 1 and below, in bf16."""

MIN_COSINE = 0.9995
"""Least cosine of the two results as vectors."""


def attention_dense_16k(settings: Settings) -> Outcome:
    """16,384 tokens, 8 heads of 64, bf16; counted on the causal half."""
    num_tokens = settings.pick(16384, 512)
    with limits.Limits(threads=settings.threads, smoke=settings.smoke) as rates:

        def measure(_: int) -> dict[str, Any]:
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
    _check(answers)
    own_s = statistics.median(answer["own_s"] for answer in answers)
    torch_s = statistics.median(answer["torch_s"] for answer in answers)
    operations = 4.0 * HEAD_DIM * NUM_HEADS * num_tokens * (num_tokens + 1) / 2
    details["own_gflops"] = operations / own_s / 1e9
    return Outcome(
        value=own_s,
        unit="s",
        ratio=torch_s / own_s,
        limit_share=operations / own_s / rate,
        peer=_peer(answers),
        details=details,
    )


NEAR_BLOCKS = WINDOW_TOKENS // BLOCK_TOKENS

MAX_GROWTH = 4.6
"""Of attention time from 16,384 to 65,536 tokens: n log n predicts 4.57 at these lengths."""


def attention_sparse_16k(settings: Settings) -> Outcome:
    """The same arrays with a window of 256 tokens and nine blocks selected; means of cells and selection included."""
    num_tokens = settings.pick(16384, 1024)
    with limits.Limits(threads=settings.threads, smoke=settings.smoke) as rates:

        def measure(_: int) -> dict[str, Any]:
            return rates.process.call(
                "sparse_attention", num_tokens=num_tokens, near_blocks=NEAR_BLOCKS, top_blocks=TOP_BLOCKS
            )

        answers = alternate({"both": measure}, rounds=settings.rounds)["both"]
    _check(answers)
    own_s, torch_s = (statistics.median(answer[key] for answer in answers) for key in ("own_s", "torch_s"))
    return Outcome(
        value=own_s,
        unit="s",
        ratio=torch_s / own_s,
        limit_share=None,
        peer=_peer(answers),
        details={
            "own_s": spread_of(answers, "own_s"),
            "torch_s": spread_of(answers, "torch_s"),
            "skipped": answers[0]["skipped"],
            "parts": answers[-1]["parts"],
            "difference": answers[0]["difference"],
            "cosine": answers[0]["cosine"],
        },
    )


def growth_64k(settings: Settings) -> Outcome:
    """How much longer dynamic attention takes for four times the tokens; the ratio is the bar over that."""
    short, long = settings.pick(16384, 512), settings.pick(65536, 2048)
    with limits.Limits(threads=settings.threads, smoke=settings.smoke) as rates:

        def measure(num_tokens: int) -> dict[str, Any]:
            return rates.process.call(
                "sparse_attention",
                num_tokens=num_tokens,
                near_blocks=NEAR_BLOCKS,
                top_blocks=TOP_BLOCKS,
                with_torch=False,
            )

        answers = alternate(
            {"short": lambda _: measure(short), "long": lambda _: measure(long)}, rounds=settings.rounds
        )
    _check(answers["short"] + answers["long"])
    short_s, long_s = (statistics.median(answer["own_s"] for answer in answers[key]) for key in ("short", "long"))
    growth = long_s / short_s
    return Outcome(
        value=growth,
        unit="times",
        ratio=MAX_GROWTH / growth,
        limit_share=None,
        peer="n log n",
        details={
            "short_s": spread_of(answers["short"], "own_s"),
            "long_s": spread_of(answers["long"], "own_s"),
            "skipped": {key: given[0]["skipped"] for key, given in answers.items()},
            "parts": {key: given[-1]["parts"] for key, given in answers.items()},
        },
    )


def _peer(answers: list[dict[str, Any]]) -> str:
    """Name the peer with the dtype it was faster in."""
    return f"PyTorch scaled_dot_product_attention, {answers[0]['torch_dtype'].removeprefix('torch.')}"


def _check(answers: list[dict[str, Any]]) -> None:
    """Raise IncorrectError where a result is too far from what it should be."""
    for answer in answers:
        if not (answer["difference"] <= MAX_DIFFERENCE and answer["cosine"] >= MIN_COSINE):
            raise IncorrectError(
                f"attention is off by {answer['difference']:.4f}, cosine {answer['cosine']:.6f}; right are "
                f"{MAX_DIFFERENCE} and {MIN_COSINE}"
            )
