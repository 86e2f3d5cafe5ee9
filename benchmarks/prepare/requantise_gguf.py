"""Requantise a GGUF file with llama.cpp's own quantiser. Run by the interpreter of the `llamacpp` peer.

`python requantise_gguf.py SOURCE.gguf TARGET.gguf Q8_0|Q4_0|Q4_K_M`
"""

from __future__ import annotations

import sys


def requantise(source: str, target: str, kind: str) -> None:
    """Write a copy in another encoding.

    Args:
        source: the GGUF file, already quantised or not.
        target: the new file.
        kind: Q8_0, Q4_0 or Q4_K_M.
    """
    import llama_cpp

    kinds = {
        "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
        "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
        "Q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    }
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_quantize_default_params()
    params.allow_requantize = True
    params.ftype = kinds[kind]
    status = llama_cpp.llama_model_quantize(source.encode(), target.encode(), params)
    if status != 0:
        raise SystemExit(f"llama_model_quantize returned {status}")


if __name__ == "__main__":
    requantise(*sys.argv[1:4])
