"""A model made of arithmetic: its next token depends on every earlier one, read back through the page tables.

A runner that mixes up pages, positions or rows gives other tokens, so the engine's bookkeeping is tested without any
real model. The vocabulary is the 256 bytes, an end token (256) and a start token (257).
"""

from __future__ import annotations

import codecs
import hashlib
from types import SimpleNamespace
from typing import Any

import numpy as np

from dseek.core.attention_pattern import DENSE
from dseek.engine.batch import Batch
from dseek.engine.engine import Engine, EngineOptions
from dseek.engine.llm import LLM
from dseek.engine.runner import Runner

VOCAB_SIZE = 258
EOS = 256


class FakeRunner(Runner):
    """Hashes what the cache holds into logits.

    Args:
        num_pages: pages of the cache.
        page_tokens: positions a page holds.
    """

    def __init__(self, num_pages: int = 64, page_tokens: int = 4) -> None:
        self.num_pages = num_pages
        self.page_tokens = page_tokens
        self.cache = np.full((num_pages, page_tokens), -1, dtype=np.int64)
        self.batches: list[Batch] = []
        self.closed = False
        self.script: bytes | None = None
        """Says these bytes after any prompt, then the end token; None hashes."""
        self.prompt_tokens = 0

    def forward(self, batch: Batch) -> np.ndarray:
        assert not self.closed
        self.check(batch)
        self.batches.append(batch)
        logits = []
        for sequence in range(batch.num_sequences):
            table = batch.page_tables[sequence]
            for row in range(batch.row_starts[sequence], batch.row_starts[sequence + 1]):
                position = int(batch.positions[row])
                self.cache[table[position // self.page_tokens], position % self.page_tokens] = batch.token_ids[row]
                if row in batch.logit_rows:
                    pages = table[: position // self.page_tokens + 1]
                    history = self.cache[pages].reshape(-1)[: position + 1]
                    assert (history >= 0).all(), "a position was never computed"
                    logits.append(self.logits_after(history))
        return np.array(logits, dtype=np.float32).reshape(-1, VOCAB_SIZE)

    def hidden(self, batch: Batch) -> np.ndarray:
        """Four numbers a position: itself, its token, one, and the sum of tokens so far."""
        self.forward(batch)
        sums = []
        for position in batch.positions.tolist():
            slots = np.arange(position + 1)
            pages = batch.page_tables[0, slots // self.page_tokens]
            sums.append(int(self.cache[pages, slots % self.page_tokens].sum()))
        columns = (batch.positions, batch.token_ids, np.ones(batch.num_rows), sums)
        return np.stack(columns, axis=1)[batch.logit_rows].astype(np.float32)

    def logits_after(self, history: np.ndarray) -> np.ndarray:
        """Logits that follow a list of tokens."""
        if self.script is not None:
            logits = np.zeros(VOCAB_SIZE, dtype=np.float32)
            said = len(history) - self.prompt_tokens
            logits[self.script[said] if said < len(self.script) else EOS] = 9
            return logits
        digest = hashlib.sha256(history.astype(np.int64).tobytes()).digest()
        logits = np.random.default_rng(int.from_bytes(digest[:8], "little")).standard_normal(VOCAB_SIZE)
        logits[EOS] -= 1
        return (logits * 2).astype(np.float32)

    def check(self, batch: Batch) -> None:
        """Hold the batch to its contract."""
        for array in (batch.token_ids, batch.positions, batch.row_starts, batch.page_tables, batch.logit_rows):
            assert array.dtype == np.int32
        assert batch.row_starts[0] == 0
        assert batch.row_starts[-1] == batch.num_rows
        assert (np.diff(batch.row_starts) > 0).all()
        assert (np.diff(batch.logit_rows) > 0).all()
        written: list[set[int]] = []
        for sequence in range(batch.num_sequences):
            positions = batch.positions[batch.row_starts[sequence] : batch.row_starts[sequence + 1]]
            assert (np.diff(positions) == 1).all()
            written.append(set(batch.page_tables[sequence, positions // self.page_tokens].tolist()))
        for sequence, table in enumerate(batch.page_tables.tolist()):
            others = set().union(*written[:sequence], *written[sequence + 1 :])
            assert not others.intersection(table), "a sequence's page is written by another"

    def close(self) -> None:
        self.closed = True


class FakeStream:
    """Bytes to text, whole characters only."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._decoder.decode(bytes([token_id])) if token_id < 256 else ""

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class FakeTokenizer:
    """One token a byte."""

    eos_token_ids = (EOS,)
    bos_token_id = 257
    vocab_size = VOCAB_SIZE

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return ([257] if add_special_tokens else []) + list(text.encode())

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")

    def stream(self) -> FakeStream:
        return FakeStream()

    def apply_chat_template(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return "".join(f"<{message['role']}>{message['content']}" for message in messages) + "<assistant>"


SMALL_SHAPE = SimpleNamespace(num_layers=1, num_heads=1, head_dim=4, num_block_parameters=lambda: 64)
"""What an engine asks of the shape in a stand-in for a plan."""


def make_files(**changes: Any) -> Any:
    """A stand-in for an opened model."""
    shape = SimpleNamespace(vocab_size=VOCAB_SIZE, eos_token_ids=(), max_position_embeddings=4096)
    fields: dict[str, Any] = {
        "name": "fake",
        "shape": shape,
        "tokenizer": FakeTokenizer,
        "chat_template": "fake",
        "close": lambda: None,
    }
    return SimpleNamespace(**(fields | changes))


def make_plan(runner: FakeRunner, **changes: Any) -> Any:
    """A stand-in for a plan that fits the runner."""
    fields: dict[str, Any] = {
        "page_tokens": runner.page_tokens,
        "context_tokens": runner.num_pages * runner.page_tokens,
        "max_batch": 8,
        "prefill_chunk_tokens": 16,
        "precision": "fp32",
        "kernels": "torch",
        "num_threads": 1,
        "cache_dtype": "fp32",
        "machine_id": "none",
        "attention_patterns": (DENSE,),
        "shape": SMALL_SHAPE,
        # Rows of prompts cost nothing, so that they are cut by the plan's chunk alone.
        "predicted": SimpleNamespace(decode_tokens_s=1.0, prefill_tokens_s=1e12),
    }
    return SimpleNamespace(**(fields | changes))


def make_engine(runner: FakeRunner | None = None, **changes: Any) -> Engine:
    """An engine over a fake runner; `changes` are fields of the plan and of `EngineOptions`."""
    runner = runner or FakeRunner()
    options = {name: changes.pop(name) for name in EngineOptions.__dataclass_fields__ if name in changes}
    return Engine(make_files(), make_plan(runner, **changes), runner, EngineOptions(**options))


def make_llm(runner: FakeRunner | None = None, **changes: Any) -> LLM:
    """An `LLM` over a fake runner; `changes` are fields of the plan."""
    runner = runner or FakeRunner()
    return LLM(make_files(), make_plan(runner, **changes), runner)
