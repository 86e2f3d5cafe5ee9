"""What a reduction over ranks is, in plain PyTorch: the definition that the kernels are tested against.

The TCP transport computes with it, and so does whoever has no kernels; both give the same bits as the kernels do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

_STEPS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "sum": torch.add,
    "avg": torch.add,
    "product": torch.mul,
    "min": torch.minimum,
    "max": torch.maximum,
    "band": torch.bitwise_and,
    "bor": torch.bitwise_or,
    "bxor": torch.bitwise_xor,
}


def reduce(sources: Sequence[torch.Tensor], reduction: str) -> torch.Tensor:
    """Reduce what the ranks hold, element by element, in the order of the ranks: ((x_0 o x_1) o x_2) o ...

    bfloat16 and float16 are computed in float32 and rounded once, at the end. An average is the sum divided by the
    number of ranks. A NaN of any rank makes min and max NaN. Integers wrap around.

    Args:
        sources: one tensor a rank, [N], of one dtype.
        reduction: a key of `native.REDUCTIONS`.

    Returns:
        A new tensor [N] of the same dtype.
    """
    dtype = sources[0].dtype
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    step = _STEPS[reduction]
    total = sources[0].to(wide, copy=True)
    for source in sources[1:]:
        total = step(total, source.to(wide))
    if reduction == "avg":
        total = total / len(sources)
    return total.to(dtype)
