"""Operations and bytes of PyTorch's operators, from the shapes that its profiler records.

The formulas are those of `torch.utils.flop_counter`; what they miss is registered there, so that `FlopCounterMode`
counts it as well: attention on the CPU. Composite operators that a reader of a profile wants
to see whole (`aten::linear`, `aten::scaled_dot_product_attention`, `aten::conv2d`) have their formula here.

What it does not know: custom operators of others, and operators inside a compiled graph, which are one kernel there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

from dseek.profiler.records import Kind

Shape = Sequence[int]

DTYPE_BYTES = {
    "float": 4, "double": 8, "c10::Half": 2, "c10::BFloat16": 2, "c10::Float8_e4m3fn": 1, "c10::Float8_e5m2": 1,
    "signed char": 1, "unsigned char": 1, "bool": 1, "short": 2, "short int": 2, "int": 4, "long": 8, "long int": 8,
    "c10::complex<float>": 8,
}  # fmt: skip
"""Bytes of a number by the names that the profiler has for its type."""

DTYPE_NAMES = {"float": "fp32", "double": "fp64", "c10::Half": "fp16", "c10::BFloat16": "bf16", "signed char": "int8"}

VIEWS = frozenset(
    "aten::" + name
    for name in (
        "view", "reshape", "t", "transpose", "permute", "expand", "expand_as", "slice", "select", "unsqueeze",
        "squeeze",
        "as_strided", "detach", "alias", "narrow", "split", "chunk", "unbind", "_unsafe_view", "unsafe_chunk",
        "split_with_sizes", "flatten", "unflatten", "empty", "empty_strided", "empty_like", "resize_", "result_type",
        "is_nonzero", "item", "_local_scalar_dense", "lift_fresh", "detach_", "view_as", "movedim", "swapaxes", "size",
        "numel", "is_contiguous", "set_", "_reshape_alias",
    )
)  # fmt: skip
"""Operators that move nothing."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What one call of an operator takes."""

    kind: Kind
    """Sort of work."""
    flops: float
    """Operations."""
    num_bytes: float
    """Inputs and outputs."""
    dtype: str
    """Of the first input that is a number with a name here."""
    dimensions: tuple[int, int, int] | None = None
    """Rows, outputs and inputs of a product with a weight."""


def attention_flops(query: Shape, key: Shape, value: Shape, *, causal: bool) -> float:
    """Count attention's operations.

    Args:
        query: [..., H, T, d].
        key: [..., G, S, d].
        value: [..., G, S, e].
        causal: only pairs of a query and an earlier position, or its own, counting from the first, are computed.

    Returns:
        Two operations a pair, head and channel, of both products.
    """
    rows, positions = query[-2], key[-2]
    pairs = rows * positions
    if causal:
        # Row t sees positions up to t, as PyTorch aligns them.
        full = min(rows, positions)
        pairs = full * (full + 1) // 2 + max(0, rows - positions) * positions
    return 2.0 * math.prod(query[:-2]) * pairs * (query[-1] + value[-1])


def _registered() -> None:
    """Teach `torch.utils.flop_counter` what it misses; done once."""
    cpu_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    if cpu_attention not in flop_registry:

        @register_flop_formula(cpu_attention)  # type: ignore[untyped-decorator, unused-ignore]
        def _cpu_attention(
            query: Shape, key: Shape, value: Shape, dropout_p: float = 0.0, is_causal: bool = False, *_: Any, **__: Any
        ) -> int:
            return int(attention_flops(query, key, value, causal=is_causal))

    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    if backward not in flop_registry:

        @register_flop_formula(backward)  # type: ignore[untyped-decorator, unused-ignore]
        def _cpu_attention_backward(
            grad: Shape,
            query: Shape,
            key: Shape,
            value: Shape,
            out: Shape,
            logsumexp: Shape,
            dropout_p: float = 0.0,
            is_causal: bool = False,
            *_: Any,
            **__: Any,
        ) -> int:
            # The scores are computed again, then four products for the gradients: five where forward has two.
            return int(2.5 * attention_flops(query, key, value, causal=is_causal))


_registered()


def _linear(shapes: Sequence[Shape], values: Sequence[Any]) -> tuple[float, tuple[int, int, int]]:
    x, weight = shapes[0], shapes[1]
    rows = math.prod(x[:-1])
    return 2.0 * rows * math.prod(weight), (rows, weight[0], weight[1])


def _dseek_linear(shapes: Sequence[Shape], values: Sequence[Any]) -> tuple[float, tuple[int, int, int]]:
    rows, inputs = math.prod(shapes[0][:-1]), shapes[0][-1]
    outputs = int(values[2])
    return 2.0 * rows * outputs * inputs, (rows, outputs, inputs)


def _product(first: int) -> Callable[[Sequence[Shape], Sequence[Any]], tuple[float, tuple[int, int, int]]]:
    """A formula for matrices that begin with the argument of an index: [..., M, K] x [..., K, N]."""

    def formula(shapes: Sequence[Shape], values: Sequence[Any]) -> tuple[float, tuple[int, int, int]]:
        left, right = shapes[first], shapes[first + 1]
        batch, rows, inputs, outputs = math.prod(left[:-2]), left[-2], left[-1], right[-1]
        return 2.0 * batch * rows * inputs * outputs, (batch * rows, outputs, inputs)

    return formula


def _attention(shapes: Sequence[Shape], values: Sequence[Any], causal_at: int) -> float:
    causal = len(values) > causal_at and str(values[causal_at]) in ("True", "1")
    return attention_flops(shapes[0], shapes[1], shapes[2], causal=causal)


_LINEARS = {
    "aten::linear": _linear,
    "dseek::linear": _dseek_linear,
    "aten::mm": _product(0),
    "aten::addmm": _product(1),
    "aten::bmm": _product(0),
    "aten::baddbmm": _product(1),
}

_ATTENTIONS = {
    "aten::scaled_dot_product_attention": 5,
    "aten::_scaled_dot_product_flash_attention_for_cpu": 4,
    "aten::_scaled_dot_product_flash_attention": 4,
    "aten::_scaled_dot_product_efficient_attention": 6,
    "aten::_scaled_dot_product_attention_math": 5,
}
"""Attention and the index of its argument `is_causal`."""

_ELSEWHERE = ("aten::convolution", "aten::conv1d", "aten::conv2d", "aten::conv3d", "aten::_convolution")


def cost_of(name: str, shapes: Sequence[Shape], dtypes: Sequence[str], values: Sequence[Any]) -> Cost | None:
    """Work out what a call takes.

    Args:
        name: of the operator, `aten::mm`.
        shapes: of its arguments; empty for those that are no tensors.
        dtypes: of its arguments, by the profiler's names.
        values: its arguments that are no tensors, as the profiler gives them, at their places.

    Returns:
        The cost of operators whose work is understood whole; None for those that are made of others.
    """
    dtype = next((DTYPE_NAMES[item] for item in dtypes if item in DTYPE_NAMES), "")
    width = next((DTYPE_BYTES[item] for item in dtypes if item in DTYPE_BYTES), 4)
    read = tensor_bytes(shapes, dtypes)
    try:
        if name in _LINEARS:
            flops, dimensions = _LINEARS[name](shapes, values)
            written = dimensions[0] * dimensions[1] * width
            return Cost("linear", flops, read + written, dtype, dimensions)
        if name in _ATTENTIONS:
            flops = _attention(shapes, values, _ATTENTIONS[name])
            written = math.prod(shapes[0][:-1]) * shapes[2][-1] * width
            return Cost("attention", flops, read + written, dtype)
        if name == "aten::_scaled_dot_product_flash_attention_for_cpu_backward":
            causal = len(values) > 7 and str(values[7]) in ("True", "1")
            flops = 2.5 * attention_flops(shapes[1], shapes[2], shapes[3], causal=causal)
            return Cost("attention", flops, read + tensor_bytes(shapes[1:4], dtypes[1:4]), dtype)
        if name in _ELSEWHERE:
            return _convolution(shapes, values, read, width, dtype)
    except (IndexError, TypeError, ValueError):
        return None  # another overload than the one that is known
    return None


def _convolution(shapes: Sequence[Shape], values: Sequence[Any], read: float, width: int, dtype: str) -> Cost:
    """A convolution, from the sizes of its output as PyTorch documents them (`torch.nn.Conv2d`)."""
    x, weight = shapes[0], shapes[1]
    dims = len(weight) - 2
    stride, padding, dilation = (_numbers(values[index], dims) for index in (3, 4, 5))
    spatial = [
        (size + 2 * pad - hop * (kernel - 1) - 1) // step + 1
        for size, kernel, step, pad, hop in zip(x[-dims:], weight[2:], stride, padding, dilation, strict=True)
    ]
    batch = x[0] if len(x) == len(weight) else 1
    outputs = batch * math.prod(spatial)
    flops = 2.0 * outputs * math.prod(weight)
    return Cost("linear", flops, read + outputs * weight[0] * width, dtype)


def _numbers(value: Any, count: int) -> list[int]:
    """Numbers out of a list as the profiler writes it, `[1, 1]`."""
    if isinstance(value, str):
        value = [int(item) for item in value.strip("[]").split(",")]
    numbers = [int(item) for item in value]
    return numbers * count if len(numbers) == 1 else numbers


def tensor_bytes(shapes: Sequence[Shape], dtypes: Sequence[str]) -> float:
    """Add up the bytes of tensors.

    Args:
        shapes: of the arguments.
        dtypes: of the arguments; those that are no numbers count nothing.
    """
    return float(
        sum(
            math.prod(shape) * DTYPE_BYTES[dtype]
            for shape, dtype in zip(shapes, dtypes, strict=False)
            if shape and dtype in DTYPE_BYTES
        )
    )


def moved_bytes(name: str, shapes: Sequence[Shape], dtypes: Sequence[str]) -> float:
    """Estimate the bytes of an operator that only moves or changes numbers: its inputs, and an output like the largest.

    Args:
        name: of the operator.
        shapes: of its arguments.
        dtypes: of its arguments.

    Returns:
        Bytes; 0 for views.
    """
    if name in VIEWS or not any(shapes):
        return 0.0
    if name == "aten::embedding":
        rows = math.prod(shapes[1]) if len(shapes) > 1 else 0
        return float(2 * rows * shapes[0][-1] * DTYPE_BYTES.get(dtypes[0], 4) + 8 * rows)
    each = [tensor_bytes([shape], [dtype]) for shape, dtype in zip(shapes, dtypes, strict=False)]
    return sum(each) + max(each, default=0.0)
