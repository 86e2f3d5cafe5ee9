"""Where the environment says `CI`, a skip is a failure, of a whole file too; an expected failure is neither."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import pytest
@pytest.fixture
def lacking(): pytest.skip("no such thing")
def test_fixture(lacking): pass
def test_inside(): pytest.skip("no g++")
@pytest.mark.skipif(True, reason="no /proc")
def test_marked(): pass
@pytest.mark.xfail(strict=True)
def test_expected(): assert False
def test_good(): pass
"""


@pytest.mark.parametrize("ci", ["", "1"])
def test_a_skip_under_ci_is_a_failure(tmp_path: Path, repo: Path, ci: str) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "test_whole.py").write_text('import pytest\npytest.importorskip("no_such_module")\n')
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    plain = ["-p", "tests.conftest", "-p", "no:cacheprovider", "--continue-on-collection-errors", "-q", str(tmp_path)]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *plain, "-c", str(tmp_path / "pytest.ini")],
        cwd=repo,
        env=dict(os.environ, CI=ci),
        capture_output=True,
        text=True,
        check=False,
    )
    if ci:
        assert run.returncode == 1
        for reason in ("no such thing", "no g++", "no /proc", "could not import 'no_such_module'"):
            lines = [line for line in run.stdout.splitlines() if reason in line]
            assert any(line.endswith("(CI: nothing may be missing)") for line in lines), (reason, run.stdout)
        assert "skipped" not in run.stdout and "1 passed, 1 xfailed" in run.stdout
    else:
        assert run.returncode == 0
        assert "1 passed, 4 skipped, 1 xfailed" in run.stdout
