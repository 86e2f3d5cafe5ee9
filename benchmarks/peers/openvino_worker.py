"""OpenVINO GenAI behind the protocol: `LLMPipeline` on the CPU, prefix caching off, computing in bf16."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import openvino
import openvino_genai

from benchmarks.peers.worker import Answer, Worker, serve, steady_token_s


class OpenVinoWorker(Worker):
    """A folder exported by optimum-intel. Option `attention_backend`: PA (paged, its default) or SDPA."""

    def load(self, path: str, threads: int, context_tokens: int, options: dict[str, Any] | None = None) -> Answer:
        """See `worker`."""
        started = time.perf_counter()
        options = options or {}
        properties: dict[str, Any] = {
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": options.get("precision_hint", "bf16"),
            "PERFORMANCE_HINT": "LATENCY",
        }
        backend = options.get("attention_backend", "PA")
        properties["ATTENTION_BACKEND"] = backend
        if backend == "PA":
            scheduler = openvino_genai.SchedulerConfig()
            scheduler.enable_prefix_caching = False
            scheduler.max_num_batched_tokens = max(context_tokens, 256)
            properties["scheduler_config"] = scheduler
        self.pipeline = openvino_genai.LLMPipeline(path, "CPU", **properties)
        return {"load_s": time.perf_counter() - started, "version": openvino_genai.__version__}

    def generate(self, token_ids: list[int], num_tokens: int) -> Answer:
        """See `worker`."""
        ids = np.array([token_ids], dtype=np.int64)
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        started = time.perf_counter()
        result = self.pipeline.generate(inputs, self._greedy(num_tokens))
        wall_s = time.perf_counter() - started
        times = [float(value) for value in result.perf_metrics.raw_metrics.m_new_token_times]
        return {
            "token_ids": [int(token) for token in result.tokens[0]],
            "first_token_s": result.perf_metrics.get_ttft().mean / 1e3 if num_tokens > 1 else wall_s,
            "token_s": steady_token_s(times) / 1e3,
        }

    def start(
        self, path: str, threads: int, context_tokens: int, prompt: str, options: dict[str, Any] | None = None
    ) -> Answer:
        """See `worker`."""
        started = time.perf_counter()
        self.load(path, threads, context_tokens, options)
        encoded = self.pipeline.get_tokenizer().encode(prompt)
        result = self.pipeline.generate(encoded, self._greedy(1))
        return {
            "first_token_s": time.perf_counter() - started,
            "first_token_at_s": time.monotonic(),
            "token_id": int(result.tokens[0][0]),
            "prompt_token_ids": [int(token) for token in encoded.input_ids.data[0]],
        }

    def _greedy(self, num_tokens: int) -> Any:
        """Greedy decoding of exactly so many tokens."""
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = num_tokens
        config.do_sample = False
        config.ignore_eos = True
        config.apply_chat_template = False
        return config


if __name__ == "__main__":
    serve(OpenVinoWorker())
