"""Training speed of dynamic attention: forward and backward beside PyTorch's dense attention, in turn."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.contest import alternate, spread_of
from benchmarks.errors import IncorrectError
from benchmarks.peers.client import PeerProcess
from benchmarks.result import Outcome
from benchmarks.rows import Settings
from benchmarks.rows.pattern import FIELDS

NUM_HEADS, HEAD_DIM = 8, 64

FORWARD_BAR, BACKWARD_BAR = 2.5, 1.7
"""Times that each direction is to be faster than PyTorch's."""

CHECKED_TOKENS = 2048
"""Length at which gradients are compared: selection leaves out about half of the blocks."""

MAX_DIFFERENCE = 0.02
"""Largest difference of an output or gradient in bf16, as a share of the largest right value."""

MIN_COSINE = 0.9999
"""Least cosine of an output or gradient and what it should be, as vectors."""


def train_attention(settings: Settings) -> Outcome:
    """16,384 tokens, 8 heads of 64 with keys of their own, bf16; selection counts as forward.

    The ratio is the smaller one of the two directions' ratios over their bars, so that 1 meets both; the value is the
    time of a whole step, forward and backward.
    """
    num_tokens = settings.pick(16384, 1024)
    with PeerProcess("training", threads=settings.threads) as worker:
        worker.call("setup", threads=settings.threads)
        checks = [
            worker.call(
                "check",
                num_tokens=settings.pick(CHECKED_TOKENS, CHECKED_TOKENS // 2),
                num_heads=NUM_HEADS,
                num_groups=num_groups,
                head_dim=HEAD_DIM,
                pattern=FIELDS,
            )
            for num_groups in (NUM_HEADS, 2)
        ]
        _check(checks)

        def measure(_: int) -> dict[str, float]:
            return worker.call("train", num_tokens=num_tokens, num_heads=NUM_HEADS, head_dim=HEAD_DIM, pattern=FIELDS)

        answers = alternate({"both": measure}, rounds=settings.rounds)["both"]
    seconds = {
        f"{who}_{direction}_s": statistics.median(answer[f"{who}_{direction}_s"] for answer in answers)
        for who in ("own", "torch")
        for direction in ("forward", "backward")
    }
    forward = seconds["torch_forward_s"] / seconds["own_forward_s"]
    backward = seconds["torch_backward_s"] / seconds["own_backward_s"]
    return Outcome(
        value=seconds["own_forward_s"] + seconds["own_backward_s"],
        unit="s",
        ratio=min(forward / FORWARD_BAR, backward / BACKWARD_BAR),
        limit_share=None,
        peer=f"PyTorch scaled_dot_product_attention, {answers[0]['torch_dtype'].removeprefix('torch.')}",
        details={
            "tokens": num_tokens,
            "forward_ratio": forward,
            "backward_ratio": backward,
            "bars": {"forward": FORWARD_BAR, "backward": BACKWARD_BAR},
            **{key: spread_of(answers, key) for key in seconds},
            "check": checks,
        },
    )


def _check(checks: list[dict[str, Any]]) -> None:
    """Raise IncorrectError where an output or gradient is too far from the definition's."""
    for check in checks:
        for name, difference in check["difference"].items():
            cosine = check["cosine"][name]
            if not (difference <= MAX_DIFFERENCE and cosine >= MIN_COSINE):
                what = name if name == "output" else f"the gradient of {name}"
                raise IncorrectError(
                    f"{what} is off by {difference:.4f} of its largest value, cosine {cosine:.6f}; right are "
                    f"{MAX_DIFFERENCE} and {MIN_COSINE}"
                )
