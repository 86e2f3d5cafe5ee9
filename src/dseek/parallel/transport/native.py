"""The compiled half of the transport, if it was built, and the numbers it knows element types and reductions by."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch
import torch.distributed as dist

from dseek.core import environment
from dseek.core.errors import ConfigError

ELEMENTS = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.int8: 4,
    torch.uint8: 5,
    torch.int16: 6,
    torch.int32: 7,
    torch.int64: 8,
}
"""What can be reduced, as `Element` of csrc/common/kernels.h."""

REDUCTIONS = {"sum": 0, "avg": 1, "product": 2, "min": 3, "max": 4, "band": 5, "bor": 6, "bxor": 7}
"""Reductions, as `Reduction` of csrc/common/kernels.h."""

_NAMES = {
    dist.ReduceOp.SUM: "sum",
    dist.ReduceOp.AVG: "avg",
    dist.ReduceOp.PRODUCT: "product",
    dist.ReduceOp.MIN: "min",
    dist.ReduceOp.MAX: "max",
    dist.ReduceOp.BAND: "band",
    dist.ReduceOp.BOR: "bor",
    dist.ReduceOp.BXOR: "bxor",
}

_OF_TRUTH = {"sum": "max", "max": "max", "bor": "max", "product": "min", "min": "min", "band": "min", "bxor": "bxor"}
"""What a reduction of truth values is on bytes of 0 and 1."""


@functools.cache
def module() -> ModuleType | None:
    """Return the compiled extension, or None where it was not built or DSEEK_KERNELS is torch."""
    if environment.get("DSEEK_KERNELS") == "torch":
        return None
    try:
        return importlib.import_module("dseek._native")
    except ImportError:
        return None


def reducible(x: torch.Tensor, operation: object) -> tuple[torch.Tensor, str]:
    """See a tensor as elements that can be reduced.

    Args:
        x: contiguous.
        operation: a `torch.distributed.ReduceOp`.

    Returns:
        The same memory as [numel] of a key of `ELEMENTS`, and the reduction's name.

    Raises:
        ConfigError: the operation is not one of the eight, or means nothing for this dtype.
    """
    reduction = next((name for known, name in _NAMES.items() if operation == known), None)
    if reduction is None:
        raise ConfigError(f"the reduction is {operation}", needed="one of " + ", ".join(REDUCTIONS))
    flat = x.detach().reshape(-1)
    wanted = reduction
    if x.dtype == torch.bool:
        flat, reduction = flat.view(torch.uint8), _OF_TRUTH.get(reduction, "")
    elif x.is_complex():
        flat, reduction = torch.view_as_real(flat).reshape(-1), reduction if reduction in ("sum", "avg") else ""
    if flat.dtype not in ELEMENTS:
        raise ConfigError(f"a tensor of {x.dtype} cannot be reduced", needed=", ".join(map(str, ELEMENTS)))
    is_bitwise = reduction in ("band", "bor", "bxor")
    if not reduction or (is_bitwise if flat.is_floating_point() else reduction == "avg"):
        raise ConfigError(f"{wanted} of {x.dtype} is not defined", remedy="convert the tensor first")
    return flat, reduction
