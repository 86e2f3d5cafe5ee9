"""vLLM on the CPU behind the protocol: the whole prompt in one step, no prefix cache, bf16 beside W8A8 weights."""

from __future__ import annotations

import time
from typing import Any

import vllm

from benchmarks.peers.worker import Answer, Worker, serve


class VllmWorker(Worker):
    """A Hugging Face folder, plain or with `compressed-tensors` W8A8 weights."""

    def load(self, path: str, threads: int, context_tokens: int, options: dict[str, Any] | None = None) -> Answer:
        """See `worker`."""
        started = time.perf_counter()
        self.engine = vllm.LLM(
            model=path,
            dtype="bfloat16",
            max_model_len=context_tokens,
            max_num_batched_tokens=max(context_tokens, 2048),
            max_num_seqs=(options or {}).get("max_batch", 4),
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
            disable_log_stats=False,
        )
        return {"load_s": time.perf_counter() - started, "version": vllm.__version__}

    def generate(self, token_ids: list[int], num_tokens: int) -> Answer:
        """See `worker`."""
        params = vllm.SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
        prompt = {"prompt_token_ids": token_ids}
        started = time.perf_counter()
        output = self.engine.generate([prompt], params, use_tqdm=False)[0]
        wall_s = time.perf_counter() - started
        metrics = output.metrics
        decode_s = metrics.last_token_ts - metrics.first_token_ts
        return {
            "token_ids": list(output.outputs[0].token_ids),
            "first_token_s": wall_s - decode_s,
            "token_s": decode_s / (num_tokens - 1) if num_tokens > 1 else 0.0,
        }

    def generate_many(self, prompts: list[list[int]], num_tokens: int) -> Answer:
        """See `worker`."""
        params = vllm.SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
        given = [{"prompt_token_ids": token_ids} for token_ids in prompts]
        started = time.perf_counter()
        outputs = self.engine.generate(given, params, use_tqdm=False)
        whole_s = time.perf_counter() - started
        return {"token_ids": [list(output.outputs[0].token_ids) for output in outputs], "whole_s": whole_s}


if __name__ == "__main__":
    serve(VllmWorker())
