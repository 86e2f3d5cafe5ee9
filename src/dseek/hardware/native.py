"""The compiled extension as this room sees it: the functions that measure, and whether it is there at all."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class NativeDecoder(Protocol):
    """Decoder blocks over packed weights; see `dseek.ops` for what the arguments are."""

    def add_block(self, **arrays: npt.NDArray[Any]) -> None:
        """Append a block with the packed weights and norms in `arrays`."""
        ...

    def set_tables(self, **arrays: npt.NDArray[Any]) -> None:
        """Set embedding, head and final norm, given in `arrays`."""
        ...

    def set_rotary(self, cos: npt.NDArray[np.float32], sin: npt.NDArray[np.float32]) -> None:
        """Set the rotation tables `cos` and `sin`, [positions, head_dim / 2]."""
        ...

    def allocate_cache(self, num_pages: int) -> None:
        """Make a cache of `num_pages` pages."""
        ...

    def run_blocks(
        self,
        x: npt.NDArray[np.float32],
        positions: npt.NDArray[np.int32],
        row_starts: npt.NDArray[np.int32],
        page_tables: npt.NDArray[np.int32],
        block_begin: int,
        block_end: int,
    ) -> npt.NDArray[np.float32]:
        """Run the blocks from `block_begin` to `block_end` on hidden states `x`, [rows, hidden size].

        Row r is at `positions[r]`; sequence s has rows `row_starts[s]` to `row_starts[s + 1]` and pages
        `page_tables[s]`.
        """
        ...


class NativeModule(Protocol):
    """The part of `dseek._native` that measuring needs; every function uses the threads set by `set_num_threads`."""

    __file__: str
    Decoder: Callable[..., NativeDecoder]

    def variant(self) -> str:
        """Kernel variant in use."""
        ...

    def variants(self) -> list[str]:
        """Kernel variants that this processor can run."""
        ...

    def cpu_features(self) -> list[str]:
        """Instruction sets that the kernels know of and the processor and operating system have."""
        ...

    def set_variant(self, name: str) -> None:
        """Switch to the kernel variant called `name`."""
        ...

    def num_threads(self) -> int:
        """Threads in use."""
        ...

    def set_num_threads(self, count: int) -> None:
        """Use `count` threads."""
        ...

    def read_bandwidth(self, num_bytes: int, repeats: int) -> float:
        """Read a buffer of `num_bytes` over and over with all threads; GB/s, the best of `repeats`."""
        ...

    def pack(
        self, weight_format: str, weight: npt.NDArray[np.float32], interleaved: bool = False
    ) -> npt.NDArray[np.uint8]:
        """Pack a float32 [N, K] `weight` in `weight_format`; `interleaved` mixes its two halves, as gate and up are."""
        ...

    def time_linear(
        self, weight_format: str, m: int, n: int, k: int, repeats: int, cold: bool, working_set_bytes: int = ...
    ) -> float:
        """Seconds a call of [m, k] x [n, k]^T, the median of `repeats`.

        The weight is packed in `weight_format`; `cold` makes the calls take turns on weights that fill
        `working_set_bytes`.
        """
        ...

    def time_attention(
        self,
        num_query_rows: int,
        context: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        cache_dtype: str,
        repeats: int,
    ) -> float:
        """Seconds a call of causal attention of one sequence, the median of `repeats`.

        The cache, of `cache_dtype`, holds `context` positions, the newest `num_query_rows` of which are the queries;
        `num_heads` query heads share `num_kv_heads` key/value heads of width `head_dim`.
        """
        ...


def load() -> NativeModule | None:
    """Return the compiled extension, or None where it was not built or cannot be loaded here."""
    try:
        return cast(NativeModule, importlib.import_module("dseek._native"))
    except ImportError:
        return None
