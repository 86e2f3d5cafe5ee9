"""dseek behind the same protocol as its peers, through its Python interface: `dseek.load` and the engine.

Operations beside the common ones: `encode` and `encode_all` (text to ids), `pieces` (ids to the text of each), `nll`
(see `transformers_worker`), `plan` (what was planned), `predict` (what the cost model says of a run), `generate_batch`,
`watch` and `skipped` (what attention left out).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import dseek  # `load` and all behind it are imported when first used, so that counts as part of starting
from benchmarks.peers.worker import Answer, Worker, serve

if TYPE_CHECKING:
    from dseek.engine.llm import LLM


class DseekWorker(Worker):
    """Options are keyword arguments of `dseek.load`: precision, batch and so on; attention is dense unless they say."""

    llm: LLM
    decoder: Any = None

    def load(self, path: str, threads: int, context_tokens: int, options: dict[str, Any] | None = None) -> Answer:
        """See `worker`."""
        started = time.perf_counter()
        # Prompts are repeated, and every run is to compute them, as with the peers.
        wanted = {"attention": "dense", "prefix_cache": False, **(options or {})}
        self.llm = dseek.load(path, threads=threads, context=context_tokens, **wanted)
        return {"load_s": time.perf_counter() - started, "version": dseek.__version__, **self.plan()}

    def plan(self) -> Answer:
        """What the plan decided and foresaw."""
        from dseek.plan.attention_wish import patterns_text

        plan = self.llm.plan
        predicted = plan.predicted
        return {
            "precision": plan.precision,
            "cache_dtype": plan.cache_dtype,
            "kernels": plan.kernels,
            "weight_formats": sorted({name for layer in plan.layer_formats for name in layer.by_role().values()}),
            "attention": patterns_text(plan.attention_patterns),
            "weights_bytes": predicted.weights_bytes,
            "streamed_bytes": predicted.streamed_bytes,
            "cache_bytes": predicted.cache_bytes,
            "cache_bytes_per_token": predicted.cache_bytes / (plan.num_pages * plan.page_tokens),
            "predicted_peak_bytes": predicted.peak_bytes,
        }

    def predict(self, prompt_tokens: int, context_tokens: int, batch: int) -> Answer:
        """What the plan's cost model says of a run, from the measurements in dseek's cache: tokens a second."""
        from dseek.hardware.store import load_or_measure

        predicted = self.llm.plan.predict(
            load_or_measure(), prompt_tokens=prompt_tokens, context_tokens=context_tokens, batch=batch
        )
        return {"prefill_tokens_s": predicted.prefill_tokens_s, "decode_tokens_s": predicted.decode_tokens_s}

    def generate(self, token_ids: list[int], num_tokens: int) -> Answer:
        """See `worker`."""
        outputs = self.generate_batch([token_ids], num_tokens)
        return {"token_ids": outputs["token_ids"][0], **{key: outputs[key] for key in ("first_token_s", "token_s")}}

    def generate_many(self, prompts: list[list[int]], num_tokens: int) -> Answer:
        """See `worker`."""
        started = time.perf_counter()
        outputs = self.llm.generate(prompts, max_new_tokens=num_tokens, ignore_eos=True, detokenize=False)
        whole_s = time.perf_counter() - started
        return {"token_ids": [list(output.token_ids) for output in outputs], "whole_s": whole_s}

    def generate_batch(self, prompts: list[list[int]], num_tokens: int) -> Answer:
        """Answer several prompts at once.

        Args:
            prompts: token ids of each.
            num_tokens: length of each answer.

        Returns:
            `token_ids` of each, `first_token_s` until every prompt had its first token, `token_s` a step after that.
        """
        from dseek.engine.request import SamplingParams

        params = SamplingParams(max_new_tokens=num_tokens, ignore_eos=True, detokenize=False)
        started = time.perf_counter()
        requests = [self.llm.submit(prompt, params) for prompt in prompts]
        while not all(request.first_token_s for request in requests):
            self.llm.engine.step()
        first = time.perf_counter()
        steps = 0
        while not any(request.finished for request in requests):
            self.llm.engine.step()
            steps += 1
        last = time.perf_counter()
        while not all(request.finished for request in requests):
            self.llm.engine.step()
        return {
            "token_ids": [list(request.output().token_ids) for request in requests],
            "first_token_s": first - started,
            "token_s": (last - first) / steps if steps else 0.0,
        }

    def start(
        self, path: str, threads: int, context_tokens: int, prompt: str, options: dict[str, Any] | None = None
    ) -> Answer:
        """See `worker`."""
        started = time.perf_counter()
        self.load(path, threads, context_tokens, options)
        output = self.llm.generate([prompt], max_new_tokens=1, ignore_eos=True)[0]
        return {
            "first_token_s": time.perf_counter() - started,
            "first_token_at_s": time.monotonic(),
            "token_id": output.token_ids[0],
            "prompt_token_ids": list(output.prompt_token_ids),
            **self.plan(),
        }

    def encode(self, path: str, text: str) -> Answer:
        """Token ids of a text, without special ones, by the tokenizer of a model that need not be loaded."""
        from dseek.models.files import open_model

        with open_model(path) as files:
            return {"token_ids": list(files.tokenizer().encode(text, add_special_tokens=False))}

    def encode_all(self, path: str, texts: list[str]) -> Answer:
        """Token ids of several texts, as `encode`."""
        from dseek.models.files import open_model

        with open_model(path) as files:
            tokenizer = files.tokenizer()
            return {"token_ids": [list(tokenizer.encode(text, add_special_tokens=False)) for text in texts]}

    def pieces(self, path: str, token_ids: list[int]) -> Answer:
        """What each token says by itself."""
        from dseek.models.files import open_model

        with open_model(path) as files:
            tokenizer = files.tokenizer()
            said = {token: tokenizer.decode([token], skip_special_tokens=False) for token in set(token_ids)}
            return {"texts": [said[token] for token in token_ids]}

    def nll(self, token_ids: list[int], window: int) -> Answer:
        """Score a text in windows through the engine; see `transformers_worker`."""
        import numpy as np

        from benchmarks.scoring import score_rows

        losses, best = [], []
        for start in range(0, len(token_ids), window):
            ids = np.array(token_ids[start : start + window], dtype=np.int64)
            for first, logits in self.llm.engine.logits(token_ids[start : start + window]):
                rows = logits[: len(ids) - 1 - first]
                row_losses, row_best = score_rows(rows, ids[first + 1 : first + 1 + len(rows)])
                losses.extend(row_losses)
                best.extend(row_best)
        return {"losses": losses, "best": best}

    def generate_profiled(self, token_ids: list[int], num_tokens: int) -> Answer:
        """`generate` under the profiler, its timeline included; beside that what the profile counted."""
        from dseek.profiler import ProfileSession

        with ProfileSession(use_torch=False) as session:
            answer = self.generate(token_ids, num_tokens)
        found = session.result
        return {**answer, "operators": len(found.operators), "flops": found.flops, "wall_s": found.wall_s}

    def module_forward(self, token_ids: list[int], profiled: bool) -> Answer:
        """Run the PyTorch module once, under the profiler or not.

        Returns:
            `seconds` of the pass, and `best`, the likeliest token after each.
        """
        import contextlib

        import torch

        from dseek.profiler import ProfileSession

        if self.decoder is None:
            self.decoder = self.llm.module().eval()
        ids = torch.tensor([token_ids])
        with torch.inference_mode(), ProfileSession(use_torch=True) if profiled else contextlib.nullcontext():
            started = time.perf_counter()
            logits = self.decoder(ids)
            seconds = time.perf_counter() - started
        return {"seconds": seconds, "best": logits[0].argmax(dim=1).tolist()}

    def watch(self) -> Answer:
        """From now on remember where a sequence lies, for `skipped`.

        Returns:
            `attention`, the patterns in words, and `gate`, whether a trained one chooses.
        """
        from benchmarks.peers.attention_pairs import WatchedRunner
        from dseek.engine.native_runner import NativeRunner
        from dseek.plan.attention_wish import patterns_text

        runner, patterns = self.llm.engine.runner, self.llm.plan.attention_patterns
        if not isinstance(runner, NativeRunner):
            raise NotImplementedError("selections can be looked at with the native kernels alone")
        self.llm.engine.runner = WatchedRunner(runner)
        return {
            "attention": patterns_text(patterns),
            "gate": any(pattern.gate for pattern in patterns),
        }

    def skipped(self, firsts: list[int]) -> Answer:
        """Count what attention left out of the last sequence, over all layers.

        Args:
            firsts: first query positions to count from.

        Returns:
            `shares` of the causal pairs of a query and an earlier position (or its own), one for each of `firsts`.
        """
        from benchmarks.peers.attention_pairs import WatchedRunner, count_skipped

        watched = self.llm.engine.runner
        if not isinstance(watched, WatchedRunner) or not watched.is_whole:
            raise RuntimeError("no sequence was computed with all its logits since `watch`: `nll` does that")
        counts = [count_skipped(watched, self.llm.plan, first) for first in firsts]
        return {"shares": [skipped / total for total, skipped in counts]}


if __name__ == "__main__":
    serve(DseekWorker())
