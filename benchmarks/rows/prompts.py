"""Prompts for speed: stretches of Python source, each different, in a model's own token ids."""

from __future__ import annotations

from benchmarks.errors import BenchmarkError
from benchmarks.models import SMOLLM2, BenchModel, own_path
from benchmarks.peers.client import PeerProcess
from benchmarks.text import standard_library_text


def source_tokens(num_tokens: int) -> list[int]:
    """Token ids of the standard library's source in SmolLM2's vocabulary, by dseek's tokenizer.

    Args:
        num_tokens: how many.

    Returns:
        So many ids.
    """
    with PeerProcess("dseek") as worker:
        text = standard_library_text(num_tokens * 6)
        ids: list[int] = worker.call("encode", path=own_path(SMOLLM2), text=text)["token_ids"]
    if len(ids) < num_tokens:
        raise BenchmarkError(f"the standard library's source gave {len(ids)} tokens, {num_tokens} are needed")
    return ids[:num_tokens]


def prompts(model: BenchModel, length: int, count: int) -> list[list[int]]:
    """Different prompts of one length.

    Args:
        model: whose vocabulary the ids must lie in.
        length: tokens of each.
        count: how many.

    Returns:
        Token ids; they overlap where the source is too short, but no two begin alike.
    """
    step = min(length, 1024)
    ids = [token % model.sizes["vocab_size"] for token in source_tokens(length + step * (count - 1))]
    return [ids[start : start + length] for start in range(0, step * count, step)]
