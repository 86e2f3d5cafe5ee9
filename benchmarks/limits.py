"""The machine's limits within a run: rates measured beside the engines, and least times that follow from them."""

from __future__ import annotations

import statistics
from types import TracebackType
from typing import Any

from benchmarks.models import BenchModel
from benchmarks.peers.client import PeerProcess


class Limits:
    """Measures rates between an engine's turns; a limit is the median over the run.

    Args:
        threads: threads to measure with.
        smoke: measure as shortly as possible.
    """

    def __init__(self, *, threads: int, smoke: bool) -> None:
        self.smoke = smoke
        self.process = PeerProcess("limits", threads=threads)
        self.samples: dict[str, list[float]] = {}
        try:
            self.variant = self.process.call("setup", threads=threads)["variant"]
            self.process.freeze()
        except BaseException:
            self.process.close()
            raise

    def measure(self, *kinds: str) -> None:
        """Take one sample of each kind: int8 or bf16 (operations a second), read (bytes a second)."""
        for kind in kinds:
            if kind == "read":
                num_bytes, repeats = (1 << 26, 1) if self.smoke else (1 << 30, 3)
                rate = self.process.call("read", num_bytes=num_bytes, repeats=repeats)["bytes_s"]
            else:
                at_least_s = 0.02 if self.smoke else 0.3
                rate = self.process.call("gemm", dtype=kind, at_least_s=at_least_s)["operations_s"]
            self.samples.setdefault(kind, []).append(rate)
        self.process.freeze()

    def rate(self, kind: str) -> float:
        """Median of the samples of a kind."""
        return statistics.median(self.samples[kind])

    def summary(self) -> dict[str, dict[str, float]]:
        """Median and best of every kind, for the details of a result."""
        return {kind: {"median": self.rate(kind), "best": max(rates)} for kind, rates in self.samples.items()}

    def __enter__(self) -> Limits:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.close()


def prefill_limit_s(
    model: BenchModel, num_tokens: int, int8_rate: float, bf16_rate: float, pairs: float | None = None
) -> float:
    """Least time of a prompt: projections at the int8 rate, then attention at the bf16 rate.

    Args:
        model: the model.
        num_tokens: length of the prompt.
        int8_rate: operations a second.
        bf16_rate: operations a second.
        pairs: of a query and a key that attention looks at; None is all, the causal half.

    Returns:
        Seconds.
    """
    linear = model.prefill_linear_operations(num_tokens) / int8_rate
    return linear + model.prefill_attention_operations(num_tokens, pairs) / bf16_rate


def decode_bytes(plan: dict[str, Any], context_tokens: float) -> float:
    """Bytes that one decoded token has to read: the weights of a step and the cache so far.

    Args:
        plan: answer of dseek's worker to `plan` or `load`.
        context_tokens: tokens in the cache.

    Returns:
        Bytes.
    """
    return float(plan["streamed_bytes"] + context_tokens * plan["cache_bytes_per_token"])
