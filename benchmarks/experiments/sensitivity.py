"""Which weights it hurts to keep in 4 bits: `python -m benchmarks.experiments.sensitivity`.

Runs SmolLM2, with its weights moved off the 4-bit grid of its file, through the engine: bf16 everywhere but in one
role, one layer or one role of some layers at a time, which are in int4. Each is compared with bf16 everywhere, window
by window of the same text. The sums of the single losses beside the loss of all together show how far they add up. The
figures of `dseek.plan.quality.SENSITIVITY` come from here.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from benchmarks import models
from benchmarks.text import standard_library_text
from dseek import load, plan
from dseek.engine.evaluate import score
from dseek.models.files import open_model
from dseek.plan.attention_wish import AttentionWish
from dseek.plan.formats import LayerFormats
from dseek.plan.plan import Plan
from dseek.plan.weights import formats_text

WINDOW = 1024
DENSE_WISH = AttentionWish(kind="dense")
SEGMENT = 5
"""Layers that are changed together where roles are looked at by depth."""

ROLES = ("qkv", "output", "gate_up", "down")
Narrow = Callable[[int, str], bool]
"""Whether the projection of a layer and role is in int4."""


class Losses:
    """Losses of one folder's model on one text.

    Args:
        folder: a model that int4 rounds.
        num_windows: windows of `WINDOW` tokens.
        skipped: windows of the text to leave out before them.
    """

    def __init__(self, folder: str, num_windows: int, skipped: int = 0) -> None:
        self.folder = folder
        with open_model(folder) as files:
            text = standard_library_text((num_windows + skipped) * WINDOW * 6)
            ids = files.tokenizer().encode(text, add_special_tokens=False)[skipped * WINDOW :]
            objective = plan.Objective(context_tokens=WINDOW, batch=1)
            self.plan = plan.make(
                files.shape,
                plan.this_machine(),
                objective,
                encodings=files.encodings(),
                precision="bf16",
                attention=DENSE_WISH,
            )
        self.windows = [ids[start : start + WINDOW] for start in range(0, num_windows * WINDOW, WINDOW)]
        self.base = self._run(self.plan)

    def _run(self, tried: Plan) -> np.ndarray:
        """Mean negative log likelihood in nats of each window."""
        with load(self.folder, plan=tried) as llm:
            return np.array([-score(llm, window)[0].mean() for window in self.windows])

    def of(self, tried: Plan) -> tuple[float, float]:
        """Measure one plan.

        Args:
            tried: a plan of the folder's model.

        Returns:
            Rise of the mean negative log likelihood over bf16 in nats, which is the relative rise of perplexity where
            it is small, and its standard error over the windows.
        """
        rises = self._run(tried) - self.base
        return float(rises.mean()), float(rises.std(ddof=1) / math.sqrt(len(rises)))


def narrowed(base: Plan, narrow: Narrow) -> Plan:
    """Put some projections of a plan in int4.

    Args:
        base: the plan.
        narrow: which.

    Returns:
        Another plan.
    """
    layers = tuple(
        LayerFormats(**{role: "i4g" if narrow(layer, role) else wide for role, wide in formats.by_role().items()})
        for layer, formats in enumerate(base.layer_formats)
    )
    return dataclasses.replace(base, layer_formats=layers)


def report(title: str, losses: Losses, choices: Iterable[tuple[str, Narrow]]) -> float:
    """Measure and print some choices.

    Args:
        title: what they have in common.
        losses: measures them.
        choices: name and narrow projections of each.

    Returns:
        Sum of their losses.
    """
    print(f"\n{title}", flush=True)
    total, variance = 0.0, 0.0
    for name, narrow in choices:
        rise, error = losses.of(narrowed(losses.plan, narrow))
        total, variance = total + rise, variance + error**2
        print(f"  {name:24} {100 * rise:+7.3f} % +- {100 * error:.3f}", flush=True)
    print(f"  {'sum':24} {100 * total:+7.3f} % +- {100 * math.sqrt(variance):.3f}", flush=True)
    return total


def report_plans(losses: Losses, accepted: Sequence[float]) -> None:
    """Measure what the planner makes of accepted losses.

    Args:
        losses: measures them.
        accepted: losses to accept, fractions.
    """
    print("\nplans, their loss as accepted, as foreseen and as measured", flush=True)
    with open_model(losses.folder) as files:
        shape, encodings = files.shape, files.encodings()
    for limit in accepted:
        objective = plan.Objective(context_tokens=WINDOW, batch=1, prompt_tokens=512, max_quality_loss=limit)
        made = plan.make(shape, plan.this_machine(), objective, encodings=encodings, attention=DENSE_WISH)
        choice = next(entry for entry in made.choices if entry.name == "precision and cache")
        foreseen = next(entry for entry in choice.alternatives if not entry.rejected)
        rise, error = losses.of(made)
        print(f"  {100 * limit:g} %, {100 * foreseen.quality_loss:.2f} %, {100 * rise:+.2f} % +- {100 * error:.2f}")
        print(f"    {choice.chosen}: {formats_text(made.layer_formats)}", flush=True)


def _segments(num_layers: int) -> Sequence[range]:
    return [range(start, min(start + SEGMENT, num_layers)) for start in range(0, num_layers, SEGMENT)]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=6, help="windows of 1,024 tokens (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the factors that move the weights (%(default)s)")
    parser.add_argument("--spread", type=float, default=1.25, help="the largest of them (default: %(default)s)")
    parser.add_argument("--roles-only", action="store_true", help="leave out what depends on the layer")
    parser.add_argument("--skip", type=int, default=0, help="windows to leave out before them (default: %(default)s)")
    parser.add_argument("--accepted", type=float, nargs="+", metavar="X", help="measure plans for these losses instead")
    arguments = parser.parse_args()
    folder = models.off_grid_folder(models.SMOLLM2, arguments.seed, arguments.spread)
    losses = Losses(str(folder), arguments.windows, arguments.skip)
    print(f"perplexity in bf16: {math.exp(losses.base.mean()):.4f}")
    if arguments.accepted:
        report_plans(losses, arguments.accepted)
        return
    num_layers = losses.plan.shape.num_layers
    report("int4 everywhere", losses, [("all", lambda layer, role: True)])
    report("one role in all layers", losses, [(role, _only(range(num_layers), [role])) for role in ROLES])
    if arguments.roles_only:
        return
    by_layer = [(f"layer {layer}", _only([layer], ROLES)) for layer in range(num_layers)]
    report("all roles of one layer", losses, by_layer)
    for role in ROLES:
        groups = [(f"layers {part[0]} to {part[-1]}", _only(part, [role])) for part in _segments(num_layers)]
        report(f"{role}, by depth", losses, groups)


def _only(layers: Sequence[int], roles: Sequence[str]) -> Narrow:
    return lambda layer, role: layer in layers and role in roles


if __name__ == "__main__":
    main()
