"""Widen a GGUF file to a Hugging Face folder in fp32, by transformers, so that every peer starts from the same weights.

Run: `python widen_gguf.py FILE.gguf FOLDER`.
"""

from __future__ import annotations

import sys
from pathlib import Path


def widen(source: Path, target: Path) -> None:
    """Write config, tokenizer and fp32 weights of a GGUF file to a folder.

    Args:
        source: the GGUF file.
        target: the folder, which exists.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        str(source.parent),
        gguf_file=source.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    tokenizer = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
    model.save_pretrained(str(target))
    tokenizer.save_pretrained(str(target))


if __name__ == "__main__":
    widen(Path(sys.argv[1]), Path(sys.argv[2]))
