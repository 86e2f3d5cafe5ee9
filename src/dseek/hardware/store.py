"""Keeps the measured `Machine` in the cache folder, and measures when there is none that fits.

The file's name carries the fingerprint: another processor, thread count, memory limit, kernel variant or build of the
kernels is another machine.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from dseek.core import environment, logs
from dseek.core.errors import ConfigError
from dseek.hardware import native as native_module
from dseek.hardware.machine import FORMAT_VERSION, Machine
from dseek.hardware.native import NativeModule
from dseek.hardware.probe import OtherLoad, Probe, probe, process_bytes

if TYPE_CHECKING:
    from dseek.hardware.measure import Progress

BUSY = 0.25
"""Processors that others may keep busy before a measurement is called disturbed."""


def load_or_measure(*, refresh: bool = False, progress: Progress | None = None) -> Machine:
    """Return this machine's measurements: the kept ones if there are any, else measure (some 25 s) and keep.

    Args:
        refresh: measure even if there are kept ones.
        progress: told how far a measurement is; not called where none is needed.

    Raises:
        ConfigError: a `DSEEK_*` variable is bad, or nothing can be measured here.
    """
    found = probe()
    native = _native()
    variant = "torch" if native is None else native.variant()
    machine_id = fingerprint(found, native, variant)
    path = _path(machine_id)
    log = logs.get_logger(__name__)
    if not refresh and path.exists():
        try:
            return Machine.from_json(path.read_text(encoding="utf-8"), where=str(path))
        except (ConfigError, OSError, UnicodeDecodeError) as error:
            log.warning("%s is of no use and is measured anew: %s", path, error)
    own_bytes = process_bytes()
    others = OtherLoad()
    from dseek.hardware.measure import measure  # only here: a kept machine is read without it

    measured = measure(found, native, progress=progress)
    other_load = round(others.share(), 3)
    if other_load > BUSY:
        log.warning(
            "others kept %.1f processors busy while this machine was measured: predictions will be off; "
            "run `dseek doctor --refresh` when it is quiet",
            other_load,
        )
    machine = Machine(
        format_version=FORMAT_VERSION,
        machine_id=machine_id,
        cpu_name=found.cpu_name,
        features=found.features,
        num_cores=found.num_cores,
        num_threads=found.num_threads,
        caches=found.caches,
        memory_bytes=found.memory_bytes,
        memory_limit_bytes=found.memory_limit_bytes,
        accelerators=found.accelerators,
        kernel_variant=variant,
        process_bytes=own_bytes,
        torch_process_bytes=measured.torch_process_bytes,
        other_load=other_load,
        cold_bytes=measured.cold_bytes,
        bandwidths=measured.bandwidths,
        gemm=measured.gemm,
        linears=measured.linears,
        attentions=measured.attentions,
        blocks=measured.blocks,
        scalings=measured.scalings,
        overheads=measured.overheads,
        packing=measured.packing,
    )
    try:
        machine.save(path)
    except OSError as error:
        log.warning("the measurements cannot be kept in %s: %s", path.parent, error)
    return machine


def kept_machine() -> Machine | None:
    """Return this machine's kept measurements, without measuring anything.

    Returns:
        The machine, or None where there are no (sound) measurements of it.

    Raises:
        ConfigError: a `DSEEK_*` variable is bad.
    """
    found = probe()
    native = _native()
    path = _path(fingerprint(found, native, "torch" if native is None else native.variant()))
    try:
        return Machine.from_json(path.read_text(encoding="utf-8"), where=str(path))
    except (ConfigError, OSError, UnicodeDecodeError):
        return None


def fingerprint(found: Probe, native: NativeModule | None, variant: str) -> str:
    """Name what the measurements depend on, in 16 hexadecimal digits.

    Args:
        found: the probed machine.
        native: the compiled kernels; their file's size and time stand for the build.
        variant: the kernel variant in use.
    """
    build = ""
    if native is not None:
        status = Path(native.__file__).stat()
        build = f"{status.st_size} {status.st_mtime_ns}"
    # Caches count only as far as they size the measurements; a memory limit changes what a plan may use.
    parts = (
        FORMAT_VERSION,
        found.cpu_name,
        found.features,
        found.num_cores,
        found.num_threads,
        found.memory_limit_bytes,
        variant,
        build,
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _path(machine_id: str) -> Path:
    return environment.get("DSEEK_CACHE_DIR") / "machines" / f"{machine_id}.json"


def _native() -> NativeModule | None:
    """The kernels in the variant that `DSEEK_KERNELS` asks for; None where it asks for PyTorch or there are none."""
    wanted = environment.get("DSEEK_KERNELS")
    if wanted == "torch":
        return None
    module = native_module.load()
    if module is not None and wanted != "auto":
        if wanted not in module.variants():
            raise ConfigError(
                f"environment variable DSEEK_KERNELS asks for {wanted!r}, which this processor cannot run",
                needed="one of auto, torch, " + ", ".join(module.variants()),
            )
        module.set_variant(wanted)
    return module
