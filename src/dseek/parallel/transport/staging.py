"""Memory for a tensor while an operation moves it, and the checks of lists of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dseek.core.errors import ConfigError

BACKEND_NAME = "dseek"
"""What `init_process_group` is given."""


class Staged:
    """A tensor and contiguous memory for it: its own where it is contiguous."""

    def __init__(self, tensor: torch.Tensor, *, is_read: bool) -> None:
        """Take memory for `tensor`; it holds the values where it `is_read`.

        Args:
            tensor: on the CPU, of any layout.
            is_read: whether the operation reads it.

        Raises:
            ConfigError: it lies elsewhere.
        """
        if tensor.device.type != "cpu":
            raise ConfigError(f"a tensor lies on {tensor.device}", needed=f"the CPU: {BACKEND_NAME} moves its memory")
        self.tensor = tensor
        plain = tensor.detach()
        self.is_own = plain.is_contiguous() and not plain.is_conj() and not plain.is_neg()
        if not self.is_own:
            plain = plain.resolve_conj().resolve_neg()
            plain = plain.contiguous() if is_read else torch.empty(plain.shape, dtype=plain.dtype)
        self.flat = plain.view(-1)


def fill(staged: Sequence[Staged]) -> None:
    """Copy what was received into the tensors that are not contiguous.

    Args:
        staged: what the operation has written.
    """
    for one in staged:
        if not one.is_own:
            one.tensor.detach().copy_(one.flat.view(one.tensor.shape))


def check_gathered(outs: list[Staged], source: Staged, rank: int, world_size: int) -> None:
    """Make sure that all_gather has one output a rank, and that this rank's fits its input.

    Args:
        outs: the outputs.
        source: this rank's input.
        rank: this rank.
        world_size: ranks of the group.

    Raises:
        ConfigError: it has not.
    """
    if len(outs) != world_size or outs[rank].flat.nbytes != source.flat.nbytes:
        raise ConfigError(
            f"all_gather has {len(outs)} outputs, {outs[rank].flat.nbytes if rank < len(outs) else 0} bytes for "
            f"{source.flat.nbytes} of this rank",
            needed=f"{world_size} outputs of the inputs' sizes",
        )


def cut(flat: torch.Tensor, tensor: torch.Tensor, sizes: list[int], world_size: int, what: str) -> list[torch.Tensor]:
    """Cut a tensor along its first axis into the parts of an all-to-all.

    Args:
        flat: its memory, [numel].
        tensor: of any shape.
        sizes: rows of each part; empty for equal parts.
        world_size: ranks of the group.
        what: input or output, for messages.

    Returns:
        One part a rank, flat.

    Raises:
        ConfigError: the sizes do not add up.
    """
    rows = tensor.shape[0] if tensor.dim() else 0
    if not sizes:
        if rows % world_size:
            raise ConfigError(f"the {what} of all_to_all_single has {rows} rows", needed=f"a multiple of {world_size}")
        sizes = [rows // world_size] * world_size
    if len(sizes) != world_size or sum(sizes) != rows:
        raise ConfigError(f"the {what} of all_to_all_single has {rows} rows, its sizes are {sizes}")
    width = flat.numel() // rows if rows else 0
    return list(flat.split([size * width for size in sizes]))


def split(whole: torch.Tensor, part: torch.Tensor, world_size: int) -> list[torch.Tensor]:
    """Cut a tensor into equal parts, one a rank.

    Args:
        whole: flat.
        part: flat, of the size and dtype that each part must have.
        world_size: ranks of the group.

    Returns:
        The parts, flat.

    Raises:
        ConfigError: they do not fit.
    """
    if whole.numel() != part.numel() * world_size or whole.dtype != part.dtype:
        raise ConfigError(
            f"the tensors have {whole.numel()} elements of {whole.dtype} and {part.numel()} of {part.dtype}",
            needed=f"one {world_size} times the other, for {world_size} ranks",
        )
    return list(whole.view(world_size, -1).unbind(0))
