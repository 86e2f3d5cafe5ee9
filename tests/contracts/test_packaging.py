"""The package installs, with a compiler or without one, and says what it is."""

from __future__ import annotations

import os
import shutil
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
    assert "$(BIN)/python -m pytest" in (repo / "Makefile").read_text().partition("\ntest:")[2].partition("\n\n")[0]
    assert "make test" in (repo / "README.md").read_text() and "make test" in (repo / ".ci/run").read_text()


def _build_wheel(repo: Path, folder: Path, **variables: str) -> tuple[Path, str]:
    """Build a wheel from a copy of the tracked files; return it and what the build printed."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("CMAKE", "SKBUILD"))}
    environment.update(TMPDIR=str(folder), PATH=f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}")
    environment.update(variables)
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=repo, capture_output=True, text=True, check=True
    )
    source = folder / "source"
    for name in filter(None, tracked.stdout.split("\0")):
        if (repo / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((repo / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-v", "-w", folder, source]
    build = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert build.returncode == 0, build.stdout[-3000:] + build.stderr[-3000:]
    (wheel,) = folder.glob("dseek-*.whl")
    return wheel, build.stdout + build.stderr


def _install(wheel: Path, home: Path) -> Path:
    """Unpack a wheel into an environment that has nothing else; return its interpreter."""
    venv.create(home, with_pip=False, symlinks=True)
    zipfile.ZipFile(wheel).extractall(next(home.glob("lib/python*/site-packages")))
    return home / "bin/python"


def _run(python: Path, code: str, folder: Path) -> str:
    run = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False, cwd=folder)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


@pytest.mark.slow
def test_without_a_compiler_the_package_is_pure_python(repo: Path, tmp_path: Path) -> None:
    wheel, printed = _build_wheel(repo, tmp_path, CC="/bin/false", CXX="/bin/false")
    assert "pure Python" in printed
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "dseek/py.typed" in names
    assert not [name for name in names if name.endswith((".so", ".cpp", ".h"))]
    python = _install(wheel, tmp_path / "venv")
    assert str(tmp_path) in _run(python, "import dseek; print(dseek.__file__)", tmp_path)


@pytest.mark.slow
@pytest.mark.native
def test_with_a_compiler_the_wheel_holds_the_kernels(repo: Path, tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    # The portable variant alone, not optimised, as compiling all of them takes long.
    wheel, printed = _build_wheel(
        repo, tmp_path, SKBUILD_CMAKE_DEFINE="DSEEK_VARIANTS=none", SKBUILD_CMAKE_BUILD_TYPE="None"
    )
    assert "pure Python" not in printed
    names = zipfile.ZipFile(wheel).namelist()
    assert len([name for name in names if name.startswith("dseek/_native.") and name.endswith(".so")]) == 1
    assert not [name for name in names if name.endswith((".cpp", ".h", ".a"))]
    python = _install(wheel, tmp_path / "venv")
    code = "import importlib.util as u; print(u.find_spec('dseek._native').origin)"
    assert str(tmp_path) in _run(python, code, tmp_path)
