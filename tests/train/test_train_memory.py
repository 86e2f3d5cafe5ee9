"""Losses in chunks, blocks computed twice, and the prediction of what autograd keeps."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from dseek.core.errors import ConfigError, MemoryLimitError
from dseek.core.shape import ModelShape
from dseek.models.decoder import Decoder
from dseek.ops.attention import apart
from dseek.ops.attention.reference import visible
from dseek.plan.training import (
    TrainingWork,
    block_activation_bytes,
    choose_training,
    num_learned,
    predict_training,
    train_flops_per_token,
)
from dseek.train.config import LoraOptions
from dseek.train.language_model import LanguageModel, restarted_positions, save_memory
from dseek.train.lora import attach
from dseek.train.losses import chunked_cross_entropy, plain_cross_entropy
from dseek.train.memory import read_size


def shape_of(**changes: Any) -> ModelShape:
    sizes: dict[str, Any] = {
        "family": "llama",
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
    }
    return ModelShape(**sizes | changes)


@pytest.mark.parametrize("chunk", [1, 4, 7, 100])
def test_the_chunked_loss_has_the_plain_ones_gradients(chunk: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 9, (11,))
    assert torch.autograd.gradcheck(lambda h, w: chunked_cross_entropy(h, w, labels, chunk) * 0.3, (hidden, weight))
    found, expected = chunked_cross_entropy(hidden, weight, labels, chunk), plain_cross_entropy(hidden, weight, labels)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    both = (hidden, weight)
    for left, right in zip(torch.autograd.grad(found / 7, both), torch.autograd.grad(expected / 7, both), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-12)
    frozen = chunked_cross_entropy(hidden, weight.detach(), labels, chunk)
    whole = plain_cross_entropy(hidden, weight, labels)
    with torch.no_grad():
        torch.testing.assert_close(chunked_cross_entropy(hidden, weight, labels, chunk), whole)
    torch.testing.assert_close(torch.autograd.grad(frozen, hidden), torch.autograd.grad(whole, hidden))


def test_the_chunked_loss_follows_autocast() -> None:
    torch.manual_seed(1)
    hidden, weight = torch.randn(8, 16, requires_grad=True), torch.randn(12, 16, requires_grad=True)
    labels = torch.randint(0, 12, (8,))
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = chunked_cross_entropy(hidden, weight, labels, 3), plain_cross_entropy(hidden, weight, labels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(found, weight)[0], torch.autograd.grad(expected, weight)[0], rtol=0.02, atol=0.05
    )


def test_saving_memory_changes_no_gradient() -> None:
    torch.manual_seed(2)
    decoder = Decoder(shape_of(tie_word_embeddings=True)).train()
    ids, documents = torch.randint(0, 300, (2, 48)), (torch.arange(48) // 20).expand(2, 48)

    def gradients(model: LanguageModel) -> list[torch.Tensor]:
        return list(torch.autograd.grad(model(ids, ids, documents), list(decoder.parameters())))

    plain = gradients(LanguageModel(decoder))
    save_memory(decoder, checkpointed_layers=1, mlp_chunk_tokens=20)
    saving = gradients(LanguageModel(decoder, logits_chunk_tokens=32))
    for left, right in zip(plain, saving, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("least", [1, 15, 128], ids=["alone", "mixed", "together"])
def test_documents_of_a_row_do_not_see_each_other(
    window: int | None, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apart, "LEAST_TOKENS", least)
    torch.manual_seed(3)
    model = LanguageModel(Decoder(shape_of(sliding_window=window)).eval())
    ids, documents = torch.randint(0, 300, (1, 40)), torch.tensor([[0] * 13 + [1] * 17 + [2] * 10])
    assert restarted_positions(documents)[0].tolist() == [*range(13), *range(17), *range(10)]
    with torch.no_grad():
        together = model.hidden_states(ids, documents)
        for first, past in ((0, 13), (13, 30), (30, 40)):
            alone = model.hidden_states(ids[:, first:past], None)
            torch.testing.assert_close(together[:, first:past], alone, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(model.decoder.model(ids[:, first:past]), alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("least", [1, 15, 128])
def test_groups_of_documents_have_the_gradients_of_one_mask(least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "LEAST_TOKENS", least)
    torch.manual_seed(4)
    documents = torch.tensor([[0] * 3 + [1] * 20 + [2] * 9, [0] * 32])
    places = torch.arange(32)
    q, k, v = (torch.randn(2, heads, 32, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    for window in (None, 5):
        groups = apart.group_documents(documents, window, torch.float64)
        assert sum(group.num_tokens for group in groups.groups) == 64
        mask = (documents[:, :, None] == documents[:, None]) & visible(places, places, window)
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], enable_gqa=True)
        found = groups.attend(q, k, v)
        torch.testing.assert_close(found, expected)
        weight = torch.randn_like(found)
        for left, right in zip(
            torch.autograd.grad((found * weight).sum(), (q, k, v)),
            torch.autograd.grad((expected * weight).sum(), (q, k, v)),
            strict=True,
        ):
            torch.testing.assert_close(left, right)


def test_masks_stay_small_however_long_rows_are() -> None:
    lengths = [5, 200, 60, 60, 60, 127, 127, 1, 128, 256]
    row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    groups = apart.group_documents(row[None], None, torch.float32).groups
    assert [group.num_tokens for group in groups] == [5, 200, 180, 254, 1, 128, 256]
    assert [group.mask is not None for group in groups] == [False, False, True, True, False, False, False]


@pytest.mark.parametrize("changes", [{}, {"num_kv_heads": 4}, {"qk_norm": True}])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_a_block_keeps_what_is_predicted(changes: dict[str, Any], lora: bool, masked: bool) -> None:
    kept = [_kept_bytes(shape_of(num_layers=layers, **changes), lora, masked) for layers in (1, 2)]
    work = TrainingWork(
        shape=shape_of(**changes),
        batch_rows=2,
        row_tokens=48,
        lora_rank=8 if lora else 0,
        lora_targets=LoraOptions().target_modules if lora else (),
        masked=masked,
    )
    assert kept[1] - kept[0] == block_activation_bytes(work)


def _kept_bytes(shape: ModelShape, lora: bool, masked: bool) -> int:
    """Memory that autograd holds after a forward pass, parameters left out."""
    decoder = Decoder(shape).train()
    if lora:
        attach(decoder, LoraOptions())
    model = LanguageModel(decoder)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, int] = {}
    held = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    ids = torch.randint(0, 300, (2, 48))
    documents = (torch.arange(48) // 20).expand(2, 48) if masked else None
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(ids, ids, documents)
    return sum(storages.values())


def test_as_little_is_saved_as_the_limit_asks_for() -> None:
    work = TrainingWork(shape=shape_of(num_layers=8), batch_rows=8, row_tokens=256, world_size=4)
    free = choose_training(work, process_bytes=0, limit_bytes=1 << 40)
    assert free.work.shard_strategy == "none" and free.work.checkpointed_layers == 0 and not free.rejected
    peaks = [predict_training(free.work, 0).peak_bytes]
    limit = free.memory.peak_bytes
    while True:
        try:
            choice = choose_training(work, process_bytes=0, limit_bytes=limit - 1)
        except MemoryLimitError:
            break
        assert choice.memory.peak_bytes < limit and choice.rejected
        limit = choice.memory.peak_bytes
        peaks.append(limit)
    assert len(peaks) > 4 and choice.work.shard_strategy == "zero3"
    assert (
        choose_training(work, process_bytes=0, limit_bytes=1 << 40, checkpointed_layers=3).work.checkpointed_layers == 3
    )
    big = TrainingWork(shape=shape_of(vocab_size=49152), batch_rows=8, row_tokens=1024)
    assert choose_training(big, process_bytes=0, limit_bytes=1 << 40).work.logits_chunk_tokens == 256


def test_learned_parameters_and_operations_are_counted() -> None:
    shape = shape_of()
    full = TrainingWork(shape=shape, batch_rows=1, row_tokens=16)
    decoder = Decoder(shape)
    assert num_learned(full) == sum(parameter.numel() for parameter in decoder.parameters())
    options = LoraOptions(r=4, target_modules=("q_proj", "down_proj"))
    attach(decoder, options)
    adapters = TrainingWork(shape=shape, batch_rows=1, row_tokens=16, lora_rank=4, lora_targets=options.target_modules)
    assert num_learned(adapters) == sum(p.numel() for p in decoder.parameters() if p.requires_grad)
    assert train_flops_per_token(adapters) < train_flops_per_token(full)
    with pytest.raises(ConfigError, match=r"lora\.target_modules names 'c_attn'"):
        attach(Decoder(shape), LoraOptions(target_modules=("c_attn",)))


def test_sizes_are_read() -> None:
    assert [read_size(text) for text in ("8GB", "512 MiB", "1000000", "1.5g")] == [8e9, 2**29, 1e6, 1.5e9]
    for text in ("", "GB", "-1GB", "1XB", "0"):
        with pytest.raises(ConfigError):
            read_size(text)


_FREE_ALL_BUT_ONE = """
import sys, torch
from dseek.train.memory import give_freed_memory_back, process_bytes
if sys.argv[1] == "back":
    give_freed_memory_back()
torch.ones(6 << 20)  # 24 MiB that come and go: from now on smaller blocks lie in the heap
blocks = [torch.ones(1 << 19) for _ in range(64)]
before = process_bytes()
del blocks[:-1]  # the newest keeps the heap from shrinking
print(before - process_bytes())
"""


@pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="another C library than glibc")
def test_freed_memory_goes_back_to_the_system() -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}

    def given_back(word: str) -> int:
        command = [sys.executable, "-c", _FREE_ALL_BUT_ONE, word]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return int(run.stdout)

    most = 63 * (2 << 20)
    assert given_back("back") > 0.9 * most
    assert given_back("no") < 0.5 * most
