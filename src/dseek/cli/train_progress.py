"""Shows a training on stderr, and writes its curves for TensorBoard where that was asked for."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dseek.core.errors import ConfigError

if TYPE_CHECKING:
    from dseek.train.run import Ready
    from dseek.train.trainer import Listener


@contextmanager
def shown_training(training: Ready) -> Iterator[Listener]:
    """Make what a training tells visible: a bar with the time left on a terminal, a line a report elsewhere.

    Args:
        training: about to begin.

    Yields:
        The listener to give to `train`.

    Raises:
        ConfigError: TensorBoard was asked for and is not installed.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(file=sys.stderr)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    writer = _writer(training)
    with Progress(*columns, console=console, disable=not console.is_terminal or not training.processes.is_first) as bar:
        try:
            yield _Shown(training, console.is_terminal, bar, writer).tell
        finally:
            if writer is not None:
                writer.close()


class _Shown:
    """One training on the screen."""

    def __init__(self, training: Ready, is_terminal: bool, bar: Any, writer: Any) -> None:
        self._is_terminal, self._bar, self._writer = is_terminal, bar, writer
        self._task: Any = None
        self._limit_tokens_s = limit_tokens_s(training)
        self._tokens, self._seconds = 0.0, 0.0

    def tell(self, what: str, figures: dict[str, Any]) -> None:
        if what == "counting":
            self._line("counting rows")
        elif what == "start":
            self._task = self._bar.add_task("training", total=figures["num_steps"], completed=figures["global_step"])
            if figures["global_step"]:
                self._line(f"going on after step {figures['global_step']} of {figures['num_steps']}")
        elif what == "step":
            self._step(figures)
        elif what == "log":
            self._log(figures)
        elif what == "evaluation":
            self._line(f"step {figures['global_step']}: evaluation loss {figures['eval_loss']:.4f}")
            self._write("eval/loss", figures["eval_loss"], figures["global_step"])
        elif what == "checkpoint":
            self._line(f"saved {figures['folder']}")

    def _step(self, figures: dict[str, Any]) -> None:
        # The first step pays for what is done once.
        if figures["global_step"] > 1:
            self._tokens += figures["num_tokens"]
            self._seconds += figures["step_s"]
        self._bar.update(self._task, completed=figures["global_step"], description=self._text(figures))

    def _log(self, figures: dict[str, Any]) -> None:
        step = figures["global_step"]
        if not self._is_terminal:
            self._line(f"step {step} of {figures['num_steps']}: {self._text(figures)}")
        for name in ("loss", "learning_rate", "grad_norm", "epoch"):
            self._write(f"train/{name}", figures[name], step)
        if self._seconds:
            self._write("train/tokens_per_second", self._tokens / self._seconds, step)
            if self._limit_tokens_s:
                share = self._tokens / self._seconds / self._limit_tokens_s
                self._write("train/limit_share", share, step)
        self._tokens, self._seconds = 0.0, 0.0

    def _text(self, figures: dict[str, Any]) -> str:
        text = f"loss {figures['loss']:.4f}"
        if self._seconds:
            tokens_s = self._tokens / self._seconds
            text += f", {tokens_s:,.0f} tokens/s"
            if self._limit_tokens_s:
                text += f" ({tokens_s / self._limit_tokens_s:.0%} of the limit)"
        return text

    def _line(self, text: str) -> None:
        if self._is_terminal:
            self._bar.console.print(text)
        else:
            print(text, file=sys.stderr, flush=True)

    def _write(self, name: str, value: float, step: int) -> None:
        if self._writer is not None:
            self._writer.add_scalar(name, value, step)


def limit_tokens_s(training: Ready) -> float | None:
    """Tell how many tokens a second the machine's measured matrix products allow, all ranks of this host together.

    Args:
        training: the work.

    Returns:
        The limit, or None where this machine was not measured (`dseek doctor`) or a device of CUDA computes.
    """
    from dseek.hardware.store import kept_machine
    from dseek.plan.training import train_flops_per_token

    machine = kept_machine() if training.processes.device.type == "cpu" else None
    dtype = "bf16" if training.config.bf16 else "fp32"
    rates = [rate.gflops for rate in machine.gemm if rate.dtype == dtype] if machine is not None else []
    return max(rates) * 1e9 / train_flops_per_token(training.choice.work) if rates else None


def _writer(training: Ready) -> Any:
    if training.config.report_to != "tensorboard" or not training.processes.is_first:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError(
            'report_to is "tensorboard", which is not installed', remedy="pip install 'dseek[train]', or leave it out"
        ) from None
    return SummaryWriter(str(Path(training.config.output_dir) / "runs"))
