"""What each rank keeps of weights, gradients and the optimiser's state: the three stages of ZeRO on PyTorch's FSDP2.

`zero1`: the state alone is shared. Gradients of a step's batches are added up whole and exchanged once; weights are
gathered once and kept until the step. `zero2`: gradients are exchanged and shared after every batch. `zero3`: weights
too are gathered block by block, in the forward and again in the backward pass. `none`: every rank holds everything, and
gradients are averaged. For one batch a step, zero1 and zero2 are the same.

Source: Rajbhandari et al. 2020, ZeRO, section 5; Zhao et al. 2023, PyTorch FSDP, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from dseek.train.language_model import LanguageModel

BUCKET_BYTES = 32 << 20
"""Gradients that are averaged in one message where nothing is shared."""


class Shards:
    """How one model is shared out.

    Args:
        model: with parameters on the meta device or filled ones; sharded in place.
        strategy: none, zero1, zero2 or zero3.
        world_size: processes.
        device: where they compute.
    """

    def __init__(self, model: LanguageModel, strategy: str, world_size: int, device: torch.device) -> None:
        self._model, self.strategy, self._world_size = model, strategy, world_size
        self.is_sharded = strategy != "none" and world_size > 1
        if not self.is_sharded:
            return
        mesh = init_device_mesh(device.type, (world_size,))
        whole_after_forward = strategy != "zero3"
        for block in model.decoder.model.layers:
            fully_shard(block, mesh=mesh, reshard_after_forward=not whole_after_forward)
        fully_shard(model, mesh=mesh, reshard_after_forward=False)

    def before_backward(self, *, is_last: bool) -> None:
        """Get ready for the backward pass of a batch.

        Args:
            is_last: it is the last batch of its step.
        """
        if isinstance(self._model, FSDPModule) and self.strategy == "zero1":
            self._model.set_requires_gradient_sync(is_last)
            self._model.set_reshard_after_backward(is_last)

    def average_gradients(self) -> None:
        """Average gradients over the ranks where nothing else did. Ranks call this together, after the last batch."""
        if self.is_sharded or self._world_size == 1:
            return
        gradients = [parameter.grad for parameter in self._model.parameters() if parameter.grad is not None]
        for bucket in _buckets(gradients):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            dist.all_reduce(flat)
            flat /= self._world_size
            for gradient, part in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
                gradient.copy_(part.view_as(gradient))


def _buckets(gradients: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    bucket: list[torch.Tensor] = []
    size = 0
    for gradient in gradients:
        bucket.append(gradient)
        size += gradient.nbytes
        if size >= BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket


def fill(model: LanguageModel, device: torch.device, tensor: Callable[[str, tuple[int, ...]], torch.Tensor]) -> None:
    """Give memory and values to the parameters of a model on the meta device; a rank keeps its part only.

    Args:
        model: sharded or not.
        device: where parameters go.
        tensor: gives the whole tensor of a name and shape.
    """
    model.to_empty(device=device)
    model.decoder.tie_weights()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            put(parameter, tensor(name, tuple(parameter.shape)))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Put a shared tensor together. All ranks call this together.

    Args:
        tensor: shared or not.

    Returns:
        The whole tensor; `tensor` itself where it was not shared.
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Give this rank's part of a tensor, in its own memory.

    Args:
        tensor: shared or not.
    """
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Share a whole tensor out as a parameter is.

    Args:
        parameter: shared or not.
        value: of its shape, the same on every rank.

    Returns:
        A tensor of its own memory, on the parameter's device.
    """
    if not isinstance(parameter, DTensor):
        return value.to(parameter.device, copy=True)
    moved = value.to(parameter.device)
    return distribute_tensor(moved, parameter.device_mesh, parameter.placements, src_data_rank=None)


def put(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Write a whole tensor into a parameter.

    Args:
        parameter: shared or not.
        value: of its shape, the same on every rank.
    """
    with torch.no_grad():
        if isinstance(parameter, DTensor):
            local(parameter).copy_(local(like(parameter, value)))
        else:
            parameter.copy_(value)
