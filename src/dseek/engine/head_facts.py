"""What the planner is told about a model's heads: from its gate, and where windows are asked for, by measuring them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dseek.plan.head_facts import HeadFacts

if TYPE_CHECKING:
    from dseek.models.files import ModelFiles
    from dseek.plan.attention_wish import AttentionWish


def head_facts(files: ModelFiles, wish: AttentionWish | None) -> HeadFacts:
    """Find out what a plan needs to know of a model's heads.

    Args:
        files: the opened model.
        wish: what the user decided about attention; windows of heads are found out only where they are asked for.

    Returns:
        The facts. Windows come from the gate's file; where it has none, from `dseek.engine.window_calibration`.

    Raises:
        DseekError: the gate beside the model is damaged, or windows cannot be measured here.
    """
    from dseek.plan.attention_wish import AttentionWish

    wish = wish or AttentionWish()
    if wish.settled_kind == "dense" or not (wish.may_be_by_rows or wish.own_windows):
        return HeadFacts()
    from dseek.models.gate_file import find_gates

    gates = find_gates(files)
    windows = gates.windows if gates is not None and wish.own_windows else ()
    if wish.own_windows and not windows:
        from dseek.engine.window_calibration import head_windows

        windows = head_windows(files)
    if gates is None:
        return HeadFacts(windows=windows)
    return HeadFacts(gate=True, dense_heads=gates.dense_heads, share_factors=gates.share_factors, windows=windows)
