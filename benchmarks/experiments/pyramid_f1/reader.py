"""The reader: a small causal transformer with a head that points at the first and the last word of the answer.

Twins differ in nothing but the attention pattern; there is no parameter that only one of them has. With so little data
a model does not find by itself what to compare, so that its beginning helps: a quarter of each head is rotated, the
rest compares words wherever they stand. In the first layer queries and keys begin as one projection, by which equal
words attend to each other; in later layers they begin with a constant in the rotated part, by which near words do.

B documents, T words, C width, H heads of d.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.experiments.pyramid_f1.squad import NUM_SHAPES, PREFIX_BUCKETS, WORD_BUCKETS
from dseek.core.attention_pattern import AttentionPattern
from dseek.ops.attention.merged import merged_dynamic_attention
from dseek.ops.attention.rotary import rotate

WIDTH, HEADS, LAYERS = 128, 2, 3
HEAD_DIM = WIDTH // HEADS
ROTATED = HEAD_DIM // 4
THETA = 1000.0
MATCH_GAIN = 1.4
"""Size of the first layer's queries and keys: a word's score with itself is some 12, with another one 0 +- 2."""
NEAR_GAIN = 1.5
"""The constant: a neighbour's score is some 4, and falls with the distance."""
WORD_STD, PREFIX_STD, SHAPE_STD, PART_STD = 1.0, 0.7, 0.3, 0.5
AHEAD = (4, 16, 64)
"""Words after a word whose states the head averages: a causal model has not seen them at the word itself."""


class Attention(nn.Module):
    """Causal self-attention after a pattern."""

    def __init__(self, *, first: bool) -> None:
        super().__init__()
        self.query = nn.Linear(WIDTH, WIDTH)
        self.key = nn.Linear(WIDTH, WIDTH)
        self.value = nn.Linear(WIDTH, WIDTH, bias=False)
        self.output = nn.Linear(WIDTH, WIDTH, bias=False)
        rotated = torch.arange(WIDTH) % HEAD_DIM < ROTATED
        nn.init.zeros_(self.query.bias)
        if first:
            nn.init.normal_(self.query.weight, std=MATCH_GAIN * WIDTH**-0.5)
            self.query.weight.data[rotated] *= 0.1
            self.key.weight.data.copy_(self.query.weight.data)
        else:
            self.query.bias.data[rotated] = NEAR_GAIN
        self.key.bias.data.copy_(self.query.bias.data)

    def forward(self, x_BTC: torch.Tensor, pattern: AttentionPattern) -> torch.Tensor:
        """Attend.

        Args:
            x_BTC: [B, T, C] normed states.
            pattern: what to attend to.

        Returns:
            [B, T, C].
        """
        num_words = x_BTC.shape[1]
        q, k, v = (
            projection(x_BTC).unflatten(-1, (HEADS, HEAD_DIM)) for projection in (self.query, self.key, self.value)
        )
        angles = torch.outer(torch.arange(num_words), THETA ** (-torch.arange(0, ROTATED, 2) / ROTATED))
        q, k = (
            torch.cat([rotate(x[..., :ROTATED], angles.cos(), angles.sin()), x[..., ROTATED:]], dim=-1) for x in (q, k)
        )
        if pattern.kind == "dense":
            out = F.scaled_dot_product_attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
            ).transpose(1, 2)
        else:
            out = torch.stack([merged_dynamic_attention(*one, pattern) for one in zip(q, k, v, strict=True)])
        return self.output(out.flatten(-2))


class Block(nn.Module):
    """Attention and a feed-forward network, each over normed states and added to them."""

    def __init__(self, *, first: bool) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.attention = Attention(first=first)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 3 * WIDTH), nn.GELU(), nn.Linear(3 * WIDTH, WIDTH))

    def forward(self, x_BTC: torch.Tensor, pattern: AttentionPattern) -> torch.Tensor:
        """Run the block.

        Args:
            x_BTC: [B, T, C] states.
            pattern: what to attend to.

        Returns:
            [B, T, C].
        """
        x_BTC = x_BTC + self.attention(self.attention_norm(x_BTC), pattern)
        return x_BTC + self.mlp(self.mlp_norm(x_BTC))


class Reader(nn.Module):
    """Words to scores of being an answer's first and last word."""

    def __init__(self) -> None:
        super().__init__()
        self.word = nn.Embedding(WORD_BUCKETS, WIDTH)
        self.prefix = nn.Embedding(PREFIX_BUCKETS, WIDTH)
        self.shape = nn.Embedding(NUM_SHAPES, WIDTH)
        self.part = nn.Embedding(3, WIDTH)
        stds = (WORD_STD, PREFIX_STD, SHAPE_STD, PART_STD)
        for table, std in zip((self.word, self.prefix, self.shape, self.part), stds, strict=True):
            nn.init.normal_(table.weight, std=std)
        self.blocks = nn.ModuleList(Block(first=layer == 0) for layer in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.Sequential(nn.Linear((1 + len(AHEAD)) * WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 2))

    def forward(self, features_BT4: torch.Tensor, pattern: AttentionPattern) -> torch.Tensor:
        """Score every word.

        Args:
            features_BT4: int64 [B, T, 4] as `documents.features_of` gives them.
            pattern: what all layers attend to.

        Returns:
            [B, T, 2] scores as the first and as the last word.
        """
        tables = (self.word, self.prefix, self.shape, self.part)
        x_BTC = torch.stack([table(features_BT4[..., idx]) for idx, table in enumerate(tables)]).sum(0)
        for block in self.blocks:
            x_BTC = block(x_BTC, pattern)
        x_BTC = self.norm(x_BTC)
        return self.head(torch.cat([x_BTC, *(_mean_ahead(x_BTC, count) for count in AHEAD)], dim=-1))


def _mean_ahead(x_BTC: torch.Tensor, count: int) -> torch.Tensor:
    """Sum of the next states over their greatest number; at the end there are fewer."""
    sums = x_BTC.cumsum(1)
    later = torch.cat([sums, sums[:, -1:].expand(-1, count, -1)], dim=1)[:, count:]
    return (later - sums) / count
