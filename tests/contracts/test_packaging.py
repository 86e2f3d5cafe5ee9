"""The package installs, with a compiler or without one, and says what it is."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest


def test_version_is_said_once_everywhere(repo: Path) -> None:
    import dseek

    config = tomllib.loads((repo / "pyproject.toml").read_text())
    assert config["project"]["version"] == dseek.__version__
    assert f"## {dseek.__version__}" in (repo / "CHANGELOG.md").read_text()


def test_torch_is_the_same_release_in_package_and_makefile(repo: Path) -> None:
    config = tomllib.loads((repo / "pyproject.toml").read_text())
    (torch,) = (dependency for dependency in config["project"]["dependencies"] if dependency.startswith("torch"))
    assert torch in (repo / "Makefile").read_text()


def test_licence_is_apache(repo: Path) -> None:
    text = (repo / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_the_test_command_is_the_same_everywhere(repo: Path) -> None:
    makefile = (repo / "Makefile").read_text()
    assert "$(BIN)/python -m pytest\n" in makefile
    assert ".venv/bin/python -m pytest" in (repo / "README.md").read_text()
    assert "make test" in (repo / ".ci/run").read_text()


@pytest.mark.slow
def test_without_a_compiler_the_package_is_pure_python(repo: Path, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("CMAKE", "SKBUILD"))}
    environment.update(CC="/bin/false", CXX="/bin/false", TMPDIR=str(tmp_path))
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=repo, capture_output=True, text=True, check=True
    )
    source = tmp_path / "source"
    for name in filter(None, tracked.stdout.split("\0")):
        if (repo / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((repo / name).read_bytes())
    build = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-v", "-w", tmp_path, source],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert build.returncode == 0, build.stdout[-3000:] + build.stderr[-3000:]
    assert "pure Python" in build.stdout + build.stderr
    (wheel,) = tmp_path.glob("dseek-*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "dseek/py.typed" in names
    assert not [name for name in names if name.endswith((".so", ".cpp", ".h"))]

    home = tmp_path / "venv"
    venv.create(home, with_pip=False, symlinks=True)
    site = next(home.glob("lib/python*/site-packages"))
    zipfile.ZipFile(wheel).extractall(site)
    code = "import dseek, sys; print(dseek.__file__, dseek.__version__)"
    run = subprocess.run([home / "bin/python", "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert str(site) in run.stdout
