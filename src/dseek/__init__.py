"""dseek: measure the machine, plan, and run a language model at the machine's limit.

    from dseek import load

    llm = load("smollm2", precision="int8")
    print(llm.generate(["The sea is"])[0].text)

Importing this package costs next to nothing: it brings in neither PyTorch nor the native kernels, probes nothing and
reads no network. `load` does all of that when it is first called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dseek.engine.llm import load

__version__ = "0.1.0"

__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    """Import `load` the first time somebody asks for it (PEP 562).

    Args:
        name: the attribute asked for.

    Returns:
        The function `dseek.engine.llm.load`.

    Raises:
        AttributeError: `name` is not part of the package's interface.
    """
    if name == "load":
        from dseek.engine.llm import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Names of the public interface, for completion."""
    return sorted(__all__)
