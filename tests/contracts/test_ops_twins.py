"""Every operator under `dseek.ops` has a reference twin and a numerics test that poisons memory."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OPERATORS = sorted({path.parent for path in (ROOT / "src/dseek/ops").glob("*/*.py")})


def _public_functions(path: Path) -> list[str]:
    tree = ast.parse(path.read_text())
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]


def _tests_of(operator: str) -> list[Path]:
    return sorted((ROOT / "tests/ops").glob(f"test_{operator}*.py"))


def test_there_are_operators() -> None:
    assert {"linear", "attention", "norm"} <= {operator.name for operator in OPERATORS}


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda path: path.name)
def test_operator_has_a_reference(operator: Path) -> None:
    assert _public_functions(operator / "reference.py")


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda path: path.name)
def test_operator_has_a_numerics_test_against_its_reference(operator: Path) -> None:
    sources = [path.read_text() for path in _tests_of(operator.name)]
    assert sources, f"no tests/ops/test_{operator.name}*.py"
    assert any(f"dseek.ops.{operator.name}.reference" in source for source in sources)
    assert any("nan" in source.lower() or "poison" in source.lower() for source in sources)
