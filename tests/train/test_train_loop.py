"""The loop: PyTorch's own steps, exact resumption, transformers' loss, PEFT's adapters, and the command."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dseek.cli.main import main
from dseek.core.errors import ConfigError, FileFormatError, MemoryLimitError, NotFiniteError
from dseek.models.decoder import Decoder
from dseek.models.files import open_model
from dseek.train import offload
from dseek.train.batches import make_batch
from dseek.train.config import load_config
from dseek.train.lora import ADAPTER_WEIGHTS
from dseek.train.model_source import ModelSource
from dseek.train.preparation import make_rows
from tests.models import tiny
from tests.train.trainings import config_of, losses, run, write_texts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, and texts beside it."""
    path = tiny.save("llama-16-mqa-tied", tmp_path_factory.mktemp("models") / "tiny")
    write_texts(path.parent / "texts.jsonl")
    return path


@pytest.fixture(scope="module")
def texts(folder: Path) -> Path:
    return folder.parent / "texts.jsonl"


def weights(folder: Path, name: str = "model.safetensors") -> dict[str, torch.Tensor]:
    return load_file(folder / name)


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("boundaries", ["none", "attention"])
def test_steps_are_those_of_a_plain_loop(folder: Path, texts: Path, tmp_path: Path, boundaries: str) -> None:
    """Cross entropy of whole rows (or of every document by itself), AdamW, clipping: written out with PyTorch alone."""
    config = config_of(
        folder, texts, tmp_path, weight_decay=0.1, gradient_accumulation_steps=2, data__document_boundaries=boundaries
    )
    _, told = run(config)

    with open_model(str(folder)) as files:
        decoder = Decoder.from_files(files).train()
    source = ModelSource(config)
    rows = make_rows(config, source, config.data.train, learned=True)
    stream = rows.rows(rows.start(), repeat=True)
    matrices = [parameter for parameter in decoder.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in decoder.parameters() if parameter.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=1e-3
    )
    for step, found in enumerate(losses(told)):
        sums, count = [], 0
        for _ in range(4):
            row = next(stream)
            ends = [place for place in range(1, 32) if row.documents[place] != row.documents[place - 1]]
            cuts = [0, *ends, 32] if boundaries == "attention" else [0, 32]
            for first, past in itertools.pairwise(cuts):
                ids = torch.tensor([row.token_ids[first:past]])
                if past - first > 1:
                    logits = decoder(ids)[0, :-1]
                    sums.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
                    count += past - first - 1
        loss = torch.stack(sums).sum() / count
        assert found == pytest.approx(float(loss), rel=2e-5), step
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 - step / 6)
        optimizer.step()
    result = weights(tmp_path)
    for name, parameter in decoder.state_dict().items():
        if name in result:
            torch.testing.assert_close(result[name], parameter, rtol=2e-3, atol=2e-5)
    source.close()


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_stopped_training_goes_on_bit_by_bit(folder: Path, texts: Path, tmp_path: Path, method: str) -> None:
    settings = {"method": method, "lora__lora_dropout": 0.2, "data__shuffle": True, "lr_scheduler_type": "cosine"}
    whole, told = run(config_of(folder, texts, tmp_path / "whole", **settings))
    config = config_of(folder, texts, tmp_path / "parts", save_steps=2, save_total_limit=1, **settings)
    result, first = run(config, stop_after=2)
    assert result.was_stopped and result.global_step == 3
    assert [path.name for path in (tmp_path / "parts").glob("checkpoint-*")] == ["checkpoint-3"]
    result, second = run(config)
    assert not result.was_stopped and result.global_step == whole.global_step == 6
    assert losses(told) == losses(first) + losses(second)
    name = ADAPTER_WEIGHTS if method == "lora" else "model.safetensors"
    assert same(weights(tmp_path / "whole", name), weights(tmp_path / "parts", name))
    files = [tmp_path / name / "checkpoint-6/trainer_state.json" for name in ("whole", "parts")]
    state = [json.loads(file.read_text()) for file in files]
    assert state[0]["data"] == state[1]["data"] and state[0]["num_tokens_seen"] == 6 * 64
    assert [entry["loss"] for entry in state[1]["log_history"]] == losses(told)


def test_another_training_is_not_gone_on_with(folder: Path, texts: Path, tmp_path: Path) -> None:
    run(config_of(folder, texts, tmp_path, max_steps=1))
    with pytest.raises(ConfigError, match=r"learning_rate = 0\.001"):
        run(config_of(folder, texts, tmp_path, max_steps=2, learning_rate=2e-3))
    with pytest.raises(ConfigError, match=r"data\.max_length = 32"):
        run(config_of(folder, texts, tmp_path, max_steps=2, data__max_length=16))
    run(config_of(folder, texts, tmp_path, max_steps=2))
    (tmp_path / "checkpoint-2/optimizer.safetensors").write_bytes(b"\x10" + bytes(20))
    with pytest.raises(FileFormatError, match=r"optimizer\.safetensors"):
        run(config_of(folder, texts, tmp_path, max_steps=3))


def test_transformers_loads_the_result_with_the_same_loss(folder: Path, texts: Path, tmp_path: Path) -> None:
    import transformers

    config = config_of(folder, texts, tmp_path, data__eval=(str(texts),), data__document_boundaries="none", max_steps=3)
    result, _ = run(config)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).eos_token == "<|end|>"
    source = ModelSource(config)
    rows = make_rows(config, source, config.data.eval, learned=False)
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows.rows(rows.start(), repeat=False):
            batch = make_batch([row], separate=False)
            if batch.num_labels:
                total += float(model(batch.token_ids, labels=batch.labels).loss) * batch.num_labels
                count += batch.num_labels
    assert result.eval_loss == pytest.approx(total / count, rel=1e-5)
    source.close()


def test_peft_loads_the_adapter_and_the_merged_model_is_the_same(folder: Path, texts: Path, tmp_path: Path) -> None:
    import transformers
    from peft import PeftModel

    run(config_of(folder, texts, tmp_path, method="lora", lora__merge=True, lora__use_rslora=True, learning_rate=0.01))
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([tiny.token_ids(24)])
    with torch.no_grad():
        before = base(ids).logits
        adapted = PeftModel.from_pretrained(base, tmp_path).eval()(ids).logits
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
        assert not torch.allclose(before, adapted, atol=1e-2)
        torch.testing.assert_close(merged(ids).logits, adapted, rtol=1e-3, atol=2e-4)
    assert len(weights(tmp_path, ADAPTER_WEIGHTS)) == 2 * 7 * 2


def test_eight_bit_moments_learn_as_wide_ones_do(folder: Path, texts: Path, tmp_path: Path) -> None:
    wide = losses(run(config_of(folder, texts, tmp_path / "wide", max_steps=12))[1])
    narrow_config = config_of(folder, texts, tmp_path / "narrow", max_steps=12, optim="adamw_8bit", save_steps=5)
    narrow = losses(run(narrow_config)[1])
    assert wide[-1] < wide[0] - 1.0
    assert narrow == pytest.approx(wide, abs=0.05)
    stored = load_file(tmp_path / "narrow/checkpoint-12/optimizer.safetensors")
    name = "decoder.model.layers.0.mlp.down_proj.weight"
    assert stored[f"exp_avg.{name}"].dtype == torch.int8 and stored[f"exp_avg_sq.{name}"].dtype == torch.uint8
    (tmp_path / "narrow/checkpoint-12").rename(tmp_path / "gone")
    before = weights(tmp_path / "narrow")
    run(narrow_config)
    assert same(before, weights(tmp_path / "narrow"))


def test_moments_on_disk_are_those_in_memory(
    folder: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "OFFLOAD_PART_VALUES", 2048)
    near = losses(run(config_of(folder, texts, tmp_path / "near", weight_decay=0.1))[1])
    config = config_of(folder, texts, tmp_path / "far", weight_decay=0.1, memory__offload_optimizer="disk")
    result, first = run(config, stop_after=2)
    assert result.was_stopped and not list((tmp_path / "far").glob("*.bin"))
    assert losses(first) + losses(run(config)[1]) == pytest.approx(near, rel=1e-6)
    for name, values in weights(tmp_path / "near").items():
        torch.testing.assert_close(weights(tmp_path / "far")[name], values, rtol=0, atol=1e-6)
    with pytest.raises(ConfigError, match="the processor computes"):
        run(config_of(folder, texts, tmp_path / "no", memory__offload_optimizer="cpu"))


def test_moments_in_the_hosts_memory_are_those_beside_the_weights() -> None:
    torch.manual_seed(0)
    near, far = (torch.nn.Parameter(torch.ones(3000)) for _ in range(2))
    optimizers = torch.optim.AdamW([near], weight_decay=0.0, fused=True), offload.OffloadedAdamW([far], None)
    for _ in range(3):
        near.grad = torch.randn(3000)
        far.grad = near.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(far, near, rtol=0, atol=1e-7)


def test_a_loss_that_is_no_number_ends_the_training(folder: Path, texts: Path, tmp_path: Path) -> None:
    bad = tiny.save("llama-16-mqa-tied", tmp_path / "bad")
    tensors = load_file(bad / "model.safetensors")
    save_file({name: value * 1e18 for name, value in tensors.items()}, bad / "model.safetensors", {"format": "pt"})
    with pytest.raises(NotFiniteError, match="the loss of step 1 is"):
        run(config_of(bad, texts, tmp_path / "out"))


def test_epochs_are_counted_in_rows(folder: Path, texts: Path, tmp_path: Path) -> None:
    config = config_of(folder, texts, tmp_path, max_steps=-1, num_train_epochs=2.0, per_device_train_batch_size=16)
    result, told = run(config)
    source = ModelSource(config)
    rows = make_rows(config, source, config.data.train, learned=True)
    count = sum(1 for _ in rows.rows(rows.start(), repeat=False))
    assert result.num_steps == -(-2 * count // 16)
    assert told[-4][1]["epoch"] >= 1.0
    source.close()


def test_new_weights_have_the_sizes_asked_for(folder: Path, texts: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1, "num_hidden_layers": 1}
    result, told = run(config_of(folder, texts, tmp_path, from_scratch=True, shape=sizes, max_steps=2))
    assert result.train_loss is not None and 4.0 < losses(told)[0] < 7.0
    with open_model(str(tmp_path)) as files:
        assert (files.shape.hidden_size, files.shape.head_dim, files.shape.num_layers) == (48, 16, 1)


def test_recipes_are_read(repo: Path) -> None:
    recipes = sorted((repo / "recipes").glob("*.toml"))
    assert len(recipes) >= 6
    for recipe in recipes:
        assert load_config(recipe).output_dir == recipe.stem


def test_wrong_keys_and_values_are_named(repo: Path) -> None:
    recipe = repo / "recipes/finetune.toml"
    with pytest.raises(ConfigError, match="did you mean 'learning_rate'"):
        load_config(recipe, ["learning_rat=1.0"])
    with pytest.raises(ConfigError, match=r"data\.packing"):
        load_config(recipe, ["data.packing=tight"])
    with pytest.raises(ConfigError, match="no table"):
        load_config(recipe, ["model.name=x"])
    with pytest.raises(ConfigError, match="KEY=VALUE"):
        load_config(recipe, ["max_steps"])
    with pytest.raises(ConfigError, match="optim is adamw_8bit"):
        load_config(recipe, ["optim=adamw_8bit", "memory.offload_optimizer=disk"])


def toml_of(path: Path, folder: Path, texts: Path, more: str = "") -> Path:
    path.write_text(
        f'model = "{folder}"\noutput_dir = "{path.parent / "out"}"\nmax_steps = 3\nlearning_rate = 1e-3\n'
        f'device = "cpu"\nlogging_steps = 1\n{more}\n[data]\ntrain = ["{texts}"]\nmax_length = 32\n'
    )
    return path


def test_the_command_shows_its_plan_and_trains(
    folder: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = toml_of(tmp_path / "run.toml", folder, texts, 'report_to = "tensorboard"')
    assert main(["train", str(recipe), "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["memory"]["peak_bytes"] > plan["memory"]["weights_bytes"] > 0
    assert not (tmp_path / "out").exists()
    assert main(["train", str(recipe), "--set", "max_steps=2", "--json"]) == 0
    shown = capsys.readouterr()
    result = json.loads(shown.out)
    assert result["global_step"] == 2 and result["train_loss"] > 0
    assert "step 2 of 2: loss" in shown.err
    assert list((tmp_path / "out/runs").iterdir()) and (tmp_path / "out/model.safetensors").is_file()
    assert main(["train", str(recipe), "--set", 'memory.limit="1MB"', "--dry-run"]) == 2
    assert "memory.limit" in capsys.readouterr().err
    with pytest.raises(MemoryLimitError):
        run(config_of(folder, texts, tmp_path, memory__limit="1MB"))


def test_ctrl_c_saves_and_the_next_call_goes_on(folder: Path, texts: Path, tmp_path: Path) -> None:
    recipe = toml_of(tmp_path / "run.toml", folder, texts)
    command = [sys.executable, "-m", "dseek.cli.main", "train", str(recipe), "--set", "max_steps=100000"]
    command += ["--nproc-per-node", "1"]  # the supervisor hands the signal on
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=dict(os.environ, OMP_NUM_THREADS="1")
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step 5 "):
            process.send_signal(signal.SIGINT)
            break
    out, err = process.communicate()
    assert process.returncode == 130, err
    assert "stopped after step" in out
    step = int(out.split("stopped after step ")[1].split()[0])
    assert (tmp_path / f"out/checkpoint-{step}/trainer_state.json").is_file()
    assert main(["train", str(recipe), "--set", f"max_steps={step + 1}"]) == 0
