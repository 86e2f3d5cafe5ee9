"""From documents to token ids with labels: a text between the model's own marks, a conversation by its chat template.

A conversation is cut as it is when the model answers: what is asked up to the opening of an answer is encoded by
itself, then the answer, so that training sees the tokens that inference will. Of an answer everything counts up to the
token that ends it; the template's line end behind that is nobody's choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dseek.core.errors import ConfigError, DseekError
from dseek.models.tokenizer import Tokenizer
from dseek.train.documents import Piece

IGNORED = -100
"""Label of a token that is not learned, as in PyTorch's cross entropy."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """Tokens of a piece."""

    token_ids: list[int]
    """Ids."""
    labels: list[int]
    """The same ids, or `IGNORED`."""
    is_conversation: bool
    """The piece was a conversation."""


class Encoder:
    """Encodes pieces for one model.

    Args:
        tokenizer: the model's.
        assistant_only_loss: in conversations, learn only what the assistant says.
        vocab_size: rows of the model's embedding.
    """

    def __init__(self, tokenizer: Tokenizer, *, assistant_only_loss: bool, vocab_size: int) -> None:
        self._tokenizer, self._assistant_only, self._vocab_size = tokenizer, assistant_only_loss, vocab_size
        marks = tokenizer.encode("", add_special_tokens=True)
        bos, ends = tokenizer.bos_token_id, tokenizer.eos_token_ids
        self._first = [bos] if bos is not None and bos in marks else []
        self._last = list(ends[:1])
        self._ends = frozenset(ends)

    @property
    def pad_id(self) -> int:
        """What fills the rest of a row; nothing sees it and nothing learns it."""
        return self._last[0] if self._last else 0

    def encode(self, piece: Piece) -> Encoded:
        """Encode one piece.

        Args:
            piece: a text or a conversation.

        Returns:
            Its tokens and labels.

        Raises:
            ConfigError: a conversation does not fit the template, or a token is beyond the model's vocabulary.
        """
        try:
            if isinstance(piece.content, str):
                token_ids = self._tokenizer.encode(piece.content, add_special_tokens=False)
                token_ids = (self._first if piece.begins else []) + token_ids + (self._last if piece.ends else [])
                encoded = Encoded(token_ids, list(token_ids), False)
            else:
                encoded = self._conversation(piece.content)
        except DseekError as error:
            raise ConfigError(f"{piece.place}: {error}") from None
        if encoded.token_ids and max(encoded.token_ids) >= self._vocab_size:
            raise ConfigError(
                f"{piece.place}: token {max(encoded.token_ids)} is beyond the model's vocabulary",
                needed=f"at most {self._vocab_size - 1}",
                remedy="use the tokenizer that belongs to the model",
            )
        return encoded

    def _conversation(self, messages: list[dict[str, Any]]) -> Encoded:
        render = self._tokenizer.apply_chat_template
        token_ids: list[int] = []
        labels: list[int] = []
        shown = ""
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if number == 0:
                raise ConfigError("the conversation begins with an answer", needed="a question or a system message")
            question = _rest(render(messages[:number], add_generation_prompt=True), shown)
            shown += question
            answer = _rest(render(messages[: number + 1], add_generation_prompt=False), shown)
            shown += answer
            asked = self._tokenizer.encode(question, add_special_tokens=False)  # the template writes the marks
            said = self._tokenizer.encode(answer, add_special_tokens=False)
            token_ids += asked + said
            labels += list(asked) if not self._assistant_only else [IGNORED] * len(asked)
            end = max((place + 1 for place, token in enumerate(said) if token in self._ends), default=len(said))
            labels += said[:end] + [IGNORED] * (len(said) - end)
        if not token_ids:
            raise ConfigError("the conversation has no answer", needed='a message with the role "assistant"')
        return Encoded(token_ids, labels, True)


def _rest(text: str, shown: str) -> str:
    """What a template wrote behind what it had written before."""
    if not text.startswith(shown):
        raise ConfigError(
            "the chat template writes earlier turns anew when another one follows",
            needed="one that only adds to them",
            remedy="give such conversations with one answer each, the last message",
        )
    return text[len(shown) :]
