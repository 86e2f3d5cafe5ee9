"""`TorchRunner`: runs batches on PyTorch, where there are no native kernels or the device is not the CPU.

The linear layers work on the rows of all sequences together, as the native runner's do; attention goes sequence by
sequence over keys and values gathered from their pages. R rows, T rows of one sequence, S its positions so far, P
pages, D model width, H query heads, G key and value heads, d head width, V vocabulary.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from dseek.core.errors import ConfigError
from dseek.engine.activation_guard import ActivationGuard, Trespass
from dseek.engine.batch import Batch
from dseek.engine.runner import Runner
from dseek.models.decoder import Attention, Block, Decoder
from dseek.ops.attention.reference import visible
from dseek.ops.attention.rotary import rotate

if TYPE_CHECKING:
    from dseek.models.files import ModelFiles
    from dseek.plan.plan import Plan

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Precisions that PyTorch runs, and their dtype."""


class TorchRunner(Runner):
    """Computes batches with a `Decoder`'s modules and a paged cache in tensors.

    Args:
        decoder: the model; its dtype and device are those of the run and of the cache.
        num_pages: pages of the cache.
        page_tokens: positions a page holds.
        context_tokens: longest sequence; a rotation that depends on the length is that of this length for all, so that
            it does not matter how a text is cut into batches.
        guard: watches the inputs of projections. With it the residual stream is in float32, and a block whose inputs
            are beyond the guard's limits, or that is not finite, is computed anew in float32; keys and values beyond
            the cache's range are cut to it. None runs without.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        num_pages: int,
        page_tokens: int,
        context_tokens: int,
        guard: ActivationGuard | None = None,
    ) -> None:
        self.num_pages = num_pages
        self.page_tokens = page_tokens
        self.context_tokens = context_tokens
        self.guard = guard
        self._wide: dict[int, Block] = {}
        self._decoder: Decoder | None = decoder.eval()
        shape = decoder.shape
        weight = decoder.model.embed_tokens.weight
        size = (shape.num_layers, num_pages * page_tokens, shape.num_kv_heads, shape.head_dim)
        self._keys_LSGd = torch.zeros(size, dtype=weight.dtype, device=weight.device)
        self._values_LSGd = torch.zeros_like(self._keys_LSGd)

    @classmethod
    def from_files(cls, files: ModelFiles, plan: Plan, device: torch.device | str = "cpu") -> TorchRunner:
        """Load the weights and make the cache that a plan asks for.

        Args:
            files: the opened model.
            plan: precision, threads, pages.
            device: where to run.

        Returns:
            The runner.

        Raises:
            ConfigError: the plan's precision or its attention needs the native kernels.
        """
        for layer, pattern in enumerate(plan.attention_patterns):
            if pattern.kind != "dense":
                raise ConfigError(
                    f"{pattern.kind} attention in layer {layer} on PyTorch",
                    needed="dense attention",
                    remedy="build the native kernels, or plan with attention dense",
                )
        if plan.precision not in DTYPES:
            raise ConfigError(
                f"precision {plan.precision} on PyTorch",
                needed="one of " + ", ".join(DTYPES),
                remedy="build the native kernels, or choose one of these",
            )
        torch.set_num_threads(plan.num_threads)
        decoder = Decoder.from_files(files, DTYPES[plan.precision], device)
        return cls(
            decoder.requires_grad_(False),
            num_pages=plan.num_pages,
            page_tokens=plan.page_tokens,
            context_tokens=plan.context_tokens,
            guard=ActivationGuard(plan.activation_limits) if plan.activation_limits else None,
        )

    @torch.inference_mode()
    def forward(self, batch: Batch) -> np.ndarray:
        """Compute every row of a batch; see `Runner.forward`.

        Args:
            batch: the rows.

        Returns:
            float32 [L, V].
        """
        assert self._decoder is not None, "the runner is closed"
        wanted = self._wanted(batch).to(self._decoder.lm_head.weight.dtype)
        return self._decoder.lm_head(wanted).float().cpu().numpy()

    @torch.inference_mode()
    def hidden(self, batch: Batch) -> np.ndarray:
        """Compute every row of a batch; see `Runner.hidden`.

        Args:
            batch: the rows.

        Returns:
            float32 [L, D].
        """
        return self._wanted(batch).float().cpu().numpy()

    def _wanted(self, batch: Batch) -> torch.Tensor:
        """Compute every row; gives those asked for after the final norm, [L, D]."""
        assert self._decoder is not None, "the runner is closed"
        model = self._decoder.model
        sequences = [_Sequence(batch, index, self.page_tokens) for index in range(batch.num_sequences)]

        # 1. Embed the rows and rotate by their positions.
        x_RD = model.embed_tokens(self._tensor(batch.token_ids))
        if self.guard is not None:
            x_RD = x_RD.float()
        rotation = model.rotary_emb(self._tensor(batch.positions), torch.float32, self.context_tokens)

        # 2. The blocks. New keys and values go to the rows' own slots, then each sequence reads all of its slots.
        slots_R = self._tensor(np.concatenate([sequence.slots[sequence.first :] for sequence in sequences]))
        for layer in range(len(model.layers)):
            x_RD = self._run_block(layer, x_RD, rotation, slots_R, sequences)

        # 3. The final norm, of the rows that are wanted.
        normed: torch.Tensor = model.norm(x_RD[self._tensor(batch.logit_rows)])
        return normed

    @property
    def decoder(self) -> Decoder | None:
        """The modules that compute, for whoever looks at a run; None once the runner is closed."""
        return self._decoder

    def close(self) -> None:
        """Free the weights and the cache."""
        self._decoder = None
        self._wide = {}
        self._keys_LSGd = self._values_LSGd = torch.empty(0)

    def _run_block(
        self,
        layer: int,
        x_RD: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        slots_R: torch.Tensor,
        sequences: list[_Sequence],
    ) -> torch.Tensor:
        """Run a block, in float32 where the guard says so; gives [R, D]."""
        assert self._decoder is not None
        block = self._decoder.model.layers[layer]
        assert isinstance(block, Block)
        largest: dict[str, torch.Tensor] = {}
        out_RD = self._block(layer, block, x_RD, rotation, slots_R, sequences, largest)
        if self.guard is None:
            return out_RD
        # One transfer for all of a block's magnitudes.
        values = torch.stack([*largest.values(), out_RD.abs().amax()]).tolist()
        trespass: Trespass | None = None
        for role, value in zip((*largest, "block"), values, strict=True):
            trespass = trespass or self.guard.judge(layer, role, value)
        if trespass is None:
            return out_RD
        self.guard.count(layer, trespass, len(x_RD), "float32")
        if layer not in self._wide:
            self._wide[layer] = copy.deepcopy(block).float()
        return self._block(layer, self._wide[layer], x_RD, rotation, slots_R, sequences, {})

    def _block(
        self,
        layer: int,
        block: Block,
        x_RD: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        slots_R: torch.Tensor,
        sequences: list[_Sequence],
        largest: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        """Run a block in the dtype of its weights; notes the largest magnitude that goes into each projection."""
        attention, mlp = block.self_attn, block.mlp
        dtype = attention.o_proj.weight.dtype

        def narrowed(role: str, inputs: torch.Tensor) -> torch.Tensor:
            if self.guard is not None:
                largest[role] = inputs.abs().amax().float()
            return inputs.to(dtype)

        cos, sin = (part.to(dtype) for part in rotation)
        q_RHd, k_RGd, v_RGd = _project(attention, narrowed("qkv", block.input_layernorm(x_RD)), (cos, sin))
        self._keys_LSGd[layer, slots_R] = self._for_cache(k_RGd)
        self._values_LSGd[layer, slots_R] = self._for_cache(v_RGd)
        window = self._window(layer)
        mixed = [self._attend(layer, q_RHd[sequence.rows], sequence, window) for sequence in sequences]
        x_RD = x_RD + attention.o_proj(narrowed("output", torch.cat(mixed)))
        inputs_RD = narrowed("gate_up", block.post_attention_layernorm(x_RD))
        hidden_RF = F.silu(mlp.gate_proj(inputs_RD)) * mlp.up_proj(inputs_RD)
        return x_RD + mlp.down_proj(narrowed("down", hidden_RF))

    def _for_cache(self, x_RGd: torch.Tensor) -> torch.Tensor:
        """Keys or values in the cache's dtype, cut to its range where they are wider."""
        dtype = self._keys_LSGd.dtype
        if x_RGd.dtype == dtype:
            return x_RGd
        largest = torch.finfo(dtype).max
        return x_RGd.clamp(-largest, largest).to(dtype)

    def _attend(self, layer: int, q_THd: torch.Tensor, sequence: _Sequence, window: int | None) -> torch.Tensor:
        """Let a sequence's rows attend to all of it up to themselves; gives [T, H d]."""
        slots_S = self._tensor(sequence.slots)
        k_GSd = self._keys_LSGd[layer, slots_S].transpose(0, 1).to(q_THd.dtype)
        v_GSd = self._values_LSGd[layer, slots_S].transpose(0, 1).to(q_THd.dtype)
        mask_TS = None
        is_causal = sequence.first == 0 and window is None and len(q_THd) > 1
        if not is_causal and (len(q_THd) > 1 or window is not None):
            key_positions = torch.arange(len(slots_S), device=q_THd.device)
            mask_TS = visible(self._tensor(sequence.positions), key_positions, window)
        out_1HTd = F.scaled_dot_product_attention(
            q_THd.transpose(0, 1)[None],
            k_GSd[None],
            v_GSd[None],
            attn_mask=mask_TS,
            is_causal=is_causal,
            enable_gqa=q_THd.shape[1] != k_GSd.shape[0],
        )
        return out_1HTd[0].transpose(0, 1).flatten(1)

    def _window(self, layer: int) -> int | None:
        """The layer's sliding window, or None."""
        assert self._decoder is not None
        shape = self._decoder.shape
        return shape.sliding_window if shape.window_layers is None or shape.window_layers[layer] else None

    def _tensor(self, indices: np.ndarray) -> torch.Tensor:
        """Bring indices to the device."""
        return torch.from_numpy(indices).to(device=self._keys_LSGd.device, dtype=torch.int64)


class _Sequence:
    """Where one sequence of a batch lies: its rows, their positions, and the cache slots of all its positions."""

    __slots__ = ("first", "positions", "rows", "slots")

    def __init__(self, batch: Batch, index: int, page_tokens: int) -> None:
        self.rows = slice(int(batch.row_starts[index]), int(batch.row_starts[index + 1]))
        self.positions = batch.positions[self.rows]
        self.first = int(self.positions[0])
        all_positions = np.arange(int(self.positions[-1]) + 1)
        pages = batch.page_tables[index, all_positions // page_tokens].astype(np.int64)
        self.slots = pages * page_tokens + all_positions % page_tokens


def _project(
    attention: Attention, x_RD: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Make rotated queries [R, H, d], rotated keys [R, G, d] and values [R, G, d]."""
    heads = (1, len(x_RD), -1, attention.head_dim)
    q_1RHd = rotate(attention.q_norm(attention.q_proj(x_RD).view(heads)), *rotation)
    k_1RGd = rotate(attention.k_norm(attention.k_proj(x_RD).view(heads)), *rotation)
    return q_1RHd[0], k_1RGd[0], attention.v_proj(x_RD).view(heads)[0]
