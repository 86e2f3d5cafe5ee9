"""Draws `AttentionMap`s: a row a layer, with the dense attention, what is kept of it, and how much that is, as PNG.

Needs matplotlib, which is an extra; it is used without its global state, so that no display is asked for. Colours are
those of Okabe and Ito and the map viridis, which readers with any colour vision tell apart.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dseek.core.attention_pattern import BLOCK_TOKENS, cell_tokens
from dseek.core.errors import ConfigError

if TYPE_CHECKING:
    from dseek.engine.attention_map import AttentionMap

LEAST_MASS = 1e-5
"""Lower end of the scale of attention, so that pictures compare."""

SHARP_BLOCKS = 256
"""Blocks that a picture shows one by one; of longer texts a dot blends several."""

DOTS_PER_INCH = 110
ROW_INCHES = 4.9
WIDTH_INCHES = 16.5

_HIDDEN_COLOUR = "#ffffff"
_LEFT_OUT_COLOUR = "#dcdcdc"
_NEAR_COLOUR = "#0072b2"
_SELECTED_COLOUR = "#e69f00"
_UNCHOSEN = {"dense": "everything is kept", "window": "no blocks are chosen"}
_FAR_COLOURS = ("#cc79a7", "#009e73", "#56b4e9", "#f0e442")


def require_matplotlib() -> None:
    """Make sure that there is something to draw with.

    Raises:
        ConfigError: there is not.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "--show-attention needs the package matplotlib",
            remedy="pip install matplotlib (dseek's extra named plot brings it), or leave the option out",
        )


def to_png(maps: Sequence[AttentionMap], title: str) -> bytes:
    """Draw maps of one text.

    Args:
        maps: at least one.
        title: above the picture.

    Returns:
        The bytes of a PNG file.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
    figure = Figure(figsize=(WIDTH_INCHES, ROW_INCHES * len(maps) + 0.5), dpi=DOTS_PER_INCH, layout=layout)
    figure.suptitle(title, fontsize="x-large", parse_math=False)
    rows = figure.subplots(len(maps), 3, squeeze=False)
    for (mass_axes, place_axes, share_axes), drawn in zip(rows, maps, strict=True):
        _draw_mass(mass_axes, drawn)
        _draw_places(place_axes, drawn)
        _draw_shares(share_axes, drawn)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw_mass(axes: Any, drawn: AttentionMap) -> None:
    """The dense attention on a logarithmic scale."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    from dseek.engine.attention_map import HIDDEN

    # What is seen and has no mass at all in float32 is drawn as the least, what is not seen stays white.
    mass_BB = np.ma.masked_where(drawn.place == HIDDEN, np.maximum(drawn.mass, LEAST_MASS / 10))
    colours = colormaps["viridis"].with_extremes(bad=_HIDDEN_COLOUR)
    image = _show(axes, drawn, mass_BB, cmap=colours, norm=LogNorm(LEAST_MASS, 1.0))
    bar = axes.figure.colorbar(image, ax=axes, extend="min", shrink=0.8)
    bar.set_label("share of a query block's attention on a key block")
    axes.set_title(f"layer {drawn.layer}, head {drawn.head}\ndense attention")


def _draw_places(axes: Any, drawn: AttentionMap) -> None:
    """What the pattern keeps."""
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.patches import Patch

    from dseek.engine.attention_map import FAR, HIDDEN
    from dseek.plan.attention_wish import pattern_text

    colours = _colours(drawn)
    norm = BoundaryNorm(np.arange(len(colours) + 1) - 0.5, len(colours))
    _show(axes, drawn, drawn.place, cmap=ListedColormap(colours), norm=norm)
    places = [place for place in np.unique(drawn.place).tolist() if place != HIDDEN]
    handles = [Patch(facecolor=colours[place], label=_label(place, drawn, FAR)) for place in places]
    axes.legend(handles=handles, loc="upper right", fontsize="small", framealpha=1.0)
    by = f"blocks chosen by {drawn.chosen_by}" if drawn.chosen_by else _UNCHOSEN[drawn.pattern.kind]
    axes.set_title(f"{pattern_text(drawn.pattern)}\n{by}")


def _draw_shares(axes: Any, drawn: AttentionMap) -> None:
    """How much of the attention falls where, by query block."""
    from dseek.engine.attention_map import FAR, LEFT_OUT, NEAR

    # Kept places lie at the bottom, what is left out ends at the top.
    shares_BP, colours = 100 * drawn.shares(), _colours(drawn)
    order = [*range(NEAR, shares_BP.shape[1]), LEFT_OUT]
    edges = np.minimum(np.arange(len(shares_BP) + 1) * BLOCK_TOKENS, drawn.num_tokens)
    stacked = np.cumsum(shares_BP[:, order], axis=1)
    below = np.zeros(len(shares_BP))
    for column, place in enumerate(order):
        axes.stairs(stacked[:, column], edges, baseline=below, fill=True, color=colours[place], linewidth=0)
        below = stacked[:, column]
    width = 1.2 if len(below) <= SHARP_BLOCKS // 2 else 0.4
    axes.stairs(
        100 * drawn.kept_by_block(), edges, baseline=None, color="black", linewidth=width, label="kept token by token"
    )
    means = f", {100 * drawn.in_means:.1f} % by means" if bool((drawn.place >= FAR).any()) else ""
    axes.set_title(f"{100 * drawn.kept:.1f} % kept token by token{means}\n{100 * drawn.skipped:.1f} % of pairs skipped")
    axes.set_xlim(0, drawn.num_tokens)
    axes.set_ylim(0, 100)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("query position (tokens)")
    axes.set_ylabel("share of the dense attention (%)")
    axes.legend(loc="lower right", fontsize="small", framealpha=1.0)


def _show(axes: Any, drawn: AttentionMap, values_BB: np.ndarray, **options: Any) -> Any:
    """Draw a grid of blocks with positions in tokens on both axes; blocks finer than a dot are blended."""
    side = len(values_BB) * BLOCK_TOKENS
    # Blocks of a dot or more stay sharp; finer ones are blended, since leaving rows out would hide lone blocks.
    options["interpolation"] = "nearest" if len(values_BB) <= SHARP_BLOCKS else "antialiased"
    image = axes.imshow(values_BB, extent=(0, side, side, 0), interpolation_stage="rgba", **options)
    axes.set_xlim(0, drawn.num_tokens)
    axes.set_ylim(drawn.num_tokens, 0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("key position (tokens)")
    axes.set_ylabel("query position (tokens)")
    return image


def _colours(drawn: AttentionMap) -> list[str]:
    """A colour for every place; past the colours there are, levels share the last one."""
    from dseek.engine.attention_map import FAR

    num_levels = max(0, int(drawn.place.max()) + 1 - FAR)
    far = [_FAR_COLOURS[min(level, len(_FAR_COLOURS) - 1)] for level in range(num_levels)]
    return [_HIDDEN_COLOUR, _LEFT_OUT_COLOUR, _NEAR_COLOUR, _SELECTED_COLOUR, *far]


def _label(place: int, drawn: AttentionMap, far: int) -> str:
    """What a place is called in the legend."""
    if place >= far:
        bias = "" if drawn.level_bias is None else f", bias {drawn.level_bias[place - far]:+.2f}"
        return f"by means, cells of {cell_tokens(place - far)} tokens{bias}"
    everything = "everything that the layer sees" if drawn.pattern.kind == "dense" else "window and first block"
    return ("", "left out", everything, "selected blocks")[place]
