"""The hook between storing keys and attending to them: once a layer, never a hang, and errors come out whole."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dseek import plan as planning
from dseek.core.attention_pattern import AttentionPattern
from dseek.engine.batch import Batch
from dseek.engine.build import build_runner
from dseek.engine.native_runner import NativeRunner
from dseek.models.files import open_model
from tests.models import tiny
from tests.plan.machines import machine

pytestmark = pytest.mark.native

PATTERN = AttentionPattern(kind="dynamic", window_tokens=(64,), top_blocks=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama-odd-sizes", tmp_path_factory.mktemp("exchange"))


@pytest.fixture(params=[1, 2, 3], ids=lambda threads: f"{threads} threads")
def runner(folder: Path, request: pytest.FixtureRequest) -> Iterator[NativeRunner]:
    with open_model(str(folder)) as files:
        plan = planning.make(
            files.shape,
            machine(),
            planning.Objective(context_tokens=128, batch=1),
            encodings=files.encodings(),
            precision="fp32",
            num_threads=1,
        )
        patterns = (PATTERN,) * files.shape.num_layers
        plan = dataclasses.replace(plan, attention_patterns=patterns, num_threads=request.param)
        made = build_runner(files, plan)
    assert isinstance(made, NativeRunner)
    yield made
    made.close()


def batch_of(num_rows: int, first: int = 0) -> Batch:
    return Batch(
        np.array(tiny.token_ids(num_rows, seed=first), dtype=np.int32),
        np.arange(first, first + num_rows, dtype=np.int32),
        np.array([0, num_rows], dtype=np.int32),
        np.array([[0, 1]], dtype=np.int32),
        np.array([num_rows - 1], dtype=np.int32),
    )


@pytest.mark.parametrize("num_rows", [1, 9, 100])
def test_it_comes_once_a_layer_after_the_layers_keys(runner: NativeRunner, num_rows: int) -> None:
    batch = batch_of(num_rows)
    expected = runner.forward(batch).copy()
    pages = runner.cache_pages()
    whole = pages.copy()
    pages[:] = 0
    seen = []

    def exchange(layer: int) -> None:
        seen.append(layer)
        np.testing.assert_array_equal(pages[:, layer], whole[:, layer])
        assert not pages[:, layer + 1 :].any()

    np.testing.assert_array_equal(runner.forward_part(batch, batch, exchange), expected)
    assert seen == [0, 1, 2]


def test_what_it_writes_is_attended_to(runner: NativeRunner) -> None:
    """Two pieces of a text computed in turn, each given the other's pages, are the text."""
    whole = batch_of(100)
    expected = runner.forward(whole).copy()
    pages = runner.cache_pages()
    kept = pages.copy()
    pages[:] = 0
    starts = np.array([0, 36], dtype=np.int32)
    last = Batch(whole.token_ids[64:], whole.positions[64:], starts, whole.page_tables, whole.logit_rows - 64)

    def exchange(layer: int) -> None:
        pages[0, layer] = kept[0, layer]

    np.testing.assert_array_equal(runner.forward_part(last, whole, exchange), expected)
    assert np.abs(runner.forward_part(last, whole, lambda layer: pages[0, layer].fill(0)) - expected).max() > 1e-3


@pytest.mark.parametrize("num_rows", [1, 9, 100])
@pytest.mark.parametrize("layer", [0, 2])
def test_its_error_ends_the_call_and_nothing_else(runner: NativeRunner, num_rows: int, layer: int) -> None:
    batch = batch_of(num_rows)
    expected = runner.forward(batch).copy()

    def exchange(at: int) -> None:
        if at == layer:
            raise ZeroDivisionError(f"layer {at}")

    for _ in range(3):
        with pytest.raises(ZeroDivisionError, match=f"layer {layer}"):
            runner.forward_part(batch, batch, exchange)
    np.testing.assert_array_equal(runner.forward(batch), expected)


def test_it_may_not_call_the_decoder_that_waits_for_it(runner: NativeRunner) -> None:
    batch = batch_of(70)
    with pytest.raises(ValueError, match="an exchange may not call the decoder"):
        runner.forward_part(batch, batch, lambda layer: runner.forward(batch))


def test_another_thread_that_waits_for_the_decoder_holds_nobody_up(runner: NativeRunner) -> None:
    batch = batch_of(70)
    expected = runner.forward(batch).copy()
    found: list[Any] = []
    asked = threading.Event()

    def ask() -> None:
        asked.set()
        found.append(runner.selection(0, 0, batch.page_tables[0], 1))

    thread = threading.Thread(target=ask)

    def exchange(layer: int) -> None:
        if layer == 0:
            thread.start()
            asked.wait()

    np.testing.assert_array_equal(runner.forward_part(batch, batch, exchange), expected)
    thread.join()
    assert found == [([0, 1], [])]


def test_wholes_are_checked(runner: NativeRunner) -> None:
    batch = batch_of(70)
    arrays = (batch.token_ids, batch.positions, batch.row_starts, batch.page_tables, batch.logit_rows)
    decoder: Any = runner._decoder
    for span, pages, message in (
        ([[0, 70]], [[0, 99]], "page 99 is out of range"),
        ([[0, 129]], [[0, 1]], "position 128 is out of range"),
        ([[70, 70]], [[0, 1]], "out of range"),
        ([[-1, 70]], [[0, 1]], "position -1"),
        ([[0, 70]], [[0]], "as wide as those of the rows"),
        ([[0, 70, 1]], [[0, 1]], r"\[sequences, 2\]"),
        ([[0, 70]], [[0, 1], [0, 1]], "as many page tables"),
    ):
        wholes = np.array(span, dtype=np.int32), np.array(pages, dtype=np.int32)
        with pytest.raises(ValueError, match=message):
            decoder.forward(*arrays, wholes=wholes)
    narrow = dataclasses.replace(batch_of(9), page_tables=np.array([[0]], dtype=np.int32))
    with pytest.raises(ValueError, match="fewer pages"):
        runner.forward_part(narrow, dataclasses.replace(batch_of(70), page_tables=narrow.page_tables), print)


def test_a_shown_cache_outlives_the_runner_and_stays_where_it_is(runner: NativeRunner) -> None:
    runner.forward(batch_of(70))
    pages, decoder = runner.cache_pages(), runner._decoder
    assert decoder is not None
    with pytest.raises(ValueError, match="allocated anew"):
        decoder.allocate_cache(3)
    del decoder
    runner.close()
    assert pages[0, 0].any()
