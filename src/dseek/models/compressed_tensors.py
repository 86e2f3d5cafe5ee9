"""Weights of a `compressed-tensors` folder: several stored tensors together are one weight. Trusts nothing in them.

A quantised projection M has `M.weight` (int8) or `M.weight_packed` (int32, the values' bits one after the other, offset
to be unsigned) with `M.weight_shape`, `M.weight_scale` and, where it is not symmetric, `M.weight_zero_point` (int8, or
packed along the rows). Values and scales become the encodings of `dseek.ops.linear.integers`, which packing moves
unchanged; what those cannot hold (groups that are no multiple of 32, zero points beside 8 bits, scales that are too
large or too small for a half) is widened to float32 when it is read.

Source: the package `compressed-tensors` (`compressors/pack_quantized`, `compressors/naive_quantized`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dseek.core.errors import FileFormatError, UnsupportedModelError
from dseek.models.compressed_config import CompressedSettings
from dseek.models.config_values import shorten
from dseek.models.encoding import to_float32
from dseek.models.safetensors_reader import SafetensorsFile, StoredTensor
from dseek.ops.linear.integers import BLOCK, channel_integers, group_integers
from dseek.ops.tensor import CHANNEL_ENCODING, EncodedTensor

Owners = Mapping[str, tuple[SafetensorsFile, str]]
"""Canonical name of a stored tensor to its file and its name there."""
_SCALE, _ZERO, _PACKED, _SHAPE = "_scale", "_zero_point", "_packed", "_shape"
_WIDE = ("F32", "F16", "BF16")


@dataclass(frozen=True, kw_only=True, slots=True)
class CompressedWeight:
    """A quantised weight, found in the headers."""

    name: str
    """Canonical name of the weight."""
    shape: tuple[int, ...]
    """Output channels and inputs."""
    encoding: str
    """What it will be read as."""
    num_bytes: int
    """Of its stored tensors."""
    num_bits: int
    """8 or 4."""
    num_groups: int
    """Scales of an output channel."""
    values: tuple[SafetensorsFile, str]
    """Where the values are."""
    scale: tuple[SafetensorsFile, str]
    """Where the scales are."""
    zero: tuple[SafetensorsFile, str] | None
    """Where the zero points are."""

    def read(self) -> EncodedTensor:
        """Read it.

        Returns:
            The weight, in `encoding`, or in F32 where a scale is none that a half holds.

        Raises:
            FileFormatError: a scale is not finite.
        """
        values = self._read_values()
        scale = np.broadcast_to(_wide(*self.scale).reshape(-1, self.num_groups), (self.shape[0], self.num_groups))
        if not np.isfinite(scale).all():
            row = int(np.argmin(np.isfinite(scale).all(axis=1)))
            raise FileFormatError(
                f"{self.scale[0].path}: the scale of {shorten(self.name)}, row {row}, is not finite",
                remedy="quantise or download the model again",
            )
        zero = None if self.zero is None else self._read_zero(self.zero)
        if self.encoding == CHANNEL_ENCODING:
            return channel_integers(self.name, values, np.ascontiguousarray(scale[:, 0]))
        if self.encoding != "F32":
            try:
                return group_integers(self.name, values, scale, num_bits=self.num_bits, zero_point=zero)
            except ValueError:
                pass  # a scale that no half holds, or values beyond their bits: float32 holds them
        wide = values.reshape(self.shape[0], self.num_groups, -1).astype(np.float32)
        if zero is not None:
            wide -= zero[:, :, None]
        wide *= scale[:, :, None]
        return EncodedTensor(self.name, self.shape, "F32", wide.reshape(-1).view(np.uint8))

    def _read_values(self) -> np.ndarray:
        file, name = self.values
        data = file.data(name)
        if file.tensors[name].encoding == "I8":
            return data.view(np.int8).reshape(self.shape)
        return unpack_integers(data.reshape(self.shape[0], -1), self.num_bits, self.shape[1])

    def _read_zero(self, place: tuple[SafetensorsFile, str]) -> np.ndarray:
        file, name = place
        data = file.data(name)
        if file.tensors[name].encoding == "I8":
            found = data.view(np.int8).reshape(-1, self.num_groups)
            return np.broadcast_to(found, (self.shape[0], self.num_groups))
        words = data.view("<u4").reshape(-1, self.num_groups).T
        packed = np.ascontiguousarray(words).view(np.uint8)
        return np.ascontiguousarray(unpack_integers(packed, self.num_bits, self.shape[0]).T)


def unpack_integers(packed: np.ndarray, num_bits: int, count: int) -> np.ndarray:
    """Undo the packing of integers into words.

    Args:
        packed: uint8 [N, bytes], little-endian words.
        num_bits: 8 or 4.
        count: integers of a row.

    Returns:
        int8 [N, count].
    """
    if num_bits == 8:
        return (packed[:, :count] ^ 0x80).view(np.int8)
    values = np.empty((packed.shape[0], packed.shape[1] * 2), dtype=np.uint8)
    values[:, 0::2] = packed & 15
    values[:, 1::2] = packed >> 4
    return values[:, :count].view(np.int8) - np.int8(8)


def _wide(file: SafetensorsFile, name: str) -> np.ndarray:
    entry = file.tensors[name]
    return to_float32(EncodedTensor(name, entry.shape, entry.encoding, file.data(name)))


class Collector:
    """Joins the stored tensors of quantised weights.

    Args:
        entries: canonical name to stored tensor, everything in the folder.
        owners: where each of them is.
        settings: from config.json.
    """

    def __init__(self, entries: Mapping[str, StoredTensor], owners: Owners, settings: CompressedSettings) -> None:
        self._entries, self._owners, self._settings = entries, owners, settings

    def collect(self) -> dict[str, CompressedWeight | StoredTensor]:
        """Join them.

        Returns:
            Canonical name to weight, plain ones as they are; what has no place is left for the check of the shape.

        Raises:
            FileFormatError: tensors of one weight that do not fit together.
            UnsupportedModelError: inputs that were put in another order.
        """
        found: dict[str, CompressedWeight | StoredTensor] = dict(self._entries)
        for scale_name in [name for name in self._entries if name.endswith("weight" + _SCALE)]:
            name = scale_name.removesuffix(_SCALE)
            weight = self._join(name)
            for part in (name, *(name + part for part in (_SCALE, _ZERO, _PACKED, _SHAPE))):
                found.pop(part, None)
            found[name] = weight
        for name, entry in found.items():
            if isinstance(entry, StoredTensor) and entry.encoding not in _WIDE:
                if name.endswith("_g_idx"):
                    raise UnsupportedModelError(
                        f"the tensor {shorten(name)} puts inputs in another order", needed="actorder weight, or none"
                    )
                raise self._error(name, f"is {entry.encoding} and has no scale", "a weight_scale beside it")
        return found

    def _join(self, name: str) -> CompressedWeight:
        scale, zero = self._entries[name + _SCALE], self._entries.get(name + _ZERO)
        if scale.encoding not in _WIDE:
            raise self._error(name + _SCALE, f"is {scale.encoding}", "one of " + ", ".join(_WIDE))
        packed = self._entries.get(name + _PACKED)
        if packed is not None:
            place = name + _PACKED
            rows, inputs = self._packed_shape(name)
            num_bits = self._packed_bits(name, packed, rows, inputs)
        else:
            place = name
            if name not in self._entries:
                raise self._error(name, "is missing beside its scale", "a weight or weight_packed")
            stored = self._entries[name]
            if stored.encoding != "I8" or len(stored.shape) != 2 or 0 in stored.shape:
                raise self._error(name, f"is {stored.encoding} {stored.shape}", "I8 with two axes, beside a scale")
            (rows, inputs), num_bits = stored.shape, self._settings.weight_bits[-1]
        num_groups = self._num_groups(name, scale, rows, inputs)
        if zero is not None:
            packed_zero = (-(-rows * num_bits // 32), num_groups)
            good = zero.encoding == "I32" and zero.shape == packed_zero
            good |= zero.encoding == "I8" and zero.shape == scale.shape
            if not good:
                raise self._error(
                    name + _ZERO, f"is {zero.encoding} {zero.shape}", f"I32 {packed_zero}, or I8 as scales"
                )
        parts = [self._entries[part] for part in (place, name + _SCALE, name + _ZERO) if part in self._entries]
        return CompressedWeight(
            name=name,
            shape=(rows, inputs),
            encoding=self._encoding(num_bits, num_groups, inputs, zero is not None),
            num_bytes=sum(part.num_bytes for part in parts),
            num_bits=num_bits,
            num_groups=num_groups,
            values=self._owners[place],
            scale=self._owners[name + _SCALE],
            zero=None if zero is None else self._owners[name + _ZERO],
        )

    def _encoding(self, num_bits: int, num_groups: int, inputs: int, has_zero: bool) -> str:
        if num_bits == 8 and num_groups == 1 and not has_zero and self._settings.int8_activations:
            return CHANNEL_ENCODING
        if inputs % (BLOCK * num_groups) or (num_bits == 8 and has_zero):
            return "F32"
        return "Q8_0" if num_bits == 8 else "Q4_1" if has_zero else "Q4_0"

    def _packed_shape(self, name: str) -> tuple[int, int]:
        entry = self._entries.get(name + _SHAPE)
        if entry is None or entry.encoding not in ("I64", "I32") or entry.shape != (2,):
            found = "is missing" if entry is None else f"is {entry.encoding} {entry.shape}"
            raise self._error(name + _SHAPE, found, "I64 (2,)")
        file, stored_name = self._owners[name + _SHAPE]
        rows, inputs = (int(size) for size in file.data(stored_name).view("<i8" if entry.encoding == "I64" else "<i4"))
        if not (0 < rows < 1 << 31 and 0 < inputs < 1 << 31):
            raise self._error(name + _SHAPE, f"says {rows} x {inputs}", "sizes of a weight")
        return rows, inputs

    def _packed_bits(self, name: str, packed: StoredTensor, rows: int, inputs: int) -> int:
        for num_bits in self._settings.weight_bits:
            if packed.encoding == "I32" and packed.shape == (rows, -(-inputs * num_bits // 32)):
                return num_bits
        raise self._error(
            name + _PACKED,
            f"is {packed.encoding} {packed.shape}, its weight {rows} x {inputs}",
            f"I32 for {' or '.join(map(str, self._settings.weight_bits))} bits",
        )

    def _num_groups(self, name: str, scale: StoredTensor, rows: int, inputs: int) -> int:
        if scale.shape in ((), (1,), (1, 1), (rows,), (rows, 1)):
            return 1
        if len(scale.shape) == 2 and scale.shape[0] == rows and scale.shape[1] > 0 and inputs % scale.shape[1] == 0:
            return scale.shape[1]
        raise self._error(
            name + _SCALE,
            f"has the shape {scale.shape}, its weight {rows} x {inputs}",
            "a scale for every channel or for groups of inputs, all alike",
        )

    def _error(self, name: str, found: str, needed: str) -> FileFormatError:
        owner = self._owners.get(name)
        where = f"{owner[0].path}: " if owner is not None else ""
        return FileFormatError(
            f"{where}tensor {shorten(name)} {found}", needed=needed, remedy="quantise or download the model again"
        )
