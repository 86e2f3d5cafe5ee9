"""Attention of a batch whose rows hold several documents, each of which sees itself alone: group by group.

One mask for a whole row costs T x T scores, most of them thrown away, and keeps PyTorch from its causal kernel. So rows
are cut where documents begin: a long document is a group of its own and needs no mask; neighbours that are short
share a group and a small mask, so that a batch of many short ones does not fall apart into as many calls.

What this does not know: a device on which a call costs more than what it saves. B rows, T tokens, H query heads, G key
and value heads, d head width, N tokens of a group.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F

from dseek.ops.attention.reference import visible

LEAST_TOKENS = 128
"""Documents of so many tokens are groups of their own; shorter neighbours are put together until they are as many."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Neighbouring tokens of one row that see nothing outside of them."""

    num_tokens: int
    """N."""
    mask: torch.Tensor | None
    """Added to scores, [1, 1, N, N]; None where the causal mask says it all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentGroups:
    """All tokens of a batch, row by row, in groups."""

    groups: tuple[Group, ...]
    """In order; together B T tokens."""

    def attend(self, q_BHTd: torch.Tensor, k_BGTd: torch.Tensor, v_BGTd: torch.Tensor) -> torch.Tensor:
        """Attend inside of each group.

        Args:
            q_BHTd: [B, H, T, d] rotated queries.
            k_BGTd: [B, G, T, d] rotated keys; H is a multiple of G.
            v_BGTd: [B, G, T, d] values.

        Returns:
            [B, H, T, d].
        """
        num_rows, num_heads, num_tokens, _ = q_BHTd.shape
        lengths = [group.num_tokens for group in self.groups]
        # Split and joined once each, so that gradients are put together once as well.
        parts = (x.transpose(1, 2).flatten(0, 1).split(lengths) for x in (q_BHTd, k_BGTd, v_BGTd))
        is_grouped = num_heads != k_BGTd.shape[1]
        out = []
        for group, q_NHd, k_NGd, v_NGd in zip(self.groups, *parts, strict=True):
            out_HNd = F.scaled_dot_product_attention(
                q_NHd.transpose(0, 1)[None],
                k_NGd.transpose(0, 1)[None],
                v_NGd.transpose(0, 1)[None],
                attn_mask=group.mask,
                is_causal=group.mask is None,
                enable_gqa=is_grouped,
            )[0]
            out.append(out_HNd.transpose(0, 1))
        return torch.cat(out).view(num_rows, num_tokens, num_heads, -1).transpose(1, 2)


def group_documents(documents_BT: torch.Tensor, window: int | None, dtype: torch.dtype) -> DocumentGroups:
    """Cut the rows of a batch into groups.

    Args:
        documents_BT: int64 [B, T], the document of each token, rising in a row.
        window: keys that a query sees at most, itself among them; None is all of its document.
        dtype: of the masks; the queries'.

    Returns:
        The groups, for all blocks with this window.
    """
    device, groups = documents_BT.device, []
    for row in documents_BT.tolist():
        lengths = [len(list(tokens)) for _, tokens in groupby(row)]
        for together in _neighbours(lengths):
            num_tokens = sum(together)
            mask = None
            if len(together) > 1 or (window is not None and num_tokens > window):
                of_N = torch.repeat_interleave(torch.arange(len(together)), torch.tensor(together)).to(device)
                places_N = torch.arange(num_tokens, device=device)
                seen_NN = (of_N[:, None] == of_N[None]) & visible(places_N, places_N, window)
                mask = torch.zeros(1, 1, num_tokens, num_tokens, dtype=dtype, device=device)
                mask.masked_fill_(~seen_NN, float("-inf"))
            groups.append(Group(num_tokens=num_tokens, mask=mask))
    return DocumentGroups(groups=tuple(groups))


def _neighbours(lengths: Iterable[int]) -> Iterator[list[int]]:
    """Lengths of documents, put together where they are short."""
    waiting: list[int] = []
    for length in lengths:
        if length >= LEAST_TOKENS:
            if waiting:
                yield waiting
                waiting = []
            yield [length]
            continue
        waiting.append(length)
        if sum(waiting) >= LEAST_TOKENS:
            yield waiting
            waiting = []
    if waiting:
        yield waiting
