"""Past benchmarks on the command line: `--no-history`, machines corrected by them, and what `dseek bench` adds."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from dseek.core import environment

if TYPE_CHECKING:
    from dseek.cli.bench import Case
    from dseek.hardware.machine import Machine
    from dseek.plan.plan import Plan


def add_history_option(parser: argparse._ActionsContainer) -> None:
    """Add --no-history.

    Args:
        parser: the verb's parser, or a group of it.
    """
    parser.add_argument(
        "--no-history",
        action="store_true",
        help="plan from the machine's measurements alone, not corrected by past runs of `dseek bench`",
    )


def corrected_machine(machine: Machine, *, ignore: bool) -> Machine:
    """Correct a machine by the past benchmarks on it.

    Args:
        machine: the measurements.
        ignore: give the machine as it is.
    """
    # Most machines have no past: then nothing is imported for it.
    path = environment.get("DSEEK_CACHE_DIR") / "history" / f"{machine.machine_id}.jsonl"
    if ignore or not path.exists():
        return machine
    from dseek import __version__
    from dseek.plan import history

    return history.corrected(machine, history.corrections(history.read(machine.machine_id), __version__))


def note(machine: Machine) -> str:
    """Say which corrections there are.

    Args:
        machine: the machine, corrected or not.

    Returns:
        Such as `by past benchmarks: decode i8c x 1.08 (6)`, or nothing.
    """
    from dseek import __version__
    from dseek.plan import history

    found = history.corrections(history.read(machine.machine_id), __version__)
    parts = [f"{entry.phase} {entry.weight_format} x {entry.factor:.2f} ({entry.num_entries})" for entry in found]
    return "by past benchmarks: " + ", ".join(parts) if parts else ""


def remember(plan: Plan, machine: Machine, cases: list[Case]) -> int:
    """Add a benchmark's cases to the history.

    Args:
        plan: what ran.
        machine: what it was planned from, without corrections.
        cases: measured cases.

    Returns:
        Entries that were added.
    """
    from dseek import __version__
    from dseek.plan import history

    entries = []
    for case in cases:
        predicted = plan.predict(
            machine, prompt_tokens=case.context_tokens, context_tokens=case.context_tokens, batch=case.batch
        )
        tokens = case.batch * case.context_tokens
        pairs: tuple[tuple[history.Phase, float, float], ...] = (
            ("prefill", tokens / predicted.prefill_tokens_s, tokens / case.prefill_tokens_s),
            ("decode", case.batch / predicted.decode_tokens_s, case.batch / case.decode_tokens_s),
        )
        entries += [
            history.Entry(
                version=history.VERSION,
                dseek=__version__,
                machine_id=plan.machine_id,
                phase=phase,
                kernels=plan.kernels,
                weight_format=history.main_format(plan),
                predicted_s=predicted_s,
                measured_s=measured_s,
                context_tokens=case.context_tokens,
                batch=case.batch,
            )
            for phase, predicted_s, measured_s in pairs
            if measured_s > 0
        ]
    history.append(entries)
    return len(entries)
