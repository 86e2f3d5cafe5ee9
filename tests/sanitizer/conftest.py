"""The marker `sanitizer`: these tests need the build of `make sanitize`, so they run only where `-m` names them."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the tests of this folder out of a run that did not ask for them.

    Args:
        config: holds the expression given with `-m`.
        items: all collected tests; changed in place.
    """
    if "sanitizer" in config.getoption("markexpr"):
        return
    here = Path(__file__).parent
    left_out = [item for item in items if item.path.is_relative_to(here)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
