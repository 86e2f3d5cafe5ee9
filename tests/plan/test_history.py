"""Past benchmarks: kept, bounded, robust, and no danger."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

from dseek import plan as planning
from dseek.plan import history
from dseek.plan.history import Entry
from tests.plan.machines import SMALL, machine


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DSEEK_CACHE_DIR", str(tmp_path))
    return tmp_path


def entry(ratio: float = 1.2, **changes: object) -> Entry:
    values: dict[str, object] = {
        "version": history.VERSION,
        "dseek": "1",
        "machine_id": "ab12",
        "phase": "decode",
        "kernels": "native",
        "weight_format": "i8c",
        "predicted_s": 0.01,
        "measured_s": 0.01 * ratio,
        "context_tokens": 128,
        "batch": 1,
    }
    return Entry(**{**values, **changes})  # type: ignore[arg-type]


def test_the_median_decides_and_few_do_not() -> None:
    history.append([entry(1.2), entry(1.3), entry(90.0)])
    (found,) = history.corrections(history.read("ab12"), "1")
    assert found.factor == pytest.approx(1.3)
    assert found.num_entries == 3
    assert history.corrections(history.read("ab12")[:2], "1") == []
    assert history.corrections(history.read("ab12"), "2") == []
    assert history.read("cd34") == []
    wild = [entry(1000.0, phase="prefill")] * 3
    (clamped,) = history.corrections(wild, "1")
    assert clamped.factor == history.LIMITS[1]


def test_foreign_and_broken_lines_are_left_out() -> None:
    history.append([entry()])
    path = history.path_of("ab12")
    good = path.read_text()
    forged = [
        good.replace("ab12", "ffff"),
        good.replace('"measured_s":0.012', '"measured_s":1e999'),
        good.replace('"measured_s":0.012', '"measured_s":-1.0'),
        good.replace('"version":1', '"version":99'),
        "[" * 5000 + "\n",
        '{"a":' + '"x' * 3000 + '"}\n',
        "\x00\xff\n",
    ]
    path.write_bytes(
        "".join(forged).encode("utf-8", "surrogateescape") + b"\xff\xfe\n" + good.encode() + b'{"version":1,"ds'
    )
    assert len(history.read("ab12")) == 1
    history.append([entry(1.5)])  # behind a line that was cut short
    assert [round(one.measured_s, 4) for one in history.read("ab12")] == [0.012, 0.015]


def test_the_file_stays_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "MAX_FILE_BYTES", 2000)
    for count in range(40):
        history.append([entry(1 + count / 100)])
    assert history.path_of("ab12").stat().st_size <= 2000 + 300
    assert history.read("ab12")[-1].measured_s == pytest.approx(0.01 * 1.39)


def test_links_and_pipes_are_not_followed(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = history.path_of("ab12")
    path.parent.mkdir()
    secret = cache / "other"
    secret.write_text("kept")
    path.symlink_to(secret)
    history.append([entry()])
    assert secret.read_text() == "kept"
    assert history.read("ab12") == []
    path.unlink()
    os.mkfifo(path)
    assert history.read("ab12") == []
    assert history.append([entry(machine_id="../../etc")]) is None
    assert not (cache / "etc.jsonl").exists()


def test_a_corrected_machine_predicts_the_measured_times() -> None:
    objective = planning.Objective(context_tokens=512)
    plan = planning.make(SMALL, machine(), objective, encodings={"BF16": 1}, precision="int8")
    name = history.main_format(plan)
    found = [
        history.Correction(phase=phase, kernels="native", weight_format=name, factor=factor, num_entries=3)
        for phase, factor in (("prefill", 1.5), ("decode", 2.0))
    ]
    case = {"prompt_tokens": 384, "context_tokens": 384, "batch": 1}
    before = plan.predict(machine(), **case)
    after = plan.predict(history.corrected(machine(), found), **case)
    assert before.prefill_tokens_s / after.prefill_tokens_s == pytest.approx(1.5, rel=0.1)
    assert before.decode_tokens_s / after.decode_tokens_s == pytest.approx(2.0, rel=0.15)
    assert history.corrected(machine(), []) is machine()
    assert json.loads(dataclasses.replace(machine()).to_json())  # the measurements themselves stay as they are
