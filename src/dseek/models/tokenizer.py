"""`Tokenizer`: text to token ids and back, whichever kind of vocabulary the model has.

The kinds differ in how they cut text (`TokenCodec`); special ids, streaming and the chat template are common. See
`gguf_tokenizer` and `folder_tokenizer` for where the parts come from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from dseek.core.errors import RequestError, UnsupportedModelError
from dseek.models.chat_template import ChatTemplate

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_MAX_PENDING_TOKENS = 8
"""A character has at most four bytes, and so at most four tokens: what is still broken after eight stays broken."""


class TokenCodec(ABC):
    """How one kind of vocabulary cuts text; safe to use from several threads."""

    vocab_size: int
    """Number of ids, special ones included."""

    @abstractmethod
    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Cut text into token ids; special tokens written in the text become their ids.

        Args:
            text: any text.
            add_special_tokens: put the model's start and end tokens around it, where it has them.

        Returns:
            Token ids.

        Raises:
            UnicodeEncodeError: the text has a lone surrogate.
        """

    @abstractmethod
    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Join tokens into text.

        Args:
            token_ids: none negative; those beyond the vocabulary stand for nothing.
            skip_special_tokens: leave special tokens out.

        Returns:
            Text; incomplete UTF-8 shows as U+FFFD.
        """

    @abstractmethod
    def token_id(self, token: str) -> int | None:
        """Look up a token by its spelling in the vocabulary.

        Args:
            token: such as `<|im_end|>`.

        Returns:
            Its id, or None.
        """

    def to_json(self) -> str:
        """Describe the vocabulary as a tokenizer.json.

        Raises:
            UnsupportedModelError: this kind has no such description.
        """
        raise UnsupportedModelError(
            "the model's tokenizer is of the SentencePiece kind, which is not written as tokenizer.json",
            needed="a byte-level tokenizer",
            remedy="take the Hugging Face folder of the model, which has the file",
        )


class Tokenizer:
    """A model's tokenizer. Safe to use from several threads, except that each stream belongs to one.

    Args:
        codec: cuts text.
        bos_token_id: starts a text, or None.
        eos_token_ids: end an answer.
        chat_template: Jinja source, or None.
        special_tokens: names such as `bos_token` to their text, for the template.
    """

    def __init__(
        self,
        codec: TokenCodec,
        *,
        bos_token_id: int | None = None,
        eos_token_ids: tuple[int, ...] = (),
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        self._codec = codec
        self.bos_token_id = bos_token_id
        self.eos_token_ids = eos_token_ids
        self.chat_template = chat_template
        self._special_tokens = dict(special_tokens or {})
        self._compiled: ChatTemplate | None = None

    @property
    def vocab_size(self) -> int:
        """Number of ids, special ones included."""
        return self._codec.vocab_size

    @property
    def special_tokens(self) -> dict[str, str]:
        """Names such as `bos_token` to their text."""
        return dict(self._special_tokens)

    def to_json(self) -> str:
        """Describe the vocabulary as a tokenizer.json; special names, end tokens and the template are not in it.

        Raises:
            UnsupportedModelError: this kind has no such description.
        """
        return self._codec.to_json()

    def token_id(self, token: str) -> int | None:
        """Look up a token by its spelling in the vocabulary.

        Args:
            token: such as `<|im_end|>`.

        Returns:
            Its id, or None.
        """
        return self._codec.token_id(token)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Cut text into token ids.

        Args:
            text: any text; special tokens written in it become their ids.
            add_special_tokens: put the model's start (and end) tokens around it, where it has them.

        Returns:
            Token ids.

        Raises:
            RequestError: the text is no valid Unicode (a lone surrogate).
        """
        try:
            return self._codec.encode(text, add_special_tokens)
        except UnicodeEncodeError as error:
            raise RequestError(
                f"the text has a lone surrogate at character {error.start}", needed="valid Unicode text"
            ) from None

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Join tokens into text.

        Args:
            token_ids: ids; those beyond the vocabulary stand for nothing.
            skip_special_tokens: leave special tokens out of the text.

        Returns:
            Text; incomplete UTF-8 shows as U+FFFD.

        Raises:
            RequestError: an id is negative or beyond 32 bits.
        """
        ids = [int(token_id) for token_id in token_ids]
        if ids and not (0 <= min(ids) and max(ids) < 1 << 32):
            raise RequestError(
                f"token ids from {min(ids)} to {max(ids)}", needed=f"ids from 0 to {self.vocab_size - 1}"
            )
        return self._codec.decode(ids, skip_special_tokens)

    def stream(self, skip_special_tokens: bool = True) -> TextStream:
        """Start decoding an answer token by token.

        Args:
            skip_special_tokens: leave special tokens out of the text.
        """
        return TextStream(self, skip_special_tokens)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """Write a conversation as the model's prompt; encode it with `add_special_tokens=False`.

        Args:
            messages: each with `role` (system, user, assistant) and `content`.
            add_generation_prompt: end with the opening of the assistant's answer.
            variables: further names the template may use, such as `tools`.

        Returns:
            The prompt, special tokens in it as text.

        Raises:
            RequestError: the model has no template, a message is malformed, or the template refuses the messages.
            FileFormatError: the template does not compile.
        """
        if self.chat_template is None:
            raise RequestError(
                "the model has no chat template", remedy="use a model tuned for chat, or `dseek generate` with a prompt"
            )
        for message in messages:
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise RequestError(f"the message {message!r} has no role", needed="messages with role and content")
        if self._compiled is None:
            self._compiled = ChatTemplate(self.chat_template, self._special_tokens)
        return self._compiled.render(messages, add_generation_prompt=add_generation_prompt, **variables)


class TextStream:
    """Turns tokens into text as they come: never half a character, and together the same text as decoding all at once.

    A token's text can depend on the one before (a leading space is dropped at the start of a text), so each new token
    is decoded behind those whose text went out last, and only what is new is handed out.

    Args:
        tokenizer: decodes.
        skip_special_tokens: leave special tokens out of the text.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._window: list[int] = []
        self._num_done = 0
        self._done_text = ""

    def push(self, token_id: int) -> str:
        """Take one token.

        Args:
            token_id: the next token of the answer.

        Returns:
            The text that is final now, often that of this token; empty while a character is incomplete.
        """
        self._window.append(token_id)
        text = self._decode(self._window)
        if text.endswith(_REPLACEMENT) and len(self._window) - self._num_done < _MAX_PENDING_TOKENS:
            return ""
        return self._hand_out(text)

    def flush(self) -> str:
        """End the answer.

        Returns:
            What was held back: characters that stayed incomplete, as U+FFFD.
        """
        return self._hand_out(self._decode(self._window))

    def _hand_out(self, text: str) -> str:
        new_text = text[len(self._done_text) :]
        tail = self._window[self._num_done :]
        tail_text = self._decode(tail)
        if tail_text:  # else it could not shield the next token from the rules at a text's start
            self._window, self._done_text = tail, tail_text
        else:
            self._done_text = text
        self._num_done = len(self._window)
        return new_text

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, self._skip_special_tokens)
