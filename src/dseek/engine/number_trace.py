"""Where numbers that are not finite began: a run whose logits are NaN or infinite is done again, slowly and watched.

The sequence goes through the reference of every operator, one layer's weights at a time, rounded as the plan rounds
them; the first projection, norm or sum whose output is not finite while its input is names the place. Costs nothing
until it is needed. It attends to everything that a window permits and keeps no cache, so what only a narrow cache, a
choice of blocks or a faulty kernel makes is not found, and then it says so. T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from dseek.models.decoder import Block, RMSNorm, Rotary
from dseek.models.encoding import to_float32
from dseek.ops.attention.reference import visible
from dseek.ops.linear import reference
from dseek.ops.tensor import EncodedTensor

if TYPE_CHECKING:
    from dseek.models.files import ModelFiles
    from dseek.plan.plan import Plan

_BEFORE = {
    "input_layernorm": "the sum before it",
    "self_attn.o_proj": "self_attn, scores times values",
    "post_attention_layernorm": "the sum after self_attn",
    "mlp.down_proj": "mlp, silu(gate_proj) * up_proj",
}
"""What feeds a module and is no module itself."""
_ROLE_OF = {
    "self_attn.q_proj": "qkv",
    "self_attn.k_proj": "qkv",
    "self_attn.v_proj": "qkv",
    "self_attn.o_proj": "output",
    "mlp.gate_proj": "gate_up",
    "mlp.up_proj": "gate_up",
    "mlp.down_proj": "down",
}
_HEAD_ROWS = 8192  # of the head, widened at once
_TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """The first number that was not finite."""

    layer: int | None
    """Index of the block; None is before the first or after the last one."""
    part: str
    """Projection, norm or sum that gave it."""
    position: int
    """Of the token."""
    channel: int
    """Index in the output."""
    value: float
    """NaN or an infinity."""
    largest_input: float
    """Largest magnitude that went in, of that token."""

    def __str__(self) -> str:
        place = self.part if self.layer is None else f"layer {self.layer}, {self.part}"
        return (
            f"{place} gives {self.value} at token {self.position}, channel {self.channel}, "
            f"from inputs of at most {self.largest_input:g}"
        )


class _FoundError(Exception):
    """Ends the run."""

    def __init__(self, origin: Origin) -> None:
        super().__init__(str(origin))
        self.origin = origin


@torch.inference_mode()
def first_not_finite(files: ModelFiles, plan: Plan, token_ids: Sequence[int]) -> Origin | None:
    """Run a sequence through the references and find where its numbers stop being finite.

    Args:
        files: the opened model.
        plan: its precision or formats by layer.
        token_ids: T ids, up to the one whose logits were wrong.

    Returns:
        The place, or None where everything stays finite here.
    """
    try:
        _run(files, plan, list(token_ids))
    except _FoundError as found:
        return found.origin
    return None


def _run(files: ModelFiles, plan: Plan, token_ids: list[int]) -> None:
    shape = files.shape
    is_native = plan.kernels == "native"
    dtype = torch.float32 if is_native else _TORCH_DTYPES.get(plan.precision, torch.float32)

    # 1. The rows of the embedding that are asked for.
    table = files.tensor("model.embed_tokens.weight")
    x_1TD = torch.from_numpy(to_float32(_rows(table, np.array(token_ids)))).to(dtype)[None]
    _require_finite(x_1TD, None, "model.embed_tokens", x_1TD)

    # 2. The blocks, one at a time.
    positions = torch.arange(len(token_ids))
    rotation = Rotary(shape)(positions, dtype, plan.context_tokens)
    for layer in range(shape.num_layers):
        windowed = shape.sliding_window is not None and (shape.window_layers is None or shape.window_layers[layer])
        mask_TS = visible(positions, positions, shape.sliding_window) if windowed else None
        block = _load_block(files, layer, dtype)
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear) and is_native:
                _use_reference(module, plan.layer_formats[layer].by_role()[_ROLE_OF[name]])
            if isinstance(module, nn.Linear | RMSNorm):
                module.register_forward_hook(_watcher(layer, name))
        x_1TD = block(x_1TD, rotation, mask_TS, not windowed, None)
        _require_finite(x_1TD, layer, "the sum after mlp", x_1TD)
        files.release()

    # 3. The head, for the last token.
    norm = _vector(files, "model.norm.weight", dtype)
    last_1D = F.rms_norm(x_1TD[0, -1:].float(), (shape.hidden_size,), norm.float(), shape.rms_norm_eps).to(dtype)
    _require_finite(last_1D, None, "model.norm", x_1TD[0, -1:], first_position=len(token_ids) - 1)
    head = files.tensor("lm_head.weight" if files.has("lm_head.weight") else "model.embed_tokens.weight")
    for start in range(0, head.shape[0], _HEAD_ROWS):
        rows = np.arange(start, min(start + _HEAD_ROWS, head.shape[0]))
        weight = torch.from_numpy(to_float32(_rows(head, rows)))
        if is_native:
            logits = reference.linear(last_1D, weight, plan.head_format, few_rows=True)
        else:
            logits = F.linear(last_1D, weight.to(dtype))
        _require_finite(logits, None, "lm_head", last_1D, first_position=len(token_ids) - 1, first_channel=start)


def _load_block(files: ModelFiles, layer: int, dtype: torch.dtype) -> Block:
    """One block with its weights."""
    with torch.device("meta"):
        block = Block(files.shape, layer)
    state = {name: _vector(files, f"model.layers.{layer}.{name}", dtype) for name in block.state_dict()}
    block.load_state_dict(state, strict=True, assign=True)
    return block.eval()


def _vector(files: ModelFiles, name: str, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(to_float32(files.tensor(name))).to(dtype)


def _rows(tensor: EncodedTensor, rows: np.ndarray) -> EncodedTensor:
    """Some rows of a stored matrix, which are runs of its bytes."""
    data = tensor.data.reshape(tensor.shape[0], -1)[rows]
    return EncodedTensor(tensor.name, (len(rows), *tensor.shape[1:]), tensor.encoding, data.reshape(-1))


def _use_reference(linear: nn.Linear, weight_format: str) -> None:
    """Let a projection round its weight and its inputs as a packed format does."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        product = reference.linear(rows, linear.weight, weight_format, few_rows=len(rows) <= 8)
        product = product if linear.bias is None else product + linear.bias
        return product.reshape(*x.shape[:-1], -1)

    linear.forward = forward  # type: ignore[method-assign,assignment]


def _watcher(layer: int, name: str) -> Any:
    """A hook that holds what goes into a module, and what comes out of it, to be finite."""

    def watch(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        _require_finite(inputs[0], layer, _BEFORE.get(name, f"the input of {name}"), inputs[0])
        _require_finite(output, layer, name, inputs[0])

    return watch


def _require_finite(
    x: torch.Tensor,
    layer: int | None,
    part: str,
    source: torch.Tensor,
    *,
    first_position: int = 0,
    first_channel: int = 0,
) -> None:
    """Raise where `x` [..., T, ...] is not finite; names the earliest token, and its first channel."""
    if bool(torch.isfinite(x).all()):
        return
    # Heads, where there are any, count as channels: tokens are the axis after the batch.
    rows = x.reshape(x.shape[0] * x.shape[1], -1) if x.dim() > 2 else x
    sources = source.reshape(len(rows), -1)
    row, channel = torch.nonzero(~torch.isfinite(rows))[0].tolist()
    magnitudes = sources[row].float().abs()
    finite = magnitudes[torch.isfinite(magnitudes)]
    raise _FoundError(
        Origin(
            layer=layer,
            part=part,
            position=first_position + row,
            channel=first_channel + channel,
            value=float(rows[row, channel]),
            largest_input=float(finite.max()) if len(finite) else float("nan"),
        )
    )
