"""One pass of a frozen model over texts that fills accumulators: weights, inputs and outputs of projections, the cache.

Windows of text run one after the other; what a window leaves behind are the accumulators, whose size does not depend on
how much was read. Inputs are taken once for the layers that share them, under the name of the fused projection. Outputs
of the head, which are as wide as the vocabulary, are looked at in some rows of a window only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dseek.compress.statistics import Accumulator
from dseek.models.calibration_file import Limits, TensorStatistics
from dseek.models.decoder import Decoder
from dseek.models.encoding import to_float32
from dseek.models.files import ModelFiles
from dseek.models.tensor_names import ROLE_MODULES

CANCELLATION_ROWS = 8
"""Rows of a window whose dot products are looked at for cancellation."""

HEAD_ROWS = 32
"""Rows of a window whose logits are looked at."""

CHUNK_VALUES = 2**24
"""A weight goes through the accumulators in pieces of about so many values."""

Progress = Callable[[str, int, int], None]
"""Told what is being done, how much is done and how much there is."""


def weight_statistics(files: ModelFiles, progress: Progress) -> list[TensorStatistics]:
    """Look at every tensor of a model's files.

    Args:
        files: the opened model.
        progress: told after each tensor.

    Returns:
        Statistics, in the order of the files.
    """
    found = []
    names = files.tensor_names()
    for index, name in enumerate(names):
        array = to_float32(files.tensor(name))
        weight = torch.from_numpy(array.reshape(len(array), -1) if array.ndim > 1 else array.reshape(1, -1))
        formats: tuple[Any, ...] = ("i8c", "i8g", "i4g") if array.ndim > 1 else ()
        collected = Accumulator(name, "weight", weight.shape[1], formats)
        step = max(1, CHUNK_VALUES // weight.shape[1])
        for first in range(0, len(weight), step):
            collected.add(weight[first : first + step], name, first)
        found.append(collected.result())
        files.release()
        progress("weights", index + 1, len(names))
    return found


class ActivationPass:
    """Collects what passes through a model's projections and into its cache.

    Args:
        decoder: the model, in float32, in which no parameter needs a gradient.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.num_tokens = 0
        self._collected: dict[tuple[str, str], Accumulator] = {}
        self._where = ""

    @torch.no_grad()
    def add(self, windows: Sequence[torch.Tensor], where: Sequence[str], progress: Progress) -> None:
        """Run windows of text.

        Args:
            windows: token ids, int64 [T] each.
            where: what each is, for the places of values that are not finite.
            progress: told after each window.
        """
        for index, (token_ids, self._where) in enumerate(zip(windows, where, strict=True)):
            with self._watched():
                self.decoder(token_ids[None], _WatchedCache(self))
            self.num_tokens += len(token_ids)
            progress("activations", index + 1, len(windows))

    def results(self) -> list[TensorStatistics]:
        """Sum up, in the order of computation."""
        return [collected.result() for collected in self._collected.values()]

    def limits(self) -> Limits:
        """Give the largest magnitudes of projections' inputs, by role and layer."""
        plain: dict[str, list[float]] = {role: [] for role in ROLE_MODULES}
        rotated: dict[str, list[float]] = {role: [] for role in ROLE_MODULES}
        for layer in range(self.decoder.shape.num_layers):
            for role in ROLE_MODULES:
                collected = self._collected.get((f"model.layers.{layer}.{role}", "input"))
                known = collected is not None and collected.num_values > 0
                plain[role].append(max(-collected.least, collected.largest, 0.0) if known and collected else 0.0)
                rotated[role].append(collected.rotated_largest if known and collected else 0.0)
        return Limits(
            plain={role: tuple(values) for role, values in plain.items()},
            rotated={role: tuple(values) for role, values in rotated.items()},
        )

    def store(self, layer: int, keys_THd: torch.Tensor, values_THd: torch.Tensor) -> None:
        """Take in what a layer would put into its cache.

        Args:
            layer: index of the layer.
            keys_THd: rotated keys, [T, G, d].
            values_THd: values, [T, G, d].
        """
        for name, kind, x_TGd in (("self_attn.k", "key", keys_THd), ("self_attn.v", "value", values_THd)):
            # A row of a head has a scale of its own in an int8 cache.
            collected = self._accumulator(f"model.layers.{layer}.{name}", kind, x_TGd.shape[-1], ("int8",))
            collected.add(x_TGd.reshape(-1, x_TGd.shape[-1]), self._where)

    def _accumulator(self, name: str, kind: Any, num_channels: int, formats: Any) -> Accumulator:
        if (name, kind) not in self._collected:
            self._collected[name, kind] = Accumulator(name, kind, num_channels, formats)
        return self._collected[name, kind]

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Hooks on the linear layers while a window runs."""
        handles = []
        try:
            for layer, block in enumerate(self.decoder.model.layers):
                for role, paths in ROLE_MODULES.items():
                    for index, path in enumerate(paths):
                        fused = f"model.layers.{layer}.{role}" if index == 0 else None
                        hook = self._hook(f"model.layers.{layer}.{path}", fused)
                        handles.append(block.get_submodule(path).register_forward_hook(hook))
            handles.append(self.decoder.lm_head.register_forward_hook(self._hook("lm_head", "lm_head")))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str, input_name: str | None) -> Callable[[nn.Module, tuple[torch.Tensor], Any], None]:
        def look(linear: nn.Module, inputs: tuple[torch.Tensor], outputs: torch.Tensor) -> None:
            assert isinstance(linear, nn.Linear)
            x_RK = inputs[0].reshape(-1, inputs[0].shape[-1])
            y_RN = outputs.reshape(-1, outputs.shape[-1])
            if input_name is not None:
                collected = self._accumulator(input_name, "input", x_RK.shape[1], ("i8c", "i8g"))
                collected.add(x_RK, self._where)
            if linear.bias is not None:
                y_RN = y_RN - linear.bias
            every = max(1, len(y_RN) // HEAD_ROWS) if name == "lm_head" else 1
            collected = self._accumulator(name, "output", y_RN.shape[1], ())
            collected.add(y_RN[::every], self._where)
            some = torch.linspace(0, len(x_RK) - 1, min(CANCELLATION_ROWS, len(x_RK))).long()
            collected.add_cancellation(x_RK[some], linear.weight)

        return look


class _WatchedCache:
    """Stands for a cache that forgets: it shows what would be stored."""

    length = 0

    def __init__(self, watcher: ActivationPass) -> None:
        self._watcher = watcher

    def check_room(self, batch_size: int, num_tokens: int) -> None:
        """Have room for anything."""

    def append(self, layer: int, k_BGSd: torch.Tensor, v_BGSd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Show keys and values of one layer, and give them back."""
        self._watcher.store(layer, k_BGSd[0].transpose(0, 1), v_BGSd[0].transpose(0, 1))
        return k_BGSd, v_BGSd

    def advance(self, num_tokens: int) -> None:
        """Forget them."""
