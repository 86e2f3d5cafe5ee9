"""Every native kernel variant against the reference operators: odd sizes, all formats, poisoned memory."""

from __future__ import annotations

from collections.abc import Iterator

import gguf
import numpy as np
import pytest
import torch

from dseek.ops import native
from dseek.ops.attention.dispatch import causal_attention as native_attention
from dseek.ops.attention.reference import causal_attention
from dseek.ops.block.dispatch import decoder_block as native_block
from dseek.ops.block.reference import BlockTensors, decoder_block
from dseek.ops.linear.dispatch import linear as native_linear
from dseek.ops.linear.packing import interleave, pack, pad
from dseek.ops.linear.reference import linear, rotate, round_weight
from dseek.ops.norm.dispatch import rms_norm as native_norm
from dseek.ops.norm.reference import rms_norm
from dseek.ops.tensor import EncodedTensor

pytestmark = pytest.mark.native

FORMATS = ("f32", "f16", "bf16", "i8c", "i8p", "i8g", "i4g")
SIZES = [
    (1, 64, 576),
    (2, 16, 32),
    (3, 80, 576),
    (7, 100, 96),
    (9, 33, 1536),
    (20, 17, 80),
    (33, 40, 48),
    (50, 96, 1040),
]
VARIANTS = native.module().variants() if native.module() is not None else []


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    compiled = native.require()
    before = compiled.variant()
    compiled.set_variant(request.param)
    yield request.param
    compiled.set_variant(before)


def draw(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def encoded(weight: torch.Tensor) -> EncodedTensor:
    return EncodedTensor("weight", tuple(weight.shape), "F32", weight.contiguous().numpy().view(np.uint8).reshape(-1))


def blob(weight: torch.Tensor, weight_format: str, *, interleaved: bool = False) -> torch.Tensor:
    packed = pack(weight_format, [encoded(weight)], lambda tensor: np.empty(0), interleaved=interleaved)
    return torch.from_numpy(packed)


def poison() -> None:
    """Leave NaN in memory that the allocator is about to hand out again."""
    for num_bytes in (1 << 10, 1 << 14, 1 << 18, 1 << 21):
        np.full(num_bytes // 4, np.nan, dtype=np.float32)


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_linear(variant: str, weight_format: str, size: tuple[int, int, int]) -> None:
    rows, channels, inputs = size
    x, weight = draw(rows, inputs), draw(channels, inputs, seed=1) * 0.05
    x[:, 3] *= 20  # an outlier, as activations have
    expected = linear(x, weight, weight_format, few_rows=rows <= 8)
    poison()
    found = native_linear(x, blob(weight, weight_format), channels)
    # Exact up to the order of summation, but for int8 activations that sit on a rounding boundary: one step of one
    # input, which is the row's (or group's) largest value over 127.
    step = x.abs().max() / 127 * weight.abs().max() if weight_format in ("i8c", "i8p", "i8g", "i4g") else 0.0
    tolerance = 2e-5 * expected.abs().max() + step * 1.5
    assert (found - expected).abs().max() <= tolerance
    assert torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.9999


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_unpacking_gives_the_rounded_weight(weight_format: str, interleaved: bool) -> None:
    weight = draw(70, 112, seed=2)
    packed = blob(weight, weight_format, interleaved=interleaved)
    expected = round_weight(weight, weight_format)
    if weight_format == "i8c":
        expected = rotate(expected)[:, :112]  # the rotation is its own inverse
    found = torch.from_numpy(native.require().unpack(packed.numpy()))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5 if weight_format == "i8c" else 1e-6)


def test_rotation_keeps_products_and_spreads_outliers() -> None:
    for inputs in (16, 80, 576, 1536, 2048):
        x, weight = draw(4, inputs), draw(6, inputs, seed=1)
        torch.testing.assert_close(rotate(x) @ rotate(weight).T, x @ weight.T, rtol=1e-4, atol=1e-4)
        spike = torch.zeros(1, inputs)
        spike[0, inputs // 2] = 1
        assert rotate(spike).abs().max() <= 0.26


def test_grouped_file_encodings_are_moved_unchanged() -> None:
    weight = draw(48, 96).numpy()
    for encoding, weight_format in (("Q8_0", "i8g"), ("Q4_0", "i4g"), ("Q4_1", "i4g")):
        kind = gguf.GGMLQuantizationType[encoding]
        data = gguf.quants.quantize(weight, kind)
        expected = gguf.quants.dequantize(data, kind)
        tensor = EncodedTensor("w", weight.shape, encoding, np.ascontiguousarray(data).reshape(-1))
        packed = pack(weight_format, [tensor], lambda tensor: np.empty(0))
        np.testing.assert_allclose(native.require().unpack(packed), expected, rtol=0, atol=1e-6)


def test_interleaved_bias_follows_the_weight() -> None:
    bias = np.arange(40, dtype=np.float32)
    found = interleave(bias)
    assert found.shape == (64,)
    assert found[:16].tolist() == bias[:16].tolist() and found[16:32].tolist() == bias[20:36].tolist()
    assert found[32:36].tolist() == bias[16:20].tolist() and not found[36:48].any()
    assert pad(bias).shape == (48,)


@pytest.mark.parametrize("size", [16, 48, 576, 2048])
def test_norm(variant: str, size: int) -> None:
    x, weight = draw(5, size), draw(size, seed=1)
    poison()
    torch.testing.assert_close(native_norm(x, weight, 1e-5), rms_norm(x, weight, 1e-5), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    "size", [(1, 1, 64), (2, 15, 16), (1, 64, 64), (3, 65, 80), (2, 200, 64), (1, 130, 96), (1, 77, 128)], ids=str
)
def test_attention(variant: str, size: tuple[int, int, int]) -> None:
    q, k, v = (draw(*size, seed=seed).bfloat16() for seed in range(3))
    q[0, -1] *= 30  # one query that looks at a single key
    expected = causal_attention(*(tensor.float().transpose(0, 1) for tensor in (q, k, v))).transpose(0, 1)
    poison()
    found = native_attention(q, k, v).float()
    assert (found - expected).abs().max() < 2e-2
    assert torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.9999


@pytest.mark.parametrize("tokens", [1, 5, 70, 150])
@pytest.mark.parametrize("weight_format", ["f32", "bf16", "i8c", "i8p"])
def test_block(variant: str, weight_format: str, tokens: int) -> None:
    hidden, heads, kv_heads, head_dim, width = 96, 6, 2, 32, 176
    tensors = BlockTensors(
        qkv=draw((heads + 2 * kv_heads) * head_dim, hidden, seed=1) * 0.1,
        output=draw(hidden, heads * head_dim, seed=2) * 0.1,
        gate_up=draw(2 * width, hidden, seed=3) * 0.1,
        down=draw(hidden, width, seed=4) * 0.1,
        input_norm=draw(hidden, seed=5).abs(),
        post_attention_norm=draw(hidden, seed=6).abs(),
    )
    x, angles = draw(tokens, hidden), draw(tokens, head_dim // 2, seed=7)
    cos, sin = angles.cos(), angles.sin()
    expected = decoder_block(x, tensors, cos, sin, heads, kv_heads, 1e-5, weight_format)
    poison()
    found = native_block(
        x,
        *(
            blob(getattr(tensors, role), weight_format, interleaved=role == "gate_up")
            for role in ("qkv", "output", "gate_up", "down")
        ),
        tensors.input_norm,
        tensors.post_attention_norm,
        cos,
        sin,
        heads,
        kv_heads,
        width,
        1e-5,
        "fp32",
    )
    bound = {"f32": 2e-6, "bf16": 2e-3, "i8c": 1e-2, "i8p": 1e-2}[weight_format]
    assert (found - expected).abs().max() <= bound * expected.abs().max()


def test_operators_can_be_traced() -> None:
    weight = draw(48, 64)
    packed = blob(weight, "f32")

    def run(x: torch.Tensor) -> torch.Tensor:
        return native_linear(native_norm(x, torch.ones(64), 1e-5), packed, 48) * 2

    x = draw(3, 64)
    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="eager")(x), run(x))
    torch.library.opcheck(native_linear, (x, packed, 48), test_utils=("test_schema", "test_faketensor"))


def test_bad_blobs_are_refused() -> None:
    packed = blob(draw(16, 32), "i8c")
    with pytest.raises(ValueError, match="output channels"):
        native_linear(draw(1, 32), packed, 17)
    for position, value in ((0, 0), (8, 9), (12, 255), (20, 255), (32, 255), (48, 0)):
        broken = packed.clone()
        broken[position] = value
        with pytest.raises(ValueError):
            native.require().linear(draw(1, 32).numpy(), broken.numpy())
    with pytest.raises(ValueError):
        native.require().linear(draw(1, 32).numpy(), packed[:-64].contiguous().numpy())
