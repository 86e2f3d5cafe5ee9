"""The import table of `pyproject.toml` holds, and covers every room that exists."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

FREE_ROOMS = {"cli"}
"""Rooms that may import anything."""


def _rooms(repo: Path) -> set[str]:
    return {path.parent.name for path in (repo / "src/dseek").glob("*/__init__.py")}


def _contracts(repo: Path) -> dict[str, set[str]]:
    config = tomllib.loads((repo / "pyproject.toml").read_text())
    return {
        contract["source_modules"][0].removeprefix("dseek."): set(contract["forbidden_modules"])
        for contract in config["tool"]["importlinter"]["contracts"]
    }


def test_every_room_has_a_contract(repo: Path) -> None:
    assert set(_contracts(repo)) == _rooms(repo) - FREE_ROOMS


def test_nothing_imports_the_command_line(repo: Path) -> None:
    for room, forbidden in _contracts(repo).items():
        assert "dseek.cli" in forbidden, room


def test_no_two_rooms_import_each_other(repo: Path) -> None:
    contracts = _contracts(repo)
    for room, forbidden in contracts.items():
        for other, other_forbidden in contracts.items():
            if other != room:
                assert f"dseek.{other}" in forbidden or f"dseek.{room}" in other_forbidden, (room, other)


def test_the_table_holds(repo: Path) -> None:
    linter = Path(sys.executable).parent / "lint-imports"
    run = subprocess.run([linter, "--no-cache"], cwd=repo, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def _imports(path: Path) -> set[str]:
    """Every module that a file imports, at any depth."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_core_imports_the_standard_library_only(repo: Path) -> None:
    allowed = sys.stdlib_module_names | {"dseek"}
    for path in (repo / "src/dseek/core").glob("*.py"):
        assert {name.split(".")[0] for name in _imports(path)} <= allowed, path.name


def test_the_kernels_are_reached_through_three_doors(repo: Path) -> None:
    package = repo / "src/dseek"
    users = {path for path in package.rglob("*.py") if "dseek._native" in _imports(path)}
    doors = {package / "ops/native.py", package / "parallel/transport/native.py"}
    strangers = {path for path in users if path.parent != package / "hardware" and path not in doors}
    assert not strangers
