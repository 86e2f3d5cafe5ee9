"""Every shell and Python block of the README runs.

The comment above a block says what it needs: `<!-- test: model -->` the embedded model; `<!-- test: install -->` a
machine without an environment, which is what `.ci/run` does for real (here only the targets are resolved). A block
without a comment needs nothing. Blocks run in the order of the page in one folder: a later one finds an earlier one's
files.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[2] / "README.md"


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    needs: str
    language: str
    line: int
    text: str


def _blocks() -> list[Block]:
    pattern = re.compile(r"(?:<!-- test: (\w+) -->\n)?^```(sh|bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    content = README.read_text()
    return [
        Block(match[1] or "nothing", match[2], content[: match.start()].count("\n") + 1, match[3])
        for match in pattern.finditer(content)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readme")


def test_the_page_has_its_parts_in_order() -> None:
    headings = re.findall(r"^## (.*)$", README.read_text(), re.MULTILINE)
    assert headings == ["The 60-second run", "Measured", "The map", "The limits"]


def test_markers_are_known() -> None:
    assert {block.needs for block in _blocks()} <= {"nothing", "model", "install"}


@pytest.mark.slow
@pytest.mark.parametrize("block", _blocks(), ids=lambda block: f"line {block.line}")
def test_block_runs(block: Block, folder: Path, repo: Path, request: pytest.FixtureRequest) -> None:
    environment = dict(os.environ, PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if block.needs == "install":
        for target in re.findall(r"^make (\w+)", block.text, re.MULTILINE):
            run = subprocess.run(["make", "-n", target], cwd=repo, capture_output=True, text=True, check=False)
            assert run.returncode == 0, run.stderr
        return
    if block.needs == "model":
        request.getfixturevalue("embedded_model")
    script = block.text if block.language == "python" else f"set -euo pipefail\n{block.text}"
    command = [sys.executable, "-c", script] if block.language == "python" else ["bash", "-c", script]
    run = subprocess.run(
        command, cwd=folder, env=environment, input="/exit\n", capture_output=True, text=True, check=False, timeout=280
    )
    assert run.returncode == 0, f"{run.stdout[-2000:]}\n{run.stderr[-4000:]}"


def test_links_lead_somewhere(repo: Path) -> None:
    for page in ("README.md", "CONTRIBUTING.md", "docs/map.md", "docs/training.md", "docs/lab-log.md", "CHANGELOG.md"):
        source = repo / page
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", source.read_text()):
            assert (source.parent / target).exists(), f"{page}: {target}"


def test_every_command_is_on_the_page() -> None:
    from dseek.cli.main import VERBS

    content = README.read_text()
    for verb in VERBS:
        assert f"`dseek {verb}" in content, verb


def test_every_variable_is_on_the_page() -> None:
    from dseek.core import environment

    content = README.read_text()
    for variable in environment.VARIABLES:
        assert f"`{variable}`" in content, variable
