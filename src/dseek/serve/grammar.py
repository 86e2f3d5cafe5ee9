"""`Grammars`: makes filters that bind an answer to a JSON schema, a regular expression, a grammar or a choice.

The work is llguidance's. A filter (`GrammarFilter`) is what the engine asks before it samples and tells after: it
belongs to one answer and to the engine's thread. Schemas come from strangers, so the parser runs with limits, and what
exceeds them is the request's error.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dseek.core.errors import RequestError
from dseek.serve.requirements import GRAMMAR, require

if TYPE_CHECKING:
    from llguidance import LLTokenizer

    from dseek.engine.llm import LLM

MAX_SCHEMA_CHARS = 256 * 1024
"""Longest JSON schema, as text."""

_JSON_OPTIONS = {"whitespace_pattern": r"[ \n\t]{0,12}"}
"""Room for an indented layout, and an end to the empty space that small models like to go on with."""

MAX_DEPTH = 64
"""Deepest nesting of a schema: the compiler recurses."""


class GrammarFilter:
    """Says which tokens may come next in one answer.

    Args:
        tokenizer: of llguidance.
        grammar: as `LLMatcher.grammar_from_*` writes it.

    Raises:
        RequestError: the grammar does not compile.
    """

    def __init__(self, tokenizer: LLTokenizer, grammar: str) -> None:
        from llguidance import LLMatcher

        self._matcher = LLMatcher(tokenizer, grammar, log_level=0)
        if self._matcher.is_error():
            raise RequestError(
                f"the grammar cannot be used: {self._matcher.get_error()[:300]}",
                needed="a JSON schema, regular expression or Lark grammar that llguidance compiles",
            )

    def mask(self, token_ids: Sequence[int]) -> np.ndarray:
        """Say which tokens may follow.

        Args:
            token_ids: the answer so far, whose tokens were all accepted.

        Returns:
            int32 [V / 32 rounded up], a bit a token; the end tokens are among them where the answer may end.

        Raises:
            RequestError: the grammar became too complex on the way.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.int32)
        self._check()
        return bits

    def accept(self, token_id: int) -> None:
        """Take a token that was chosen.

        Args:
            token_id: one that the mask allows.

        Raises:
            RequestError: it is none.
        """
        self._matcher.consume_token(token_id)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RequestError(f"the answer left its grammar: {self._matcher.get_error()[:300]}")


class Grammars:
    """Makes filters for one model. Safe to use from several threads.

    Args:
        llm: the model; its tokenizer is read on first use.
    """

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._tokenizer: LLTokenizer | None = None
        self._lock = threading.Lock()

    def json_schema(self, schema: Mapping[str, Any]) -> GrammarFilter:
        """Bind an answer to a JSON schema.

        Args:
            schema: the schema.

        Returns:
            A fresh filter.

        Raises:
            RequestError: the schema is too long, nested too deep, or cannot be compiled.
        """
        if _depth(schema) > MAX_DEPTH:
            raise RequestError("the JSON schema is nested too deep", needed=f"at most {MAX_DEPTH} levels")
        text = json.dumps(schema)
        if len(text) > MAX_SCHEMA_CHARS:
            raise RequestError(
                f"the JSON schema has {len(text)} characters", needed=f"at most {MAX_SCHEMA_CHARS} characters"
            )
        return self._filter("json_schema", text, _JSON_OPTIONS)

    def json_object(self) -> GrammarFilter:
        """Bind an answer to any JSON object."""
        return self.json_schema({"type": "object"})

    def regex(self, pattern: str) -> GrammarFilter:
        """Bind a whole answer to a regular expression.

        Args:
            pattern: in Rust's syntax, without look-around.
        """
        return self._filter("regex", pattern)

    def lark(self, grammar: str) -> GrammarFilter:
        """Bind a whole answer to a grammar.

        Args:
            grammar: in llguidance's variant of Lark.
        """
        return self._filter("lark", grammar)

    def choice(self, texts: Sequence[str]) -> GrammarFilter:
        """Bind a whole answer to one of some texts.

        Args:
            texts: at least one.
        """
        return self._filter("lark", "start: " + " | ".join(json.dumps(text) for text in texts))

    def _filter(self, kind: str, text: str, *options: Any) -> GrammarFilter:
        require(GRAMMAR, purpose="an answer bound to a grammar")
        from llguidance import LLMatcher

        tokenizer = self._read_tokenizer()
        try:
            grammar = getattr(LLMatcher, f"grammar_from_{kind}")(text, *options)
        except ValueError as error:
            raise RequestError(f"the grammar cannot be used: {str(error)[:300]}") from None
        return GrammarFilter(tokenizer, grammar)

    def _read_tokenizer(self) -> LLTokenizer:
        with self._lock:
            if self._tokenizer is None:
                from llguidance import LLTokenizer

                engine = self._llm.engine
                self._tokenizer = LLTokenizer(
                    self._llm.tokenizer.to_json(),
                    n_vocab=self._llm.shape.vocab_size,
                    eos_token=sorted(engine.eos_token_ids),
                )
            return self._tokenizer


def _depth(value: Any) -> int:
    """Count the levels of nested objects and lists, without recursion."""
    deepest, todo = 0, [(value, 1)]
    while todo:
        found, level = todo.pop()
        deepest = max(deepest, level)
        if level > MAX_DEPTH:
            return level
        children = found.values() if isinstance(found, Mapping) else found if isinstance(found, list) else ()
        todo.extend((child, level + 1) for child in children)
    return deepest
