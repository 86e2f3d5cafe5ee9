"""The command line is what flags.json says, and every flag explains itself."""

from __future__ import annotations

import argparse
import json

import pytest

from dseek.cli.main import VERBS, build_parser, load_verb, usage
from tests.contracts.flags import FROZEN, collect


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_flags_are_frozen(verb: str) -> None:
    frozen = json.loads(FROZEN.read_text())
    assert collect()[verb] == frozen[verb], "a deliberate change? `make flags`, and a line in CHANGELOG.md"


def test_no_verb_left_or_came_unnoticed() -> None:
    assert sorted(json.loads(FROZEN.read_text())) == sorted(VERBS)


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_flag_has_help(verb: str) -> None:
    for action in build_parser(verb)._actions:
        assert action.help and action.help is not argparse.SUPPRESS, action.option_strings or action.dest


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_help_renders_and_says_the_same_line(verb: str) -> None:
    assert build_parser(verb).format_help()
    assert load_verb(verb).HELP == VERBS[verb][1]
    assert verb in usage()
