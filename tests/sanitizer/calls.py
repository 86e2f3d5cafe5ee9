"""Hostile calls of everything that the compiled module offers: each works or raises; memory is never left.

Run as `python -m tests.sanitizer.calls SEED COUNT` by `test_sanitizer.py`. A call starts from arguments that are right,
so that what is damaged comes past the first checks: shapes, dtypes, layouts, addresses, numbers in arrays, headers of
packed weights. One decoder lives through many calls, whose weights, cache, threads and variant change in between.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from tests.sanitizer import encoder_decoders
from tests.sanitizer.damage import damaged
from tests.sanitizer.decoders import FORMATS, Sizes, batch, build
from tests.sanitizer.process import load

SIZES = Sizes(hidden=32, head_dim=16, num_pages=30, patterns=True)
MEASUREMENTS = ("read_bandwidth", "time_linear", "time_attention")

Arguments = dict[str, Any]


def is_endless(arguments: Arguments) -> bool:
    """Tell whether a measurement would accept its arguments and take the machine for long."""
    numbers = [arguments.get(key) for key in ("num_bytes", "repeats", "working_set_bytes")]
    return any(isinstance(number, int) and 2**16 <= number < 2**33 for number in numbers)


class Caller:
    """Right arguments for every binding, and the decoder that they are for.

    Args:
        native: the compiled module.
        rng: decides.
    """

    def __init__(self, native: ModuleType, rng: np.random.Generator) -> None:
        self.native = native
        self.rng = rng
        self.decoder = build(native, SIZES)
        self.translator = encoder_decoders.build(native, rng)
        self.worked: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()

    def floats(self, *shape: int) -> np.ndarray:
        """Draw float32 numbers."""
        return self.rng.standard_normal(shape, dtype=np.float32)

    def blob(self, rows: int, inputs: int, *, interleaved: bool = False) -> np.ndarray:
        """Pack a weight in any format."""
        packed: np.ndarray = self.native.pack(str(self.rng.choice(FORMATS)), self.floats(rows, inputs), interleaved)
        return packed

    def any_blob(self) -> np.ndarray:
        """Pack a weight of odd sizes, inputs 33; half of them interleaved."""
        return self.blob(int(self.rng.choice([2, 4, 18, 36])), 33, interleaved=bool(self.rng.integers(2)))

    def pieces(self) -> Arguments:
        """Make pieces of a weight in three encodings, of any bytes, so that many numbers are not finite."""
        return {
            "format": str(self.rng.choice(FORMATS)),
            "pieces": [
                ("Q4_1", 3, self.rng.integers(0, 256, 3 * 40, np.uint8)),
                ("Q4_0", 5, self.rng.integers(0, 256, 5 * 36, np.uint8)),
                ("F16", 2, self.rng.integers(0, 256, 2 * 128, np.uint8)),
            ],
            "k": 64,
            "interleaved": True,
        }

    def arguments(self, name: str) -> Arguments:
        """Make arguments that are right."""
        if name.startswith("EncoderDecoder"):
            return encoder_decoders.arguments(self.native, name, self.rng)
        rng, floats = self.rng, self.floats
        query, kv = SIZES.heads * SIZES.head_dim, SIZES.kv_heads * SIZES.head_dim
        makers: dict[str, Callable[[], Arguments]] = {
            "set_variant": lambda: {"name": str(rng.choice(["auto", *self.native.variants()]))},
            "set_num_threads": lambda: {"num_threads": int(rng.integers(1, 4))},
            "packed_bytes": lambda: {"format": str(rng.choice(FORMATS)), "n": 34, "k": 17, "interleaved": True},
            "pack": lambda: {"format": str(rng.choice(FORMATS)), "weight": floats(18, 33), "interleaved": True},
            "pack_encoded": self.pieces,
            "pack_inspected": self.pieces,
            "unpack": lambda: {"blob": self.any_blob()},
            "linear": lambda: {"x": floats(int(rng.integers(1, 40)), 33), "blob": self.any_blob()},
            "integer_conv": lambda: self.convolution(groups=int(rng.choice([1, 2]))),
            "depthwise_conv": lambda: self.convolution(groups=0),
            "rms_norm": lambda: {"x": floats(3, 33), "weight": floats(33), "epsilon": 1e-5},
            "dense_attention": lambda: {
                part: rng.integers(0, 2**16, (2, 70, 32), np.uint16) for part in ("q", "k", "v")
            },
            "dynamic_attention": lambda: {
                "q": rng.integers(0, 2**16, (4, 700, 32), np.uint16),
                "k": rng.integers(0, 2**16, (2, 700, 32), np.uint16),
                "v": rng.integers(0, 2**16, (2, 700, 32), np.uint16),
                "near_blocks": [1, 2],
                "top_blocks": int(rng.integers(0, 4)),
                **({"far": True, "level_bias": floats(4, 3)} if rng.random() < 0.5 else {"min_share": 0.05}),
                "trace": True,
            },
            "read_bandwidth": lambda: {"num_bytes": 50_001, "repeats": 1},
            "time_linear": lambda: {
                "format": str(rng.choice(FORMATS)),
                "m": 2,
                "n": 17,
                "k": 33,
                "repeats": 1,
                "cold": True,
                "working_set_bytes": 50_000,
            },
            "time_attention": lambda: {
                "num_query_rows": 3,
                "context": 70,
                "num_heads": 4,
                "num_kv_heads": 2,
                "head_dim": 32,
                "cache_dtype": str(rng.choice(["fp32", "bf16", "int8"])),
                "repeats": 1,
            },
            "Decoder": lambda: {
                "hidden_size": 32,
                "intermediate_size": 35,
                "num_layers": 2,
                "num_heads": 4,
                "num_kv_heads": 2,
                "head_dim": 16,
                "vocab_size": 67,
                "epsilon": 1e-5,
                "cache_type": "int8",
            },
            "Decoder.add_block": lambda: {
                "qkv": self.blob(query + 2 * kv, SIZES.hidden),
                "output": self.blob(SIZES.hidden, query),
                "gate_up": self.blob(2 * SIZES.inner, SIZES.hidden, interleaved=True),
                "down": self.blob(SIZES.hidden, SIZES.inner),
                "input_norm": floats(SIZES.hidden),
                "post_attention_norm": floats(SIZES.hidden),
                "query_norm": floats(SIZES.head_dim),
                "key_norm": None,
                "qkv_bias": floats(query + 2 * kv),
                "output_bias": floats(SIZES.hidden),
                "gate_up_bias": floats(96),
                "down_bias": None,
                "window": int(rng.integers(0, 100)),
            },
            "Decoder.set_limits": lambda: {"layer": int(rng.integers(0, 2)), "limits": np.abs(floats(4)).tolist()},
            "Decoder.set_wide": lambda: {
                "layer": int(rng.integers(0, 2)),
                "qkv": self.blob(query + 2 * kv, SIZES.hidden),
                "output": self.blob(SIZES.hidden, query),
                "gate_up": self.blob(2 * SIZES.inner, SIZES.hidden, interleaved=True),
                "down": self.blob(SIZES.hidden, SIZES.inner),
            },
            "Decoder.swap_wide": lambda: {"layer": int(rng.integers(0, 2))},
            "Decoder.set_tables": lambda: {
                "embedding": self.blob(SIZES.vocab, SIZES.hidden),
                "head": self.blob(SIZES.vocab, SIZES.hidden),
                "final_norm": floats(SIZES.hidden),
            },
            "Decoder.set_rotary": lambda: {
                "cos": floats(int(rng.choice([100, 1200])), SIZES.head_dim // 2),
                "sin": floats(1200, SIZES.head_dim // 2),
            },
            "Decoder.allocate_cache": lambda: {"num_pages": int(rng.integers(1, SIZES.num_pages + 1))},
            "Decoder.set_pattern": lambda: {
                "layer": int(rng.integers(0, 2)),
                "near_blocks": [1, 2],
                "top_blocks": 2,
                **({"far": True, "level_bias": floats(4, 3)} if rng.random() < 0.5 else self.rows_pattern()),
            },
            "Decoder.set_gate_rotation": lambda: {"cos": floats(4, 8), "sin": floats(4, 8)},
            "Decoder.selection": lambda: {
                "layer": 0,
                "kv_head": int(rng.integers(0, 2)),
                "pages": rng.permutation(4).astype(np.int32),
                "query_block": int(rng.integers(0, 4)),
            },
            "Decoder.row_selection": lambda: {
                "layer": 0,
                "kv_head": int(rng.integers(0, 2)),
                "pages": rng.permutation(4).astype(np.int32),
                "position": int(rng.integers(0, 256)),
            },
            "segment_bytes": lambda: {
                "world_size": int(rng.integers(1, 65)),
                "slot_bytes": 1 << int(rng.integers(14, 21)),
            },
            "Decoder.set_timing": lambda: {"on": bool(rng.integers(2)), "most_stretches": int(rng.integers(0, 500))},
            "Decoder.forward": self.batch,
            "Decoder.run_blocks": lambda: self.batch(hidden=True),
        }
        return makers[name]() if name in makers else {}

    def convolution(self, *, groups: int) -> Arguments:
        """Make images, a weight and room for the result; no groups means depthwise."""
        rng, floats = self.rng, self.floats
        batch, height, width, channels = (
            int(rng.integers(1, 4)),
            6,
            int(rng.integers(5, 9)),
            int(rng.choice([2, 18, 34])),
        )
        stride, dilation, pads = int(rng.integers(1, 3)), int(rng.integers(1, 3)), rng.integers(0, 3, 4).tolist()
        outputs = channels if groups == 0 else 2 * groups * int(rng.choice([1, 9]))
        reach = [size + first + last for size, first, last in ((height, *pads[:2]), (width, *pads[2:]))]
        pixels = [(size - dilation * 2 - 1) // stride + 1 for size in reach]
        arguments: Arguments = {
            "x": floats(batch, height, width, channels),
            "geometry": [3, 3, stride, stride, dilation, dilation, *pads],
            "steps": np.abs(floats(batch)) + 0.01,
            "find_steps": bool(rng.integers(2)),
            "range": (0, 254, 127) if rng.random() < 0.5 else (-127, 127, 0),
            "bias": floats(outputs) if rng.random() < 0.5 else None,
            "out": np.empty((batch, *pixels, outputs), np.float32),
        }
        if groups == 0:
            padded = -(-channels // 16) * 16
            return arguments | {"taps": rng.integers(-128, 128, (9, padded), np.int8), "scale": floats(padded)}
        blobs = [self.native.pack("i8p", floats(outputs // groups, 9 * channels // groups)) for _ in range(groups)]
        return arguments | {"blobs": np.concatenate(blobs), "groups": groups}

    def rows_pattern(self) -> Arguments:
        """What lets rows select for themselves, by a gate for four heads of 16 in two groups."""
        floats = self.floats
        gate = (floats(4, 16, 16), floats(1, 2, 48, 16), floats(4, 16), floats(1, 2, 16), floats(4), floats(4, 16))
        return {"min_share": float(self.rng.choice([0.01, 0.3])), "gate": (*gate, floats(4))}

    def batch(self, *, hidden: bool = False) -> Arguments:
        """Make a batch of one to four sequences, sometimes of lone rows over long contexts."""
        rng = self.rng
        lone = rng.random() < 0.3
        rows = [
            (int(rng.choice([0, 63, 64, 200, 600])), 1 if lone else int(rng.choice([1, 2, 40])))
            for _ in range(rng.integers(1, 3))
        ]
        arguments: Arguments = dict(batch(SIZES, rows, rng))
        if hidden:
            del arguments["token_ids"], arguments["logit_rows"]
            arguments |= {"x": self.floats(len(arguments["positions"]), SIZES.hidden), "block_begin": 0, "block_end": 2}
        elif rng.random() < 0.3:
            spans = np.array([(0, first + count) for first, count in rows], dtype=np.int32)
            arguments |= {"wholes": (spans, arguments["page_tables"].copy()), "exchange": self.exchange}
        return arguments

    def exchange(self, layer: int) -> None:
        """Now and then fail between two steps of a layer."""
        if self.rng.random() < 0.1:
            raise RuntimeError(f"layer {layer} was not exchanged")

    def call(self, name: str, *, harm: bool) -> None:
        """Call a binding once.

        Args:
            name: of the binding; methods of the decoder as `Decoder.method`.
            harm: whether to damage the arguments.
        """
        arguments = self.arguments(name)
        if harm and arguments:
            for _ in range(self.rng.choice([1, 1, 1, 2, 3])):
                key = str(self.rng.choice(list(arguments)))
                arguments[key] = damaged(arguments[key], self.rng)
        if harm and name in MEASUREMENTS and is_endless(arguments):
            return
        owner, _, method = name.rpartition(".")
        decoder = self.decoder
        if name == "Decoder.add_block" and self.rng.random() < 0.5:
            decoder = self.native.Decoder(**self.arguments("Decoder"))  # one that has no blocks yet
        if name in ("Decoder.set_pattern", "Decoder.set_gate_rotation", "Decoder.selection", "Decoder.row_selection"):
            decoder = self.native.Decoder(**self.arguments("Decoder"))  # patterns come before the cache
        if name in ("Decoder.selection", "Decoder.row_selection"):
            share = {"min_share": 0.1} if name == "Decoder.row_selection" else {}
            decoder.set_pattern(0, near_blocks=[1, 1], top_blocks=1, **share)
            decoder.allocate_cache(4)
        if name in ("Decoder.cache_pages", "Decoder.selections"):
            decoder = self.native.Decoder(**self.arguments("Decoder"))  # one whose cache nothing else allocates
            decoder.set_pattern(0, near_blocks=[1, 1], top_blocks=1)
            decoder.allocate_cache(2)
        if name == "Decoder.swap_wide" and self.rng.random() < 0.5:
            for layer in range(2):
                decoder.set_wide(**(self.arguments("Decoder.set_wide") | {"layer": layer}))
        if owner == "EncoderDecoder":
            decoder = self.translator
            if method.startswith("add_"):
                decoder = self.native.EncoderDecoder(**encoder_decoders.SIZES)  # one that has no layers yet
        function = getattr(decoder if owner else self.native, method)
        try:
            function(**arguments)
            self.worked[name] += 1
        except Exception:
            self.refused[name] += 1


def repeat_findings(native: ModuleType) -> None:
    """Make the calls that once read or wrote where they should not, in as few lines as each takes."""
    # 1. A header that is right in itself, of an interleaved weight with an odd number of rows.
    odd = native.pack("f32", np.ones((4, 3), np.float32), True).copy()
    odd[:64].view(np.uint32)[3] = 3
    # 2. Sizes whose cache takes more bytes a page than a number can say.
    vast = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 1, "head_dim": 512, "epsilon": 1e-5}
    vast |= dict.fromkeys(("num_layers", "num_heads", "num_kv_heads"), 2**24)
    for call in (lambda: native.unpack(odd), lambda: native.Decoder(**vast)):
        try:
            call()
        except ValueError:
            continue
        raise AssertionError("a call that must be refused was not")
    # 3. A head whose rows take more room than those of the head before it.
    sizes = Sizes(hidden=512, layers=1)
    decoder = build(native, sizes)
    rng = np.random.default_rng(0)
    arguments = batch(sizes, [(0, 1)] * 30, rng) | {"logit_rows": np.arange(30, dtype=np.int32)}
    for weight_format in ("i8c", "f32"):
        table = native.pack(weight_format, rng.standard_normal((sizes.vocab, sizes.hidden), dtype=np.float32))
        decoder.set_tables(embedding=table, head=table, final_norm=np.ones(sizes.hidden, np.float32))
        assert np.isfinite(decoder.forward(**arguments)).all()


ADDRESSED = ("Messages", "Segment", "reduce")
"""Of the transport: they take addresses, which nobody can check (`tests.sanitizer.transport` calls them rightly)."""


def names_of(native: ModuleType) -> list[str]:
    """List everything that can be called."""
    functions = [name for name in dir(native) if not name.startswith("_") and callable(getattr(native, name))]
    return [name for name in functions if name not in ADDRESSED] + [
        f"{owner}.{name}"
        for owner in ("Decoder", "EncoderDecoder")
        for name in dir(getattr(native, owner))
        if not name.startswith("_") and callable(getattr(getattr(native, owner), name))
    ]


def main(seed: int, count: int) -> None:
    """Make `count` calls, one in ten of them right, and ask that every binding has both worked and refused."""
    native = load()
    np.seterr(all="ignore")  # casts that numpy warns of are wanted here
    rng = np.random.default_rng(seed)
    native.set_num_threads(2)
    repeat_findings(native)
    caller = Caller(native, rng)
    names = names_of(native)
    weights = np.array([4.0 if "Decoder." in name else 1.0 for name in names])
    for number in range(count):
        if number % 400 == 0:
            caller.decoder = build(native, SIZES, seed=number)
            caller.translator = encoder_decoders.build(native, rng)
        caller.call(str(rng.choice(names, p=weights / weights.sum())), harm=rng.random() < 0.9)
    for name in names:
        print(name, caller.worked[name], caller.refused[name])
        assert caller.worked[name] > 0, name
        assert caller.refused[name] > 0 or not caller.arguments(name), name


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
