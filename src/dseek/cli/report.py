"""Speeds beside the machine's limit: what the verbs that run a model print about how it went.

A decode step cannot be faster than its weights can be read, a prefill not faster than its products can be computed (or
its weights read, for a short prompt). Both limits are the machine's own measurements. Attention and cache are left out
of the limits, so a long context lowers the share.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dseek.core import environment
from dseek.core.errors import DseekError

if TYPE_CHECKING:
    from dseek.engine.llm import LLM
    from dseek.engine.request import RequestOutput
    from dseek.hardware.machine import Machine
    from dseek.plan.plan import Plan


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What bounds a plan on a machine."""

    bandwidth_gbs: float
    """Measured read bandwidth, 10^9 bytes a second."""
    gflops: float
    """Fastest measured product in the format of most of the plan's weights, 10^9 operations a second."""
    streamed_bytes: int
    """Weights that a step reads."""
    flops_per_token: int
    """Operations of one token in the projections of all blocks."""

    def decode_share(self, tokens_s: float, batch: int = 1) -> float:
        """Express a decode rate as a share of its limit.

        Args:
            tokens_s: new tokens a second, all sequences together.
            batch: sequences decoded together, which share one reading of the weights.

        Returns:
            A fraction; the larger of the shares of bandwidth and of compute.
        """
        return self._share(tokens_s / batch, batch)

    def prefill_share(self, tokens_s: float, prompt_tokens: int) -> float:
        """Express a prefill rate as a share of its limit.

        Args:
            tokens_s: prompt tokens a second.
            prompt_tokens: prompt tokens that were computed together.

        Returns:
            A fraction.
        """
        return self._share(tokens_s / prompt_tokens, prompt_tokens)

    def _share(self, passes_s: float, num_rows: int) -> float:
        """Share of the limit for so many passes a second of so many rows."""
        read_s = self.streamed_bytes / (self.bandwidth_gbs * 1e9)
        compute_s = num_rows * self.flops_per_token / (self.gflops * 1e9)
        return passes_s * max(read_s, compute_s)


def limits(plan: Plan, machine: Machine | None) -> Limits | None:
    """Find what bounds a plan.

    Args:
        plan: what ran.
        machine: what it ran on, or None if that was not measured.

    Returns:
        The limits, or None where the measurements lack what they need.
    """
    if machine is None:
        return None
    sizes = plan.shape.linear_sizes()
    shares: Counter[str] = Counter()
    for formats in plan.layer_formats:
        for role, name in formats.by_role().items():
            shares[name] += sizes[role][0] * sizes[role][1]
    weight_format = shares.most_common(1)[0][0]
    rates = [
        2e-9 * curve.num_outputs * curve.num_inputs * rows / seconds
        for curve in machine.linears
        if curve.kernels == plan.kernels and curve.weight_format == weight_format
        for rows, seconds in zip(curve.num_rows, curve.seconds, strict=True)
    ]
    if not rates or machine.read_bandwidth_gbs <= 0:
        return None
    return Limits(
        bandwidth_gbs=machine.read_bandwidth_gbs,
        gflops=max(rates),
        streamed_bytes=plan.predicted.streamed_bytes,
        flops_per_token=2 * plan.shape.num_layers * plan.shape.num_block_parameters(),
    )


def planned_machine(plan: Plan) -> Machine | None:
    """Return the kept measurements that a plan was made from, without measuring anything.

    Args:
        plan: a plan.

    Returns:
        The machine, or None if its measurements are not kept here.
    """
    from dseek.hardware.machine import Machine

    path = environment.get("DSEEK_CACHE_DIR") / "machines" / f"{plan.machine_id}.json"
    try:
        return Machine.from_json(path.read_text(encoding="utf-8"), where=str(path))
    except (OSError, DseekError):
        return None


def speeds(output: RequestOutput, plan: Plan, machine: Machine | None) -> dict[str, Any]:
    """Collect the speeds of one answer, for `--json`.

    Args:
        output: the answer.
        plan: what ran.
        machine: what it ran on, or None.

    Returns:
        Tokens a second and, where the machine was measured, GB/s and shares of the limit (fractions).
    """
    bounds = limits(plan, machine)
    num_prompt = len(output.prompt_token_ids)
    found: dict[str, Any] = {
        "num_prompt_tokens": num_prompt,
        "num_cached_tokens": output.num_cached_tokens,
        "num_tokens": len(output.token_ids),
        "first_token_s": output.first_token_s,
        "prefill_tokens_s": output.prefill_tokens_s,
        "decode_tokens_s": output.decode_tokens_s,
    }
    if bounds is not None:
        num_computed = num_prompt - output.num_cached_tokens
        found["prefill_limit_share"] = bounds.prefill_share(output.prefill_tokens_s, num_computed)
        found["decode_gbs"] = output.decode_steps_s * bounds.streamed_bytes / 1e9
        found["decode_limit_gbs"] = bounds.bandwidth_gbs
        found["decode_limit_share"] = bounds.decode_share(output.decode_steps_s)
    return found


def speed_line(output: RequestOutput, plan: Plan, machine: Machine | None) -> str:
    """Write the speeds of one answer for people.

    Args:
        output: the answer.
        plan: what ran.
        machine: what it ran on, or None.

    Returns:
        One line.
    """
    found = speeds(output, plan, machine)
    prefill = f"prompt {found['num_prompt_tokens']} tokens in {output.first_token_s * 1e3:,.0f} ms"
    if output.num_cached_tokens:
        prefill += f", {output.num_cached_tokens} of them from the cache"
    prefill += f" ({found['prefill_tokens_s']:,.0f} tokens/s"
    decode = f"answer {found['num_tokens']} tokens"
    if output.decode_s > 0:
        decode += f" at {found['decode_tokens_s']:,.0f} tokens/s"
    if "decode_gbs" in found:
        prefill += f", {found['prefill_limit_share']:.0%} of the limit"
        if output.decode_s > 0:
            decode += f" = {found['decode_gbs']:.1f} of {found['decode_limit_gbs']:.1f} GB/s"
            decode += f", {found['decode_limit_share']:.0%} of the limit"
    return f"{prefill}); {decode}"


def plan_line(plan: Plan) -> str:
    """Say in a few words what runs.

    Args:
        plan: what runs.

    Returns:
        Such as `int8 on native kernels, 2 threads, cache bf16`.
    """
    from dseek.plan.attention_wish import patterns_text

    threads = f"{plan.num_threads} thread{'' if plan.num_threads == 1 else 's'}"
    cache = f"{plan.cache_dtype} cache of {plan.context_tokens} tokens"
    sparse = any(pattern.kind != "dense" for pattern in plan.attention_patterns)
    attention = f", attention: {patterns_text(plan.attention_patterns)}" if sparse else ""
    return f"{plan.precision} on {plan.kernels} kernels, {threads}, {cache}{attention}"


def fallbacks(llm: LLM) -> dict[str, object]:
    """Tell what was computed in a wider dtype, as `--json` has it.

    Args:
        llm: the model that ran.

    Returns:
        `fallbacks` with the calls of layers, in all and by layer; nothing where the plan watches nothing.
    """
    guard = llm.engine.runner.guard
    return {} if guard is None else {"fallbacks": guard.as_plain()}


def fallback_line(llm: LLM) -> str:
    """Tell it for people; empty where nothing fell back.

    Args:
        llm: the model that ran.
    """
    guard = llm.engine.runner.guard
    if guard is None or not guard.num_fallbacks:
        return ""
    return f"; {guard.num_fallbacks} times a layer was computed in a wider format"
