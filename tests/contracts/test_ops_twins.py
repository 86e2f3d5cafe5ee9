"""Every operator under `dseek.ops` has a reference twin and a numerics test that poisons memory."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OPERATORS = sorted({path.parent for path in (ROOT / "src/dseek/ops").glob("*/*.py")})


def _public_functions(path: Path) -> list[str]:
    tree = ast.parse(path.read_text())
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]


def _sources() -> list[str]:
    return [path.read_text() for path in sorted((ROOT / "tests/ops").glob("test_*.py"))]


def test_there_are_operators() -> None:
    assert {"linear", "attention", "norm"} <= {operator.name for operator in OPERATORS}


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda path: path.name)
def test_operator_has_a_reference(operator: Path) -> None:
    assert _public_functions(operator / "reference.py")


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda path: path.name)
def test_operator_has_a_numerics_test_against_its_reference(operator: Path) -> None:
    users = [source for source in _sources() if f"dseek.ops.{operator.name}.reference" in source]
    assert users, "no file of tests/ops imports the reference"
    assert any("nan" in source or "poison" in source for source in users), "no test of it poisons memory"


def test_every_registered_operator_is_tested() -> None:
    registered: set[str] = set()
    for path in (ROOT / "src/dseek").rglob("*.py"):
        registered |= set(re.findall(r"[\"']dseek::(\w+)", path.read_text()))
    tested = "\n".join(_sources())
    assert registered
    assert not {name for name in registered if name not in tested}
