"""The torch decoder on the embedded default model against transformers' own reading of the same GGUF file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dseek.models.decoder import Decoder
from dseek.models.files import open_model
from tests.models import tiny

TEXT = (
    "Paris is the capital and largest city of France. It lies on the Seine, in the north of the country.\n"
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n"
)


@pytest.mark.model
@pytest.mark.slow
def test_logits_equal_transformers(embedded_model: Path) -> None:
    import transformers

    tiny.settle_trigonometry()
    with open_model(str(embedded_model)) as files:
        tokens = torch.tensor([files.tokenizer().encode(TEXT)])
        decoder = Decoder.from_files(files)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        str(embedded_model.parent), gguf_file=embedded_model.name, dtype=torch.float32
    ).eval()
    with torch.inference_mode():
        ours, theirs = decoder(tokens), reference(tokens, use_cache=False).logits
        assert (ours - theirs).abs().max() < 1e-4
        assert torch.equal(ours.argmax(-1), theirs.argmax(-1))
        # Step by step against transformers step by step: its own two ways already differ by 1.1e-4 here, because logits
        # reach 45 and a single row is summed in another order than many.
        cache, their_cache = decoder.make_cache(tokens.shape[1]), None
        for piece in tokens.split([tokens.shape[1] - 8, *[1] * 8], dim=1):
            step = reference(piece, past_key_values=their_cache, use_cache=True)
            their_cache = step.past_key_values
            assert (decoder(piece, cache) - step.logits).abs().max() < 1e-4
