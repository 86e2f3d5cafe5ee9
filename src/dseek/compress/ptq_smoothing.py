"""Outliers: factors on the channels between two layers that move difficulty from activations to weights, or back.

Inputs x of a projection are divided by s and its weight's columns multiplied by it, which changes nothing until both
are rounded. The division is folded into what makes the inputs (a norm's weight, the value or the up projection), so the
file is an ordinary model. Two kinds of factors are offered, since they answer to two troubles:

- `smoothquant`, where activations are rounded too: s = max|x|^a / max|w|^(1 - a). Activations of a transformer have
  channels tens of times larger than the rest, and one scale a token leaves the others little.
- `awq`, where only weights are rounded: s = mean|x|^a. Weights that meet large activations get the finer steps.

The exponent a is searched for every joint, by the error of the projections' outputs on calibration rows with everything
rounded as the scheme says (AWQ's search; SmoothQuant fixes 0.5 for a whole model). No factors at all is one of the
candidates, so smoothing never makes this error worse. R rows, N output channels, K inputs.

Source: Xiao et al. 2022, SmoothQuant, equation 4; Lin et al. 2023, AWQ, section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from dseek.compress.ptq_rounding import Scheme, round_to_nearest
from dseek.models.decoder import Block
from dseek.ops.linear.reference import round_rows

Kind = Literal["smoothquant", "awq"]
EXPONENTS = tuple(step / 10 for step in range(1, 10))
_RANGE = 100.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Joint:
    """Two layers with channels between them."""

    before: str
    """The norm or projection that makes the channels."""
    after: tuple[str, ...]
    """Projections of the block that read them."""
    repeat: int = 1
    """Query heads that read each value head."""


def joints(num_query_heads: int, num_kv_heads: int) -> tuple[Joint, ...]:
    """List the joints of a block.

    Args:
        num_query_heads: H.
        num_kv_heads: G.

    Returns:
        In the order of computation.
    """
    attention = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    return (
        Joint(before="input_layernorm", after=attention),
        Joint(before="self_attn.v_proj", after=("self_attn.o_proj",), repeat=num_query_heads // num_kv_heads),
        Joint(before="post_attention_layernorm", after=("mlp.gate_proj", "mlp.up_proj")),
        Joint(before="mlp.up_proj", after=("mlp.down_proj",)),
    )


def find_factors(
    kind: Kind,
    rows_RK: torch.Tensor,
    largest_K: torch.Tensor,
    mean_K: torch.Tensor,
    weights: Sequence[torch.Tensor],
    scheme: Scheme,
    head_dim: int = 0,
    repeat: int = 1,
) -> torch.Tensor:
    """Search the factors of a joint.

    Args:
        kind: the formula.
        rows_RK: float32 [R, K], calibration inputs.
        largest_K: float32 [K], max |x| over all calibration inputs.
        mean_K: float32 [K], mean |x|.
        weights: float32 [N, K] each, of all that reads the channels.
        scheme: how weights and activations will be rounded.
        head_dim: width of a head, where `repeat` is above 1.
        repeat: channels of so many neighbouring heads share their factors.

    Returns:
        float32 [K], all ones where no factors help.
    """
    weight_NK = torch.cat(list(weights))
    wanted_RN = rows_RK @ weight_NK.T
    magnitude_K = weight_NK.abs().amax(0)
    best = torch.ones_like(largest_K)
    least = _error(rows_RK, weight_NK, wanted_RN, best, scheme)
    for exponent in EXPONENTS:
        if kind == "smoothquant":
            factors = largest_K.clamp_min(1e-6) ** exponent / magnitude_K.clamp_min(1e-6) ** (1 - exponent)
        else:
            factors = mean_K.clamp_min(1e-6) ** exponent
        if repeat > 1:
            # What reads a value head must agree on its factors.
            shared = factors.view(-1, repeat, head_dim).amax(1, keepdim=True)
            factors = shared.expand(-1, repeat, -1).reshape(-1)
        factors = factors / torch.exp(factors.log().mean())
        factors = factors.clamp(1 / _RANGE, _RANGE)
        error = _error(rows_RK, weight_NK, wanted_RN, factors, scheme)
        if error < least:
            best, least = factors, error
    return best


def _error(
    rows_RK: torch.Tensor, weight_NK: torch.Tensor, wanted_RN: torch.Tensor, factors_K: torch.Tensor, scheme: Scheme
) -> float:
    """Mean square of what rounding changes in the outputs."""
    rows = rows_RK / factors_K
    if scheme.activation_bits is not None:
        rows = round_rows(rows)
    weight = round_to_nearest(weight_NK * factors_K, scheme, search=False).widen()
    return float((rows @ weight.T - wanted_RN).square().mean())


def fold(block: Block, joint: Joint, factors_K: torch.Tensor) -> None:
    """Put the factors of a joint into the weights on both sides; the block computes what it did.

    Args:
        block: changed in place.
        joint: where.
        factors_K: float32 [K], inputs of the second side; of neighbouring query heads that share a value head, alike.
    """
    before = block.get_submodule(joint.before)
    gain = factors_K
    with torch.no_grad():
        if joint.repeat > 1:
            head_dim = block.self_attn.head_dim
            gain = factors_K.view(-1, joint.repeat, head_dim)[:, 0].reshape(-1)
        weight = before.weight
        assert isinstance(weight, torch.Tensor)
        weight /= gain if weight.dim() == 1 else gain[:, None]
        bias = getattr(before, "bias", None)
        if bias is not None:
            bias /= gain
        for name in joint.after:
            after = block.get_submodule(name)
            assert isinstance(after, torch.nn.Linear)
            after.weight *= factors_K
