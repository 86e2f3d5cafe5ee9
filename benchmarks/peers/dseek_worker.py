"""dseek behind the same protocol as its peers, through its Python interface: `dseek.load` and the engine.

Operations beside the common ones: `encode` (text to ids), `nll` (see `transformers_worker`), `plan` (what was planned),
`predict` (what the cost model says of a run), `generate_batch`.
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

    def load(self, path: str, threads: int, context_tokens: int, options: dict[str, Any] | None = None) -> Answer:
        """See `worker`."""
        started = time.perf_counter()
        wanted = {"attention": "dense", **(options or {})}
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

        with_files = open_model(path)
        try:
            return {"token_ids": list(with_files.tokenizer().encode(text, add_special_tokens=False))}
        finally:
            with_files.close()

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


if __name__ == "__main__":
    serve(DseekWorker())
