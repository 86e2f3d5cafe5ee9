"""How log-probabilities are shown: tokens as texts, OpenAI's two layouts.

A token that is half a character has no text of its own; it is shown as `token_id:N`, a name that vLLM uses too.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dseek.engine.logprobs import TokenLogprobs
    from dseek.models.tokenizer import Tokenizer

MIN_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON lacks."""

_CACHED_TOKENS = 65_536


class TokenTexts:
    """Texts of single tokens.

    Args:
        tokenizer: the model's.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        @lru_cache(maxsize=_CACHED_TOKENS)
        def text(token_id: int) -> str:
            shown = tokenizer.decode([token_id], skip_special_tokens=False)
            return f"token_id:{token_id}" if "\N{REPLACEMENT CHARACTER}" in shown else shown

        self._text = text

    def text(self, token_id: int) -> str:
        """Show one token.

        Args:
            token_id: its id.
        """
        return self._text(token_id)

    def chat(self, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """Write log-probabilities as chat completions do.

        Args:
            entries: one a token.

        Returns:
            An object with `content`.
        """
        return {
            "content": [
                {
                    **self._entry(entry.token_id, entry.logprob),
                    "top_logprobs": [self._entry(token_id, logprob) for token_id, logprob in entry.top],
                }
                for entry in entries
            ],
            "refusal": None,
        }

    def completion(
        self, entries: Sequence[TokenLogprobs | int], *, offset: int = 0, with_top: bool = True
    ) -> dict[str, Any]:
        """Write log-probabilities as completions do.

        Args:
            entries: one a token; a bare id stands for the first token of a prompt, which nothing predicts.
            offset: characters before the first token.
            with_top: list the likeliest tokens too; the token itself is always among them.

        Returns:
            Lists `tokens`, `token_logprobs`, `top_logprobs`, `text_offset`.
        """
        tokens: list[str] = []
        logprobs: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for entry in entries:
            token_id = entry if isinstance(entry, int) else entry.token_id
            shown = self.text(token_id)
            tokens.append(shown)
            offsets.append(offset)
            offset += len(shown)
            if isinstance(entry, int):
                logprobs.append(None)
                tops.append(None)
                continue
            logprobs.append(_finite(entry.logprob))
            top = {self.text(other): _finite(logprob) for other, logprob in entry.top}
            top.setdefault(shown, _finite(entry.logprob))
            tops.append(top if with_top else None)
        return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        shown = self.text(token_id)
        return {"token": shown, "logprob": _finite(logprob), "bytes": list(shown.encode("utf-8", "replace"))}


def _finite(logprob: float) -> float:
    return max(logprob, MIN_LOGPROB)
