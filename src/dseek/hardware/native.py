"""The compiled extension as this room sees it: the functions that measure, and whether it is there at all."""

from __future__ import annotations

import importlib
from typing import Protocol, cast

import numpy as np
import numpy.typing as npt


class NativeModule(Protocol):
    """The part of `dseek._native` that measuring needs; every function uses the threads set by `set_num_threads`."""

    __file__: str

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

    def pack(self, weight_format: str, weight: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
        """Pack a float32 [N, K] `weight` in `weight_format`."""
        ...

    def time_linear(self, weight_format: str, m: int, n: int, k: int, repeats: int, cold: bool) -> float:
        """Seconds a call of [m, k] x [n, k]^T, the median of `repeats`.

        The weight is packed in `weight_format`; `cold` lets every call have another weight, out of memory.
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
