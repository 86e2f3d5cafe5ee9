"""OpenVINO GenAI behind the protocol: `LLMPipeline` on the CPU, prefix caching off, computing in bf16.

Its pipeline gives no logits; with the option `logits` the same model is compiled by OpenVINO itself, in fp32.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import openvino
import openvino_genai

from benchmarks.peers.worker import Answer, Worker, serve, steady_token_s
from benchmarks.scoring import score_rows


class OpenVinoWorker(Worker):
    """A folder exported by optimum-intel. Option `attention_backend`: PA (paged, its default) or SDPA."""

    def load(self, path: str, threads: int, context_tokens: int, options: dict[str, Any] | None = None) -> Answer:
        """See `worker`."""
        started = time.perf_counter()
        options = options or {}
        if options.get("logits"):
            return self._compile(path, threads, started)
        properties: dict[str, Any] = {
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": options.get("precision_hint", "bf16"),
            "PERFORMANCE_HINT": "LATENCY",
        }
        if streams := options.get("streams"):
            return self._load_batching(path, properties, streams * context_tokens, streams, started)
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

    def _load_batching(
        self, path: str, properties: dict[str, Any], num_tokens: int, streams: int, started: float
    ) -> Answer:
        """Make the engine ready for `generate_many`: continuous batching with room for all streams."""
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        scheduler.max_num_seqs = streams
        scheduler.max_num_batched_tokens = max(num_tokens, 256)
        scheduler.cache_size = 1
        self.batching = openvino_genai.ContinuousBatchingPipeline(path, scheduler, "CPU", properties)
        return {"load_s": time.perf_counter() - started, "version": openvino_genai.__version__}

    def generate_many(self, prompts: list[list[int]], num_tokens: int) -> Answer:
        """See `worker`."""
        inputs = [openvino.Tensor(np.array([token_ids], dtype=np.int64)) for token_ids in prompts]
        config = self._greedy(num_tokens)
        started = time.perf_counter()
        handles = [self.batching.add_request(number, ids, config) for number, ids in enumerate(inputs)]
        while self.batching.has_non_finished_requests():
            self.batching.step()
        whole_s = time.perf_counter() - started
        results = [handle.read_all()[0].generated_ids for handle in handles]
        return {"token_ids": [[int(token) for token in ids] for ids in results], "whole_s": whole_s}

    def _compile(self, path: str, threads: int, started: float) -> Answer:
        """Make the model ready for `nll`."""
        core = openvino.Core()
        model = core.read_model(f"{path}/openvino_model.xml")
        settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
        self.request = core.compile_model(model, "CPU", settings).create_infer_request()
        return {
            "load_s": time.perf_counter() - started,
            "version": openvino.__version__,
            "block_bits": _block_bits(model),
        }

    def nll(self, token_ids: list[int], window: int) -> Answer:
        """See `worker`."""
        losses, best = [], []
        for start in range(0, len(token_ids), window):
            ids = np.array([token_ids[start : start + window]], dtype=np.int64)
            self.request.reset_state()
            self.request.infer(
                {
                    "input_ids": ids,
                    "attention_mask": np.ones_like(ids),
                    "position_ids": np.arange(ids.shape[1], dtype=np.int64)[None],
                    "beam_idx": np.zeros(1, dtype=np.int32),
                }
            )
            row_losses, row_best = score_rows(self.request.get_tensor("logits").data[0, :-1], ids[0, 1:])
            losses += row_losses
            best += row_best
        return {"losses": losses, "best": best}

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


def _block_bits(model: Any) -> float:
    """Bits of integers, scales and zero points for a weight of the blocks' projections."""
    bits = weights = 0
    for node in model.get_ops():
        if node.get_type_name() != "Constant" or ".layers." not in node.get_friendly_name():
            continue
        kind, size = node.get_element_type(), int(np.prod(node.get_output_shape(0), dtype=np.int64))
        if kind in (openvino.Type.i4, openvino.Type.u4, openvino.Type.i8, openvino.Type.u8) and size >= 4096:
            # Zero points are as small integers as weights are, one for a group of 32.
            weights += 0 if "zero_point" in node.get_friendly_name() else size
        bits += size * kind.bitwidth if size >= 4096 else 0
    return bits / max(weights, 1)


if __name__ == "__main__":
    serve(OpenVinoWorker())
