"""Scalars for TensorBoard, written without it: event files are framed protocol buffers with checksums.

Tags: `PHASE/roof_share`, `PHASE/milliseconds` and `PHASE/gflops` with the layer as the step, so that a chart shows the
layers side by side; and `PHASE/layer_07/roof_share` with the run's step, so that runs can be compared over time.

Source: TFRecord framing (`tensorflow/core/lib/io/record_writer.cc`), `Event` and `Summary` (`tensorflow/core/util/
event.proto`, `framework/summary.proto`), CRC-32C (RFC 3720, appendix B.4).
"""

from __future__ import annotations

import functools
import os
import socket
import struct
import time
from pathlib import Path

from dseek.core.errors import ConfigError
from dseek.core.files import atomic_write_bytes
from dseek.profiler.records import OperatorRecord, Profile

_POLYNOMIAL = 0x82F63B78
_MASK_DELTA = 0xA282EAD8


def write_scalars(profile: Profile, folder: str | Path, *, step: int = 0) -> Path:
    """Write a profile's layers as an event file.

    Args:
        profile: the profile.
        folder: log folder of the run, as `tensorboard --logdir` takes it or a folder above it.
        step: step of the scalars that compare runs.

    Returns:
        The file.

    Raises:
        ConfigError: it cannot be written.
    """
    now_s = time.time()
    records = [_record(_event(now_s, file_version="brain.Event:2"))]
    for layer in profile.by_layer():
        for tag, value in _scalars(layer):
            records.append(_record(_event(now_s, step=layer.layer or 0, tag=f"{layer.phase}/{tag}", value=value)))
            place = f"{layer.phase}/layer_{layer.layer:02d}/{tag}"
            records.append(_record(_event(now_s, step=step, tag=place, value=value)))
    name = f"events.out.tfevents.{int(now_s)}.{socket.gethostname()}.{os.getpid()}.dseek"
    path = Path(folder) / name
    try:
        atomic_write_bytes(path, b"".join(records))
    except OSError as error:
        raise ConfigError(f"scalars cannot be written to {folder}: {error.strerror or error}") from None
    return path


def _scalars(layer: OperatorRecord) -> list[tuple[str, float]]:
    found = [("milliseconds", 1e3 * layer.seconds)]
    if layer.seconds > 0 and layer.flops:
        found.append(("gflops", layer.flops / layer.seconds * 1e-9))
    if layer.roof_share is not None:
        found.append(("roof_share", layer.roof_share))
    return found


def crc32c(data: bytes) -> int:
    """Work out the CRC-32C of some bytes.

    Args:
        data: the bytes.
    """
    table = _table()
    crc = 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


@functools.cache
def _table() -> tuple[int, ...]:
    found = []
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ (_POLYNOMIAL if value & 1 else 0)
        found.append(value)
    return tuple(found)


def _masked(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + _MASK_DELTA) & 0xFFFFFFFF)


def _record(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + _masked(length) + data + _masked(data)


def _event(
    wall_s: float, *, step: int = 0, file_version: str | None = None, tag: str = "", value: float = 0.0
) -> bytes:
    """`Event`: 1 wall_time (double), 2 step (int64), 3 file_version (string), 5 summary."""
    data = b"\x09" + struct.pack("<d", wall_s)
    if step:
        data += b"\x10" + _varint(step)
    if file_version is not None:
        return data + _field(3, file_version.encode())
    # `Summary.Value`: 1 tag, 2 simple_value (float).
    inner = _field(1, tag.encode()) + b"\x15" + struct.pack("<f", value)
    return data + _field(5, _field(1, inner))


def _field(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)
