"""`Decoder`: the model as an ordinary `torch.nn.Module`, for training, CUDA, and the path without native kernels.

Parameters carry Hugging Face's names, so state dicts go both ways. One class serves all families: they differ in the
switches of `ModelShape` only. It traces under `torch.compile` and `torch.export`; it knows nothing about paged caches,
quantised weights or sampling. B rows, T tokens, S keys, D model width, H query heads, G key and value heads, d head
width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from dseek.core.shape import ModelShape
from dseek.models.kv_cache import KVCache
from dseek.models.rope import inverse_frequencies, original_positions
from dseek.ops.attention.apart import DocumentGroups
from dseek.ops.attention.reference import visible
from dseek.ops.attention.rotary import rotate
from dseek.ops.norm.reference import rms_norm

if TYPE_CHECKING:
    from dseek.models.files import ModelFiles

__all__ = ["Decoder", "KVCache"]


class RMSNorm(nn.Module):
    """Root mean square norm with a learned weight.

    Args:
        size: width D of the rows.
        eps: added to the mean of squares.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Norm the rows of `x`, [..., D]."""
        return rms_norm(x, self.weight, self.eps)


class Rotary(nn.Module):
    """Cosines and sines of positions; stays in float32 whatever the module is cast to.

    Args:
        shape: the model.
    """

    frequencies: torch.Tensor

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape = shape
        self.values, self.attention_factor = inverse_frequencies(shape)
        self.register_buffer("frequencies", torch.from_numpy(self.values.copy()), persistent=False)
        _settle_trigonometry()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Rotary:
        """Follow a move of the module, but keep the values: a cast to bfloat16 would ruin the angles."""
        super()._apply(fn, recurse)
        self.frequencies = torch.from_numpy(self.values.copy()).to(self.frequencies.device)
        return self

    def forward(
        self, positions: torch.Tensor, dtype: torch.dtype, context_tokens: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Turn positions.

        Args:
            positions: int [T].
            dtype: of the result.
            context_tokens: length of the text, which only the dynamic kind looks at; None ends it with `positions`.

        Returns:
            Cosine and sine, [T, d / 2] each.
        """
        angles = positions[:, None].float() * self._frequencies(positions, context_tokens)
        return (angles.cos() * self.attention_factor).to(dtype), (angles.sin() * self.attention_factor).to(dtype)

    def _frequencies(self, positions: torch.Tensor, context_tokens: int | None) -> torch.Tensor:
        rope, limit, width = self.shape.rope, original_positions(self.shape), self.shape.head_dim
        if rope.kind != "dynamic":
            return self.frequencies
        # The base grows with the text, by the steps of `dseek.models.rope` but traceable.
        length = positions[-1] + 1 if context_tokens is None else positions.new_tensor(context_tokens)
        tokens = length.clamp(min=limit).float()
        theta = rope.theta * (rope.factor * tokens / limit - (rope.factor - 1.0)) ** (width / (width - 2))
        exponents = torch.arange(0, width, 2, dtype=torch.float32, device=positions.device) / width
        return 1.0 / theta**exponents


class Attention(nn.Module):
    """Grouped-query attention of one block.

    Args:
        shape: the model.
        layer: index of the block.
    """

    def __init__(self, shape: ModelShape, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = shape.head_dim
        self.grouped = shape.num_heads != shape.num_kv_heads
        self.q_proj = nn.Linear(shape.hidden_size, shape.query_size, bias=shape.qkv_bias)
        self.k_proj = nn.Linear(shape.hidden_size, shape.kv_size, bias=shape.qkv_bias)
        self.v_proj = nn.Linear(shape.hidden_size, shape.kv_size, bias=shape.qkv_bias)
        self.o_proj = nn.Linear(shape.query_size, shape.hidden_size, bias=shape.output_bias)
        self.q_norm = RMSNorm(shape.head_dim, shape.rms_norm_eps) if shape.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(shape.head_dim, shape.rms_norm_eps) if shape.qk_norm else nn.Identity()

    def forward(
        self,
        x_BTD: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        mask_TS: torch.Tensor | DocumentGroups | None,
        is_causal: bool,
        cache: KVCache | None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            x_BTD: [B, T, D] normed rows.
            rotation: cosine and sine of the rows' positions, [T, d / 2] each.
            mask_TS: bool [T, S]; groups of tokens that see each other alone, without a cache; or None where `is_causal`
                says it all.
            is_causal: T equals S and the mask is the causal one; False without a mask means that all keys are seen.
            cache: keys and values so far; appended to.

        Returns:
            [B, T, D].
        """
        heads = (*x_BTD.shape[:2], -1, self.head_dim)
        q_BHTd = rotate(self.q_norm(self.q_proj(x_BTD).view(heads)), *rotation).transpose(1, 2)
        k_BGSd = rotate(self.k_norm(self.k_proj(x_BTD).view(heads)), *rotation).transpose(1, 2)
        v_BGSd = self.v_proj(x_BTD).view(heads).transpose(1, 2)
        if cache is not None:
            k_BGSd, v_BGSd = cache.append(self.layer, k_BGSd, v_BGSd)
        if isinstance(mask_TS, DocumentGroups):
            out_BHTd = mask_TS.attend(q_BHTd, k_BGSd, v_BGSd)
        else:
            out_BHTd = F.scaled_dot_product_attention(
                q_BHTd, k_BGSd, v_BGSd, attn_mask=mask_TS, is_causal=is_causal, enable_gqa=self.grouped
            )
        out_BTD: torch.Tensor = self.o_proj(out_BHTd.transpose(1, 2).flatten(2))
        return out_BTD


class MLP(nn.Module):
    """Gated MLP with SiLU.

    Args:
        shape: the model.
    """

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=shape.mlp_bias)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=shape.mlp_bias)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=shape.mlp_bias)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Map `x_BTD` to [B, T, D].

        Source: Shazeer 2020, GLU Variants Improve Transformer, equation 6.
        """
        out_BTD: torch.Tensor = self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))
        return out_BTD


class Block(nn.Module):
    """One decoder block: norm, attention, norm, MLP, each half added to the residual stream.

    Args:
        shape: the model.
        layer: index of the block.
    """

    def __init__(self, shape: ModelShape, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(shape, layer)
        self.mlp = MLP(shape)
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)

    def forward(
        self,
        x_BTD: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        mask_TS: torch.Tensor | DocumentGroups | None,
        is_causal: bool,
        cache: KVCache | None,
    ) -> torch.Tensor:
        """Run the block.

        Args:
            x_BTD: [B, T, D] residual stream.
            rotation: cosine and sine of the rows' positions, [T, d / 2] each.
            mask_TS: see `Attention.forward`.
            is_causal: see `Attention.forward`.
            cache: keys and values so far; appended to.

        Returns:
            [B, T, D].
        """
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), rotation, mask_TS, is_causal, cache)
        x_BTD = x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))
        return x_BTD


class Stack(nn.Module):
    """Everything between token ids and the head; Hugging Face calls it `model`.

    Args:
        shape: the model.
    """

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Block(shape, layer) for layer in range(shape.num_layers))
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.rotary_emb = Rotary(shape)

    def forward(self, token_ids_BT: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """Give the normed last hidden states.

        Args:
            token_ids_BT: int [B, T].
            cache: keys and values before these tokens; appended to.

        Returns:
            [B, T, D].
        """
        num_tokens = token_ids_BT.shape[1]
        start = 0 if cache is None else cache.length
        if cache is not None:
            cache.check_room(token_ids_BT.shape[0], num_tokens)
        x_BTD = self.embed_tokens(token_ids_BT)
        positions = torch.arange(start, start + num_tokens, device=x_BTD.device)
        rotation = self.rotary_emb(positions, x_BTD.dtype)

        # One mask serves all layers of a kind. Without a window, a text from its start is what `is_causal` means, and a
        # lone newest row sees everything: both spare the mask. Branches, because tracing wants plain booleans.
        keys = torch.arange(start + num_tokens, device=x_BTD.device)
        window = self.shape.sliding_window
        windowed_TS = visible(positions, keys, window) if window is not None else None
        plain_TS: torch.Tensor | None = None
        is_causal = False
        if start == 0:
            is_causal = True
        elif num_tokens > 1:
            plain_TS = visible(positions, keys, None)
        for layer, block in enumerate(self.layers):
            if self._is_windowed(layer):
                x_BTD = block(x_BTD, rotation, windowed_TS, False, cache)
            else:
                x_BTD = block(x_BTD, rotation, plain_TS, is_causal, cache)
        if cache is not None:
            cache.advance(num_tokens)
        normed_BTD: torch.Tensor = self.norm(x_BTD)
        return normed_BTD

    def _is_windowed(self, layer: int) -> bool:
        if self.shape.sliding_window is None:
            return False
        return self.shape.window_layers is None or self.shape.window_layers[layer]


class Decoder(nn.Module):
    """A decoder-only transformer with its head.

    Args:
        shape: sizes and switches.

    New weights are drawn by `reset_parameters`. With a tied head, `lm_head.weight` *is* the embedding parameter, and a
    state dict may carry it once or twice.
    """

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape = shape
        self.model = Stack(shape)
        self.lm_head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        self.tie_weights()
        self.reset_parameters()
        self.register_load_state_dict_pre_hook(_complete_state_dict)

    @classmethod
    def from_files(
        cls, files: ModelFiles, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> Decoder:
        """Build a decoder and load its weights, widened from whatever encoding they are stored in.

        Args:
            files: an open model.
            dtype: of the parameters.
            device: where to put them; None is the CPU.

        Returns:
            The decoder in eval mode; it does not hold on to `files`.

        Raises:
            FileFormatError: a weight is not a finite number.
            ConfigError: one would become infinite in `dtype`.
        """
        from dseek.models.weight_checks import checked_tensor

        with torch.device("meta"):
            decoder = cls(files.shape)
        state: dict[str, torch.Tensor] = {}
        for name in decoder.state_dict():
            if files.has(name):
                state[name] = checked_tensor(files.tensor(name), dtype, device)
        decoder.load_state_dict(state, strict=True, assign=True)
        decoder.tie_weights()
        decoder.to(device=device or "cpu")
        return decoder.requires_grad_(True).eval()

    def tie_weights(self) -> None:
        """Make the head and the embedding one parameter again, where the shape ties them."""
        if self.shape.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def reset_parameters(self, std: float = 0.02) -> None:
        """Draw new weights: normal for matrices, zero for biases, one for norms.

        Args:
            std: standard deviation of the matrices; those that write to the residual stream get std / sqrt(2 L).
                Source: Radford et al. 2019, Language Models are Unsupervised Multitask Learners, section 2.3.
        """
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
            else:
                writes_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=std / (2 * self.shape.num_layers) ** 0.5 if writes_residual else std)

    def forward(self, token_ids_BT: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """Predict the next token at every position.

        Args:
            token_ids_BT: int64 [B, T], each from 0 to V - 1; rows are of one length, without padding.
            cache: keys and values of the tokens before these, or None for a whole text. It is appended to, in place;
                only without gradients.

        Returns:
            Logits [B, T, V] in the dtype of the parameters.

        Raises:
            RequestError: the cache has no room, another batch size, or gradients are enabled with it.
        """
        logits_BTV: torch.Tensor = self.lm_head(self.model(token_ids_BT, cache))
        return logits_BTV

    def make_cache(self, max_tokens: int, batch_size: int = 1) -> KVCache:
        """Make an empty cache in this decoder's dtype, on its device.

        Args:
            max_tokens: room, in positions.
            batch_size: rows.

        Returns:
            The cache.
        """
        weight = self.model.embed_tokens.weight
        return KVCache(self.shape, max_tokens, batch_size=batch_size, dtype=weight.dtype, device=weight.device)


def _settle_trigonometry() -> None:
    """Make the first call of cos and sin in the process one that runs in a single thread.

    When the first call runs in several threads, MKL's choice of a kernel races, and some rows may come out wrong by
    1.5e-4 (pytorch issue 188792).
    """
    angles = torch.zeros(8, device="cpu")
    angles.cos()
    angles.sin()


def _complete_state_dict(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Accept Hugging Face state dicts: a tied head may be left out, old files carry the rotary frequencies."""
    assert isinstance(module, Decoder)
    head, embedding = prefix + "lm_head.weight", prefix + "model.embed_tokens.weight"
    if module.shape.tie_word_embeddings and head not in state_dict and embedding in state_dict:
        state_dict[head] = state_dict[embedding]
    for name in [name for name in state_dict if name.endswith("rotary_emb.inv_freq")]:
        del state_dict[name]
