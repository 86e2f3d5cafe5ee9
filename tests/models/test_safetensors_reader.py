"""The safetensors reader against the safetensors package, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dseek.core.errors import FileFormatError, UnsupportedModelError
from dseek.models.safetensors_reader import MAX_HEADER_BYTES, SafetensorsFile


def test_reads_what_the_safetensors_package_writes(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "a": torch.randn(3, 5, generator=generator),
        "b.weight": torch.randn(7, generator=generator).to(torch.bfloat16),
        "naïve": torch.randn(2, 2, 2, generator=generator).to(torch.float16),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 4),
    }
    save_file(tensors, str(tmp_path / "x.safetensors"), metadata={"format": "pt"})
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert file.metadata == {"format": "pt"}
    assert set(file.tensors) == set(tensors)
    for name, tensor in tensors.items():
        stored = file.tensors[name]
        assert stored.shape == tuple(tensor.shape)
        assert stored.encoding == {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[tensor.dtype]
        assert file.data(name).tobytes() == tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    file.close()


def _file(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def _entry(start: int, end: int, shape: Any = None, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - start) // 4] if shape is None else shape, "data_offsets": [start, end]}


BROKEN = {
    "empty": (b"", "empty"),
    "short": (b"\x01\x00", "bytes long"),
    "length": (_file({}, length=1 << 62), "claims"),
    "header over the limit": (_file({}, length=MAX_HEADER_BYTES + 1), "claims"),
    "no object": (_file(b"[1]"), "JSON object"),
    "no json": (_file(b'{"a": '), "no JSON"),
    "not utf-8": (_file(b'{"\xff": 1}'), "no JSON"),
    "deep": (_file(b'{"a":' * 100_000), "no JSON"),
    "huge number": (_file(b'{"a":' + b"9" * 10_000 + b"}"), "no JSON"),
    "name twice": (_file(b'{"a": 1, "a": 2}'), "twice"),
    "metadata": (_file({"__metadata__": {"a": 1}}), "__metadata__"),
    "entry": (_file({"a": [1]}), "described by"),
    "missing key": (_file({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)), "described by"),
    "another key": (_file({"a": _entry(0, 4) | {"x": 1}}, bytes(4)), "described by"),
    "negative size": (_file({"a": _entry(0, 4, [-1, -1])}, bytes(4)), "shape"),
    "float size": (_file({"a": _entry(0, 4, [1.0])}, bytes(4)), "shape"),
    "boolean size": (_file({"a": _entry(0, 4, [True])}, bytes(4)), "shape"),
    "text size": (_file({"a": _entry(0, 4, "1")}, bytes(4)), "shape"),
    "many dimensions": (_file({"a": _entry(0, 4, [1] * 9)}, bytes(4)), "shape"),
    "huge shape": (_file({"a": _entry(0, 4, [1 << 62] * 4)}, bytes(4)), "as many as"),
    "wrong size": (_file({"a": _entry(0, 8, [1])}, bytes(8)), "as many as"),
    "backwards": (_file({"a": _entry(8, 4, [1])}, bytes(8)), "data_offsets"),
    "outside": (_file({"a": _entry(0, 8)}, bytes(4)), "data_offsets"),
    "overlap": (_file({"a": _entry(0, 8), "b": _entry(4, 12)}, bytes(12)), "overlaps"),
    "hole": (_file({"a": _entry(0, 4), "b": _entry(8, 12)}, bytes(12)), "hole"),
    "more data": (_file({"a": _entry(0, 4)}, bytes(8)), "end at byte"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_refused_by_name(tmp_path: Path, case: str) -> None:
    data, message = BROKEN[case]
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(FileFormatError, match=message):
        SafetensorsFile(tmp_path / "x.safetensors")


@pytest.mark.parametrize("dtype", ["I8", "F8_E4M3", "F64", "BOOL", "nonsense", 3, None])
def test_dtypes_that_are_not_run_are_named(tmp_path: Path, dtype: Any) -> None:
    (tmp_path / "x.safetensors").write_bytes(_file({"a": _entry(0, 4, dtype=dtype)}, bytes(4)))
    with pytest.raises(UnsupportedModelError, match="dtype"):
        SafetensorsFile(tmp_path / "x.safetensors")


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(5, 5), "b": torch.ones(3)}, str(tmp_path / "x.safetensors"))
    whole = (tmp_path / "x.safetensors").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "x.safetensors").write_bytes(whole[:length])
        with pytest.raises(FileFormatError):
            SafetensorsFile(tmp_path / "x.safetensors")


def test_views_outlive_the_file(tmp_path: Path) -> None:
    save_file({"a": torch.ones(5)}, str(tmp_path / "x.safetensors"))
    file = SafetensorsFile(tmp_path / "x.safetensors")
    data = file.data("a")
    file.close()
    assert data.view(np.float32).tolist() == [1.0] * 5
