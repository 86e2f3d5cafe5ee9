"""`Marian`: an encoder-decoder as an ordinary `torch.nn.Module`, for training and as the reference of the kernels.

Parameters carry the names of transformers' `MarianMTModel`, so state dicts go both ways; every projection is an
`nn.Linear`, the head among them, so that what replaces linear layers finds them all. It knows nothing of choosing
tokens. B sentences, S source tokens, T target tokens, D model width, H heads, d head width, F MLP width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from dseek.models.marian_shape import MarianShape

_FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"relu": F.relu, "silu": F.silu, "gelu": F.gelu}


def sinusoids(num_positions: int, width: int) -> torch.Tensor:
    """Compute the table of positions: sines in the first half of the width, cosines in the second.

    Args:
        num_positions: rows.
        width: columns, even.

    Returns:
        float32 [num_positions, width].

    Source: Vaswani et al. 2017, Attention Is All You Need, section 3.5; halves instead of pairs as Marian has them.
    """
    exponents = torch.arange(0, width, 2, dtype=torch.float64) / width
    angles = torch.arange(num_positions, dtype=torch.float64)[:, None] / 10_000.0**exponents
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


@dataclass(slots=True)
class Dropout:
    """Shares of values that training leaves out; nothing is left out of a module in `eval` mode."""

    hidden: float = 0.0
    """Of embeddings, and of what attention and MLP add to the residual stream."""
    inner: float = 0.0
    """Of the MLP's inner values."""


class Attention(nn.Module):
    """Attention with as many key heads as query heads.

    Args:
        shape: the model.
    """

    def __init__(self, shape: MarianShape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        width = shape.hidden_size
        self.k_proj, self.v_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.q_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)

    def heads(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Split the width into heads.

        Args:
            x_BTD: [B, T, D].

        Returns:
            [B, H, T, d].
        """
        return x_BTD.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def keys_values(self, x_BSD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Project what is attended to.

        Args:
            x_BSD: [B, S, D].

        Returns:
            Keys and values, [B, H, S, d] each.
        """
        return self.heads(self.k_proj(x_BSD)), self.heads(self.v_proj(x_BSD))

    def forward(
        self,
        x_BTD: torch.Tensor,
        keys_values: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        """Attend.

        Args:
            x_BTD: [B, T, D] rows that ask.
            keys_values: of `keys_values`, as far as the rows may see them.
            mask: bool, broadcast to [B, H, T, S], true where a row sees; None for everything.
            is_causal: rows see keys up to their own place; then `mask` is None.

        Returns:
            [B, T, D].
        """
        out_BHTd = F.scaled_dot_product_attention(
            self.heads(self.q_proj(x_BTD)), *keys_values, attn_mask=mask, is_causal=is_causal
        )
        out_BTD: torch.Tensor = self.out_proj(out_BHTd.transpose(1, 2).flatten(2))
        return out_BTD


class Layer(nn.Module):
    """One block: attention to itself, in the decoder attention to the source, MLP; a norm after each sum.

    Args:
        shape: the model.
        attends_to_source: whether it is a block of the decoder.
        dropout: shared by all blocks of a model.
    """

    def __init__(self, shape: MarianShape, attends_to_source: bool, dropout: Dropout) -> None:
        super().__init__()
        self.dropout = dropout
        self.activation = shape.activation
        self.self_attn = Attention(shape)
        self.self_attn_layer_norm = nn.LayerNorm(shape.hidden_size)
        self.attends_to_source = attends_to_source
        if attends_to_source:
            self.encoder_attn = Attention(shape)
            self.encoder_attn_layer_norm = nn.LayerNorm(shape.hidden_size)
        self.fc1 = nn.Linear(shape.hidden_size, shape.intermediate_size)
        self.fc2 = nn.Linear(shape.intermediate_size, shape.hidden_size)
        self.final_layer_norm = nn.LayerNorm(shape.hidden_size)

    def forward(
        self,
        x_BTD: torch.Tensor,
        mask: torch.Tensor | None = None,
        source: tuple[torch.Tensor, torch.Tensor] | None = None,
        source_mask: torch.Tensor | None = None,
        past: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """Run the block.

        Args:
            x_BTD: [B, T, D] residual stream.
            mask: bool [B, 1, 1, T] of the encoder, true where there is a token.
            source: keys and values of the source, of `encoder_attn.keys_values`; None in the encoder.
            source_mask: bool [B, 1, 1, S], or None where no source is padded.
            past: keys and values of earlier tokens, [B, H, P, d] each; then T is 1.

        Returns:
            The new stream, and keys and values up to now.
        """
        keys, values = self.self_attn.keys_values(x_BTD)
        if past is not None:
            keys, values = torch.cat([past[0], keys], dim=2), torch.cat([past[1], values], dim=2)
        causal = self.attends_to_source and past is None
        attended = self.self_attn(x_BTD, (keys, values), mask, is_causal=causal)
        x_BTD = self.self_attn_layer_norm(x_BTD + self._drop(attended))
        if source is not None:
            attended = self.encoder_attn(x_BTD, source, source_mask)
            x_BTD = self.encoder_attn_layer_norm(x_BTD + self._drop(attended))
        inner = _FUNCTIONS[self.activation](self.fc1(x_BTD))
        inner = F.dropout(inner, self.dropout.inner, self.training)
        x_BTD = self.final_layer_norm(x_BTD + self._drop(self.fc2(inner)))
        return x_BTD, (keys, values)

    def _drop(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return F.dropout(x_BTD, self.dropout.hidden, self.training)


class Stack(nn.Module):
    """The blocks of one side.

    Args:
        shape: the model.
        is_decoder: which side.
        dropout: shared by all blocks of a model.
    """

    def __init__(self, shape: MarianShape, is_decoder: bool, dropout: Dropout) -> None:
        super().__init__()
        count = shape.num_decoder_layers if is_decoder else shape.num_encoder_layers
        self.layers = nn.ModuleList(Layer(shape, is_decoder, dropout) for _ in range(count))


class Body(nn.Module):
    """Everything but the head.

    Args:
        shape: the model.
        dropout: shared by all blocks.
    """

    def __init__(self, shape: MarianShape, dropout: Dropout) -> None:
        super().__init__()
        self.shared = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.encoder = Stack(shape, False, dropout)
        self.decoder = Stack(shape, True, dropout)


Cache = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of each block."""


class Marian(nn.Module):
    """The model.

    Args:
        shape: its sizes.
    """

    positions: torch.Tensor
    final_logits_bias: torch.Tensor

    def __init__(self, shape: MarianShape) -> None:
        super().__init__()
        self.shape = shape
        self.dropout = Dropout()
        self.model = Body(shape, self.dropout)
        self.lm_head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        self.lm_head.weight = self.model.shared.weight
        self.register_buffer("final_logits_bias", torch.zeros(1, shape.vocab_size))
        self.register_buffer("positions", sinusoids(shape.max_positions, shape.hidden_size), persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        """Draw weights so that sums over a row keep its variance; embeddings so that logits start small."""
        for name, parameter in self.named_parameters():
            if name == "model.shared.weight":
                nn.init.normal_(parameter, std=1.0 / math.sqrt(self.shape.hidden_size))
            elif parameter.dim() == 2:
                nn.init.xavier_uniform_(parameter)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def embed(self, ids_BT: torch.Tensor, first: int = 0) -> torch.Tensor:
        """Look tokens up and add their positions.

        Args:
            ids_BT: int64 [B, T].
            first: position of the first token.

        Returns:
            [B, T, D].
        """
        x_BTD = self.model.shared(ids_BT) * self.shape.embedding_scale
        x_BTD = x_BTD + self.positions[first : first + ids_BT.shape[1]]
        return F.dropout(x_BTD, self.dropout.hidden, self.training)

    def encode(self, source_BS: torch.Tensor, mask_BS: torch.Tensor | None = None) -> torch.Tensor:
        """Run the encoder.

        Args:
            source_BS: int64 [B, S] tokens.
            mask_BS: bool [B, S], true where there is a token; None where no row is padded.

        Returns:
            [B, S, D].
        """
        mask = None if mask_BS is None else mask_BS[:, None, None]
        x_BSD = self.embed(source_BS)
        for layer in self.model.encoder.layers:
            x_BSD, _ = layer(x_BSD, mask)
        return x_BSD

    def source_cache(self, encoded_BSD: torch.Tensor) -> Cache:
        """Project the source for every block of the decoder, once a sentence.

        Args:
            encoded_BSD: of `encode`.

        Returns:
            Keys and values of each block.
        """
        return [_layer(layer).encoder_attn.keys_values(encoded_BSD) for layer in self.model.decoder.layers]

    def decode(
        self,
        target_BT: torch.Tensor,
        source: Cache,
        mask_BS: torch.Tensor | None = None,
        past: Cache | None = None,
    ) -> tuple[torch.Tensor, Cache]:
        """Run the decoder, without its head.

        Args:
            target_BT: int64 [B, T] tokens; T is 1 where there is a past.
            source: of `source_cache`.
            mask_BS: bool [B, S], true where the source has a token; None where none is padded.
            past: what an earlier call returned.

        Returns:
            Hidden states [B, T, D], and keys and values up to now.
        """
        mask = None if mask_BS is None else mask_BS[:, None, None]
        x_BTD = self.embed(target_BT, 0 if past is None else past[0][0].shape[2])
        cache: Cache = []
        for index, layer in enumerate(self.model.decoder.layers):
            x_BTD, keys_values = layer(x_BTD, None, source[index], mask, None if past is None else past[index])
            cache.append(keys_values)
        return x_BTD, cache

    def head(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Score the vocabulary.

        Args:
            x_BTD: [B, T, D] of `decode`.

        Returns:
            Logits [B, T, V].
        """
        logits: torch.Tensor = self.lm_head(x_BTD) + self.final_logits_bias
        return logits

    def forward(
        self, source_BS: torch.Tensor, target_BT: torch.Tensor, mask_BS: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compute the logits of a whole target, each from the tokens up to it.

        Args:
            source_BS: int64 [B, S].
            target_BT: int64 [B, T], the start token first.
            mask_BS: bool [B, S], true where the source has a token; None where none is padded.

        Returns:
            Logits [B, T, V].
        """
        hidden, _ = self.decode(target_BT, self.source_cache(self.encode(source_BS, mask_BS)), mask_BS)
        return self.head(hidden)


def _layer(module: nn.Module) -> Layer:
    assert isinstance(module, Layer)
    return module
