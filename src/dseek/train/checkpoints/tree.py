"""A training state as plain data: tensors taken out under names, everything else as JSON.

The state is any nest of dicts, lists and tuples around tensors, numbers, texts, None: what `state_dict()` of modules,
optimisers and schedulers gives. Nothing is pickled. A DTensor counts as its local shard and where that lies.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dseek.core.errors import ConfigError, FileFormatError

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float32,
        torch.float64,
        torch.bfloat16,
        torch.float16,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.uint8,
        torch.bool,
        torch.complex64,
        torch.complex128,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    )
}
"""Element types by the names that manifests use."""

MAX_DEPTH = 64
"""Deepest nesting of a state."""

Node = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Leaf:
    """One tensor of a state, or this rank's part of it."""

    name: str
    """Its path, as JSON."""
    local: torch.Tensor
    """What this rank holds."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    offset: tuple[int, ...]
    """Where `local` lies in it."""
    is_replica: bool
    """Whether every rank holds the same, so that one needs to write it."""


def leaf_of(name: str, tensor: torch.Tensor) -> Leaf:
    """Say what part of a tensor this process holds.

    Args:
        name: its path.
        tensor: plain, or a DTensor sharded along axes.

    Returns:
        The part.

    Raises:
        ConfigError: it is a DTensor of partial sums, or of a dtype that manifests do not know.
    """
    if str(tensor.dtype).removeprefix("torch.") not in DTYPES:
        raise ConfigError(f"{name} has elements of {tensor.dtype}", needed=", ".join(DTYPES))
    # Importing DTensors takes a second; where nobody has, there are none.
    if type(tensor).__name__ != "DTensor":
        shape = tuple(tensor.shape)
        return Leaf(name=name, local=tensor.detach(), shape=shape, offset=(0,) * len(shape), is_replica=True)
    from torch.distributed.tensor import DTensor, Partial
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    assert isinstance(tensor, DTensor)
    if any(isinstance(placement, Partial) for placement in tensor.placements):
        raise ConfigError(f"{name} is a sum that was not taken yet", remedy="redistribute it before saving")
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    coordinate: Sequence[int] = tensor.device_mesh.get_coordinate() or ()
    # Along axes of the mesh that do not split the tensor, the first holder writes.
    is_first = all(
        place == 0 for place, placement in zip(coordinate, tensor.placements, strict=True) if placement.is_replicate()
    )
    local = tensor.to_local().detach()
    if not is_first:
        local = local[:0] if local.dim() else local.new_empty(0)
    return Leaf(name=name, local=local, shape=tuple(tensor.shape), offset=tuple(offset), is_replica=False)


def take_apart(state: object) -> tuple[Node, dict[str, torch.Tensor]]:
    """Split a state into its structure and its tensors.

    Args:
        state: the nest.

    Returns:
        The structure, plain data for JSON, and the tensors by name.

    Raises:
        ConfigError: something in it is neither.
    """
    tensors: dict[str, torch.Tensor] = {}

    def visit(value: object, path: tuple[str | int, ...]) -> Node:
        name = json.dumps(path)
        if len(path) > MAX_DEPTH:
            raise ConfigError(f"the state is nested more than {MAX_DEPTH} deep at {name}")
        if isinstance(value, torch.Tensor):
            tensors[name] = value
            return {"tensor": name}
        if isinstance(value, Mapping):
            for key in value:
                if not isinstance(key, (str, int)) or isinstance(key, bool):
                    raise ConfigError(f"the state has a key {key!r} at {name}", needed="texts and whole numbers")
            return {"dict": [[key, visit(one, (*path, key))] for key, one in value.items()]}
        if isinstance(value, (list, tuple)):
            kind = "list" if isinstance(value, list) else "tuple"
            return {kind: [visit(one, (*path, index)) for index, one in enumerate(value)]}
        if value is None or isinstance(value, (bool, int, float, str)):
            return {"value": value}
        raise ConfigError(
            f"the state holds a {type(value).__name__} at {name}",
            needed="tensors, numbers, texts, None, and dicts, lists and tuples of them",
            remedy="save what it is made of instead; checkpoints hold no pickles",
        )

    return visit(state, ()), tensors


def put_together(node: object, tensor_of: Callable[[str], torch.Tensor], depth: int = 0) -> Any:
    """Build a state from its structure.

    Args:
        node: from `take_apart`, perhaps by way of a file that is not to be trusted.
        tensor_of: gives the tensor of a name.
        depth: of the node.

    Returns:
        The nest.

    Raises:
        FileFormatError: the structure is not one.
    """
    if depth > MAX_DEPTH or not isinstance(node, dict) or len(node) != 1:
        raise FileFormatError("the structure of a checkpoint's state is damaged")
    ((kind, content),) = node.items()
    if kind == "value" and (content is None or isinstance(content, (bool, int, float, str))):
        return content
    if kind == "tensor" and isinstance(content, str):
        return tensor_of(content)
    if kind in ("list", "tuple") and isinstance(content, list):
        parts = [put_together(one, tensor_of, depth + 1) for one in content]
        return parts if kind == "list" else tuple(parts)
    if kind == "dict" and isinstance(content, list):
        entries = {}
        for entry in content:
            if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], (str, int)):
                raise FileFormatError("the structure of a checkpoint's state is damaged")
            entries[entry[0]] = put_together(entry[1], tensor_of, depth + 1)
        return entries
    raise FileFormatError("the structure of a checkpoint's state is damaged")
