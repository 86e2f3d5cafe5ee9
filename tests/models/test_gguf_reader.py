"""The GGUF reader against the `gguf` package, and what it refuses."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterable
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dseek.core.errors import DseekError, FileFormatError, UnsupportedModelError
from dseek.models import gguf_strings
from dseek.models.gguf_reader import ENCODINGS, GgufFile
from dseek.models.gguf_strings import StringArray, read_string_array
from dseek.ops.tensor import BLOCK_SIZES
from tests.models import gguf_building


def test_reads_what_the_gguf_package_reads(embedded_model: Path) -> None:
    ours, theirs = GgufFile(embedded_model), gguf.GGUFReader(str(embedded_model))
    keys = [key for key in theirs.fields if not key.startswith("GGUF.")]
    assert list(ours.metadata) == keys
    for key in keys:
        value = ours.metadata[key]
        assert (list(value) if isinstance(value, (StringArray, np.ndarray)) else value) == theirs.fields[key].contents()
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        stored = ours.tensors[tensor.name]
        assert stored.shape == tuple(reversed(tensor.shape.tolist()))
        assert (stored.encoding, stored.offset) == (tensor.tensor_type.name, tensor.data_offset)
        assert np.array_equal(ours.data(tensor.name), tensor.data.view(np.uint8).reshape(-1))
    pairs = ours.metadata["tokenizer.ggml.merges"].to_pairs()
    assert [" ".join(pair) for pair in pairs] == theirs.fields["tokenizer.ggml.merges"].contents()


def test_encodings_are_those_of_the_gguf_package() -> None:
    for number, name in ENCODINGS.items():
        kind = gguf.GGMLQuantizationType(number)
        assert kind.name == name
        assert gguf.GGML_QUANT_SIZES[kind] == BLOCK_SIZES[name]
    assert set(ENCODINGS.values()) == set(BLOCK_SIZES)


def test_every_value_type(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "x.gguf"), "llama")
    values = {
        "u8": 200, "i8": -3, "u16": 60_000, "i16": -300, "u32": 1 << 31, "i32": -5, "u64": 1 << 63, "i64": -(1 << 40),
        "f32": 0.5, "f64": 0.1, "yes": True, "no": False, "text": "naïve 🙂", "empty": "",
    }  # fmt: skip
    for key, add in {
        "u8": writer.add_uint8, "i8": writer.add_int8, "u16": writer.add_uint16, "i16": writer.add_int16,
        "u32": writer.add_uint32, "i32": writer.add_int32, "u64": writer.add_uint64, "i64": writer.add_int64,
        "f32": writer.add_float32, "f64": writer.add_float64, "yes": writer.add_bool, "no": writer.add_bool,
        "text": writer.add_string, "empty": writer.add_string,
    }.items():  # fmt: skip
        add(key, values[key])
    for key, array in {"a": [1, 2, 3], "b": [0.5, 1.5], "c": ["x", "", "yz"], "d": [True, False]}.items():
        writer.add_array(key, array)
        values[key] = array
    writer.add_custom_alignment(64)
    writer.add_tensor("one", np.arange(7, dtype=np.float32))
    writer.add_tensor("two", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile(tmp_path / "x.gguf")
    # The writer drops an empty string.
    assert {key: file.metadata[key] for key in values if key != "empty"} == {
        key: value for key, value in values.items() if key != "empty"
    }
    assert file.tensors["two"].shape == (2, 3)
    assert file.tensors["two"].offset % 64 == 0
    assert file.data("two").view(np.float32).tolist() == [0, 1, 2, 3, 4, 5]


def _records(strings: Iterable[str]) -> bytes:
    return b"".join(struct.pack("<Q", len(data)) + data for data in (text.encode() for text in strings))


def _read(data: bytes, count: int) -> tuple[StringArray, int]:
    buffer = mmap.mmap(-1, len(data))
    buffer.write(data)
    return read_string_array(buffer, 0, count, "strings")


_STRINGS = st.lists(
    st.one_of(st.text(st.characters(exclude_categories=["Cs"]), max_size=12), st.just("\0" * 9), st.just("x" * 300)),
    max_size=20,
)


@settings(max_examples=150, deadline=None)
@given(_STRINGS, st.binary(max_size=40), st.booleans())
def test_string_arrays_of_any_kind(strings: list[str], behind: bytes, many: bool) -> None:
    strings = strings + [f"token{i}" for i in range(200)] * many
    records = _records(strings)
    array, end = _read(records + behind + b"\x01", len(strings))
    assert end == len(records)
    assert array.to_list() == strings
    assert array[:3] == strings[:3]
    assert [array[i] for i in range(len(array))] == strings


@pytest.mark.parametrize("special", ["", "\0", "x" * 255, "x" * 256, "x" * 70_000, "\u0120" * 128])
def test_string_arrays_at_the_edges_of_the_fast_path(special: str) -> None:
    strings = [f"t{i}" for i in range(100)] + [special] + [f"u{i}" for i in range(100)]
    array, end = _read(_records(strings) + b"\0\0\0\0", len(strings))
    assert array.to_list() == strings
    assert end == len(_records(strings))


@pytest.mark.parametrize("lead", range(18))
def test_long_string_arrays_are_found_without_walking(lead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_strings, "_walk", None)
    # Several windows; `lead` moves every place that a record can have at their edges.
    strings = ["x" * lead, *(f"token{i:04}" for i in range(9000)), "y" * 300]
    records = _records(strings)
    for behind in (b"", b"\1" + bytes(100)):
        array, end = _read(records + behind, len(strings))
        assert end == len(records)
        assert array.to_list() == strings


def test_a_chain_that_breaks_late_is_walked() -> None:
    strings = [f"token{i}" for i in range(9000)] + ["\0" * 20, "z"]
    array, end = _read(_records(strings), len(strings))
    assert array.to_list() == strings
    assert end == len(_records(strings))
    with pytest.raises(FileFormatError, match="over the end"):
        _read(_records(strings)[:-9] + struct.pack("<Q", 2) + b"z", len(strings))


def test_merges_become_pairs() -> None:
    strings = [f"a{i} b{i}" for i in range(100)]
    array, _ = _read(_records(strings), 100)
    assert array.to_pairs() == [(f"a{i}", f"b{i}") for i in range(100)]
    for wrong in ("a b c", "ab", "a\0b", ""):
        array, _ = _read(_records([*strings, wrong, "a b"]), 102)
        with pytest.raises(FileFormatError, match="two parts"):
            array.to_pairs()


def _preamble(num_tensors: int = 0, num_entries: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_entries)


def _text(text: str) -> bytes:
    return _records([text])


def _tensor(name: str, sizes: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return _text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


BROKEN = {
    "empty": (b"", "empty"),
    "magic": (b"GGML" + bytes(60), "starts with"),
    "short": (b"GGUF\x03", "ends inside"),
    "entries": (_preamble(0, 1 << 60), "claims"),
    "tensors": (_preamble(1 << 60, 0), "claims"),
    "key too long": (_preamble(0, 1) + struct.pack("<Q", 1 << 62), "bytes long"),
    "key twice": (_preamble(0, 2) + 2 * (_text("a") + struct.pack("<IB", 0, 1)), "twice"),
    "key bytes": (_preamble(0, 1) + struct.pack("<Q", 2) + b"\xff\xfe" + bytes(8), "UTF-8"),
    "unknown type": (_preamble(0, 1) + _text("a") + struct.pack("<I", 99), "unknown type"),
    "bool": (_preamble(0, 1) + _text("a") + struct.pack("<IB", 7, 2), "boolean"),
    "array length": (_preamble(0, 1) + _text("a") + struct.pack("<IIQ", 9, 4, 1 << 62), "claims"),
    "array beyond": (_preamble(0, 1) + _text("a") + struct.pack("<IIQ", 9, 4, 1000), "more than"),
    "strings beyond": (_preamble(0, 1) + _text("a") + struct.pack("<IIQ", 9, 8, 1000), "more than"),
    "string beyond": (_preamble(0, 1) + _text("a") + struct.pack("<IIQQQ", 9, 8, 2, 2, 9), "over the end"),
    "nested array": (_preamble(0, 1) + _text("a") + struct.pack("<IIQ", 9, 9, 1), "array of the type"),
    "alignment": (_preamble(0, 1) + _text("general.alignment") + struct.pack("<II", 4, 24), "power of two"),
    "dimensions": (_preamble(1) + _tensor("t", [2] * 5) + bytes(64), "dimensions"),
    "zero size": (_preamble(1) + _tensor("t", [0, 4]) + bytes(64), "shape"),
    "huge size": (_preamble(1) + _tensor("t", [1 << 40, 1 << 40]) + bytes(64), "shape"),
    "block": (_preamble(1) + _tensor("t", [33], 8) + bytes(64), "multiple of 32"),
    "offset": (_preamble(1) + _tensor("t", [4], offset=8) + bytes(64), "multiple of 32"),
    "far offset": (_preamble(1) + _tensor("t", [4], offset=1 << 63) + bytes(64), "ends at byte"),
    "truncated": (_preamble(1) + _tensor("t", [32]) + bytes(96), "ends at byte"),
    "overlap": (_preamble(2) + _tensor("t", [16]) + _tensor("u", [8], offset=32) + bytes(128), "overlap"),
    "name twice": (_preamble(2) + _tensor("t", [8]) + _tensor("t", [8], offset=32) + bytes(128), "twice"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_refused_by_name(tmp_path: Path, case: str) -> None:
    data, message = BROKEN[case]
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(FileFormatError, match=message):
        GgufFile(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (_preamble(version=1), "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (_preamble(1) + _tensor("t", [256], 16) + bytes(400), "ggml type 16"),
    ],
)
def test_what_is_not_read_is_named(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(UnsupportedModelError, match=message):
        GgufFile(tmp_path / "x.gguf")


def test_every_truncation_of_a_model_is_refused(tmp_path: Path) -> None:
    gguf_building.write_model(tmp_path / "m.gguf")
    whole = (tmp_path / "m.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [*range(0, 2000, 13), *range(2000, len(whole) - 32, 4999)]:
        cut.write_bytes(whole[:length])
        with pytest.raises(DseekError):
            GgufFile(cut)


def test_close_waits_for_views(tmp_path: Path) -> None:
    gguf_building.write_model(tmp_path / "m.gguf")
    file = GgufFile(tmp_path / "m.gguf")
    view = file.data("output_norm.weight")
    file.close()
    assert view.view(np.float32).size == gguf_building.SIZES["hidden"]
