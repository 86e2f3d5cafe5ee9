"""`Trainer`: one training, step by step, from a configuration to a folder that transformers loads.

    while steps are left: take the next rows, learn from them, and report, evaluate and save where that is due

A training that was stopped (Ctrl-C, SIGTERM, a crash) goes on from its newest whole state at the very next row and with
the very same numbers: dropout is drawn from the step's and the batch's number, not from a state. Several ranks learn
the same as one with a batch as large as all of theirs, to rounding. The trainer knows no terminal: what happens it
tells its listener.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dseek.core.errors import NotFiniteError
from dseek.core.logs import get_logger
from dseek.train.batches import Batch, StepBatches, evaluation_batches
from dseek.train.config import TrainConfig
from dseek.train.faults import Fault, strike
from dseek.train.model_source import ModelSource
from dseek.train.optimizers import end, set_learning_rate
from dseek.train.packing import RowState
from dseek.train.preparation import (
    MemoryChoice,
    count_rows,
    make_data,
    make_model,
    make_rows,
    written_config,
)
from dseek.train.processes import Processes
from dseek.train.results import save_checkpoint, save_result
from dseek.train.resuming import find_newest
from dseek.train.saving import TrainerState
from dseek.train.schedule import learning_rate
from dseek.train.shards import whole
from dseek.train.snapshots import Snapshots
from dseek.train.supervisor import restart_count

logger = get_logger(__name__)

Listener = Callable[[str, dict[str, Any]], None]
"""Called with what happened (`start`, `step`, `log`, `evaluation`, `checkpoint`, `result`) and its figures; on the
first rank alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """How a training ended."""

    global_step: int
    """Steps that are done."""
    num_steps: int
    """Steps that there were to be."""
    was_stopped: bool
    """Somebody asked to stop before the end; the newest checkpoint has all steps that are done."""
    train_loss: float | None
    """Mean cross entropy of the last step's labels, in nats; None where no step was done."""
    eval_loss: float | None
    """The same of the evaluation files, at the end; None without any."""
    output_dir: Path
    """Where everything is."""
    peak_bytes: int = 0
    """Memory of the rank that held most, at its most."""


class Trainer:
    """One training.

    Args:
        config: all that is decided.
        listener: told what happens.
        source: the model, opened.
        processes: this process and its peers.
        choice: how memory is saved.
        faults: what is to go wrong.

    Raises:
        DseekError: the model, the data or a checkpoint is not what it should be.
    """

    def __init__(
        self,
        config: TrainConfig,
        listener: Listener,
        *,
        source: ModelSource,
        processes: Processes,
        choice: MemoryChoice,
        faults: Sequence[Fault] = (),
    ) -> None:
        self.config, self.listener, self.processes = config, listener, processes
        self.choice, self.faults = choice, faults
        self.folder = Path(config.output_dir)
        self.rows = make_rows(config, source, config.data.train, learned=True)
        self.eval_rows = make_rows(config, source, config.data.eval, learned=False) if config.data.eval else None
        self.prepared = make_model(config, source, processes, choice)
        self.model, self.optimizer = self.prepared.model, self.prepared.optimizer
        self.global_step, self.num_tokens_seen = 0, 0
        self.row_state = RowState()
        self.log_history: list[dict[str, float]] = []
        self.last_loss: float | None = None
        self.eval_loss: float | None = None
        self.stop_wanted = False
        self.snapshots = Snapshots(config, self.prepared, processes)
        self._resume()
        self.num_steps = config.max_steps if config.max_steps > 0 else self._count_steps()

    def run(self) -> TrainResult:
        """Train to the end, or until `stop` was called.

        Returns:
            How it ended.

        Raises:
            NotFiniteError: the loss is no number any more; the checkpoints are as they were.
            ConfigError: a document is not what it should be.
            PeerError: a rank died.
        """
        self._tell("start", global_step=self.global_step, num_steps=self.num_steps, output_dir=str(self.folder))
        data = make_data(self.config, self.rows, self.row_state, self.processes)
        try:
            stopped = False
            with self.processes.among_peers():
                while self.global_step < self.num_steps and not stopped:
                    strike(self.faults, rank=self.processes.rank, step=self.global_step, start=restart_count())
                    stopped = self.learn(data.next())
                    self._evaluate_if_due()
                    self._save_if_due(now=stopped)
                if not stopped:
                    self._finish()
            self.snapshots.close()
        finally:
            data.close()
            end(self.optimizer, self.config, self.processes.rank)
        return TrainResult(
            global_step=self.global_step,
            num_steps=self.num_steps,
            was_stopped=stopped,
            train_loss=self.last_loss,
            eval_loss=self.eval_loss,
            output_dir=self.folder,
        )

    def stop(self) -> None:
        """Ask for an end after the step under way; may be called from a signal handler."""
        self.stop_wanted = True

    def learn(self, step: StepBatches) -> bool:
        """Take one step of the optimiser.

        Args:
            step: the rows.

        Returns:
            True where a rank was asked to stop.

        Raises:
            NotFiniteError: the loss is no number any more.
            PeerError: the supervisor has ended.
        """
        started_s = time.perf_counter()
        # 1. All ranks agree on how much a label weighs.
        num_labels, num_tokens = self.processes.sum(step.num_labels, step.num_tokens)
        # 2. Gradients of the mean over all labels of the step, whatever batch and rank they are in.
        loss_sum = torch.zeros((), device=self.processes.device)
        for number, batch in enumerate(step.batches):
            self.prepared.shards.before_backward(is_last=number == len(step.batches) - 1)
            self._seed_dropout(number)
            loss = self._loss(batch)
            (loss * (self.processes.world_size / max(1.0, num_labels))).backward()
            loss_sum += loss.detach().to(loss_sum.dtype)
            self.processes.lease.sign()
        self.prepared.shards.average_gradients()
        # 3. The step.
        rate = learning_rate(self.config, self.global_step, self.num_steps)
        norm = self._clip()
        set_learning_rate(self.optimizer, rate)
        total, wants = self.processes.sum(float(loss_sum), float(self.stop_wanted))
        total /= max(1.0, num_labels)
        if total != total or total in (float("inf"), float("-inf")):
            raise NotFiniteError(
                f"the loss of step {self.global_step + 1} is {total}",
                needed="a finite number",
                remedy="lower learning_rate or max_grad_norm; the checkpoints so far are in order",
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        # 4. What it came to.
        self.global_step += 1
        self.num_tokens_seen += int(num_tokens)
        self.row_state, self.last_loss = step.after, total
        figures = {
            "loss": total,
            "learning_rate": rate,
            "grad_norm": norm,
            "num_labels": num_labels,
            "num_tokens": num_tokens,
            "step_s": time.perf_counter() - started_s,
            "epoch": float(step.after.position.epoch),
        }
        self._report(figures)
        self.processes.lease.renew(self.global_step)
        return wants > 0

    @torch.no_grad()
    def evaluate(self) -> float:
        """Compute the mean cross entropy of the evaluation files. All ranks call this together.

        Returns:
            Nats a label.
        """
        assert self.eval_rows is not None
        self.model.eval()
        total, count = 0.0, 0.0
        for batch in evaluation_batches(
            self.eval_rows,
            batch_size=self.config.per_device_eval_batch_size,
            rank=self.processes.rank,
            world_size=self.processes.world_size,
            separate=self.config.data.document_boundaries == "attention",
        ):
            total += float(self._loss(batch))
            self.processes.lease.sign()
            count += batch.num_labels
        self.model.train()
        total, count = self.processes.sum(total, count)
        self.eval_loss = total / max(1.0, count)
        self._log({"eval_loss": self.eval_loss})
        self._tell("evaluation", global_step=self.global_step, eval_loss=self.eval_loss, num_labels=count)
        return self.eval_loss

    def save(self) -> None:
        """Write a checkpoint of the steps that are done. All ranks call this together."""
        folder = save_checkpoint(self.folder, self._state(), self.prepared, self.config, self.processes)
        self._tell("checkpoint", global_step=self.global_step, folder=str(folder))

    def _state(self) -> TrainerState:
        return TrainerState(
            global_step=self.global_step,
            num_tokens_seen=self.num_tokens_seen,
            world_size=self.processes.world_size,
            data=self.row_state,
            config=written_config(self.config),
            log_history=tuple(self.log_history),
            memory=self.choice,
        )

    def _loss(self, batch: Batch) -> torch.Tensor:
        device = self.processes.device
        documents = None if batch.documents is None else batch.documents.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.config.bf16):
            loss: torch.Tensor = self.model(batch.token_ids.to(device), batch.labels.to(device), documents)
        return loss

    def _seed_dropout(self, batch_idx: int) -> None:
        """Draw the same whether the training was stopped in between or not."""
        if self.config.method == "lora" and self.config.lora.lora_dropout:
            number = self.global_step * self.config.gradient_accumulation_steps + batch_idx
            torch.manual_seed((self.config.seed * 1_000_003 + number) * 4096 + self.processes.rank)

    def _clip(self) -> float:
        learned = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        longest = self.config.max_grad_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(learned, longest)
        return float(whole(norm))

    def _report(self, figures: dict[str, float]) -> None:
        self._tell("step", global_step=self.global_step, num_steps=self.num_steps, **figures)
        if self.global_step % self.config.logging_steps == 0 or self.global_step == self.num_steps:
            self._log({key: figures[key] for key in ("loss", "learning_rate", "grad_norm", "epoch")})
            self._tell("log", global_step=self.global_step, num_steps=self.num_steps, **figures)

    def _log(self, figures: dict[str, float]) -> None:
        self.log_history.append({"step": float(self.global_step), **figures})

    def _tell(self, what: str, **figures: Any) -> None:
        if self.processes.is_first:
            self.listener(what, figures)

    def _evaluate_if_due(self) -> None:
        every = self.config.eval_steps
        if every and self.global_step % every == 0 and self.global_step < self.num_steps:
            self.evaluate()

    def _save_if_due(self, *, now: bool) -> None:
        every = self.config.save_steps
        before_end = self.global_step < self.num_steps and not now
        if before_end and self.snapshots.is_due(self.global_step):
            self.snapshots.save(self._state())
        if now or (before_end and every and self.global_step % every == 0):
            self.save()

    def _finish(self) -> None:
        if self.eval_rows is not None:
            self.evaluate()
        self.save()
        files = save_result(self.folder, self.prepared, self.config, self.processes)
        self._tell("result", output_dir=str(self.folder), files=files)

    def _resume(self) -> None:
        """Go on from the newest whole state, where there is one."""
        found = find_newest(self.config, self.processes)
        if found is None:
            self.row_state = self.rows.start()
        else:
            found.restore(self.prepared, self.config, self.processes)
            state = found.state
            self.global_step, self.num_tokens_seen = state.global_step, state.num_tokens_seen
            self.row_state, self.log_history = state.data, list(state.log_history)
            logger.info("going on after step %d of %s", self.global_step, found.place)
        self.snapshots.begin_after(self.global_step)

    def _count_steps(self) -> int:
        rows_of_step = (
            self.config.per_device_train_batch_size
            * self.config.gradient_accumulation_steps
            * self.processes.world_size
        )
        self._tell("counting", output_dir=str(self.folder))
        rows = count_rows(self.rows, self.processes.lease.sign)
        return max(1, round(self.config.num_train_epochs * rows / rows_of_step + 0.499))
