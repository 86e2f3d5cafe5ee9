"""Names cures and prices them by the machine's measured rates, as the plan would.

A cure of a linear layer is a narrower format, or dseek's kernels where PyTorch ran it; of attention, a narrower cache.
The price is the measured time, scaled by what the two ways take on this machine; what it loses in quality is the
plan's business (`dseek plan MODEL --max-quality-loss`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from dseek.core.errors import ConfigError
from dseek.hardware.machine import Machine
from dseek.plan.explain import loss_text
from dseek.plan.formats import packed_bytes
from dseek.plan.plan import Plan
from dseek.plan.quality import WEIGHT_LOSS
from dseek.plan.rates import Rates
from dseek.profiler.native_session import role_of
from dseek.profiler.native_work import streamed_bytes
from dseek.profiler.records import Advice, OperatorRecord

LEAST_SHARE = 0.005
"""Of the run's time that a cure must save to be told."""

NAMES = {
    "f32": "fp32",
    "f16": "fp16",
    "bf16": "bf16",
    "i8c": "int8",
    "i8p": "int8",
    "i8g": "int8 groups",
    "i4g": "int4",
}
_NEXT = {"wide": ("i8c", "i8g"), "int8": ("i4g",)}
"""The next narrower formats: a cure goes one step, as each loses more than the one before."""

_BITS = {"f32": 32, "fp32": 32, "f16": 16, "fp16": 16, "bf16": 16, "i8c": 8, "i8p": 8, "i8g": 8.5, "i4g": 5}


def advise(
    records: Sequence[OperatorRecord], machine: Machine, plan: Plan | None, num_threads: int, wall_s: float
) -> tuple[Advice, ...]:
    """Look for cures.

    Args:
        records: the operators.
        machine: the measurements.
        plan: what ran, where it was a plan.
        num_threads: threads of the run.
        wall_s: time of the run.

    Returns:
        Cures that save at least `LEAST_SHARE` of the run, those for a layer and those for all alike layers together,
        the largest first.
    """
    found: list[Advice] = []
    try:
        rates = Rates(machine, "native", num_threads)
    except ConfigError:
        return ()
    working_set = (
        machine.cold_bytes if plan is None else streamed_bytes(plan.shape, plan.layer_formats, plan.head_format)
    )
    groups: dict[tuple[str, str, str], list[tuple[OperatorRecord, str, float]]] = defaultdict(list)
    for record in records:
        cure = _cure(record, rates, plan, working_set)
        if cure is None:
            continue
        what, saves_s = cure
        groups[record.phase, record.name, what].append((record, what, saves_s))
        if saves_s >= LEAST_SHARE * wall_s:
            found.append(
                Advice(
                    text=_text(f"{record.place} {record.name}", record, record.seconds, what, saves_s, wall_s),
                    saves_s=saves_s,
                    place=record.place,
                    operator=record.name,
                )
            )
    for (_, name, what), parts in groups.items():
        saves_s = sum(part[2] for part in parts)
        if len(parts) > 1 and saves_s >= LEAST_SHARE * wall_s:
            seconds = sum(record.seconds for record, _, _ in parts)
            is_by_layer = all(record.place.startswith("layer ") for record, _, _ in parts)
            place = f"{len(parts)} {'layers' if is_by_layer else 'places'}"
            found.append(
                Advice(
                    text=_text(f"{name} of {place}", parts[0][0], seconds, what, saves_s, wall_s),
                    saves_s=saves_s,
                    place=place,
                    operator=name,
                )
            )
    return tuple(sorted(found, key=lambda advice: -advice.saves_s))


def _cure(record: OperatorRecord, rates: Rates, plan: Plan | None, working_set: float) -> tuple[str, float] | None:
    """The best cure of one operator and the seconds it saves."""
    if record.kind == "attention" and plan is not None and record.layer is not None:
        return _narrower_cache(record, rates, plan)
    if record.kind != "linear" or record.dimensions is None or record.phase == "backward":
        return None
    rows, outputs, inputs = record.dimensions
    is_native = role_of(record.name) is not None or record.name == "lm_head"
    bits = _BITS.get(record.dtype, 0)
    best: tuple[str, float] | None = None
    for name in _NEXT["wide" if bits > 8.5 else "int8"]:
        if not rates.has_format(name) or _BITS[name] >= bits:
            continue
        other_s = rates.linear_s(name, rows, outputs, inputs, working_set)
        if is_native:
            # Both ways by the same measurements, so that what they have in common cancels out.
            ratio = other_s / rates.linear_s(record.dtype, rows, outputs, inputs, working_set)
            what = f"{NAMES[name]} would save"
        else:
            ratio = other_s * record.calls / record.seconds
            what = f"{NAMES[name]} on dseek's kernels would save"
        saves_s = record.seconds * (1 - ratio)
        if saves_s > 0 and (best is None or saves_s > best[1]):
            best = what, saves_s
    return best


def _narrower_cache(record: OperatorRecord, rates: Rates, plan: Plan) -> tuple[str, float] | None:
    """An int8 cache, where decoding reads a wider one and memory binds."""
    shape = plan.shape
    if record.phase != "decode" or record.roof != "memory" or plan.cache_dtype == "int8" or not rates.has_cache("int8"):
        return None
    # So long a context has the bytes that a call read, in the mean.
    context = max(1, round(record.num_bytes / record.calls / (4 * shape.kv_size)))
    heads = (shape.num_heads, shape.num_kv_heads, shape.head_dim)
    working_set = shape.num_layers * record.num_bytes / record.calls
    working_set += packed_bytes(plan.head_format, shape.vocab_size, shape.hidden_size)
    now = rates.attention_s(plan.cache_dtype, 1, context, *heads, working_set)
    then = rates.attention_s("int8", 1, context, *heads, working_set)
    saves_s = record.seconds * (1 - then / now)
    return ("an int8 cache would save", saves_s) if saves_s > 0 else None


def _text(where: str, record: OperatorRecord, seconds: float, what: str, saves_s: float, wall_s: float) -> str:
    bound = f", {record.roof} bound" if record.roof else ""
    loss = f" (everywhere it loses some {loss_text(WEIGHT_LOSS['i4g'])} of quality)" if what.startswith("int4") else ""
    share = f"{100 * seconds / wall_s:.0f} % of time"
    return f"{where} ({record.phase}): {share}{bound}, {what} {time_text(saves_s)}{loss}"


def time_text(seconds: float) -> str:
    """Write a time for people.

    Args:
        seconds: the time.

    Returns:
        Such as `0.9 ms`.
    """
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            value = seconds / scale
            return f"{value:.3g} {unit}" if value < 1000 else f"{value:,.0f} {unit}"
    return f"{seconds * 1e9:.3g} ns"
