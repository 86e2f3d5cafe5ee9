"""AdamW whose moments lie elsewhere: in a file on disk that is mapped, or in the host's memory beside a device.

A step goes through all parameters in parts of a million values. While one part is computed, the next one's moments are
brought and the last one's are put back, by a thread (or, on CUDA, by a stream of its own), so that of all moments three
parts are near at a time. Pages of the file are let go as soon as they were read or written; what of them the system
keeps in its cache, it can drop when it needs the memory. The arithmetic is that of PyTorch's own AdamW.

Source: Rajbhandari et al. 2021, ZeRO-Infinity, section 5.2, for moments that stream through memory in parts.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from dseek.core.errors import ConfigError
from dseek.plan.training import OFFLOAD_PART_VALUES
from dseek.train.shards import local

NUM_BUFFERS = 3
"""One part that is computed, one that is brought, one that is put back."""


@dataclass(frozen=True, slots=True)
class _Part:
    """Some values of one parameter."""

    group: dict[str, Any]
    step: torch.Tensor
    weight: torch.Tensor
    gradient: torch.Tensor
    mean: torch.Tensor
    square: torch.Tensor


class OffloadedAdamW(torch.optim.Optimizer):
    """AdamW with moments in a file or in the host's memory.

    Args:
        params: groups of parameters with `weight_decay`.
        file: where the moments lie, made anew; None keeps them in the host's memory, pinned where the parameters are on
            a CUDA device.
        lr: step size.
        betas: shares of the two moments that a step keeps.
        eps: added to the root of the second moment.

    Raises:
        ConfigError: the file cannot be made as long as is needed.
    """

    def __init__(
        self,
        params: Any,
        file: Path | None,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        sizes = [local(parameter).numel() for parameter in parameters]
        self._device = local(parameters[0]).device
        self._map = None if file is None else _mapped(file, 2 * 4 * sum(sizes))
        mapped = None if self._map is None else torch.frombuffer(self._map, dtype=torch.uint8, count=1)
        self._first_byte = 0 if mapped is None else mapped.data_ptr()
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="dseek-moments")
        moments = self._make_moments(sizes)
        for parameter, (mean, square) in zip(parameters, moments, strict=True):
            self.state[parameter] = {
                "step": torch.zeros(()),
                "exp_avg": _like(parameter, mean),
                "exp_avg_sq": _like(parameter, square),
            }
        part = min(OFFLOAD_PART_VALUES, max(sizes))
        self._buffers = [torch.empty(2, part, device=self._device) for _ in range(NUM_BUFFERS)]
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step.

        Args:
            closure: computes the loss again; None where it is not wanted.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parts = list(self._parts())
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        brought: Future[None] | None = self._worker.submit(self._bring, parts[0], 0) if parts else None
        put_back: list[Future[None]] = []
        for index, part in enumerate(parts):
            assert brought is not None
            brought.result()
            if index + 1 < len(parts):
                # Its buffer was put back before: the worker takes one order after the other.
                brought = self._worker.submit(self._bring, parts[index + 1], index + 1)
            self._update(part, index)
            put_back.append(self._worker.submit(self._put_back, part, index))
        for done in put_back:
            done.result()
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        for parameter in {id(p): p for group in self.param_groups for p in group["params"]}.values():
            if parameter.grad is not None:
                self.state[parameter]["step"] += 1
        return loss

    def release(self) -> None:
        """Let go of the file's pages that this process has seen; what was written stays written."""
        if self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """End the worker; the moments stay readable."""
        self._worker.shutdown(wait=True)

    def _make_moments(self, sizes: list[int]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        if self._map is None:
            pinned = self._device.type == "cuda"
            for size in sizes:
                yield torch.zeros(size, pin_memory=pinned), torch.zeros(size, pin_memory=pinned)
            return
        offset = 0
        for size in sizes:
            pair = []
            for _ in range(2):
                pair.append(torch.frombuffer(self._map, dtype=torch.float32, count=size, offset=offset))
                offset += 4 * size
            yield pair[0], pair[1]

    def _parts(self) -> Iterator[_Part]:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                whole = (
                    local(parameter).view(-1),
                    local(parameter.grad).reshape(-1),
                    local(state["exp_avg"]).view(-1),
                    local(state["exp_avg_sq"]).view(-1),
                )
                for first in range(0, len(whole[0]), OFFLOAD_PART_VALUES):
                    cut = [tensor[first : first + OFFLOAD_PART_VALUES] for tensor in whole]
                    yield _Part(group, state["step"], *cut)

    def _bring(self, part: _Part, index: int) -> None:
        self._move(index, part, to_buffer=True)

    def _put_back(self, part: _Part, index: int) -> None:
        self._move(index, part, to_buffer=False)

    @torch.no_grad()
    def _move(self, index: int, part: _Part, *, to_buffer: bool) -> None:
        buffer = self._buffers[index % NUM_BUFFERS][:, : len(part.weight)]
        if self._stream is None:
            for near, far in zip(buffer, (part.mean, part.square), strict=True):
                near.copy_(far) if to_buffer else far.copy_(near)
                self._let_go(far)
            return
        with torch.cuda.stream(self._stream):
            if not to_buffer:  # the update runs on the stream of the training
                self._stream.wait_stream(torch.cuda.default_stream(self._device))
            for near, far in zip(buffer, (part.mean, part.square), strict=True):
                near.copy_(far, non_blocking=True) if to_buffer else far.copy_(near, non_blocking=True)
        self._stream.synchronize()

    def _let_go(self, far: torch.Tensor) -> None:
        """Take the pages of a part out of this process's memory; the first and the last may be others' too."""
        if self._map is None:
            return
        start = far.data_ptr() - self._first_byte
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        self._map.madvise(mmap.MADV_DONTNEED, first, start + far.nbytes - first)

    def _update(self, part: _Part, index: int) -> None:
        mean, square = self._buffers[index % NUM_BUFFERS][:, : len(part.weight)]
        group = part.group
        adamw(
            [part.weight],
            [part.gradient],
            [mean],
            [square],
            [],
            [part.step.to(self._device, copy=True)],
            foreach=False,
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _mapped(file: Path, num_bytes: int) -> mmap.mmap:
    """Make a file of zeros and map it; the system gives it disk as it is written."""
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with file.open("w+b") as opened:
            os.posix_fallocate(opened.fileno(), 0, max(1, num_bytes))
            return mmap.mmap(opened.fileno(), max(1, num_bytes))
    except OSError as error:
        file.unlink(missing_ok=True)
        raise ConfigError(
            f"the optimiser's state of {num_bytes >> 20} MiB does not fit in {file.parent}: {error.strerror or error}",
            needed="that much free disk",
        ) from None


def _like(parameter: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """A flat moment in the parameter's shape, shared as the parameter is; its memory is the moment's."""
    shaped = moment.view(local(parameter).shape)
    if not isinstance(parameter, DTensor):
        return shaped
    return DTensor.from_local(
        shaped,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
