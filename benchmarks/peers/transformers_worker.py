"""transformers behind the protocol: the fp32 reference that answers are judged by, and a peer in bf16.

Operations beside the common ones:

- `nll` token_ids, window: cut the text in windows, each predicted from its own beginning only; gives `losses` (nats of
  every token but the first of each window) and `best` (the likeliest token at the same places).
- `regret` prompt, answer: by how many nats each token of an answer is less likely than the likeliest one.
- `encode` path, text: token ids without special ones.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, __version__

from benchmarks.peers.worker import Answer, Worker, serve, steady_token_s
from benchmarks.scoring import regrets, score_rows

LOGIT_ROWS = 512
"""Rows of logits made at once."""


class TransformersWorker(Worker):
    """A Hugging Face folder with scaled-dot-product attention.

    Options: `dtype`, float32 (the default) or bfloat16; `config`, fields of the configuration to replace; `positions`,
    to extend the model to so many by YaRN; `torchao_int4_groups`, to round the projections with torchao to int4 in
    groups of so many inputs.
    """

    @torch.inference_mode()
    def load(self, path: str, threads: int, context_tokens: int, options: dict[str, Any] | None = None) -> Answer:
        """See `worker`."""
        started = time.perf_counter()
        torch.set_num_threads(threads)
        options = options or {}
        dtype = getattr(torch, options.get("dtype", "float32"))
        config = AutoConfig.from_pretrained(path, **options.get("config", {}))
        if "positions" in options:
            _extend(config, options["positions"])
        self.model = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=dtype, attn_implementation="sdpa")
        if "torchao_int4_groups" in options:
            _round_by_torchao(self.model, options["torchao_int4_groups"])
        self.model.eval()
        return {"load_s": time.perf_counter() - started, "version": __version__}

    @torch.inference_mode()
    def generate(self, token_ids: list[int], num_tokens: int) -> Answer:
        """See `worker`."""
        ids = torch.tensor([token_ids])
        started = time.perf_counter()
        output = self.model(ids, use_cache=True, logits_to_keep=1)
        answer = [int(output.logits[0, -1].argmax())]
        times = [time.perf_counter()]
        while len(answer) < num_tokens:
            ids = torch.tensor([[answer[-1]]])
            output = self.model(ids, use_cache=True, past_key_values=output.past_key_values)
            answer.append(int(output.logits[0, -1].argmax()))
            times.append(time.perf_counter())
        return {"token_ids": answer, "first_token_s": times[0] - started, "token_s": steady_token_s(times)}

    @torch.inference_mode()
    def nll(self, token_ids: list[int], window: int) -> Answer:
        """See the module."""
        losses, best = [], []
        for start in range(0, len(token_ids), window):
            ids = token_ids[start : start + window]
            hidden = self.model.model(torch.tensor([ids]), use_cache=False).last_hidden_state[0]
            for first in range(0, len(ids) - 1, LOGIT_ROWS):
                last = min(first + LOGIT_ROWS, len(ids) - 1)
                logits = self.model.lm_head(hidden[first:last]).float().numpy()
                row_losses, row_best = score_rows(logits, np.array(ids[first + 1 : last + 1]))
                losses.extend(row_losses)
                best.extend(row_best)
        return {"losses": losses, "best": best}

    @torch.inference_mode()
    def regret(self, prompt: list[int], answer: list[int]) -> Answer:
        """See the module."""
        ids = torch.tensor([prompt + answer[:-1]])
        logits = self.model(ids, use_cache=False, logits_to_keep=len(answer)).logits[0].float().numpy()
        return {"regrets": regrets(logits, np.array(answer))}

    def encode(self, path: str, text: str) -> Answer:
        """See the module."""
        tokenizer = AutoTokenizer.from_pretrained(path)
        return {"token_ids": tokenizer.encode(text, add_special_tokens=False)}


def _extend(config: Any, positions: int) -> None:
    """Turn positions beyond the trained length as YaRN does."""
    trained = config.max_position_embeddings
    config.rope_parameters = {
        **config.rope_parameters,
        "rope_type": "yarn",
        "factor": positions / trained,
        "original_max_position_embeddings": trained,
    }
    config.max_position_embeddings = positions


def _round_by_torchao(model: Any, group_size: int) -> None:
    """Round the projections of all blocks as torchao's weight-only configuration for integers of any width does."""
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    config = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(group_size))
    quantize_(model, config, lambda module, name: isinstance(module, torch.nn.Linear) and "layers." in name)


if __name__ == "__main__":
    serve(TransformersWorker())
