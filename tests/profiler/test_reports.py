"""The files that a profile is written to, read back by other means than those that wrote them."""

from __future__ import annotations

import html.parser
import struct
from pathlib import Path
from typing import Any

import pytest

from dseek.profiler.html_report import html_report
from dseek.profiler.records import OperatorRecord, Profile, Roofs
from dseek.profiler.tensorboard import crc32c, write_scalars


def record(name: str, layer: int | None, seconds: float, **changes: Any) -> OperatorRecord:
    values: dict[str, Any] = {
        "name": name,
        "kind": "linear",
        "phase": "decode",
        "layer": layer,
        "place": f"layer {layer}",
        "calls": 2,
        "seconds": seconds,
        "flops": 4e6,
        "num_bytes": 1e6,
        "dtype": "i8c",
        "least_s": seconds / 2,
        "roof": "memory",
    }
    return OperatorRecord(**{**values, **changes})


def made(**changes: Any) -> Profile:
    operators = (
        record("down_proj", 0, 0.004),
        record("down_proj", 1, 0.002),
        record("<script>alert(1)</script>", 1, 0.001, kind="attention", least_s=None, roof=""),
        record("wait", 1, 0.001, kind="idle", flops=0.0, num_bytes=0.0, least_s=None, roof=""),
    )
    roofs = Roofs(bandwidth_gbs=20.0, peaks_gflops={"i8c": 500.0, "f32": 100.0})
    values: dict[str, Any] = {"title": "a & b", "machine": "m", "num_threads": 2, "wall_s": 0.01, "roofs": roofs}
    return Profile(**{"operators": operators, **values, **changes})


def test_sums_keep_what_they_are_of() -> None:
    profile = made()
    (down, *_rest) = profile.by_name()
    assert (down.name, down.calls, down.place) == ("down_proj", 4, "all layers")
    assert down.seconds == pytest.approx(0.006)
    assert down.roof_share == pytest.approx(0.5)
    first, second = profile.by_layer()
    assert (first.layer, second.layer) == (0, 1)
    assert second.seconds == pytest.approx(0.004)
    assert second.roof_share == pytest.approx(0.25)  # idle time lowers it
    assert second.calls == 2


class _Reader(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_report_is_whole_and_asks_for_nothing() -> None:
    text = html_report(made())
    reader = _Reader()
    reader.feed(text)
    assert not reader.open
    assert reader.tags.count("svg") == 2
    assert not {"script", "link", "img", "iframe"} & set(reader.tags)
    assert not [name for name, _ in reader.attributes if name in ("src", "href", "onload")]
    assert "url(" not in text
    assert "@import" not in text
    assert "http" not in text
    assert "<script>alert(1)</script>" in reader.text  # as text
    assert "prefers-color-scheme: dark" in text


def test_the_report_goes_without_roofs_or_layers() -> None:
    bare = made(roofs=None, operators=(record("python", None, 0.01, kind="idle", flops=0.0, num_bytes=0.0),))
    reader = _Reader()
    reader.feed(html_report(bare))
    assert "svg" not in reader.tags


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        shift += 7
        at += 1
        if data[at - 1] < 128:
            return value, at


def _message(data: bytes) -> dict[int, Any]:
    """Decode a protocol buffer by its wire types alone."""
    fields: dict[int, Any] = {}
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        match key & 7:
            case 0:
                fields[key >> 3], at = _varint(data, at)
            case 1:
                fields[key >> 3], at = struct.unpack_from("<d", data, at)[0], at + 8
            case 5:
                fields[key >> 3], at = struct.unpack_from("<f", data, at)[0], at + 4
            case 2:
                size, at = _varint(data, at)
                fields[key >> 3], at = data[at : at + size], at + size
    return fields


def _unmasked(word: bytes) -> int:
    rotated = (struct.unpack("<I", word)[0] - 0xA282EAD8) & 0xFFFFFFFF
    return (rotated >> 17 | rotated << 15) & 0xFFFFFFFF


def test_event_files_are_read_back(tmp_path: Path) -> None:
    assert crc32c(b"123456789") == 0xE3069283  # the check value of CRC-32C
    path = write_scalars(made(), tmp_path / "run", step=300)
    data, at = path.read_bytes(), 0
    scalars: dict[tuple[str, int], float] = {}
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        body = data[at + 12 : at + 12 + length]
        assert _unmasked(data[at + 8 : at + 12]) == crc32c(data[at : at + 8])
        assert _unmasked(data[at + 12 + length : at + 16 + length]) == crc32c(body)
        event = _message(body)
        if 3 in event:
            assert (at, event[3]) == (0, b"brain.Event:2")
        else:
            value = _message(_message(event[5])[1])
            scalars[value[1].decode(), event.get(2, 0)] = value[2]
        at += 16 + length
    assert scalars["decode/roof_share", 0] == pytest.approx(0.5)
    assert scalars["decode/roof_share", 1] == pytest.approx(0.25)
    assert scalars["decode/layer_01/milliseconds", 300] == pytest.approx(4.0)
    assert scalars["decode/gflops", 0] == pytest.approx(1.0)
