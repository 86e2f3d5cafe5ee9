"""`NativeRunner`: runs batches on the compiled decoder, which takes a whole batch through all layers in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from dseek.core.attention_pattern import num_levels
from dseek.core.errors import ConfigError
from dseek.engine.activation_guard import ActivationGuard
from dseek.engine.batch import Batch
from dseek.engine.decoder_clocks import DecoderClocks
from dseek.engine.planned_gates import planned_gates
from dseek.engine.runner import Runner
from dseek.models.encoding import to_float32
from dseek.models.files import ModelFiles
from dseek.models.rope import rope_table
from dseek.ops import native
from dseek.ops.linear.packing import check_finite, interleave, pack, pad
from dseek.plan.formats import ROLES, LayerFormats, WeightFormat
from dseek.plan.layout import PAGE_TOKENS
from dseek.plan.plan import Plan

_ROLES = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "output": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


WIDE_FORMAT: WeightFormat = "bf16"
"""What a layer falls back to: inputs in bf16 have the range of fp32, and no step that one large value sets for all."""


class NativeRunner(Runner):
    """Packed weights, cache and kernels of one model.

    Args:
        files: the opened model; its weights are packed here and its pages may then be dropped.
        plan: formats, attention, cache, threads. Where it limits the inputs of projections, a batch in which a layer's
            are beyond that is computed again with the layer in `WIDE_FORMAT`, for which its weights are packed again.

    Raises:
        ConfigError: there are no native kernels, or the plan's pages have another size than theirs.
    """

    def __init__(self, files: ModelFiles, plan: Plan) -> None:
        compiled = native.require()
        if plan.page_tokens != PAGE_TOKENS:
            raise ConfigError(f"the plan's pages hold {plan.page_tokens} tokens", needed=f"pages of {PAGE_TOKENS}")
        compiled.set_num_threads(plan.num_threads)
        self._decoder: Any | None = _build(compiled, files, plan)
        self._decoder.allocate_cache(plan.num_pages)
        self._files = files
        self._plan = plan
        self._clocks = DecoderClocks()
        self._widened: set[int] = set()
        if plan.activation_limits:
            self.guard = ActivationGuard(plan.activation_limits)
            for layer, limits in enumerate(plan.activation_limits):
                self._decoder.set_limits(layer, list(limits.by_role().values()))
        self.num_pages = plan.num_pages
        self.weight_bytes: int = self._decoder.weight_bytes
        """Bytes of packed weights that a decode step of one sequence reads."""
        self._shape = files.shape
        self._set_rotary(plan.context_tokens)

    def forward(self, batch: Batch) -> np.ndarray:
        """Compute every row of a batch; see `Runner.forward`.

        Args:
            batch: the rows.

        Returns:
            float32 [L, V].
        """
        return self._guarded(batch)

    def hidden(self, batch: Batch) -> np.ndarray:
        """Compute every row of a batch; see `Runner.hidden`.

        Args:
            batch: the rows.

        Returns:
            float32 [L, D].
        """
        return self._guarded(batch, hidden=True)

    def forward_part(self, part: Batch, whole: Batch, exchange: Callable[[int], None]) -> np.ndarray:
        """Compute some rows of a batch whose other rows somebody else computes.

        Args:
            part: the rows; several of its sequences may be pieces of one and share its pages, each consecutive.
            whole: the batch that they are a part of; its page tables are as wide.
            exchange: called with each layer's index, in order, when the part's keys and values of the layer are in the
                cache (`cache_pages`). When it returns, those of the whole batch must be. It may not call the runner;
                what it raises ends the call and is raised by it.

        Returns:
            float32 [L, V] for `part.logit_rows`. Limits of the plan are not watched here.
        """
        ends = whole.row_starts[1:] - 1
        spans = np.stack([whole.positions[whole.row_starts[:-1]], whole.positions[ends] + 1], axis=1)
        logits = self._forward(part, exchange=exchange, wholes=(np.ascontiguousarray(spans), whole.page_tables))
        if self.guard is not None and self._decoder is not None:
            self._decoder.take_exceeded()  # it is of this batch, and the next one is watched
        return logits

    def _guarded(self, batch: Batch, **options: Any) -> np.ndarray:
        """Run a batch within the plan's limits, where it has some."""
        out = self._forward(batch, **options)
        return out if self.guard is None else self._within_limits(batch, out, self.guard, options)

    def _forward(self, batch: Batch, **options: Any) -> np.ndarray:
        assert self._decoder is not None, "the runner is closed"
        arrays = (batch.token_ids, batch.positions, batch.row_starts, batch.page_tables, batch.logit_rows)
        with self._clocks.watching(self._decoder, self._plan, batch):
            logits: np.ndarray = self._decoder.forward(*arrays, **options)
        return logits

    def _within_limits(
        self, batch: Batch, out: np.ndarray, guard: ActivationGuard, options: dict[str, Any]
    ) -> np.ndarray:
        """Compute a batch again with wider layers until no other layer's inputs are beyond the plan's limits."""
        decoder = self._decoder
        assert decoder is not None
        wider: set[int] = set()
        try:
            while exceeded := [place for place in decoder.take_exceeded() if place // len(ROLES) not in wider]:
                for layer in sorted({place // len(ROLES) for place in exceeded}):
                    role = ROLES[min(place for place in exceeded if place // len(ROLES) == layer) % len(ROLES)]
                    guard.count(layer, guard.beyond(layer, role), batch.num_rows, WIDE_FORMAT)
                    self._widen(layer)
                    decoder.swap_wide(layer)
                    wider.add(layer)
                out = self._forward(batch, **options)
        finally:
            for layer in wider:
                decoder.swap_wide(layer)
        return out

    def _widen(self, layer: int) -> None:
        """Pack a layer's weights in the wide format, the first time."""
        if layer not in self._widened:
            assert self._decoder is not None
            wide = _projections(self._files, f"model.layers.{layer}.", LayerFormats.uniform(WIDE_FORMAT))
            self._decoder.set_wide(layer, **wide)
            self._widened.add(layer)

    def cache_pages(self) -> np.ndarray:
        """Show the memory of the cache, uint8 [pages, layers, bytes]: keys, values and scales as the kernels hold them.

        Sums over a page's tokens are made anew from its keys and values when a later block begins, so whoever writes a
        page writes nothing else.
        """
        assert self._decoder is not None, "the runner is closed"
        pages: np.ndarray = self._decoder.cache_pages()
        return pages

    def selections(self) -> list[np.ndarray]:
        """Show the memory of what the queries of each page selected, arrays uint8 [pages, layers, heads, bytes]."""
        assert self._decoder is not None, "the runner is closed"
        arrays: list[np.ndarray] = self._decoder.selections()
        return arrays

    def selection(
        self, layer: int, kv_head: int, pages: np.ndarray, query_block: int
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Tell what a block of queries attended to in a layer that is not dense; for looking at, not for running.

        Args:
            layer: index of the layer.
            kv_head: index of the key-value head.
            pages: int32 [P], page table of the sequence, which must still lie there.
            query_block: index of the queries' block.

        Returns:
            Blocks attended to token by token, rising, its own the last; level and index of cells that count by means.

        Raises:
            ValueError: there is no such layer, head, page or block, or the layer has no pattern.
        """
        assert self._decoder is not None, "the runner is closed"
        exact, far = self._decoder.selection(layer, kv_head, pages, query_block)
        return list(exact), [(level, index) for level, index in far]

    def row_selection(self, layer: int, kv_head: int, pages: np.ndarray, position: int) -> tuple[list[int], list[int]]:
        """Tell what sixteen queries attended to, up to one of them, where each selects for itself; for looking at.

        Args:
            layer: index of the layer.
            kv_head: index of the key-value head.
            pages: int32 [P], page table of the sequence, which must still lie there.
            position: of the newest query that is asked for; those from the multiple of 16 before it on are meant.

        Returns:
            Blocks attended to, rising, its own the last; for each the first of the queries that does, from 0 on.

        Raises:
            ValueError: there is no such layer, head, page or position, or the layer's queries do not select so.
        """
        assert self._decoder is not None, "the runner is closed"
        blocks, first_rows = self._decoder.row_selection(layer, kv_head, pages, position)
        return list(blocks), list(first_rows)

    def close(self) -> None:
        """Free the weights and the cache."""
        self._decoder = None

    def _set_rotary(self, context_tokens: int) -> None:
        """Make the tables for positions up to `context_tokens` (some rotations depend on it)."""
        assert self._decoder is not None
        cos, sin = rope_table(self._shape, context_tokens, context_tokens)
        self._decoder.set_rotary(np.ascontiguousarray(cos), np.ascontiguousarray(sin))


def _build(compiled: ModuleType, files: ModelFiles, plan: Plan) -> Any:
    """Pack all weights into a decoder."""
    shape = files.shape
    decoder = compiled.Decoder(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab_size,
        epsilon=shape.rms_norm_eps,
        cache_type=plan.cache_dtype,
    )
    gates = planned_gates(files, plan.attention_patterns)
    if gates is not None and any(pattern.gate for pattern in plan.attention_patterns):
        decoder.set_gate_rotation(*gates.rotation(plan.num_pages))
    for layer, formats in enumerate(plan.layer_formats):
        windowed = shape.window_layers is None or shape.window_layers[layer]
        window = shape.sliding_window if shape.sliding_window is not None and windowed else 0
        decoder.add_block(**_block(files, f"model.layers.{layer}.", formats), window=window)
        pattern = plan.attention_patterns[layer]
        if pattern.kind != "dense":
            level_bias = None
            if gates is not None and pattern.far:
                level_bias = gates.layers[layer].bias_of_levels(num_levels(plan.num_pages * PAGE_TOKENS))
            decoder.set_pattern(
                layer,
                near_blocks=list(pattern.near_blocks(shape.num_kv_heads)),
                top_blocks=pattern.top_blocks,
                far=pattern.far,
                min_share=pattern.min_share,
                share_factors=list(pattern.share_factors),
                level_bias=level_bias,
                gate=gates.layers[layer].learned if gates is not None and pattern.gate else None,
            )
        files.release()
    tied = not files.has("lm_head.weight")
    embedding = pack(plan.embedding_format, [files.tensor("model.embed_tokens.weight")], to_float32)
    if tied and plan.head_format == plan.embedding_format:
        head = embedding
    else:
        name = "model.embed_tokens.weight" if tied else "lm_head.weight"
        head = pack(plan.head_format, [files.tensor(name)], to_float32)
    decoder.set_tables(embedding=embedding, head=head, final_norm=_vector(files, "model.norm.weight"))
    files.release()
    return decoder


def _block(files: ModelFiles, prefix: str, formats: LayerFormats) -> dict[str, np.ndarray]:
    """Packed weights, norms and biases of one block, as the decoder takes them."""
    arrays = _projections(files, prefix, formats)
    for role in ROLES:
        bias = _joined_bias(files, [prefix + name for name in _ROLES[role]])
        if bias is not None:
            arrays[role + "_bias"] = interleave(bias) if role == "gate_up" else pad(bias)
    arrays["input_norm"] = _vector(files, prefix + "input_layernorm.weight")
    arrays["post_attention_norm"] = _vector(files, prefix + "post_attention_layernorm.weight")
    if files.shape.qk_norm:
        arrays["query_norm"] = _vector(files, prefix + "self_attn.q_norm.weight")
        arrays["key_norm"] = _vector(files, prefix + "self_attn.k_norm.weight")
    return arrays


def _projections(files: ModelFiles, prefix: str, formats: LayerFormats) -> dict[str, np.ndarray]:
    """Packed weights of one block's projections."""
    arrays = {}
    for role, weight_format in formats.by_role().items():
        tensors = [files.tensor(f"{prefix}{name}.weight") for name in _ROLES[role]]
        arrays[role] = pack(weight_format, tensors, to_float32, interleaved=role == "gate_up")
    return arrays


def _joined_bias(files: ModelFiles, names: Sequence[str]) -> np.ndarray | None:
    """Biases of the projections of one role, one after the other; None where there is none."""
    if not files.has(names[0] + ".bias"):
        return None
    return np.concatenate([_vector(files, name + ".bias") for name in names])


def _vector(files: ModelFiles, name: str) -> np.ndarray:
    return np.ascontiguousarray(check_finite(name, to_float32(files.tensor(name))), dtype=np.float32).reshape(-1)
