"""What narrower formats cost a model: the divergence of its predictions, measured or estimated for every projection.

Measured is the Kullback-Leibler divergence, in nats a token, of the model's predictions with something rounded from its
own in fp32. On text that the model predicts as well as it does its own it is the rise of the mean log-loss, that is the
relative rise of perplexity where it is small; unlike that rise it is never negative and varies little between texts.

A sweep over all projections and formats takes as long as some hundreds of passes. The estimate takes one pass forward
and backward, and one forward for each role and format. To second order, errors d of a projection's outputs cost

    KL = 1/2 E[(g . d)^2],

with g the gradient, by these outputs, of the loss of a *drawn* next token (Fisher's information; Theis et al. 2018,
Faster gaze prediction with dense networks and Fisher pruning, uses it for what may be left out). The errors d are those
that the format makes of the inputs in fp32; rows are taken as independent, which they are not, since a weight's errors
are the same in all of them. So only the shape over layers is taken from there: a role in a format is measured in all
layers at once, and the shape scaled to it.

B windows, T tokens, R rows looked at, D model width, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dseek.compress.rounding import Formats, RoundedLinear, rounded
from dseek.models.decoder import Block, Decoder
from dseek.models.tensor_names import ROLE_MODULES
from dseek.ops.attention.reference import visible
from dseek.ops.linear.reference import round_rows, round_weight

FORMATS = ("i4g", "i8c", "i8g", "bf16", "f16")
"""Formats that losses are found of; f32 loses nothing."""

CACHES = ("bf16", "int8")
TABLES = ("bf16", "f16", "i8g")

ROW_STEP = 2
"""Every so many rows the predictions are compared."""

CHUNK_ROWS = 64
"""Rows of logits that are compared at a time."""

Progress = Callable[[str, int, int], None]


class Sensitivity:
    """Compares a model with itself, something of it rounded.

    Keeps every layer's input and the predictions of every window: 4 B T (L D + V / `ROW_STEP`) bytes.

    Args:
        decoder: the model, in float32, in which no parameter needs a gradient.
        windows: token ids, int64 [T] each.
        seed: of the tokens that are drawn.
    """

    def __init__(self, decoder: Decoder, windows: Sequence[torch.Tensor], seed: int = 0) -> None:
        self.decoder = decoder
        self._generator = torch.Generator().manual_seed(seed)
        self._windows = [_Window(decoder, token_ids) for token_ids in windows]

    def divergence(self, formats: Formats, *, cache_dtype: str | None = None, table_format: str | None = None) -> float:
        """Measure what formats cost.

        Args:
            formats: of projections; the others are in fp32.
            cache_dtype: of keys and values; None is fp32.
            table_format: of embedding and head; None is fp32.

        Returns:
            Kullback-Leibler divergence from the model in fp32, nats a token.
        """
        first = min((layer for layer, _ in formats), default=self.decoder.shape.num_layers)
        if cache_dtype is not None or table_format is not None:
            first = 0
        head: nn.Module = self.decoder.lm_head
        if table_format is not None:
            head = RoundedLinear(self.decoder.lm_head, table_format)
        total, count = 0.0, 0
        with torch.inference_mode(), rounded(self.decoder, formats):
            for window in self._windows:
                x_1TD = window.states[first]
                if table_format is not None:
                    rows = round_weight(self.decoder.model.embed_tokens(window.token_ids), table_format)
                    x_1TD = rows[None]
                cache: Any = None if cache_dtype is None else _RoundingCache(cache_dtype)
                x_1TD = run_layers(self.decoder, x_1TD, first, cache)
                total += window.divergence(self.decoder.model.norm(x_1TD), head)
                count += window.num_rows
        return total / count

    def expected(self, formats: Sequence[str], progress: Progress) -> dict[str, dict[str, list[float]]]:
        """Estimate what each projection costs in formats, by Fisher's information alone.

        Args:
            formats: weight formats.
            progress: told after each window.

        Returns:
            Divergence, nats a token, by format, role and layer: good for comparing layers of a role.
        """
        num_layers = self.decoder.shape.num_layers
        found = {name: {role: [0.0] * num_layers for role in ROLE_MODULES} for name in formats}
        num_tokens = sum(len(window.token_ids) for window in self._windows)
        for index, window in enumerate(self._windows):
            for (name, role, layer), value in window.expected(self.decoder, formats, self._generator):
                found[name][role][layer] += value / num_tokens
            progress("gradients", index + 1, len(self._windows))
        return found


class _Window:
    """One piece of text: the model's states and predictions in fp32."""

    def __init__(self, decoder: Decoder, token_ids: torch.Tensor) -> None:
        self.token_ids = token_ids
        self.states: list[torch.Tensor] = []
        with torch.no_grad():
            x_1TD = decoder.model.embed_tokens(token_ids[None])
            out_1TD = run_layers(decoder, x_1TD, 0, None, self.states)
            self.states.append(out_1TD)
            kept_RD = decoder.model.norm(out_1TD)[0, ::ROW_STEP]
            self.num_rows = len(kept_RD)
            self.log_p_RV = F.log_softmax(decoder.lm_head(kept_RD), -1)

    def divergence(self, normed_1TD: torch.Tensor, head: nn.Module) -> float:
        """Sum of the rows' divergences, in nats."""
        total = 0.0
        kept_RD = normed_1TD[0, ::ROW_STEP]
        for first in range(0, self.num_rows, CHUNK_ROWS):
            rows = slice(first, first + CHUNK_ROWS)
            log_p, log_q = self.log_p_RV[rows], F.log_softmax(head(kept_RD[rows]), -1)
            total += float((log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64))
        return max(0.0, total)

    def expected(
        self, decoder: Decoder, formats: Sequence[str], generator: torch.Generator
    ) -> Iterator[tuple[tuple[str, str, int], float]]:
        """Sums over the window's rows of (g . d)^2 / 2, by format, role and layer; one layer's graph at a time."""
        # 1. The gradient by the last states, of a token drawn from the model's own predictions at every row.
        x_1TD = self.states[-1].clone().requires_grad_()
        normed_TD = decoder.model.norm(x_1TD)[0]
        for first in range(0, len(normed_TD), CHUNK_ROWS):
            logits_RV = decoder.lm_head(normed_TD[first : first + CHUNK_ROWS])
            drawn_R = torch.multinomial(logits_RV.detach().softmax(-1), 1, generator=generator)[:, 0]
            F.cross_entropy(logits_RV, drawn_R, reduction="sum").backward(retain_graph=True)
        assert x_1TD.grad is not None
        gradient_1TD = x_1TD.grad

        # 2. Back through the layers, with the gradients by every projection's outputs.
        for layer in reversed(range(decoder.shape.num_layers)):
            block = decoder.model.layers[layer]
            assert isinstance(block, Block)
            seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
            paths = [path for role_paths in ROLE_MODULES.values() for path in role_paths]
            handles = [block.get_submodule(path).register_forward_hook(_keep(seen, path)) for path in paths]
            try:
                x_1TD = self.states[layer].clone().requires_grad_()
                y_1TD = run_layers(decoder, x_1TD, layer, None, last=layer)
            finally:
                for handle in handles:
                    handle.remove()
            outputs = [seen[path][1] for path in paths]
            gradient_1TD, *by_output = torch.autograd.grad(y_1TD, [x_1TD, *outputs], gradient_1TD)
            gradients = dict(zip(paths, by_output, strict=True))

            # 3. What each format does to the outputs, along these gradients.
            for name in formats:
                for role, role_paths in ROLE_MODULES.items():
                    change_T = torch.zeros(x_1TD.shape[1])
                    for path in role_paths:
                        linear = block.get_submodule(path)
                        assert isinstance(linear, nn.Linear)
                        with torch.no_grad():
                            error_1TN = RoundedLinear(linear, name)(seen[path][0]) - seen[path][1]
                            change_T += (error_1TN * gradients[path]).sum(-1)[0]
                    yield (name, role, layer), 0.5 * float(change_T.double().square().sum())


def _keep(seen: dict[str, tuple[torch.Tensor, torch.Tensor]], path: str) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        seen[path] = inputs[0].detach(), output

    return hook


def run_layers(
    decoder: Decoder,
    x_1TD: torch.Tensor,
    first: int,
    cache: Any,
    states: list[torch.Tensor] | None = None,
    last: int | None = None,
) -> torch.Tensor:
    """Run a whole text through some layers.

    Args:
        decoder: the model.
        x_1TD: what goes into the first of them.
        first: index of the first.
        cache: shown keys and values, as `KVCache` is; None for none.
        states: what goes into each layer is appended to it.
        last: index of the last; None runs all that follow.

    Returns:
        [1, T, D], what the last one puts out.
    """
    model, shape = decoder.model, decoder.shape
    positions = torch.arange(x_1TD.shape[1], device=x_1TD.device)
    rotation = model.rotary_emb(positions, x_1TD.dtype)
    for layer in range(first, shape.num_layers if last is None else last + 1):
        if states is not None:
            states.append(x_1TD)
        windowed = shape.sliding_window is not None and (shape.window_layers is None or shape.window_layers[layer])
        mask_TS = visible(positions, positions, shape.sliding_window) if windowed else None
        x_1TD = model.layers[layer](x_1TD, rotation, mask_TS, mask_TS is None, cache)
    return x_1TD


class _RoundingCache:
    """Stands for a cache of a narrower dtype that forgets: gives keys and values back as they would be read."""

    def __init__(self, cache_dtype: str) -> None:
        self._dtype = cache_dtype

    def append(self, layer: int, k_BGSd: torch.Tensor, v_BGSd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Round keys and values of one layer: to bf16, or to int8 with a scale for each head and position."""
        if self._dtype == "bf16":
            return k_BGSd.bfloat16().float(), v_BGSd.bfloat16().float()
        width = k_BGSd.shape[-1]
        k_rows, v_rows = (round_rows(x.reshape(-1, width)) for x in (k_BGSd, v_BGSd))
        return k_rows.view_as(k_BGSd), v_rows.view_as(v_BGSd)


def scaled(
    expected: Mapping[str, Mapping[str, Sequence[float]]], levels: Mapping[tuple[str, str], float]
) -> dict[str, dict[str, tuple[float, ...]]]:
    """Scale what is expected of each layer to what all layers of a role lose together.

    Args:
        expected: from `Sensitivity.expected`.
        levels: divergence of a role in all layers at once, by format and role.

    Returns:
        Losses by format, role and layer.
    """
    found: dict[str, dict[str, tuple[float, ...]]] = {}
    for (name, role), level in levels.items():
        shape = expected[name][role]
        total = sum(shape)
        # Where nothing is expected of any layer, as of weights that a format holds exactly, they share alike.
        found.setdefault(name, {})[role] = tuple(
            value * level / total if total > 0 else level / len(shape) for value in shape
        )
    return found


def origin_of(windows: Sequence[torch.Tensor], seed: int) -> str:
    """Tell texts and settings of losses from others.

    Args:
        windows: token ids.
        seed: of the tokens that are drawn.
    """
    digest = hashlib.sha256(repr((seed, ROW_STEP)).encode())
    for token_ids in windows:
        digest.update(len(token_ids).to_bytes(8, "little") + token_ids.numpy().tobytes())
    return digest.hexdigest()[:16]
