"""Plain data to dataclasses, strictly."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dseek.core import config
from dseek.core.errors import ConfigError
from dseek.core.shape import ModelShape


@dataclass(frozen=True, kw_only=True, slots=True)
class Inner:
    width: int
    scale: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Outer:
    name: str
    inner: Inner
    kind: Literal["a", "b"] = "a"
    sizes: tuple[int, ...] = ()
    pair: tuple[int, str] = (1, "x")
    maybe: int | None = None
    either: int | str = 0
    folder: Path = Path(".")
    table: dict[str, float] = field(default_factory=dict)
    flag: bool = False


FULL = {
    "name": "n",
    "inner": {"width": 3, "scale": 2},
    "kind": "b",
    "sizes": [1, 2],
    "pair": [4, "y"],
    "maybe": None,
    "either": "text",
    "folder": "/tmp",
    "table": {"k": 1},
    "flag": True,
}


def test_every_kind_of_field_goes_there_and_back() -> None:
    outer = config.from_mapping(Outer, FULL)
    assert outer == Outer(
        name="n",
        inner=Inner(width=3, scale=2.0),
        kind="b",
        sizes=(1, 2),
        pair=(4, "y"),
        either="text",
        folder=Path("/tmp"),
        table={"k": 1.0},
        flag=True,
    )
    assert config.from_mapping(Outer, config.to_plain(outer)) == outer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nmae": "x"}, "did you mean 'name'"),
        ({"name": 3}, "name is 3; needed: a text"),
        ({"inner": {}}, "inner.width is missing"),
        ({"inner": {"width": 1, "sacle": 2}}, "did you mean 'scale'"),
        ({"inner": {"width": True}}, "inner.width is True"),
        ({"inner": {"width": 1.0}}, "whole number"),
        ({"inner": {"width": 1, "scale": float("inf")}}, "inner.scale"),
        ({"inner": {"width": 1, "scale": 10**400}}, "inner.scale"),
        ({"inner": [1]}, "a table of width, scale"),
        ({"kind": "c"}, "one of a, b"),
        ({"sizes": [1, "2"]}, r"sizes\[1\] is '2'"),
        ({"sizes": 3}, "a list of a whole number"),
        ({"pair": [1]}, "a list of 2 values"),
        ({"maybe": "x"}, "maybe is 'x'"),
        ({"either": 1.5}, "a whole number or a text"),
        ({"table": {"k": "v"}}, "table.k"),
        ({"table": {1: 2.0}}, "table"),
        ({"flag": 1}, "true or false"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.from_mapping(Outer, {**FULL, **change})


def test_missing_key_and_wrong_root() -> None:
    with pytest.raises(ConfigError, match="name is missing"):
        config.from_mapping(Outer, {"inner": {"width": 1}})
    with pytest.raises(ConfigError, match="a table of name"):
        config.from_mapping(Outer, [])


def test_model_shape_goes_there_and_back() -> None:
    shape = ModelShape(
        family="llama",
        vocab_size=10,
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        max_position_embeddings=128,
        window_layers=(True, False),
        eos_token_ids=(1, 2),
    )
    assert config.from_mapping(ModelShape, config.to_plain(shape)) == shape


@pytest.mark.parametrize("text", ["{", "[1,]", '{"a": NaN}', '{"a": 1, "a": 2}', "[" * 100_000, "1" * 5000, ""])
def test_strict_json(text: str) -> None:
    with pytest.raises(ConfigError, match="where"):
        config.parse_json(text, where="where")


def test_toml_and_json_files(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('name = "n"\n[inner]\nwidth = 2\n')
    assert config.load_toml(Outer, path).inner.width == 2
    path.write_text("name = ")
    with pytest.raises(ConfigError, match="is not TOML"):
        config.load_toml(Outer, path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        config.load_toml(Outer, path)
    with pytest.raises(ConfigError, match="cannot be read"):
        config.load_json(Outer, tmp_path / "none.json")
    path.write_text('{"name": "n", "inner": {"width": 5}}')
    assert config.load_json(Outer, path).inner.width == 5


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(list(FULL)), _JSON))
def test_anything_is_read_or_refused(change: dict[str, Any]) -> None:
    try:
        config.from_mapping(Outer, {**FULL, **change})
    except ConfigError:
        return
