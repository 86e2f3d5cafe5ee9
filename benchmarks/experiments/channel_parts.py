"""Where the loss of int8 by channel and token sits: perplexity with one role of some layers in groups of 32 instead.

Run: `python -m benchmarks.experiments.channel_parts [--text prose|source]`, with `BENCHMARKS_PROSE` as for the row
`quality-w8a8`, whose texts and model these are. Everything else stays in the format i8c.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys

from benchmarks import models
from benchmarks.rows import Settings, quantised
from benchmarks.scoring import perplexity
from dseek.plan.formats import ROLES, LayerFormats

SIXTHS = 6


def main() -> int:
    """Print the change of perplexity over fp32 of every part.

    Returns:
        Exit status.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experiments.channel_parts", description=__doc__)
    parser.add_argument("--text", choices=("prose", "source"), default="prose", help="what is scored")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="threads (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="only show that it works")
    options = parser.parse_args()
    settings = Settings(threads=options.threads, smoke=options.smoke)
    texts = {options.text: quantised.measured_texts(settings)[options.text]}
    wide = quantised.reference(settings, texts, models.hf_folder(quantised.MODEL), models.own_path(quantised.MODEL))
    right = perplexity(wide[options.text]["losses"])
    for name, chosen in _parts().items():
        found = quantised.score_formats(settings, models.own_path(quantised.MODEL), texts, chosen)
        print(f"{name:24} {100 * (perplexity(found[options.text]['losses']) / right - 1):+.3f} %", flush=True)
    return 0


def _parts() -> dict[str, quantised.FormatsOfLayer]:
    """What is put into groups, by name: nothing, each role, and down_proj by sixths of the layers."""
    channels = LayerFormats.uniform("i8c")

    def with_role(role: str, sixth: int | None = None) -> quantised.FormatsOfLayer:
        def formats(layer: int, num_layers: int) -> LayerFormats:
            here = sixth is None or layer * SIXTHS // num_layers == sixth
            return dataclasses.replace(channels, **{role: "i8g"}) if here else channels

        return formats

    parts: dict[str, quantised.FormatsOfLayer] = {"all in i8c": lambda layer, num_layers: channels}
    parts |= {f"{role} in i8g": with_role(role) for role in ROLES}
    parts |= {f"down in i8g, sixth {sixth}": with_role("down", sixth) for sixth in range(SIXTHS)}
    return parts


if __name__ == "__main__":
    sys.exit(main())
