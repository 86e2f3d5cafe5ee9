"""One byte written before, inside or behind an array of the compiled module: what the sanitizer must tell apart."""

from __future__ import annotations

import ctypes
import sys

import numpy as np

from tests.sanitizer.process import load


def main(place: str) -> None:
    """Write the byte through the C library, which the sanitizer watches."""
    blob = load().pack("f32", np.ones((16, 3), np.float32))
    offset = {"before": -1, "inside": blob.nbytes - 1, "behind": blob.nbytes}[place]
    ctypes.memset(blob.ctypes.data + offset, 0, 1)


if __name__ == "__main__":
    main(sys.argv[1])
