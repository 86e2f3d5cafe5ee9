"""The chat template's sandbox, and what templates of the hub expect to find in it."""

from __future__ import annotations

import pytest

from dseek.core.errors import FileFormatError, RequestError
from dseek.models.chat_template import MAX_TEMPLATE_CHARS, ChatTemplate

MESSAGES = [{"role": "user", "content": "a <b> & 'c'"}, {"role": "assistant", "content": "é"}]


def render(text: str, **variables: object) -> str:
    """Render a template over `MESSAGES`."""
    return ChatTemplate(text, {"bos_token": "<s>"}).render(MESSAGES, add_generation_prompt=False, **variables)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{{ bos_token }}{{ messages[0]['content'] }}", "<s>a <b> & 'c'"),
        ("{{ messages[1].content | tojson }}", '"é"'),
        ("{{ messages[0] | tojson(indent=1) }}", '{\n "role": "user",\n "content": "a <b> & \'c\'"\n}'),
        (
            "{% for m in messages %}\n  {% if loop.index0 == 1 %}{% break %}{% endif %}\n{{ m.role }}\n{% endfor %}",
            "user\n",
        ),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "2"),
        ("{% generation %}{{ messages[0].role }}{% endgeneration %}", "user"),
        ("{{ 'yes' if tools is none else 'no' }}", "yes"),
        ("{{ strftime_now('%Y')[:2] }}", "20"),
        ("{{ messages[0].content.split('<')[0].strip() }}", "a"),
        ("{{ depth }}", "3"),
    ],
)
def test_what_templates_expect(text: str, expected: str) -> None:
    assert render(text, depth=3) == expected


@pytest.mark.parametrize(
    "text",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ namespace(__init__=1) }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{{ nothing.at.all }}",
        "{{ 1 / 0 }}",
    ],
)
def test_what_fails_or_reaches_outside_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="chat template"):
        render(text)


def test_private_names_do_not_get_out() -> None:
    assert render("{{ raise_exception.__globals__ }}{{ strftime_now.__globals__ }}{{ ''.__class__ }}") == ""
    with pytest.raises(RequestError):
        render("{{ '{0.__class__.__mro__}'.format(1) }}")


@pytest.mark.parametrize("text", ["{% for %}", "{{", "{% endif %}", "x" * (MAX_TEMPLATE_CHARS + 1)])
def test_what_does_not_compile_is_a_broken_file(text: str) -> None:
    with pytest.raises(FileFormatError, match="chat template"):
        ChatTemplate(text, {})


def test_messages_are_not_changed() -> None:
    messages = [{"role": "user", "content": ["x"]}]
    with pytest.raises(RequestError):
        ChatTemplate("{{ messages[0].content.append('y') }}", {}).render(messages, add_generation_prompt=True)
    assert messages == [{"role": "user", "content": ["x"]}]


def test_messages_must_be_plain_data() -> None:
    with pytest.raises(RequestError, match="chat template"):
        ChatTemplate("x", {}).render([{"role": "user", "content": object()}], add_generation_prompt=True)
