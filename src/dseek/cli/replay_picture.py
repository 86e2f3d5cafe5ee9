"""The picture of `dseek bench-serve`: how many requests were at least so fast, with the targets."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dseek.core.errors import ConfigError
from dseek.core.files import atomic_write_bytes

if TYPE_CHECKING:
    from dseek.serve.replay import Report, Seen


def draw(results: Sequence[Seen], report: Report, path: Path) -> None:
    """Draw cumulative distributions of the time to first token, between tokens, and to the end.

    Args:
        results: what the clients saw.
        report: the same, summed up.
        path: PNG file to write, whole or not at all.

    Raises:
        ConfigError: it cannot be written.
    """
    from matplotlib.figure import Figure

    whole = [seen for seen in results if seen.error is None]
    series: tuple[tuple[str, list[float], float | None], ...] = (
        (
            "time to first token",
            [seen.first_token_s for seen in whole if seen.first_token_s is not None],
            report.targets.first_token_s,
        ),
        ("between tokens", [gap for seen in whole for gap in seen.gaps_s], report.targets.between_tokens_s),
        ("end to end", [seen.whole_s for seen in whole], None),
    )
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for axes, (title, values, target) in zip(figure.subplots(1, len(series)), series, strict=True):
        ordered = sorted(values)
        shares = [(index + 1) / len(ordered) for index in range(len(ordered))]
        axes.step(ordered, shares, where="post", color="#0f766e")
        if target is not None:
            axes.axvline(target, color="#b42318", linestyle="--", linewidth=1, label="target")
            axes.legend(loc="lower right", frameon=False)
        axes.set(title=title, xlabel="seconds", ylim=(0, 1.02))
        if ordered and ordered[0] > 0:
            axes.set_xscale("log")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("share of requests")
    figure.suptitle(
        f"{report.requests} requests, {report.offered_s:.2f} offered a second, {report.goodput_s:.2f} served well"
    )
    held = io.BytesIO()
    figure.savefig(held, format="png", dpi=120)
    try:
        atomic_write_bytes(path, held.getvalue())
    except OSError as error:
        raise ConfigError(f"the picture cannot be written to {path}: {error.strerror or error}") from None
