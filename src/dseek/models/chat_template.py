"""Renders a model's chat template: Jinja text from somebody else's file, run in a sandbox.

The environment offers what Hugging Face templates expect (`raise_exception`, `strftime_now`, `tojson` that leaves HTML
alone, loop controls, `{% generation %}` blocks) and nothing more; the sandbox allows no private attributes, no changes
to the messages and no ranges beyond 100,000. What it cannot do is to bound the time of nested loops.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

from dseek.core.errors import FileFormatError, RequestError

MAX_TEMPLATE_CHARS = 1 << 20
"""Real templates reach some 20,000 characters; the compiler's work grows with the length."""


class ChatTemplate:
    """A compiled chat template.

    Args:
        text: Jinja source.
        special_tokens: names such as `bos_token` to the text of the token.

    Raises:
        FileFormatError: it is too long or does not compile.
    """

    def __init__(self, text: str, special_tokens: Mapping[str, str]) -> None:
        import jinja2

        if len(text) > MAX_TEMPLATE_CHARS:
            raise FileFormatError(
                f"the chat template has {len(text)} characters", needed=f"at most {MAX_TEMPLATE_CHARS}"
            )
        self._special_tokens = dict(special_tokens)
        try:
            self._template = _environment().from_string(text)
        except (jinja2.TemplateError, RecursionError, SyntaxError, ValueError, OverflowError) as error:
            raise FileFormatError(f"the chat template does not compile ({error})", remedy=_REMEDY) from None

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool, **variables: Any) -> str:
        """Write a conversation as the model's prompt.

        Args:
            messages: each with at least `role` and `content`.
            add_generation_prompt: end with the opening of the assistant's answer.
            variables: further names the template may use, such as `tools` or `enable_thinking`.

        Returns:
            The prompt, special tokens in it as text.

        Raises:
            RequestError: the template refuses the messages or fails on them.
        """
        context = {"tools": None, "documents": None, **self._special_tokens, **variables}
        try:
            plain = json.loads(json.dumps([dict(message) for message in messages]))
            text: str = self._template.render(messages=plain, add_generation_prompt=add_generation_prompt, **context)
            return text
        except Exception as error:  # the template is a program of somebody else's: it may raise anything
            raise RequestError(
                f"the chat template cannot show these messages ({type(error).__name__}: {error})", remedy=_REMEDY
            ) from None


def _environment() -> Any:
    """Make the sandbox."""
    import jinja2
    import jinja2.ext
    import jinja2.sandbox
    from jinja2 import nodes

    class Generation(jinja2.ext.Extension):
        """`{% generation %} ... {% endgeneration %}` marks what the assistant said; here it is simply shown."""

        tags = {"generation"}  # noqa: RUF012 (the name and type are jinja2's)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    class SafeNamespace(jinja2.utils.Namespace):
        """`namespace()` that refuses private names, which would reach the interpreter behind the sandbox."""

        def __init__(*args: Any, **values: Any) -> None:
            named = dict(*args[1:], **values)
            for name in named:
                _check_public(name)
            jinja2.utils.Namespace.__init__(args[0], named)

        def __setitem__(self, name: str, value: Any) -> None:
            _check_public(name)
            super().__setitem__(name, value)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.datetime.now().strftime(layout)
    environment.globals["namespace"] = SafeNamespace
    return environment


def _check_public(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise RequestError(f"the chat template sets the private name {name!r}")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


_REMEDY = "use `dseek generate` with a plain prompt, or a model with another template"
