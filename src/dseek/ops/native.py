"""The compiled kernels, if there are any: found once, told once.

Nothing else imports `dseek._native` for running models, so that what happens without a compiler is decided here:
the package works on the PyTorch reference and says so in one line.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

from dseek.core import environment
from dseek.core.errors import ConfigError
from dseek.core.logs import get_logger

_log = get_logger(__name__)


@functools.cache
def module() -> ModuleType | None:
    """Return the compiled extension with the variant that DSEEK_KERNELS asks for.

    Returns:
        The module, or None where it was not built or DSEEK_KERNELS is torch.

    Raises:
        ConfigError: DSEEK_KERNELS names a variant that this processor cannot run.
    """
    wanted = environment.get("DSEEK_KERNELS")
    if wanted == "torch":
        return None
    try:
        native = importlib.import_module("dseek._native")
    except ImportError as error:
        _log.warning("native kernels are not built (%s); running on PyTorch, many times slower", error)
        return None
    if wanted != "auto":
        try:
            native.set_variant(wanted)
        except ValueError as error:
            raise ConfigError(
                f"DSEEK_KERNELS is {wanted!r}, which this processor cannot run",
                needed="one of auto, torch, " + ", ".join(native.variants()),
            ) from error
    return native


def require() -> ModuleType:
    """Return the compiled extension.

    Raises:
        ConfigError: there is none.
    """
    native = module()
    if native is None:
        raise ConfigError(
            "this needs the native kernels, which are not built or switched off",
            remedy="install with a C++20 compiler and leave DSEEK_KERNELS unset",
        )
    return native
