"""`Machine`: everything the planner knows about the hardware, plain data that goes to JSON and back.

Times are those of the kernels that will run, at several sizes; the planner interpolates between them. A curve belongs
to a set of kernels: `native` (the compiled extension) or `torch`.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

from dseek.core import config
from dseek.core.errors import ConfigError
from dseek.core.files import atomic_write_text

FORMAT_VERSION = 1
"""Version of the JSON; a file of another version is measured anew."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cache:
    """One level of the data caches, as one core sees it."""

    level: int
    """1, 2, 3."""
    num_bytes: int
    """Size of one instance."""
    num_sharing: int
    """Logical processors that share an instance."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Accelerator:
    """A device beside the processor, named by the operating system; dseek's native kernels do not use it."""

    kind: str
    """cuda or rocm."""
    name: str
    """As the driver calls it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bandwidth:
    """Read bandwidth over a working set that is read again and again by all threads."""

    num_bytes: int
    """Size of the working set."""
    gbs: float
    """10^9 bytes a second."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GemmRate:
    """PyTorch's matrix product in one dtype, for one class of shapes: [m, k] x [k, n]."""

    dtype: str
    """fp32, bf16, fp16 or int8."""
    shape_class: str
    """matvec, thin or square."""
    m: int
    """Rows."""
    n: int
    """Outputs."""
    k: int
    """Inputs."""
    gflops: float
    """2 m n k / time, in 10^9 a second."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearCurve:
    """Time of one linear layer [num_outputs, num_inputs] over the number of rows it is given."""

    kernels: str
    """native or torch."""
    weight_format: str
    """How the weight is stored: f32, f16, bf16, i8c, i8g, i4g."""
    num_outputs: int
    """Output channels."""
    num_inputs: int
    """Input channels."""
    num_rows: tuple[int, ...]
    """Rows of each point, rising."""
    seconds: tuple[float, ...]
    """Time a call with `Machine.cold_bytes` of weights read in turn (from 128 rows on that makes no difference)."""
    warm_seconds: tuple[float, ...]
    """Time a call with the weight as near as it fits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionCurve:
    """Time of causal attention of one sequence and one layer over a filled paged cache."""

    kernels: str
    """native or torch."""
    cache_dtype: str
    """fp32, bf16 or int8."""
    num_heads: int
    """Query heads."""
    num_kv_heads: int
    """Key and value heads."""
    head_dim: int
    """Width of a head."""
    num_rows: int
    """Query rows, the newest positions; 1 is decode."""
    contexts: tuple[int, ...]
    """Positions in the cache at each point, rising, the queries' own included."""
    seconds: tuple[float, ...]
    """Time a call with caches read in turn, `Machine.cold_bytes` of them (measured for decode only)."""
    warm_seconds: tuple[float, ...]
    """Time a call with the cache as near as it fits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockCurve:
    """Time of a whole decoder block over the rows it is given; corrects the sum of its parts."""

    kernels: str
    """native or torch."""
    weight_format: str
    """Format of all four projections."""
    hidden_size: int
    """Width of the residual stream."""
    intermediate_size: int
    """Width of the gated MLP."""
    num_heads: int
    """Query heads."""
    num_kv_heads: int
    """Key and value heads."""
    head_dim: int
    """Width of a head."""
    num_layers: int
    """Blocks that were run one after the other."""
    decode_context: int
    """Positions that each decoding sequence sees."""
    max_decode_rows: int
    """Up to so many rows are sequences that decode; more are one prompt."""
    num_rows: tuple[int, ...]
    """Rows of each point, rising."""
    seconds: tuple[float, ...]
    """Time of one block; cache in bf16."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ThreadScaling:
    """Time with fewer threads, as a multiple of the time with all of them."""

    num_threads: int
    """Threads."""
    matvec: float
    """One row times a weight that comes from memory."""
    matmul: float
    """512 rows."""
    attention: float
    """Decode over a long context."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Overheads:
    """What a step costs besides linear layers and attention."""

    kernels: str
    """native or torch."""
    dispatch_s: float
    """A call that computes next to nothing: handing work to the threads and back."""
    element_s: float
    """One element of a norm, rotation or activation, all threads at work."""
    step_s: float
    """The engine's own work in a step, whatever the batch."""
    row_s: float
    """The engine's own work for each sequence in a step."""
    logit_s: float
    """Sampling, for each logit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackRate:
    """How fast weights are brought into a format at load."""

    weight_format: str
    """See `LinearCurve`."""
    weights_per_s: float
    """Weights a second."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """The hardware as probed and measured."""

    format_version: int
    """`FORMAT_VERSION` of the writer."""
    machine_id: str
    """Fingerprint of processor, threads, memory limit and kernels: the measurements hold for this only."""
    cpu_name: str
    """As the operating system calls it; for people only."""
    features: tuple[str, ...]
    """Instruction sets that matter to the kernels."""
    num_cores: int
    """Physical cores this process may use."""
    num_threads: int
    """Threads everything was measured with, unless said otherwise."""
    caches: tuple[Cache, ...]
    """Data caches, level 1 first."""
    memory_bytes: int
    """Main memory."""
    memory_limit_bytes: int
    """What this process may use: main memory, or less where its control group says so."""
    accelerators: tuple[Accelerator, ...]
    """Devices beside the processor."""
    kernel_variant: str
    """Native variant that was measured, or torch where the native kernels are absent."""
    process_bytes: int
    """Memory of a process before it has a model."""
    torch_process_bytes: int
    """The same with PyTorch imported; 0 if PyTorch was not measured."""
    other_load: float
    """Processors that others kept busy while this was measured: much of it spoils the timings."""
    cold_bytes: int
    """Working set of the cold timings."""
    bandwidths: tuple[Bandwidth, ...]
    """Read bandwidth over working sets, small to large."""
    gemm: tuple[GemmRate, ...]
    """PyTorch's matrix products, to know what each dtype is worth here."""
    linears: tuple[LinearCurve, ...]
    """Linear layers."""
    attentions: tuple[AttentionCurve, ...]
    """Attention."""
    blocks: tuple[BlockCurve, ...]
    """Whole decoder blocks."""
    scalings: tuple[ThreadScaling, ...]
    """Fewer threads, rising; the last entry is all threads, with factors 1."""
    overheads: tuple[Overheads, ...]
    """One entry a set of kernels."""
    packing: tuple[PackRate, ...]
    """Packing at load, native kernels only."""

    @property
    def read_bandwidth_gbs(self) -> float:
        """Bandwidth of main memory: that over the largest working set (0 where nothing was measured)."""
        return self.bandwidths[-1].gbs if self.bandwidths else 0.0

    def to_json(self) -> str:
        """Write as JSON."""
        return json.dumps(config.to_plain(self), separators=(",", ":"))

    @staticmethod
    def from_json(text: str, *, where: str = "machine") -> Machine:
        """Read what `to_json` wrote.

        Args:
            text: the JSON document.
            where: what it is, for messages.

        Raises:
            ConfigError: not such JSON, or numbers that cannot be measurements.
        """
        machine = config.from_mapping(Machine, config.parse_json(text, where=where), where=where)
        _check(machine, where)
        return machine

    def save(self, path: str | Path) -> None:
        """Write to a file, whole or not at all.

        Args:
            path: where.

        Raises:
            OSError: it cannot be written.
        """
        atomic_write_text(path, self.to_json())


def _check(machine: Machine, where: str) -> None:
    """Refuse what no measurement can be: the planner divides by these numbers."""
    if machine.format_version != FORMAT_VERSION:
        raise ConfigError(f"{where} has format version {machine.format_version}", needed=str(FORMAT_VERSION))
    sound = (
        machine.num_threads >= 1 and machine.num_cores >= 1 and min(machine.memory_limit_bytes, machine.cold_bytes) > 0
    )
    sound = sound and all(entry.gbs > 0 and entry.num_bytes > 0 for entry in machine.bandwidths)
    for curve in machine.linears:
        sound = sound and min(curve.num_outputs, curve.num_inputs) > 0
        sound = sound and _rising(curve.num_rows) and len(curve.num_rows) == len(curve.seconds)
        sound = sound and len(curve.warm_seconds) == len(curve.seconds)
        sound = sound and min((*curve.seconds, *curve.warm_seconds), default=0.0) > 0
    for attention in machine.attentions:
        sound = sound and min(attention.num_heads, attention.num_kv_heads, attention.head_dim, attention.num_rows) > 0
        sound = sound and _rising(attention.contexts) and len(attention.contexts) == len(attention.seconds)
        sound = sound and len(attention.warm_seconds) == len(attention.seconds)
        sound = sound and min((*attention.seconds, *attention.warm_seconds), default=0.0) > 0
    for block in machine.blocks:
        sound = sound and min(block.hidden_size, block.intermediate_size, block.num_heads, block.num_kv_heads) > 0
        sound = sound and min(block.head_dim, block.num_layers, block.decode_context, block.max_decode_rows) > 0
        sound = sound and _rising(block.num_rows) and len(block.num_rows) == len(block.seconds)
        sound = sound and min(block.seconds, default=0.0) > 0
    for scaling in machine.scalings:
        sound = sound and min(scaling.num_threads, scaling.matvec, scaling.matmul, scaling.attention) > 0
    for cost in machine.overheads:
        sound = sound and min(cost.dispatch_s, cost.element_s, cost.step_s, cost.row_s, cost.logit_s) >= 0
    sound = sound and all(rate.weights_per_s > 0 for rate in machine.packing)
    if not sound:
        raise ConfigError(
            f"{where} holds numbers that cannot be measurements", remedy="measure again with `dseek doctor --refresh`"
        )


def _rising(values: tuple[int, ...]) -> bool:
    return bool(values) and values[0] > 0 and all(a < b for a, b in itertools.pairwise(values))
