"""GGUF files that were written here, in llama.cpp itself (the wheel `xllamacpp`): its probabilities are ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dseek.cli.main import main
from dseek.models.decoder import Decoder
from dseek.models.files import open_model
from tests.models import tiny

ROUNDING = 0.25
"""Largest difference of a logarithm of a probability: llama.cpp rounds activations to 8 bits in groups of 32, and keys
and values to halves. Rows in a wrong order or a wrong rotation give other tokens altogether."""

PROMPT = "the quick brown fox answers; 12 naïve cafés, 東京 🙂"


def likeliest(path: Path, prompt: Any, count: int) -> dict[int, float]:
    """Ids and log probabilities of the likeliest next tokens, by llama.cpp."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_batch, params.n_parallel, params.n_gpu_layers = 256, 256, 1, 0
    params.cpuparams.n_threads = 1
    params.warmup = False
    server = xllamacpp.Server(params)
    request = {"prompt": prompt, "n_predict": 1, "temperature": 0, "n_probs": count}
    answer = server.handle_completions(request)
    answer = json.loads(answer) if isinstance(answer, str | bytes) else answer
    first = answer["choices"][0]["logprobs"]["content"][0]
    return {entry["id"]: entry["logprob"] for entry in first["top_logprobs"]}


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("llama-64-mha", ["int8"]),
        ("llama-llama3", ["int4"]),
        ("qwen3-128-tied", ["int4", "--symmetric"]),
        ("qwen2", ["int8"]),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_llamacpp_computes_what_we_do(case: str, options: list[str], tmp_path: Path) -> None:
    model, out = tiny.save(case, tmp_path / "m"), tmp_path / "out.gguf"
    assert main(["quantize", str(model), "--out", str(out), "--enable_quantization", *options]) == 0
    with open_model(str(out)) as files:
        decoder, tokenizer = Decoder.from_files(files), files.tokenizer()

    def expected(ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return decoder(torch.tensor([ids]))[0, -1].log_softmax(-1)

    def is_shown(ids: list[int]) -> bool:
        """Whether llama.cpp tells of the token that we expect: it keeps back those that end inside a character."""
        best, second = expected(ids).topk(2).values.tolist()
        first = int(expected(ids).argmax())
        return best - second > ROUNDING and first not in tokenizer.eos_token_ids and tokenizer.decode([first]).isascii()

    by_ids = next(ids for ids in (tiny.token_ids(40, seed=seed) for seed in range(200)) if is_shown(ids))
    text = next(text for text in (PROMPT[start:] for start in range(30)) if is_shown(tokenizer.encode(text)))
    for prompt, ids in ((by_ids, by_ids), (text, tokenizer.encode(text))):
        wanted, found = expected(ids), likeliest(out, prompt, 5)
        assert len(found) == 5
        for token_id, log_probability in found.items():
            assert abs(log_probability - float(wanted[token_id])) < ROUNDING
        # What is likelier than all of the five by more than the rounding would be missing.
        assert float(wanted.max()) - max(float(wanted[token_id]) for token_id in found) < ROUNDING
