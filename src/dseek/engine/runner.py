"""`Runner`: the interface between the engine's loop and whatever computes the model.

A runner owns the weights and the paged key/value cache. The engine owns which page belongs to which sequence
(`dseek.engine.cache`); it tells the runner by the batch's page tables, so a runner keeps no state a sequence.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import numpy as np

from dseek.core.errors import ConfigError
from dseek.engine.activation_guard import ActivationGuard
from dseek.engine.batch import Batch

if TYPE_CHECKING:
    import torch


class Runner(ABC):
    """Computes batches of rows against a paged cache.

    One thread at a time may call it. `forward` mutates the cache pages named by the batch and nothing else.
    """

    num_pages: int
    """Pages in the cache, set by the constructor; page indices run from 0 to `num_pages - 1`."""

    guard: ActivationGuard | None = None
    """Counts what was computed in a wider dtype; None where nothing is watched."""

    is_shared = False
    """Whether other processes run the same steps, so that nothing may depend on what a clock says."""

    @abstractmethod
    def forward(self, batch: Batch) -> np.ndarray:
        """Compute every row of a batch and return the logits of the rows asked for.

        Args:
            batch: the rows; keys and values of all of them are written to their pages.

        Returns:
            float32 [L, V], one row for each of `batch.logit_rows` ([0, V] when there are none). The array may be a
            buffer that the next call overwrites; a caller that keeps logits copies them.
        """

    def hidden(self, batch: Batch) -> np.ndarray:
        """Compute every row of a batch and return what the head would see of the rows asked for.

        Args:
            batch: as for `forward`.

        Returns:
            float32 [L, D], the last block's output after the final norm. May be a buffer that the next call overwrites.

        Raises:
            ConfigError: this runner does not give them.
        """
        raise ConfigError(f"hidden states from a {type(self).__name__}", needed="a runner that gives them")

    def fresh_seed(self) -> int | None:
        """Give the seed of a request that brings none, or None where it may draw one of its own.

        Where several processes run the same requests, they must draw the same.
        """
        return None

    @abstractmethod
    def close(self) -> None:
        """Free the weights and the cache; the runner is of no use afterwards. May be called twice."""


def torch_modules(runner: Runner) -> tuple[torch.nn.Module, ...]:
    """Return the PyTorch modules that a runner computes with; none where it uses the native kernels.

    Args:
        runner: not closed.
    """
    decoder = getattr(runner, "decoder", None)
    return () if decoder is None else (decoder,)
