"""`Translator`: lines of text through an encoder-decoder, greedily; `Seq2SeqRunner`: what computes the tokens.

Lines are translated in batches of like length and handed back in their order. The answer to a line is the likeliest
token after the other until the end token; nothing is sampled, and there is no beam.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dseek.core.errors import ConfigError, RequestError
from dseek.models.marian_shape import MarianShape

if TYPE_CHECKING:
    from dseek.models.marian import Marian
    from dseek.models.tokenizer import Tokenizer

PRECISIONS = ("fp32", "int8")
"""What products may be computed in."""
BACKENDS = ("auto", "native", "torch")
"""What may compute them: compiled kernels, or PyTorch."""


class Seq2SeqRunner(ABC):
    """Computes answers to tokenised sources. Used by one thread at a time."""

    shape: MarianShape
    """The model."""

    @abstractmethod
    def translate(self, sources: Sequence[Sequence[int]], limits: Sequence[int]) -> list[list[int]]:
        """Answer a batch.

        Args:
            sources: token ids with the end token, at least one each.
            limits: most tokens of each answer.

        Returns:
            Token ids of each answer, without start and end token.
        """


def answer_limit(num_source_tokens: int, shape: MarianShape) -> int:
    """Bound an answer that does not end by itself.

    Args:
        num_source_tokens: tokens of the source.
        shape: the model.

    Returns:
        Twice the source and sixteen, and no more than the model's positions.
    """
    return min(shape.max_positions, 2 * num_source_tokens + 16)


def make_runner(model: Marian, precision: str, *, backend: str = "auto", threads: int | None = None) -> Seq2SeqRunner:
    """Make what runs a model.

    Args:
        model: the module; its weights are packed or copied.
        precision: one of `PRECISIONS`.
        backend: one of `BACKENDS`; `auto` is native where there are kernels.
        threads: of the native kernels or of PyTorch; None leaves them as they are.

    Returns:
        The runner.

    Raises:
        ConfigError: a precision or backend that is not known, or int8 without native kernels.
    """
    for what, value, known in (("precision", precision, PRECISIONS), ("backend", backend, BACKENDS)):
        if value not in known:
            raise ConfigError(f"the {what} is {value!r}", needed="one of " + ", ".join(known))
    from dseek.ops import native

    if backend == "native" or (backend == "auto" and native.module() is not None):
        from dseek.engine.marian_native import NativeMarian

        return NativeMarian(model, precision, threads=threads)
    if precision != "fp32":
        raise ConfigError(
            f"{precision} on PyTorch", needed="the native kernels", remedy="take fp32, or install with a compiler"
        )
    from dseek.engine.marian_torch import TorchMarian

    return TorchMarian(model, threads=threads)


class Translator:
    """Translates lines.

    Args:
        runner: computes tokens.
        tokenizer: the model's.
    """

    def __init__(self, runner: Seq2SeqRunner, tokenizer: Tokenizer) -> None:
        self.runner, self.tokenizer = runner, tokenizer

    def translate(
        self,
        lines: Sequence[str],
        *,
        batch_size: int = 32,
        max_new_tokens: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[str]:
        """Translate lines.

        Args:
            lines: one text each; those without text stay empty.
            batch_size: lines that run together.
            max_new_tokens: most tokens of an answer; None goes by the source (`answer_limit`).
            progress: told after every batch how many lines are done, and of how many.

        Returns:
            Translations, in the order of the lines.

        Raises:
            RequestError: a line is no valid Unicode or too long for the model, or a number is out of range.
        """
        shape = self.runner.shape
        if batch_size < 1:
            raise RequestError(f"a batch of {batch_size} lines", needed="at least 1")
        if max_new_tokens is not None and not 1 <= max_new_tokens <= shape.max_positions:
            raise RequestError(f"{max_new_tokens} new tokens", needed=f"1 to {shape.max_positions}")
        sources = self.encode(lines)
        answers = [""] * len(lines)
        order = sorted(
            (index for index, line in enumerate(lines) if line.strip()), key=lambda index: len(sources[index])
        )
        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            limits = [max_new_tokens or answer_limit(len(sources[index]), shape) for index in batch]
            found = self.runner.translate([sources[index] for index in batch], limits)
            for index, token_ids in zip(batch, found, strict=True):
                answers[index] = self.tokenizer.decode(token_ids).strip()
            if progress is not None:
                progress(min(first + batch_size, len(order)), len(order))
        return answers

    def encode(self, lines: Sequence[str]) -> list[list[int]]:
        """Cut lines into tokens.

        Args:
            lines: one text each.

        Returns:
            Token ids with the end token.

        Raises:
            RequestError: a line is no valid Unicode, or too long for the model.
        """
        shape = self.runner.shape
        sources = []
        for number, line in enumerate(lines, 1):
            token_ids = self.tokenizer.encode(line)
            if not token_ids or token_ids[-1] != shape.eos_id:
                token_ids = [*token_ids, shape.eos_id]
            if len(token_ids) > shape.max_positions:
                raise RequestError(
                    f"line {number} has {len(token_ids)} tokens",
                    needed=f"at most {shape.max_positions}",
                    remedy="split it into sentences, one a line",
                )
            sources.append(token_ids)
        return sources


def load_translator(
    folder: Path, precision: str = "fp32", *, backend: str = "auto", threads: int | None = None
) -> Translator:
    """Open a model folder and make its translator.

    Args:
        folder: a Marian model in Hugging Face layout, with tokenizer.json.
        precision: one of `PRECISIONS`; int8 rounds the weights to one scale an output channel as they are loaded.
        backend: one of `BACKENDS`.
        threads: threads to run on; None leaves them as they are.

    Returns:
        The translator.

    Raises:
        DseekError: the folder, or an argument, is unusable.
    """
    from dseek.models.marian_files import open_marian, open_tokenizer

    tokenizer = open_tokenizer(folder)
    model = open_marian(folder)
    if tokenizer.vocab_size > model.shape.vocab_size:
        raise ConfigError(
            f"the tokenizer of {folder} has {tokenizer.vocab_size} tokens, the model {model.shape.vocab_size}",
            needed="the tokenizer that the model was trained with",
        )
    return Translator(make_runner(model, precision, backend=backend, threads=threads), tokenizer)
