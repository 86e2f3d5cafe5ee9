"""What a profile is made of: operators with their time and work, stretches for a timeline, and what it all adds up to.

Plain data, no PyTorch. Seconds of an operator are those of the run's clock: where a team of threads works on it, the
mean over the team, and what threads wait for each other is an operator of its own. So the seconds of all operators,
`outside` among them, add up to the time of the run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

Kind = Literal["linear", "attention", "memory", "other", "idle"]
"""linear: products with weights; attention; memory: norms, copies, activations; other: no work is known of it; idle:
waiting, and whatever runs outside the operators."""

Roof = Literal["memory", "compute", ""]


@dataclass(frozen=True, kw_only=True, slots=True)
class OperatorRecord:
    """All calls of one operator in one place."""

    name: str
    """Such as `o_proj`, `attention` or `aten::addmm`."""
    kind: Kind
    """What sort of work it is."""
    phase: str
    """prefill, decode, mixed, forward or backward."""
    layer: int | None
    """Index of the layer; None outside the layers."""
    place: str
    """Where it is, for people: `layer 7`, or the module's path."""
    calls: int
    """How often it ran."""
    seconds: float
    """Time of all calls."""
    flops: float
    """Operations, a multiply and an add counted apart; 0 where they are not known."""
    num_bytes: float
    """Bytes that have to be moved at least: weights, inputs and outputs, each once a call; 0 where not known."""
    dtype: str
    """Format of the weights or of the numbers: a weight format such as i8c, or fp32; empty where none is known."""
    sizes: str = ""
    """Its sizes, for people: `576 x 1536, 1 row`."""
    dimensions: tuple[int, int, int] | None = None
    """Rows (the mean over calls, rounded), outputs and inputs of a linear operator; None for others."""
    least_s: float | None = None
    """Time of all calls on the roofline; None where the machine was not measured or the work is not known."""
    roof: Roof = ""
    """Which roof that is."""

    @property
    def roof_share(self) -> float | None:
        """Share of the roofline that was reached, a fraction; None where it is not known."""
        return self.least_s / self.seconds if self.least_s is not None and self.seconds > 0 else None

    @property
    def intensity(self) -> float | None:
        """Operations a byte; None where either is not known."""
        return self.flops / self.num_bytes if self.flops > 0 and self.num_bytes > 0 else None


@dataclass(frozen=True, slots=True)
class Stretch:
    """One bar of the timeline."""

    name: str
    """Of the operator."""
    place: str
    """Layer or module."""
    track: int
    """Thread, from 0 on."""
    begin_s: float
    """Since the run began."""
    seconds: float
    """How long."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Advice:
    """A cure, priced by the machine's measured rates."""

    text: str
    """One sentence."""
    saves_s: float
    """Seconds of the whole run that it is predicted to save."""
    place: str
    """Where."""
    operator: str
    """Name of the operator."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Roofs:
    """The machine's measured limits, as the roofline is drawn."""

    bandwidth_gbs: float
    """Read bandwidth for what the run reads, 10^9 bytes a second."""
    peaks_gflops: dict[str, float]
    """Fastest measured product by format or dtype, 10^9 operations a second."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """One profiled run."""

    title: str
    """What ran."""
    machine: str
    """On what, for people."""
    num_threads: int
    """Threads that worked."""
    wall_s: float
    """Time of the run."""
    operators: tuple[OperatorRecord, ...]
    """Everything, longest first."""
    roofs: Roofs | None
    """Limits; None where the machine was not measured."""
    advice: tuple[Advice, ...] = ()
    """Cures, the largest first."""
    stretches: tuple[Stretch, ...] = ()
    """The timeline, or its beginning."""
    num_lost_stretches: int = 0
    """Stretches that the timeline has no room for."""
    notes: tuple[str, ...] = ()
    """What a reader must know to judge the figures."""

    @property
    def flops(self) -> float:
        """Operations of the run, as far as they are known."""
        return sum(record.flops for record in self.operators)

    @property
    def num_bytes(self) -> float:
        """Bytes of the run, as far as they are known."""
        return sum(record.num_bytes for record in self.operators)

    def by_name(self) -> tuple[OperatorRecord, ...]:
        """Sum up every operator over the layers, one record a phase and name, longest first."""
        return merged(self.operators, lambda record: (record.phase, record.name, record.dtype), place="all layers")

    def by_layer(self) -> tuple[OperatorRecord, ...]:
        """Sum up the operators of each layer, in the order of the layers; what has no layer is left out."""
        inside = [record for record in self.operators if record.layer is not None]
        found = merged(inside, lambda record: (record.phase, str(record.layer), ""), name="layer")
        return tuple(sorted(found, key=lambda record: (record.phase, record.layer or 0)))


def merged(
    records: Iterable[OperatorRecord],
    key: Callable[[OperatorRecord], tuple[str, str, str]],
    *,
    name: str | None = None,
    place: str | None = None,
) -> tuple[OperatorRecord, ...]:
    """Add up records that share a key.

    Args:
        records: any.
        key: a function of a record; records of equal keys become one.
        name: name of the sums; None keeps that of the first.
        place: place of the sums; None keeps that of the first.

    Returns:
        The sums, longest first. Their share of the roof is over what has a known limit only if all of it has one.
    """
    groups: dict[tuple[str, str, str], list[OperatorRecord]] = defaultdict(list)
    for record in records:
        groups[key(record)].append(record)
    sums = [_sum(group, name, place) for group in groups.values()]
    return tuple(sorted(sums, key=lambda record: -record.seconds))


def _sum(group: list[OperatorRecord], name: str | None, place: str | None) -> OperatorRecord:
    first = group[0]
    # Records that have no limit (idle time, say) leave the sum its limit, and lower its share, as they should.
    limits = [record.least_s for record in group if record.least_s is not None]
    roofs: dict[Roof, float] = defaultdict(float)
    for record in group:
        roofs[record.roof] += record.least_s or 0.0
    same_layer = all(record.layer == first.layer for record in group)
    same_dtype = all(record.dtype == first.dtype for record in group)
    same_kind = all(record.kind == first.kind for record in group)
    return OperatorRecord(
        name=first.name if name is None else name,
        kind=first.kind if same_kind else "other",
        phase=first.phase,
        layer=first.layer if same_layer else None,
        place=f"layer {first.layer}" if name == "layer" else first.place if place is None or same_layer else place,
        calls=min(record.calls for record in group) if name == "layer" else sum(record.calls for record in group),
        seconds=sum(record.seconds for record in group),
        flops=sum(record.flops for record in group),
        num_bytes=sum(record.num_bytes for record in group),
        dtype=first.dtype if same_dtype else "",
        sizes=first.sizes if all(record.sizes == first.sizes for record in group) else "",
        dimensions=first.dimensions if all(record.dimensions == first.dimensions for record in group) else None,
        least_s=sum(limits) if limits else None,
        roof=max(roofs, key=lambda roof: roofs[roof]) if limits else "",
    )


def sizes_text(dimensions: tuple[int, int, int] | None) -> str:
    """Write the sizes of a product for people.

    Args:
        dimensions: rows, outputs and inputs; None for what is no product.

    Returns:
        Such as `576 x 1536, 1 row`, or nothing.
    """
    if dimensions is None:
        return ""
    rows, outputs, inputs = dimensions
    return f"{outputs} x {inputs}, {rows} row{'' if rows == 1 else 's'}"
