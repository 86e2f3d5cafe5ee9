"""What every test may ask for: the embedded model, poisoned memory, and honest skips.

A test that needs something this machine lacks (the compiled kernels, the embedded model) skips with a reason; where the
environment says `CI`, as `.ci/run` does, nothing may be missing and every skip is a failure instead.
"""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)

ONLY_WHERE_NAMED = ("rows", "sanitizer", "browser", "cluster", "mooncake")
"""Markers of tests that need minutes, a build of their own, a browser, several nodes, or another engine."""


def _nothing_may_be_missing(report: Report) -> Report:
    """Turn a skip into a failure where the environment says `CI`; an expected failure stays what it is."""
    if os.environ.get("CI") and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"{reason} (CI: nothing may be missing)"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Hold every test to `_nothing_may_be_missing`."""
    report = yield
    return _nothing_may_be_missing(report)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Hold files that skip as a whole to `_nothing_may_be_missing`."""
    report = yield
    return _nothing_may_be_missing(report)


def pytest_configure() -> None:
    """Let programs that tests start be interrupted: a shell's background jobs inherit that the signal is ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Hold the marker `native`.

    Args:
        item: the test about to run.
    """
    if item.get_closest_marker("native") and importlib.util.find_spec("dseek._native") is None:
        pytest.skip("the native kernels are not built: `make native`")


@pytest.fixture(scope="session")
def repo() -> Path:
    """Root of the repository."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def embedded_model() -> Path:
    """The GGUF file of the embedded default model, fetched on first use and kept in the user's cache."""
    from dseek.models import locate

    try:
        return Path(locate.pull("smollm2", None))
    except (ValueError, OSError) as error:
        pytest.skip(f"the embedded model cannot be had: {error}")


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Uninitialised memory holds NaN (or the largest integer), so that a kernel that reads before it writes is caught.

    Covers `numpy.empty`, `numpy.empty_like` and, where torch is already imported, torch's own empty tensors.
    """
    import sys

    def poison(make: Callable[..., Any]) -> Callable[..., Any]:
        def made(*args: Any, **kwargs: Any) -> Any:
            array = make(*args, **kwargs)
            if array.dtype.kind in "fc":
                array.fill(np.nan)
            elif array.dtype.kind in "iu":
                array.fill(np.iinfo(array.dtype).max)
            return array

        return made

    monkeypatch.setattr(np, "empty", poison(np.empty))
    monkeypatch.setattr(np, "empty_like", poison(np.empty_like))
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    was_filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(was_deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = was_filled


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests whose marker, one of `ONLY_WHERE_NAMED`, the run did not ask for.

    Args:
        config: holds the expression given with `-m`.
        items: all collected tests; changed in place.
    """
    unnamed = [marker for marker in ONLY_WHERE_NAMED if marker not in config.getoption("markexpr")]
    left_out = [item for item in items if any(item.get_closest_marker(marker) for marker in unnamed)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
