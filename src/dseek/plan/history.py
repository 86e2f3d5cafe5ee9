"""What predictions came to: measured beside predicted times of past benchmarks, and the corrections they suggest.

A file a machine in the cache folder, JSON lines, bounded. A class is what was measured (prefill or decode) on which
kernels in which format of most weights; its correction is the median of measured over predicted times, on a logarithmic
scale, of its newest entries of this version on this machine. Predictions that are compared are those without
corrections, so that corrections do not feed on themselves.

The file may have been damaged or forged: lines that are not such entries are left out, and no correction is beyond
`LIMITS`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import stat
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dseek.core import config, environment, logs
from dseek.core.errors import ConfigError
from dseek.core.files import atomic_write_text
from dseek.hardware.machine import LinearCurve, Machine
from dseek.plan.formats import MEASURED_AS
from dseek.plan.plan import Plan

VERSION = 1
"""Of the entries; others are left out."""

MAX_FILE_BYTES = 1 << 20
MAX_LINE_BYTES = 2048
LEAST_ENTRIES = 3
"""A class with fewer is not corrected."""

NEWEST = 32
"""Entries of a class that count."""

LIMITS = (1 / 3, 3.0)
FEW_ROWS = 32
"""Up to so many rows a linear layer is one of decode."""

Phase = Literal["prefill", "decode"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One measured case."""

    version: int
    """`VERSION` of the writer."""
    dseek: str
    """Version of the program: other kernels have other times."""
    machine_id: str
    """Fingerprint of the machine."""
    phase: Phase
    """What was timed."""
    kernels: str
    """native or torch."""
    weight_format: str
    """Format of most weights."""
    predicted_s: float
    """Without corrections."""
    measured_s: float
    """Median of the benchmark's repeats."""
    context_tokens: int
    """Positions."""
    batch: int
    """Sequences."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Correction:
    """What the predictions of one class are multiplied with."""

    phase: Phase
    """See `Entry`."""
    kernels: str
    """See `Entry`."""
    weight_format: str
    """See `Entry`."""
    factor: float
    """Measured over predicted time."""
    num_entries: int
    """Entries behind it."""


def path_of(machine_id: str) -> Path:
    """Return where a machine's history is kept.

    Args:
        machine_id: its fingerprint, hexadecimal digits.
    """
    return environment.get("DSEEK_CACHE_DIR") / "history" / f"{machine_id}.jsonl"


def main_format(plan: Plan) -> str:
    """Return the format of most weights of a plan, by the name that is measured.

    Args:
        plan: the plan.
    """
    sizes = plan.shape.linear_sizes()
    shares: Counter[str] = Counter()
    for formats in plan.layer_formats:
        for role, name in formats.by_role().items():
            shares[name] += sizes[role][0] * sizes[role][1]
    most = shares.most_common(1)[0][0]
    return MEASURED_AS.get(most, most)


def append(entries: Sequence[Entry]) -> None:
    """Add entries to the history of their machines; what cannot be written is warned of and lost.

    Args:
        entries: sound ones.
    """
    by_machine: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        if _is_sound(entry):
            by_machine[entry.machine_id].append(entry)
    for machine_id, new in by_machine.items():
        path = path_of(machine_id)
        lines = "".join(json.dumps(config.to_plain(entry), separators=(",", ":")) + "\n" for entry in new)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0)
            handle = os.open(path, flags, 0o644)
            try:
                # A last line that was cut short must not swallow the first new one.
                os.write(handle, (("" if _ends_whole(path) else "\n") + lines).encode())
                size = os.fstat(handle).st_size
            finally:
                os.close(handle)
            if size > MAX_FILE_BYTES:
                kept = [json.dumps(config.to_plain(entry), separators=(",", ":")) for entry in read(machine_id)]
                atomic_write_text(path, "\n".join(kept[len(kept) // 2 :]) + "\n")
        except OSError as error:
            logs.get_logger(__name__).warning("the history %s cannot be kept: %s", path, error)


def read(machine_id: str) -> list[Entry]:
    """Read a machine's history.

    Args:
        machine_id: its fingerprint.

    Returns:
        The sound entries of this machine, oldest first; none where there is no file or it is none of ours.
    """
    path = path_of(machine_id)
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0))
        with os.fdopen(handle, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                return []
            file.seek(max(0, status.st_size - 2 * MAX_FILE_BYTES))
            data = file.read(2 * MAX_FILE_BYTES)
    except OSError:
        return []
    found = []
    for line in data.split(b"\n"):
        if not line or len(line) > MAX_LINE_BYTES:
            continue
        try:
            entry = config.from_mapping(
                Entry, config.parse_json(line.decode("utf-8"), where="history"), where="history"
            )
        except (ConfigError, UnicodeDecodeError):
            continue
        if entry.machine_id == machine_id and _is_sound(entry):
            found.append(entry)
    return found


def corrections(entries: Iterable[Entry], dseek_version: str) -> list[Correction]:
    """Work out the correction of every class that has entries enough.

    Args:
        entries: of one machine, oldest first.
        dseek_version: entries of others are left out.
    """
    classes: dict[tuple[Phase, str, str], list[float]] = defaultdict(list)
    for entry in entries:
        if entry.dseek == dseek_version:
            ratio = math.log(entry.measured_s / entry.predicted_s)
            classes[entry.phase, entry.kernels, entry.weight_format].append(ratio)
    low, high = LIMITS
    return [
        Correction(
            phase=phase,
            kernels=kernels,
            weight_format=weight_format,
            factor=min(high, max(low, math.exp(_median(ratios[-NEWEST:])))),
            num_entries=min(len(ratios), NEWEST),
        )
        for (phase, kernels, weight_format), ratios in sorted(classes.items())
        if len(ratios) >= LEAST_ENTRIES
    ]


def corrected(machine: Machine, found: Sequence[Correction]) -> Machine:
    """Scale a machine's curves by corrections.

    Linear layers and blocks of few rows by decode, of many by prefill, each in its own format; attention, which has a
    cache instead of weights, by the mean of the formats.

    Args:
        machine: the measurements.
        found: corrections; none gives the machine itself.
    """
    if not found:
        return machine
    factors = {(entry.kernels, entry.weight_format, entry.phase): entry.factor for entry in found}

    def mean(kernels: str, phase: Phase) -> float:
        logs_of = [math.log(entry.factor) for entry in found if (entry.kernels, entry.phase) == (kernels, phase)]
        return math.exp(sum(logs_of) / len(logs_of)) if logs_of else 1.0

    def scaled(kernels: str, name: str, rows: Sequence[int], seconds: Sequence[float]) -> tuple[float, ...]:
        return tuple(
            value * factors.get((kernels, name, "decode" if count <= FEW_ROWS else "prefill"), 1.0)
            for count, value in zip(rows, seconds, strict=True)
        )

    def linear(curve: LinearCurve) -> LinearCurve:
        key = curve.kernels, curve.weight_format, curve.num_rows
        return dataclasses.replace(
            curve, seconds=scaled(*key, curve.seconds), warm_seconds=scaled(*key, curve.warm_seconds)
        )

    attentions = []
    for attention in machine.attentions:
        factor = mean(attention.kernels, "decode" if attention.num_rows == 1 else "prefill")
        attentions.append(
            dataclasses.replace(
                attention,
                seconds=tuple(factor * value for value in attention.seconds),
                warm_seconds=tuple(factor * value for value in attention.warm_seconds),
            )
        )
    blocks = tuple(
        dataclasses.replace(block, seconds=scaled(block.kernels, block.weight_format, block.num_rows, block.seconds))
        for block in machine.blocks
    )
    linears = tuple(linear(curve) for curve in machine.linears)
    return dataclasses.replace(machine, linears=linears, attentions=tuple(attentions), blocks=blocks)


def _is_sound(entry: Entry) -> bool:
    sizes = 1 <= entry.context_tokens <= 2**24 and 1 <= entry.batch <= 2**16
    times = all(1e-9 <= value <= 1e6 for value in (entry.predicted_s, entry.measured_s))
    names = all(len(text) <= 64 for text in (entry.dseek, entry.kernels, entry.weight_format))
    is_id = 0 < len(entry.machine_id) <= 64 and entry.machine_id.isalnum()
    return entry.version == VERSION and sizes and times and names and is_id


def _ends_whole(path: Path) -> bool:
    """Whether a file is empty or its last line is complete."""
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _median(values: Sequence[float]) -> float:
    """As `statistics.median`, whose import takes longer than a start of ours may."""
    ordered, middle = sorted(values), len(values) // 2
    return ordered[middle] if len(values) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
