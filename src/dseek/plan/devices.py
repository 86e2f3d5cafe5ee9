"""Descriptions of machines that are not this one: published figures, read from a file.

`machines/*.json` come with the package; `load_machine` takes their names or a file (JSON or TOML) of the same form. A
description says what the data sheet says, and the shares of it that are assumed to be reached; predictions from it are
estimates, not measurements.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from dseek.core import config
from dseek.core.errors import ConfigError
from dseek.hardware.machine import Machine
from dseek.plan.outline import MAX_FILE_BYTES, known_names


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """A connection between two devices, or of a device to its host."""

    bandwidth_gbs: float
    """10^9 bytes a second in one direction."""
    latency_s: float
    """Time of a message without contents."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """One device."""

    name: str
    """For people."""
    memory_bytes: int
    """Its memory."""
    bandwidth_gbs: float
    """Of its memory, 10^9 bytes a second."""
    peaks_tflops: dict[str, float]
    """10^12 operations a second by dtype, without sparsity."""
    bandwidth_share: float = 0.75
    """Share of the bandwidth that is assumed to be reached."""
    compute_share: float = 0.6
    """Share of the peaks that is assumed to be reached by large products."""
    operator_s: float = 5e-6
    """Time to start an operator."""

    def peak_flops(self, dtype: str) -> float:
        """Operations a second that are assumed to be reached in a `dtype`; narrower weights compute in 16 bits.

        Raises:
            ConfigError: no such peak is described.
        """
        for name in (dtype, "bf16", "fp16", "fp32"):
            if name in self.peaks_tflops:
                return self.peaks_tflops[name] * 1e12 * self.compute_share
        raise ConfigError(f"{self.name} has no peak for {dtype}", needed="peaks_tflops with bf16, fp16 or fp32")

    @property
    def bytes_s(self) -> float:
        """Bytes a second that are assumed to be reached."""
        return self.bandwidth_gbs * 1e9 * self.bandwidth_share


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceMachine:
    """A machine of equal devices."""

    name: str
    """For people."""
    source: str
    """Where the figures are from, and which of them are assumptions."""
    num_devices: int
    """Devices."""
    device: Device
    """Each of them."""
    link: Link | None = None
    """Between any two of them."""
    host_link: Link | None = None
    """From each to the host's memory."""
    host_memory_bytes: int = 0
    """Memory of the host, beside the devices'."""


def load_machine(where: str) -> DeviceMachine:
    """Read a description.

    Args:
        where: a JSON or TOML file, or a name of `machines/` with or without `.json`.

    Raises:
        ConfigError: there is none, or its figures make no sense.
    """
    path = Path(where)
    if path.is_file():
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"{where} is {path.stat().st_size} bytes long", needed=f"at most {MAX_FILE_BYTES}")
        read = config.load_toml if path.suffix == ".toml" else config.load_json
        machine = read(DeviceMachine, path)
    else:
        name = path.name.removesuffix(".json").lower()
        known = known_names("machines")
        if name not in known:
            raise ConfigError(
                f"there is no machine {where!r}", needed="a JSON or TOML file, or one of " + ", ".join(known)
            )
        text = (resources.files("dseek.plan") / "machines" / f"{name}.json").read_text(encoding="utf-8")
        machine = config.from_mapping(DeviceMachine, config.parse_json(text, where=name), where=name)
    _check(machine, where)
    return machine


def from_measured(machine: Machine) -> DeviceMachine:
    """Describe this machine by its measurements, so that it can be compared with others.

    Args:
        machine: the measurements.
    """
    names = {"f32": "fp32", "f16": "fp16", "bf16": "bf16", "i8c": "int8"}
    peaks: dict[str, float] = {}
    for curve in machine.linears:
        if curve.weight_format in names:
            size = 2e-12 * curve.num_outputs * curve.num_inputs
            best = max(size * rows / seconds for rows, seconds in zip(curve.num_rows, curve.seconds, strict=True))
            name = names[curve.weight_format]
            peaks[name] = max(peaks.get(name, 0.0), best)
    device = Device(
        name=machine.cpu_name,
        memory_bytes=machine.memory_limit_bytes,
        bandwidth_gbs=machine.read_bandwidth_gbs,
        peaks_tflops=peaks,
        bandwidth_share=1.0,
        compute_share=1.0,
        operator_s=machine.overheads[0].dispatch_s if machine.overheads else 0.0,
    )
    return DeviceMachine(name="this machine", source="measured here", num_devices=1, device=device)


def _check(machine: DeviceMachine, where: str) -> None:
    device = machine.device
    positive = [device.memory_bytes, device.bandwidth_gbs, *device.peaks_tflops.values()]
    links = [link for link in (machine.link, machine.host_link) if link is not None]
    positive += [link.bandwidth_gbs for link in links]
    shares = (device.bandwidth_share, device.compute_share)
    sound = 1 <= machine.num_devices <= 65536 and min(positive) > 0 and bool(device.peaks_tflops)
    sound = sound and all(0 < share <= 1 for share in shares) and machine.host_memory_bytes >= 0
    sound = sound and device.operator_s >= 0 and all(link.latency_s >= 0 for link in links)
    if not sound:
        raise ConfigError(
            f"{where} describes no machine", needed="positive sizes and rates, shares above 0 and up to 1"
        )
    if machine.num_devices > 1 and machine.link is None:
        raise ConfigError(f"{where} has {machine.num_devices} devices and no link", needed="a table `link`")
