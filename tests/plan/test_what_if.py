"""Planning past this machine: published counts, costs that add up, and the memory of training by its papers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks.published import ACTIVE, PARAMETERS, TRAINING_FLOPS
from dseek.cli.main import main
from dseek.core.errors import ConfigError, MemoryLimitError, UnsupportedModelError
from dseek.plan import training_memory, what_if
from dseek.plan.devices import DeviceMachine, from_measured, load_machine
from dseek.plan.outline import Outline, known_names, outline_of, read_outline
from dseek.plan.what_if import Split
from tests.plan.machines import machine


@pytest.fixture(scope="module")
def a100x8() -> DeviceMachine:
    return load_machine("a100x8")


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_those_published(name: str) -> None:
    assert read_outline(name).num_parameters() == pytest.approx(PARAMETERS[name], rel=0.02)


@pytest.mark.parametrize("name", ACTIVE)
def test_active_parameters_are_those_published(name: str) -> None:
    outline, (published, with_embedding) = read_outline(name), ACTIVE[name]
    table = outline.vocab_size * outline.hidden_size if with_embedding else 0
    assert outline.num_parameters(active=True) + table == pytest.approx(published, rel=0.02)


@pytest.mark.parametrize("name", TRAINING_FLOPS)
def test_operations_are_those_published(name: str) -> None:
    sequence, flops = TRAINING_FLOPS[name]
    assert read_outline(name).training_flops_per_token(sequence) == pytest.approx(flops, rel=0.02)


def test_an_outline_counts_as_the_shape_of_a_model_that_runs() -> None:
    from tests.plan.machines import MIDDLING, UNSEEN

    for shape in (MIDDLING, UNSEEN):
        data = {
            "model_type": "qwen3" if shape.qk_norm else "llama",
            "vocab_size": shape.vocab_size,
            "hidden_size": shape.hidden_size,
            "intermediate_size": shape.intermediate_size,
            "num_hidden_layers": shape.num_layers,
            "num_attention_heads": shape.num_heads,
            "num_key_value_heads": shape.num_kv_heads,
            "head_dim": shape.head_dim,
            "tie_word_embeddings": shape.tie_word_embeddings,
        }
        assert outline_of(data, "m").num_parameters() == shape.num_parameters()


def test_one_device_reads_its_weights_and_cache(a100x8: DeviceMachine) -> None:
    outline = read_outline("llama-3.1-8b")
    alone = dataclasses.replace(a100x8, num_devices=1)
    point = what_if.predict(outline, alone, Split(), batch=1, context_tokens=1000)
    read = 2 * outline.num_parameters(active=True) + 1000 * 2 * outline.cache_elements_per_token()
    starts = (outline.num_layers * what_if.OPERATORS_PER_LAYER + 1) * alone.device.operator_s
    assert point.step_s == pytest.approx(read / alone.device.bytes_s + starts, rel=1e-3)
    assert point.communication_s == 0
    assert point.weights_bytes == pytest.approx(2 * outline.num_parameters(), rel=1e-3)


def test_links_cost_what_their_formulas_say(a100x8: DeviceMachine) -> None:
    outline = read_outline("llama-3.1-70b")
    batch, link = 16, a100x8.link
    assert link is not None
    point = what_if.predict(outline, a100x8, Split(tensor=8), batch=batch, context_tokens=512)
    one = 2 * 7 / 8 * 2 * batch * outline.hidden_size / (link.bandwidth_gbs * 1e9) + 2 * 3 * link.latency_s
    assert point.communication_s == pytest.approx(outline.num_layers * 2 * one)
    slow = dataclasses.replace(a100x8, link=dataclasses.replace(link, latency_s=1e-3))
    assert what_if.predict(outline, slow, Split(tensor=8), batch=batch, context_tokens=512).step_s > 2 * point.step_s
    halves = what_if.predict(outline, a100x8, Split(pipeline=8), batch=batch, context_tokens=512)
    assert halves.weights_bytes == pytest.approx(point.weights_bytes, rel=0.1)
    assert halves.communication_s < point.communication_s


def test_experts_are_read_as_far_as_tokens_meet_them(a100x8: DeviceMachine) -> None:
    outline = read_outline("qwen3-30b-a3b")
    times = [
        what_if.predict(outline, a100x8, Split(), batch=batch, context_tokens=1).step_s for batch in (1, 16, 512, 1024)
    ]
    active, everything = outline.num_parameters(active=True), outline.num_parameters(with_embedding=False)
    starts = (outline.num_layers * what_if.OPERATORS_PER_LAYER + 1) * a100x8.device.operator_s
    assert times[0] - starts == pytest.approx(2 * active / a100x8.device.bytes_s, rel=0.02)
    assert times[2] - starts == pytest.approx(2 * everything / a100x8.device.bytes_s, rel=0.1)
    assert times == sorted(times)


def test_the_best_batch_has_the_least_time_a_token(a100x8: DeviceMachine) -> None:
    points = what_if.search(read_outline("llama-3.1-70b"), a100x8, context_tokens=2048)
    best = what_if.best(points)
    assert best.token_s <= what_if.TIE * min(point.token_s for point in points)
    assert all(point.memory_bytes <= 0.9 * 80e9 for point in points)
    rows = what_if.best_by_batch(points)
    assert [row.batch for row in rows] == sorted({point.batch for point in points})
    with pytest.raises(MemoryLimitError, match="narrower"):
        what_if.search(read_outline("deepseek-v3"), a100x8, context_tokens=2048)


def test_training_memory_is_that_of_the_papers(a100x8: DeviceMachine) -> None:
    """Figure 1 of the ZeRO paper: 7.5B parameters on 64 devices; section 3 of ZeRO-Infinity: 0.1T parameters."""
    outline = dataclasses.replace(_plain(vocab=1), num_layers=1)
    scale = 7.5e9 / outline.num_parameters()
    for stage, published in ((0, 120e9), (1, 31.4e9), (2, 16.6e9), (3, 1.88e9)):
        row = training_memory.training_memory(outline, a100x8, num_devices=64, stage=stage)
        states = (row.weights_bytes + row.gradients_bytes + row.optimizer_bytes) * scale
        assert states == pytest.approx(published, rel=0.02), stage
    wide = dataclasses.replace(_plain(vocab=1), hidden_size=10240, num_layers=80, intermediate_size=4 * 10240)
    kept = training_memory.activation_bytes(wide, 32, 1024, recomputes=True)
    assert kept / 2**40 == pytest.approx(0.05, rel=0.05)


def test_offload_and_tiling_move_what_they_say(a100x8: DeviceMachine) -> None:
    outline = read_outline("gpt3-175b")
    plain = training_memory.training_memory(outline, a100x8, num_devices=8, stage=3)
    offloaded = training_memory.training_memory(outline, a100x8, num_devices=8, stage=3, offload="all")
    tiled = training_memory.training_memory(outline, a100x8, num_devices=8, stage=3, offload="all", tiles=16)
    states = plain.weights_bytes + plain.gradients_bytes + plain.optimizer_bytes
    assert offloaded.host_bytes == pytest.approx(states) == pytest.approx(16 * outline.num_parameters() / 8)
    assert offloaded.device_bytes == pytest.approx(plain.device_bytes - states)
    assert tiled.working_bytes < offloaded.working_bytes
    assert tiled.transfer_s == pytest.approx(8 * outline.num_parameters() / 8 / 31.5e9)
    assert len(training_memory.table(outline, a100x8, num_devices=64, batch=1, sequence_tokens=2048)) == 16
    with pytest.raises(ConfigError, match="stage 2 with offload of all"):
        training_memory.training_memory(outline, a100x8, num_devices=8, stage=2, offload="all")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "no configuration"),
        ({"model_type": "mamba"}, "cannot be planned"),
        ({"model_type": "llama", "hidden_size": 64}, "num_attention_heads is None"),
        ({"model_type": "llama", "hidden_size": -1, "num_attention_heads": 2}, "hidden_size is -1"),
        ({"model_type": "llama", "hidden_size": 2**40, "num_attention_heads": 2}, "hidden_size"),
        ({"model_type": "llama", "hidden_size": "64", "num_attention_heads": 2}, "hidden_size is '64'"),
    ],
)
def test_configurations_are_checked(data: object, message: str) -> None:
    with pytest.raises((ConfigError, UnsupportedModelError), match=message):
        outline_of(data, "m")


def test_machines_are_checked(tmp_path: Path) -> None:
    assert set(known_names("machines")) >= {"a100x8", "jetson-orin", "phone", "cpu-2-cores"}
    for name in known_names("machines"):
        assert load_machine(name).source
    path = tmp_path / "m.toml"
    path.write_text(
        'name = "m"\nsource = "s"\nnum_devices = 2\n[device]\nname = "d"\nmemory_bytes = 1\nbandwidth_gbs = 1.0\n'
        "[device.peaks_tflops]\nbf16 = 1.0\n"
    )
    with pytest.raises(ConfigError, match="no link"):
        load_machine(str(path))
    path.write_text(path.read_text().replace("num_devices = 2", "num_devices = 0"))
    with pytest.raises(ConfigError, match="describes no machine"):
        load_machine(str(path))
    with pytest.raises(ConfigError, match="jetson-orin"):
        load_machine("orin")
    here = from_measured(machine())
    assert here.device.peaks_tflops["int8"] > here.device.peaks_tflops["fp32"]


def test_the_verb_plans_for_other_machines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["plan", "deepseek-v3.json", "--machine", "a100x8.json", "--batch", "32", "--precision", "int4", "--json"])
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found["best"]["batch"] == 32
    assert found["num_parameters"] == pytest.approx(671e9, rel=0.01)
    drawing = tmp_path / "front.svg"
    options = ["--machine", "a100x8", "--pareto", "--max-quality-loss", "0.3", "--plot", str(drawing), "--json"]
    assert main(["plan", "deepseek-v3", *options]) == 0
    points = json.loads(capsys.readouterr().out)["points"]
    assert sum(point["is_chosen"] for point in points) == 1
    assert all(point["why"] for point in points)
    assert drawing.read_text().startswith("<svg")
    assert main(["plan", "gpt3-175b", "--machine", "a100x8", "--train", "--devices", "64"]) == 0
    assert "optimiser 12 P" in capsys.readouterr().out
    for wrong in (["--plot", "f"], ["--train"], ["--machine", "a100x8", "--devices", "3"]):
        assert main(["plan", "gpt3-175b", *wrong]) == 2
    assert main(["plan", "gpt4", "--machine", "a100x8"]) == 2


def _plain(vocab: int) -> Outline:
    return dataclasses.replace(read_outline("gpt3-175b"), vocab_size=vocab, num_learned_positions=0)
