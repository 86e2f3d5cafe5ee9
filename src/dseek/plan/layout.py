"""`Layout`: the part of a plan that time and memory depend on."""

from __future__ import annotations

from dataclasses import dataclass

from dseek.core.attention_pattern import AttentionPattern
from dseek.plan.formats import CacheDtype, Kernels, LayerFormats, WeightFormat

PAGE_TOKENS = 64
"""Positions in a page of the cache."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """The part of a plan that time and memory depend on; `Plan` explains the fields."""

    kernels: Kernels
    """native or torch."""
    layer_formats: tuple[LayerFormats, ...]
    """Weight formats, layer by layer."""
    embedding_format: WeightFormat
    """Format of the embedding."""
    head_format: WeightFormat
    """Format of the output head."""
    cache_dtype: CacheDtype
    """Element type of the key/value cache."""
    attention_patterns: tuple[AttentionPattern, ...]
    """What each layer attends to, layer by layer."""
    num_pages: int
    """Pages of the cache."""
    max_batch: int
    """Sequences at a time."""
    prefill_chunk_tokens: int
    """Most rows of a step."""
    num_threads: int
    """Threads."""
