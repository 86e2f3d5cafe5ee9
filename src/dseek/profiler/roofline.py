"""The roofline of a measured machine: the least time that work can take, by its bytes or by its operations.

    least time = max(bytes / bandwidth, operations / peak)

Bandwidth is what was measured over a working set as large as the run's; the peak of a format is the fastest product
that was measured in it. Neither is a data sheet's figure, and a kernel that was not measured when the machine was may
come out above 100 %. Source: Williams, Waterman, Patterson, "Roofline", CACM 52(4), 2009.
"""

from __future__ import annotations

from dseek.hardware.machine import Machine
from dseek.plan.rates import Rates
from dseek.profiler.records import Roof, Roofs

EQUIVALENTS = (("f32", "fp32"), ("f16", "fp16"), ("i8p", "i8c"))
"""Two names of one arithmetic: the higher of their peaks holds for both."""


class Roofline:
    """Least times on one machine.

    Args:
        machine: the measurements.
        kernels: native or torch: whose products set the peaks. PyTorch's own (`Machine.gemm`) count for both.
        num_threads: threads of the run; fewer than were measured reach as much less as the plan's rates say.
        working_set_bytes: what the run reads between two readings of the same byte.

    Raises:
        ConfigError: the machine was not measured with these kernels.
    """

    def __init__(self, machine: Machine, kernels: str, num_threads: int, working_set_bytes: float) -> None:
        self.rates = Rates(machine, kernels, num_threads)
        self.machine = machine
        scale = self.rates.linear_s("bf16" if self.rates.has_format("bf16") else "f32", 512, 2048, 2048, 0.0)
        whole = Rates(machine, kernels, machine.num_threads)
        slower = scale / whole.linear_s("bf16" if whole.has_format("bf16") else "f32", 512, 2048, 2048, 0.0)
        peaks: dict[str, float] = {}
        for curve in machine.linears:
            if curve.kernels == kernels:
                size = 2e-9 * curve.num_outputs * curve.num_inputs
                best = max(size * rows / seconds for rows, seconds in zip(curve.num_rows, curve.seconds, strict=True))
                peaks[curve.weight_format] = max(peaks.get(curve.weight_format, 0.0), best / slower)
        for rate in machine.gemm:
            peaks[rate.dtype] = max(peaks.get(rate.dtype, 0.0), rate.gflops / slower)
        for pair in EQUIVALENTS:
            known = [peaks[name] for name in pair if name in peaks]
            peaks |= dict.fromkeys(pair, max(known)) if known else {}
        bandwidth = 1e-9 / self.rates.stream_s_per_byte(max(1.0, working_set_bytes))
        self.roofs = Roofs(bandwidth_gbs=bandwidth, peaks_gflops=peaks)

    def peak_gflops(self, dtype: str) -> float | None:
        """Return the peak for a format.

        Args:
            dtype: a weight format or a dtype.

        Returns:
            10^9 operations a second, or None where none was measured.
        """
        return self.roofs.peaks_gflops.get(dtype)

    def least_s(self, flops: float, num_bytes: float, dtype: str) -> tuple[float | None, Roof]:
        """Work out the least time and which roof it is.

        Args:
            flops: operations.
            num_bytes: bytes.
            dtype: format of the operations.

        Returns:
            Seconds and the roof that binds; None and nothing where neither is known.
        """
        by_bytes = num_bytes * 1e-9 / self.roofs.bandwidth_gbs
        peak = self.peak_gflops(dtype)
        by_flops = flops * 1e-9 / peak if peak else 0.0
        least = max(by_bytes, by_flops)
        if least <= 0:
            return None, ""
        return least, "memory" if by_bytes >= by_flops else "compute"
