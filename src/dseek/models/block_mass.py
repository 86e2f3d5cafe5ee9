"""The attention mass that single rows give blocks of keys, from a layer's queries and keys."""

from __future__ import annotations

import math

import torch

from dseek.core.attention_pattern import BLOCK_TOKENS


def block_mass(q_RHd: torch.Tensor, k_TGd: torch.Tensor, rows_R: torch.Tensor) -> torch.Tensor:
    """Compute the attention mass of some rows on every block of keys.

    Args:
        q_RHd: rotated queries.
        k_TGd: rotated keys, T a multiple of 64.
        rows_R: int64, positions of the queries.

    Returns:
        float32 [R, H, B].
    """
    num_tokens, num_groups, head_dim = k_TGd.shape
    hidden_RT = torch.arange(num_tokens)[None] > rows_R[:, None]
    masses = []
    for group, q_RPd in enumerate(q_RHd.unflatten(1, (num_groups, -1)).unbind(1)):
        scores_PRT = (q_RPd.transpose(0, 1) @ k_TGd[:, group].T).float() / math.sqrt(head_dim)
        weights_PRT = scores_PRT.masked_fill_(hidden_RT, float("-inf")).softmax(dim=-1)
        masses.append(weights_PRT.unflatten(-1, (-1, BLOCK_TOKENS)).sum(-1).transpose(0, 1))
    return torch.cat(masses, dim=1)
