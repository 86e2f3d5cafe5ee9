"""`import dseek` is quick and brings nothing heavy; commands that need no model bring no PyTorch."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "numpy", "rich", "tokenizers", "transformers", "huggingface_hub", "gguf", "jinja2", "dseek._native")


def _run(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_import_takes_under_a_fifth_of_a_second() -> None:
    code = "import time; t = time.perf_counter(); import dseek; print(time.perf_counter() - t)"
    assert min(float(_run(code)) for _ in range(3)) < 0.2


def test_import_brings_nothing_heavy() -> None:
    code = f"import sys, dseek; print([name for name in {HEAVY!r} if name in sys.modules])"
    assert _run(code) == "[]"


def test_core_needs_the_standard_library_only() -> None:
    code = (
        "import sys, pkgutil, importlib, dseek.core as core\n"
        "for found in pkgutil.iter_modules(core.__path__): importlib.import_module('dseek.core.' + found.name)\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    assert _run(code) == "[]"


@pytest.mark.parametrize(
    "module", ["dseek.cli.main", "dseek.plan.plan", "dseek.hardware.store", "dseek.models.files", "dseek.parallel"]
)
def test_no_torch_before_a_model_runs_on_it(module: str) -> None:
    assert _run(f"import sys, {module}; print('torch' in sys.modules)") == "False"


@pytest.mark.parametrize("module", ["dseek.plan", "dseek.hardware.store"])
def test_planning_with_kept_measurements_needs_the_standard_library_only(module: str) -> None:
    rare = (*HEAVY, "difflib", "tempfile", "tomllib")
    code = f"import sys, {module}; print([name for name in {rare!r} if name in sys.modules])"
    assert _run(code) == "[]"


def test_help_imports_no_verb() -> None:
    code = (
        "import sys\nfrom dseek.cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "rooms = {name.split('.')[1] for name in sys.modules if name.startswith('dseek.')}\n"
        "verbs = [name for name in sys.modules if name.startswith('dseek.cli.') and name != 'dseek.cli.main']\n"
        "print('LOADED', sorted(rooms - {'cli', 'core'}), verbs)"
    )
    assert _run(code).splitlines()[-1] == "LOADED [] []"


def test_every_exported_name_resolves() -> None:
    assert _run("import dseek; print(all(hasattr(dseek, name) for name in dseek.__all__))") == "True"


def test_an_unknown_name_is_an_attribute_error() -> None:
    code = "import dseek\ntry:\n    dseek.lood\nexcept AttributeError as error:\n    print(error)"
    assert "lood" in _run(code)
