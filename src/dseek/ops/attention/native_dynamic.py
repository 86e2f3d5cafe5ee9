"""The door to the kernel of dynamic attention over a whole sequence, with what it selected.

T tokens, H query heads, G key and value heads, d head width, L levels of cells.
"""

from __future__ import annotations

from typing import Any

import torch

from dseek.core.attention_pattern import AttentionPattern, num_levels
from dseek.ops import native
from dseek.ops.attention.selection import BlockChoice, Selection


def native_dynamic_attention(
    q_THd: torch.Tensor,
    k_TGd: torch.Tensor,
    v_TGd: torch.Tensor,
    pattern: AttentionPattern,
    *,
    level_bias_HL: torch.Tensor | None = None,
    with_selection: bool = True,
) -> tuple[torch.Tensor, Selection] | None:
    """Attend with the kernel, where there is one for these tensors and this pattern.

    Args:
        q_THd: [T, H, d] rotated queries; nothing here records gradients.
        k_TGd: [T, G, d] rotated keys of the same positions and dtype.
        v_TGd: [T, G, d] values, likewise.
        pattern: what to attend to.
        level_bias_HL: [H, L] added to the scores of far cells by level, or None.
        with_selection: whether to tell what was selected.

    Returns:
        Output [T, H, d] in the dtype of the queries and the selection (empty where it is not wanted); None where the
        kernels are not built or do not compute this: dense patterns, dtypes but float32 and bfloat16, other devices
        than the CPU, head widths that are no multiple of 16 or above 512.
    """
    kernels = native.module()
    if kernels is None or not _is_computed(q_THd, pattern, level_bias_HL):
        return None
    options: dict[str, Any] = {
        "near_blocks": list(pattern.near_blocks(k_TGd.shape[1])),
        "top_blocks": pattern.top_blocks,
        "far": pattern.far,
    }
    if pattern.far and level_bias_HL is not None:
        options["level_bias"] = level_bias_HL.detach().float().contiguous().numpy()
    views = [_heads_first(tensor) for tensor in (q_THd, k_TGd, v_TGd)]
    if not with_selection:
        return _tokens_first(kernels.dynamic_attention(*views, **options), q_THd.dtype), {}
    out, heads, _ = kernels.dynamic_attention(*views, **options, trace=True)
    # The kernel's lists end with the query block itself.
    selection = {
        block: tuple(BlockChoice(exact_blocks=tuple(exact[:-1]), far_cells=tuple(far)) for exact, far in choices)
        for block, choices in enumerate(zip(*heads, strict=True))
    }
    return _tokens_first(out, q_THd.dtype), selection


def _is_computed(q_THd: torch.Tensor, pattern: AttentionPattern, level_bias_HL: torch.Tensor | None) -> bool:
    num_tokens, num_heads, head_dim = q_THd.shape
    return (
        pattern.kind != "dense"
        and q_THd.device.type == "cpu"
        and q_THd.dtype in (torch.float32, torch.bfloat16)
        and head_dim % 16 == 0
        and head_dim <= 512
        and (level_bias_HL is None or level_bias_HL.shape == (num_heads, num_levels(num_tokens)))
    )


def _heads_first(x_THd: torch.Tensor) -> Any:
    """[T, H, d] as the kernel's array [H, T, d]."""
    x_HTd = x_THd.detach().transpose(0, 1).contiguous()
    return (x_HTd.view(torch.uint16) if x_HTd.dtype == torch.bfloat16 else x_HTd).numpy()


def _tokens_first(array: Any, dtype: torch.dtype) -> torch.Tensor:
    """The kernel's array [H, T, d] as [T, H, d]."""
    x_HTd = torch.from_numpy(array)
    return (x_HTd.view(torch.bfloat16) if dtype == torch.bfloat16 else x_HTd).transpose(0, 1)
