"""From a prompt to token ids: plain text with the opening tokens it needs, or a conversation by its chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from dseek.core.errors import RequestError

if TYPE_CHECKING:
    from dseek.models.files import ModelFiles


def text_token_ids(files: ModelFiles, text: str) -> list[int]:
    """Make ids of a plain text, with the start token where the model has it so.

    Args:
        files: the opened model.
        text: the text.

    Returns:
        Token ids.

    Raises:
        RequestError: the text holds half a surrogate pair, as bytes that were no UTF-8 become.
    """
    return files.tokenizer().encode(_encodable(text))


def chat_token_ids(files: ModelFiles, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Write a conversation as a model expects it, up to where its answer begins.

    Args:
        files: the opened model.
        messages: each with `role` (system, user, assistant) and `content`.

    Returns:
        Token ids of the prompt.

    Raises:
        RequestError: the model has no chat template, or a message has no UTF-8 form.
    """
    if files.chat_template is None:
        raise RequestError(
            f"{files.name} has no chat template", needed="a chat model", remedy="use `generate` with plain text"
        )
    tokenizer = files.tokenizer()
    text = tokenizer.apply_chat_template([dict(message) for message in messages], add_generation_prompt=True)
    return tokenizer.encode(_encodable(text), add_special_tokens=False)


def _encodable(text: str) -> str:
    """Refuse a text that has no UTF-8 form."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"character {error.start} is no text: {error.reason}", needed="UTF-8") from error
    return text
