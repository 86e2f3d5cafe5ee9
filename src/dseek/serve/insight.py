"""What the web page's panel tells: the plan in words, and which blocks of tokens a layer attends to by it.

The picture is the plan's own rule, not a measurement of one text: where a layer selects blocks as it goes, they are
shown as selectable. `dseek plan --show-attention` draws what a head really attends to over a text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dseek.core.attention_pattern import BLOCK_TOKENS, AttentionPattern
from dseek.plan.attention_wish import pattern_text
from dseek.plan.explain import size_text
from dseek.serve.errors import ApiError

if TYPE_CHECKING:
    from dseek.engine.llm import LLM

HIDDEN, LEFT_OUT, SELECTABLE, SEEN = range(4)
"""A block of keys that comes after the queries; that the layer skips; that it opens where it matters; that it sees."""

LEGEND = ("later", "left out", "opened where it matters", "seen")


def plan_words(llm: LLM) -> dict[str, Any]:
    """Explain a plan for people.

    Args:
        llm: the loaded model.

    Returns:
        `summary` (a sentence), `facts` (pairs of a name and a value) and `choices` (what was decided, and why).
    """
    plan = llm.plan
    predicted = plan.predicted
    kernels = "PyTorch" if plan.kernels == "torch" else "the native kernels"
    words = (
        f"{llm.files.name} runs in {plan.precision} on {kernels}, "
        f"{plan.num_threads} thread{'s' if plan.num_threads > 1 else ''}; "
        f"{plan.max_batch} answers at a time share a cache of {size_text(predicted.cache_bytes)}."
    )
    facts = [
        ("Precision", plan.precision),
        ("Kernels", plan.kernels),
        ("Threads", str(plan.num_threads)),
        ("Context", f"{plan.context_tokens:,} tokens"),
        ("Answers at a time", str(plan.max_batch)),
        ("Prompt rows a step", f"{plan.prefill_chunk_tokens:,}"),
        ("Cache", f"{plan.num_pages:,} pages of {plan.page_tokens} tokens, {plan.cache_dtype}"),
        ("Weights", size_text(predicted.weights_bytes)),
        ("Memory at most", size_text(predicted.peak_bytes)),
        ("Predicted decode", f"{predicted.decode_tokens_s:,.0f} tokens/s"),
        ("Predicted prefill", f"{predicted.prefill_tokens_s:,.0f} tokens/s"),
    ]
    return {
        "summary": words,
        "facts": [{"name": name, "value": value} for name, value in facts],
        "choices": [{"name": choice.name, "chosen": choice.chosen, "why": choice.why} for choice in plan.choices],
        "num_layers": plan.shape.num_layers,
    }


def attention_view(llm: LLM, layer: int, num_blocks: int) -> dict[str, Any]:
    """Show which blocks of keys the queries of each block see in one layer.

    Args:
        llm: the loaded model.
        layer: index of the layer.
        num_blocks: blocks on each side of the picture.

    Returns:
        `rows` (a text of digits a block of queries, each an index into `legend`), `legend`, `words`, `block_tokens` and
        `seen` (share of the causal pairs of blocks that are seen).

    Raises:
        ApiError: there is no such layer.
    """
    patterns = llm.plan.attention_patterns
    if layer >= len(patterns):
        raise ApiError(400, f"layer {layer}; needed: 0 to {len(patterns) - 1}", param="layer")
    pattern = patterns[layer]
    rows = [[_place(pattern, query, key) for key in range(num_blocks)] for query in range(num_blocks)]
    causal = num_blocks * (num_blocks + 1) // 2
    return {
        "layer": layer,
        "block_tokens": BLOCK_TOKENS,
        "legend": LEGEND,
        "words": pattern_text(pattern),
        "rows": ["".join(map(str, row)) for row in rows],
        "seen": sum(row.count(SEEN) for row in rows) / causal,
    }


def _place(pattern: AttentionPattern, query: int, key: int) -> int:
    """What becomes of a block of keys for a block of queries, by the widest window of the layer's heads."""
    if key > query:
        return HIDDEN
    if pattern.kind == "dense" or pattern.dense_heads:
        return SEEN
    window = max(pattern.window_tokens) // BLOCK_TOKENS
    if key == 0 or query - key <= window:
        return SEEN
    return SELECTABLE if pattern.kind == "dynamic" else LEFT_OUT
