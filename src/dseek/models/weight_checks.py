"""Weights for the torch module, with what a dtype cannot hold refused by name."""

from __future__ import annotations

import torch

from dseek.core.errors import ConfigError
from dseek.models.encoding import to_float32
from dseek.ops.linear.packing import check_finite
from dseek.ops.tensor import EncodedTensor


def checked_tensor(tensor: EncodedTensor, dtype: torch.dtype, device: torch.device | str | None) -> torch.Tensor:
    """Widen a stored weight and cast it.

    Args:
        tensor: as it lies in its file.
        dtype: wanted.
        device: where to put it; None is the CPU.

    Returns:
        A copy, of the tensor's shape.

    Raises:
        FileFormatError: a value is not a finite number.
        ConfigError: one would become infinite in `dtype`.
    """
    values = check_finite(tensor.name, to_float32(tensor))
    # The array may be a view of the mapped file, so it is always copied.
    cast = torch.tensor(values, dtype=dtype, device=device)
    if dtype != torch.float32 and not bool(torch.isfinite(cast).all()):
        place = torch.nonzero(~torch.isfinite(cast))[0].tolist()
        raise ConfigError(
            f"tensor {tensor.name} holds {values[tuple(place)]:g} at {place}, which {dtype} cannot hold",
            needed=f"magnitudes up to {torch.finfo(dtype).max:g}",
            remedy="choose a wider precision, such as bf16 or fp32",
        )
    return cast
