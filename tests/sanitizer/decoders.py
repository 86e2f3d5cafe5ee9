"""Small random decoders straight from the compiled class, for processes that import no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

FORMATS = ("f32", "f16", "bf16", "i8c", "i8p", "i8g", "i4g")
PAGE_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a decoder is built from."""

    hidden: int = 48
    inner: int = 35
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    vocab: int = 67
    cache: str = "bf16"
    window: int = 0
    num_pages: int = 40
    num_positions: int = 1200
    patterns: bool = False


def build(native: ModuleType, sizes: Sizes, seed: int = 0) -> Any:
    """Build a complete decoder; each projection takes a format of its own.

    Args:
        native: the compiled module.
        sizes: of the decoder.
        seed: of weights and formats.

    Returns:
        The decoder, with tables and cache.
    """
    rng = np.random.default_rng(seed)

    def blob(rows: int, inputs: int, *, interleaved: bool = False) -> np.ndarray:
        weight = rng.standard_normal((rows, inputs), dtype=np.float32)
        packed: np.ndarray = native.pack(str(rng.choice(FORMATS)), weight, interleaved)
        return packed

    def vector(size: int) -> np.ndarray:
        return rng.standard_normal(size, dtype=np.float32)

    def whole_panels(size: int) -> int:
        return -(-size // 16) * 16

    query, kv = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    decoder = native.Decoder(
        hidden_size=sizes.hidden,
        intermediate_size=sizes.inner,
        num_layers=sizes.layers,
        num_heads=sizes.heads,
        num_kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        vocab_size=sizes.vocab,
        epsilon=1e-5,
        cache_type=sizes.cache,
    )
    for layer in range(sizes.layers):
        extras = {}
        if layer % 2 == 0:
            extras = {"query_norm": vector(sizes.head_dim), "key_norm": vector(sizes.head_dim)}
            extras |= {"qkv_bias": vector(query + 2 * kv), "output_bias": vector(whole_panels(sizes.hidden))}
            extras |= {"gate_up_bias": vector(2 * whole_panels(sizes.inner))}
            extras |= {"down_bias": vector(whole_panels(sizes.hidden))}
        decoder.add_block(
            qkv=blob(query + 2 * kv, sizes.hidden),
            output=blob(sizes.hidden, query),
            gate_up=blob(2 * sizes.inner, sizes.hidden, interleaved=True),
            down=blob(sizes.hidden, sizes.inner),
            input_norm=vector(sizes.hidden),
            post_attention_norm=vector(sizes.hidden),
            window=sizes.window,
            **extras,
        )
    decoder.set_tables(
        embedding=blob(sizes.vocab, sizes.hidden),
        head=blob(sizes.vocab, sizes.hidden),
        final_norm=vector(sizes.hidden),
    )
    angles = rng.standard_normal((sizes.num_positions, sizes.head_dim // 2), dtype=np.float32)
    decoder.set_rotary(np.cos(angles), np.sin(angles))
    if sizes.patterns:
        _set_patterns(decoder, sizes, rng)
    decoder.allocate_cache(sizes.num_pages)
    return decoder


def _set_patterns(decoder: Any, sizes: Sizes, rng: np.random.Generator) -> None:
    """Let the first layer select by rows with a gate, and the second by blocks with far cells."""
    dim, near = 16, [1] * sizes.kv_heads
    shapes = (
        (sizes.heads, sizes.head_dim, dim),
        (1, sizes.kv_heads, 3 * sizes.head_dim, dim),
        (sizes.heads, dim),
        (1, sizes.kv_heads, dim),
        (sizes.heads,),
        (sizes.heads, sizes.head_dim),
        (sizes.heads,),
    )
    gate = tuple(rng.standard_normal(shape, dtype=np.float32) for shape in shapes)
    angles = rng.standard_normal((sizes.num_pages, dim // 2), dtype=np.float32)
    decoder.set_gate_rotation(np.cos(angles), np.sin(angles))
    decoder.set_pattern(0, near_blocks=near, top_blocks=3, min_share=0.1, gate=gate)
    if sizes.layers > 1:
        decoder.set_pattern(1, near_blocks=near, top_blocks=1, far=True)


def batch(sizes: Sizes, rows: list[tuple[int, int]], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Make the arguments of `Decoder.forward`.

    Args:
        sizes: of the decoder.
        rows: first position and number of rows of each sequence.
        rng: draws token ids, pages and which logits are wanted.

    Returns:
        Arrays by argument name.
    """
    longest = max(first + count for first, count in rows)
    num_rows = sum(count for _, count in rows)
    pages = np.full((len(rows), -(-longest // PAGE_TOKENS)), -1, dtype=np.int32)
    free = rng.permutation(sizes.num_pages).astype(np.int32)
    taken = 0
    for sequence, (first, count) in enumerate(rows):
        needed = -(-(first + count) // PAGE_TOKENS)
        pages[sequence, :needed] = free[taken : taken + needed]
        taken += needed
    wanted = np.flatnonzero(rng.random(num_rows) < rng.choice([0.0, 0.1, 0.5, 1.0]))
    return {
        "token_ids": rng.integers(0, sizes.vocab, num_rows).astype(np.int32),
        "positions": np.concatenate([np.arange(first, first + count) for first, count in rows]).astype(np.int32),
        "row_starts": np.cumsum([0, *(count for _, count in rows)]).astype(np.int32),
        "page_tables": pages,
        "logit_rows": wanted.astype(np.int32),
    }
