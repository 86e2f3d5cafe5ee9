"""llama.cpp behind the protocol, by llama-cpp-python's low-level calls: no Python sampler in the timed part."""

from __future__ import annotations

import time
from typing import Any

import llama_cpp
import numpy as np

from benchmarks.peers.worker import Answer, Worker, serve, steady_token_s
from benchmarks.scoring import score_rows

LOGIT_ROWS = 256
"""Rows of logits asked for at once."""
BATCH_TOKENS = 2048
"""Tokens of one `llama_decode` call in prefill (llama.cpp's own default `n_batch`)."""


class LlamaCppWorker(Worker):
    """A GGUF file in llama.cpp with flash attention; everything else at its defaults."""

    def load(self, path: str, threads: int, context_tokens: int, options: dict[str, Any] | None = None) -> Answer:
        """See `worker`."""
        started = time.perf_counter()
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), model_params)
        if not self.model:
            raise ValueError(f"llama.cpp could not load {path}")
        params = llama_cpp.llama_context_default_params()
        streams = (options or {}).get("streams", 1)
        params.n_ctx = context_tokens * streams
        params.n_seq_max = streams
        params.n_batch = BATCH_TOKENS
        params.n_threads = threads
        params.n_threads_batch = threads
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise ValueError("llama.cpp could not make a context")
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(self.vocab)
        return {
            "load_s": time.perf_counter() - started,
            "version": llama_cpp.__version__,
            "system": llama_cpp.llama_print_system_info().decode(),
        }

    def generate(self, token_ids: list[int], num_tokens: int) -> Answer:
        """See `worker`."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        prompt = (llama_cpp.llama_token * len(token_ids))(*token_ids)
        started = time.perf_counter()
        self._prefill(prompt, len(token_ids))
        answer = [self._best()]
        times = [time.perf_counter()]
        one = (llama_cpp.llama_token * 1)()
        while len(answer) < num_tokens:
            one[0] = answer[-1]
            self._decode(one, 1)
            answer.append(self._best())
            times.append(time.perf_counter())
        return {"token_ids": answer, "first_token_s": times[0] - started, "token_s": steady_token_s(times)}

    def generate_many(self, prompts: list[list[int]], num_tokens: int) -> Answer:
        """See `worker`."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        answers: list[list[int]] = [[] for _ in prompts]
        started = time.perf_counter()
        queue = [(seq, pos, token) for seq, ids in enumerate(prompts) for pos, token in enumerate(ids)]
        last = {seq: len(ids) - 1 for seq, ids in enumerate(prompts)}
        for first in range(0, len(queue), BATCH_TOKENS):
            self._step(queue[first : first + BATCH_TOKENS], last, answers)
        for index in range(1, num_tokens):
            rows = [(seq, len(ids) + index - 1, answers[seq][-1]) for seq, ids in enumerate(prompts)]
            self._step(rows, {seq: pos for seq, pos, _ in rows}, answers)
        return {"token_ids": answers, "whole_s": time.perf_counter() - started}

    def _step(self, rows: list[tuple[int, int, int]], last: dict[int, int], answers: list[list[int]]) -> None:
        """Compute rows of several sequences; append the likeliest token after each sequence's last row."""
        batch = llama_cpp.llama_batch_init(len(rows), 0, 1)
        try:
            batch.n_tokens = len(rows)
            for index, (seq, pos, token) in enumerate(rows):
                batch.token[index], batch.pos[index] = token, pos
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, seq
                batch.logits[index] = int(pos == last[seq])
            status = llama_cpp.llama_decode(self.context, batch)
        finally:
            llama_cpp.llama_batch_free(batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        for index, (seq, pos, _) in enumerate(rows):
            if pos == last[seq]:
                logits = llama_cpp.llama_get_logits_ith(self.context, index)
                answers[seq].append(int(np.ctypeslib.as_array(logits, shape=(self.vocab_size,)).argmax()))

    def start(
        self, path: str, threads: int, context_tokens: int, prompt: str, options: dict[str, Any] | None = None
    ) -> Answer:
        """See `worker`."""
        started = time.perf_counter()
        self.load(path, threads, context_tokens)
        text = prompt.encode()
        room = (llama_cpp.llama_token * (len(text) + 8))()
        count = llama_cpp.llama_tokenize(self.vocab, text, len(text), room, len(room), True, True)
        if count <= 0:
            raise ValueError("llama.cpp could not tokenize the prompt")
        self._prefill(room, count)
        token_id = self._best()
        return {
            "first_token_s": time.perf_counter() - started,
            "first_token_at_s": time.monotonic(),
            "token_id": token_id,
            "prompt_token_ids": list(room[:count]),
        }

    def nll(self, token_ids: list[int], window: int) -> Answer:
        """See `worker`."""
        losses, best = [], []
        for start in range(0, len(token_ids), window):
            ids = token_ids[start : start + window]
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
            for first in range(0, len(ids) - 1, LOGIT_ROWS):
                last = min(first + LOGIT_ROWS, len(ids) - 1)
                logits = self._all_logits(ids[first:last], first)
                row_losses, row_best = score_rows(logits, np.array(ids[first + 1 : last + 1]))
                losses += row_losses
                best += row_best
        return {"losses": losses, "best": best}

    def _all_logits(self, token_ids: list[int], position: int) -> np.ndarray:
        """Compute tokens from a position on; float32 [T, V], valid until the next call."""
        batch = llama_cpp.llama_batch_init(len(token_ids), 0, 1)
        try:
            batch.n_tokens = len(token_ids)
            for index, token_id in enumerate(token_ids):
                batch.token[index], batch.pos[index] = token_id, position + index
                batch.n_seq_id[index], batch.seq_id[index][0], batch.logits[index] = 1, 0, 1
            status = llama_cpp.llama_decode(self.context, batch)
        finally:
            llama_cpp.llama_batch_free(batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        logits = llama_cpp.llama_get_logits(self.context)
        return np.ctypeslib.as_array(logits, shape=(len(token_ids), self.vocab_size))

    def _prefill(self, tokens: Any, count: int) -> None:
        """Compute `count` tokens in batches, logits of the last one only."""
        for start in range(0, count, BATCH_TOKENS):
            size = min(BATCH_TOKENS, count - start)
            piece = (llama_cpp.llama_token * size)(*tokens[start : start + size])
            self._decode(piece, size)

    def _decode(self, tokens: Any, count: int) -> None:
        """One `llama_decode` call."""
        status = llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(tokens, count))
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")

    def _best(self) -> int:
        """The likeliest next token (waits for the computation)."""
        logits = llama_cpp.llama_get_logits_ith(self.context, -1)
        return int(np.ctypeslib.as_array(logits, shape=(self.vocab_size,)).argmax())


if __name__ == "__main__":
    serve(LlamaCppWorker())
