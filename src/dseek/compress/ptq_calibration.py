"""What a block's projections are fed: second moments, magnitudes and some rows, gathered as texts run through it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from dseek.compress.ptq_rounding import Scheme
from dseek.ops.linear.reference import round_rows

SAMPLE_ROWS = 512
"""Rows kept of each input: every one of all that were seen has the same chance."""


class InputStatistics:
    """Of one input, over all rows seen so far. K inputs, R rows.

    Args:
        num_inputs: K.
        seed: of the rows that are kept.
    """

    def __init__(self, num_inputs: int, seed: int) -> None:
        self.largest = torch.zeros(num_inputs)
        """float32 [K], max |x|."""
        self._sum = torch.zeros(num_inputs, dtype=torch.float64)
        self._moment = torch.zeros(num_inputs, num_inputs)
        self._rows = torch.zeros(SAMPLE_ROWS, num_inputs)
        self._num_seen = 0
        self._generator = torch.Generator().manual_seed(seed)

    @property
    def mean(self) -> torch.Tensor:
        """float32 [K], mean |x|."""
        return (self._sum / max(1, self._num_seen)).float()

    def rows(self) -> torch.Tensor:
        """Return the kept rows, float32 [R, K]."""
        return self._rows[: min(self._num_seen, SAMPLE_ROWS)]

    def hessian(self) -> torch.Tensor:
        """Return the mean of x x^T, float32 [K, K]."""
        return self._moment / max(1, self._num_seen)

    def add(self, x_RK: torch.Tensor) -> None:
        """Take rows in.

        Args:
            x_RK: float32 [R, K].
        """
        magnitude = x_RK.abs()
        self.largest = torch.maximum(self.largest, magnitude.amax(0))
        self._sum += magnitude.sum(0, dtype=torch.float64)
        self._moment.addmm_(x_RK.T, x_RK)
        # Vitter 1985, Random Sampling with a Reservoir, algorithm R, over a whole batch at once.
        count = len(x_RK)
        numbers = torch.arange(self._num_seen, self._num_seen + count)
        places = (torch.rand(count, generator=self._generator, dtype=torch.float64) * (numbers + 1)).long()
        places = torch.where(numbers < SAMPLE_ROWS, numbers, places)
        kept = places < SAMPLE_ROWS
        self._rows[places[kept]] = x_RK[kept]
        self._num_seen += count

    def divide(self, factors_K: torch.Tensor) -> None:
        """Become the statistics of x / factors.

        Args:
            factors_K: float32 [K].
        """
        self.largest = self.largest / factors_K
        self._sum /= factors_K
        self._rows /= factors_K
        self._moment /= torch.outer(factors_K, factors_K)


@contextmanager
def gathered(module: nn.Module, groups: Sequence[Sequence[str]], seed: int) -> Iterator[dict[str, InputStatistics]]:
    """Gather statistics of the inputs of projections while the block runs.

    Args:
        module: the block.
        groups: names of projections that share their inputs; statistics go under the first name of each.
        seed: of the rows that are kept.

    Yields:
        Name to statistics, which grow with every run.
    """
    found: dict[str, InputStatistics] = {}
    handles = []
    for index, group in enumerate(groups):
        projection = module.get_submodule(group[0])
        assert isinstance(projection, nn.Linear)
        statistics = found[group[0]] = InputStatistics(projection.in_features, seed * len(groups) + index)

        def look(_: nn.Module, inputs: tuple[torch.Tensor], statistics: InputStatistics = statistics) -> None:
            statistics.add(inputs[0].detach().flatten(0, -2))

        handles.append(projection.register_forward_pre_hook(look))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def rounding_activations(modules: Iterable[nn.Module], scheme: Scheme) -> Iterator[None]:
    """Round the inputs of projections to int8, one scale a token, where the scheme says so.

    Args:
        modules: the projections.
        scheme: of the weights and activations.

    Yields:
        Nothing; it ends with the context.
    """

    def rounded(_: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        x = inputs[0]
        return (round_rows(x.flatten(0, -2)).view(x.shape),)

    handles = []
    if scheme.activation_bits is not None:
        handles = [module.register_forward_pre_hook(rounded) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def cut_texts(token_ids: Sequence[int], num_texts: int, num_tokens: int, seed: int) -> torch.Tensor:
    """Cut calibration texts out of a long one, spread over all of it.

    Args:
        token_ids: at least `num_tokens`.
        num_texts: S; fewer where there are not so many without overlap.
        num_tokens: T.
        seed: of the places.

    Returns:
        int64 [S, T].
    """
    num_pieces = len(token_ids) // num_tokens
    order = torch.randperm(num_pieces, generator=torch.Generator().manual_seed(seed))[: min(num_texts, num_pieces)]
    slack = len(token_ids) - num_pieces * num_tokens
    offset = math.floor(slack / 2)
    ids = torch.tensor(token_ids[offset : offset + num_pieces * num_tokens], dtype=torch.int64).view(-1, num_tokens)
    return ids[order.sort().values]
