"""Public docstrings name the parameters that the signature has, and no file grows out of one sitting."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "src/dseek"
MODULES = sorted(PACKAGE.rglob("*.py"))
SECTIONS = ("Args:", "Returns:", "Raises:", "Yields:", "Source:", "Note:", "Example:", "Attributes:")

Function = ast.FunctionDef | ast.AsyncFunctionDef
Owner = ast.ClassDef | None


def _public_functions(tree: ast.AST, owner: ast.ClassDef | None = None) -> Iterator[tuple[str, Function, Owner]]:
    """Yield name, node and class (None for a plain function) of every public function and method."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from _public_functions(node, node)
        elif (
            isinstance(node, Function) and not node.name.startswith("_") and not _decorated(node, "overload", "setter")
        ):
            yield f"{owner.name}.{node.name}" if owner else node.name, node, owner


def _decorated(node: Function, *endings: str) -> bool:
    """Whether one of the decorators ends in one of the names."""
    return any(ast.unparse(decorator).endswith(endings) for decorator in node.decorator_list)


def _parameters(node: Function, owner: Owner) -> list[str]:
    """Names of the parameters, `self` and `cls` left out."""
    arguments = node.args
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    if owner is not None and not _decorated(node, "staticmethod"):
        names = names[1:]
    names += [argument.arg for argument in arguments.kwonlyargs]
    names += [extra.arg for extra in (arguments.vararg, arguments.kwarg) if extra is not None]
    return names


def _complaint(node: Function, owner: Owner) -> str | None:
    """Say what is wrong with one docstring, or None.

    A function lists its parameters under `Args:`. A method may name them in its sentence instead, and may go without a
    docstring where its class derives from one that documents it.
    """
    docstring = ast.get_docstring(node)
    if docstring is None:
        return None if owner is not None and owner.bases else "no docstring"
    parameters = _parameters(node, owner)
    documented = _documented(docstring)
    unknown = [name for name in documented if name not in parameters]
    missing = [name for name in parameters if name not in documented]
    if owner is not None:
        missing = [name for name in missing if not re.search(rf"\b{name}\b", docstring)]
    return f"undocumented {missing}, not in the signature {unknown}" if missing or unknown else None


def _documented(docstring: str) -> list[str]:
    """Names listed under `Args:`; several may share a line (`key, value: ...`)."""
    names: list[str] = []
    inside = False
    indent = ""
    for line in docstring.splitlines():
        stripped = line.strip()
        if stripped in SECTIONS or stripped.startswith(SECTIONS):
            inside = stripped == "Args:"
            indent = ""
            continue
        if not inside or not stripped:
            continue
        if not indent:
            indent = line[: len(line) - len(line.lstrip())]
        if line.startswith(indent) and not line[len(indent)].isspace():
            head = stripped.split(":", 1)[0]
            names += [name.strip().strip("*`") for name in re.sub(r"\(.*?\)", "", head).split(",")]
    return names


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_module_and_public_names_are_documented(module: Path) -> None:
    tree = ast.parse(module.read_text())
    wrong: list[str] = []
    if not ast.get_docstring(tree):
        wrong.append("the module has no docstring")
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and not ast.get_docstring(node):
            wrong.append(f"class {node.name} has no docstring")
    for name, node, owner in _public_functions(tree):
        complaint = _complaint(node, owner)
        if complaint:
            wrong.append(f"line {node.lineno}: {name}: {complaint}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_is_read_in_one_sitting(module: Path) -> None:
    assert len(module.read_text().splitlines()) <= 400


def test_no_home_paths_and_no_leftovers_in_the_repository(repo: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=repo, capture_output=True, text=True, check=False
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    forbidden = re.compile(
        "|".join(("/" + "home/[a-z]", "/" + "Users/[A-Za-z]", "/" + "root/", "TO" + "DO", "FIX" + "ME"))
    )
    wrong = []
    for name in filter(None, listed.stdout.split("\0")):
        path = repo / name
        if not path.is_file() or name == "LICENSE":
            continue
        content = path.read_bytes()
        if b"\0" in content:
            continue
        for number, line in enumerate(content.decode("utf-8", errors="replace").splitlines(), start=1):
            if forbidden.search(line):
                wrong.append(f"{name}:{number}: {line.strip()[:100]}")
    assert not wrong, "\n".join(wrong)
