"""`train_translation`: an encoder-decoder learned from pairs of sentences; stopped, it goes on where it was.

Weights and sums are float32; products may run in bfloat16 where that is quick. What is kept is a running
mean of the weights, which translates better than the last step's. After every pass everything is written, whole or not
at all, so that a run that was stopped repeats at most one pass. B pairs, T target tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save as to_safetensors

from dseek.core.errors import ConfigError
from dseek.core.files import atomic_write_bytes
from dseek.models.marian import Marian
from dseek.train.translation_text import Pair, PairBatch, batches, make_batch

Progress = Callable[[str, int, int, dict[str, float]], None]
"""Called with what is being done, how much of it is done, how much there is, and figures worth showing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TranslationTraining:
    """How a translation model is trained."""

    num_passes: int = 10
    """Passes over the pairs."""
    tokens_per_batch: int = 1536
    """Most tokens of a batch on its longer side, padding included."""
    learning_rate: float = 2e-3
    """Largest step of AdamW, reached after `warm_up_steps`."""
    warm_up_steps: int = 500
    """Steps over which the rate rises from nothing."""
    decay_share: float = 0.4
    """Share of all steps, the last ones, over which the rate falls to nothing. Until they begin, a training may be
    resumed with another number of passes."""
    weight_decay: float = 0.01
    """Of AdamW, on matrices alone."""
    label_smoothing: float = 0.1
    """Share of a label that is spread evenly over the vocabulary."""
    dropout: float = 0.2
    """Share of hidden values that a step leaves out."""
    inner_dropout: float = 0.0
    """The same inside the MLP."""
    averaging: float = 0.998
    """Share of the running mean that a step keeps; 0 keeps the last weights."""
    low_precision: bool = False
    """Whether products run in bfloat16; quick only on processors with instructions for it."""
    seed: int = 0
    """Of initial weights, of dropout and of the order of batches."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: a value out of its range.
        """
        for what, value, low, high in (
            ("number of passes", self.num_passes, 1, 100_000),
            ("tokens of a batch", self.tokens_per_batch, 16, 1 << 20),
            ("steps of warming up", self.warm_up_steps, 0, 1 << 20),
            ("share of decay", self.decay_share, 0.0, 1.0),
            ("weight decay", self.weight_decay, 0.0, 1.0),
            ("label smoothing", self.label_smoothing, 0.0, 0.9),
            ("dropout", self.dropout, 0.0, 0.9),
            ("inner dropout", self.inner_dropout, 0.0, 0.9),
            ("averaging", self.averaging, 0.0, 0.99999),
            ("seed", self.seed, 0, 1 << 31),
        ):
            if not low <= value <= high:
                raise ConfigError(f"the training's {what} is {value}", needed=f"{low} to {high}")
        if not 0.0 < self.learning_rate < 1.0:
            raise ConfigError(f"the learning rate is {self.learning_rate}", needed="above 0 and below 1")


def smoothed_loss(model: Marian, batch: PairBatch, label_smoothing: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy of a batch, summed over its target tokens.

    With smoothing s the loss of a token is (1 - s) (-log p(y)) + s mean over V (-log p). The mean over the vocabulary
    of the logits is that of one row, the mean of the head's rows, so smoothing needs no pass over the logits.

    Args:
        model: in the mode it is to be run in.
        batch: of `make_batch`.
        label_smoothing: s.

    Returns:
        The smoothed sum, with its gradient, and the plain one without.

    Source: Szegedy et al. 2016, Rethinking the Inception Architecture, section 7.
    """
    hidden, _ = model.decode(
        batch.inputs, model.source_cache(model.encode(batch.source, batch.source_mask)), batch.source_mask
    )
    kept = batch.labels >= 0
    hidden_ND, labels_N = hidden[kept], batch.labels[kept]
    logits_NV = model.lm_head(hidden_ND)
    plain = F.cross_entropy(logits_NV.float(), labels_N, reduction="sum")
    if label_smoothing == 0.0:
        return plain, plain.detach()
    chosen = logits_NV.gather(1, labels_N[:, None]).float().sum()
    average = (hidden_ND.float() @ model.lm_head.weight.float().mean(dim=0)).sum()
    return plain + label_smoothing * (chosen - average), plain.detach()


@torch.no_grad()
def validation_loss(model: Marian, pairs: Sequence[Pair], config: TranslationTraining) -> float:
    """Mean cross entropy a target token, in nats, without dropout and smoothing.

    Args:
        model: left in `eval` mode.
        pairs: that are not trained on.
        config: size of batches, precision.
    """
    model.eval()
    total, count = 0.0, 0
    for group in batches(pairs, config.tokens_per_batch, None):
        batch = make_batch(group, model.shape.pad_id, model.shape.start_id)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.low_precision):
            total += float(smoothed_loss(model, batch, 0.0)[1])
        count += batch.num_labels
    return total / max(1, count)


def train_translation(
    model: Marian,
    pairs: Sequence[Pair],
    validation: Sequence[Pair],
    state_file: Path,
    config: TranslationTraining,
    progress: Progress,
) -> list[float]:
    """Train a model in place; afterwards it has the averaged weights of the pass with the least validation loss.

    Args:
        model: of the shape wanted, its weights those to begin with.
        pairs: to learn from.
        validation: to judge passes by; without any, the last pass counts.
        state_file: safetensors that every pass is kept in; where it exists, training goes on after it.
        config: how.
        progress: told after every step, and after every pass with its losses.

    Returns:
        Validation loss of each pass.

    Raises:
        ConfigError: the state is of a training with other settings, or there are no pairs.
    """
    if not pairs:
        raise ConfigError("there are no pairs to train on", needed="sentences with their translations")
    run = _Run(model, config, state_file)
    steps_per_pass = sum(1 for _ in batches(pairs, config.tokens_per_batch, None))  # the same for every order
    while run.num_passes < config.num_passes:
        index = run.num_passes
        torch.manual_seed(run.seed_of(index))
        model.train()
        model.dropout.hidden, model.dropout.inner = config.dropout, config.inner_dropout
        total, count = 0.0, 0
        for number, group in enumerate(batches(pairs, config.tokens_per_batch, run.seed_of(index))):
            batch = make_batch(group, model.shape.pad_id, model.shape.start_id)
            with torch.autocast("cpu", torch.bfloat16, enabled=config.low_precision):
                loss, plain = smoothed_loss(model, batch, config.label_smoothing)
            run.step(loss / batch.num_labels, config.num_passes * steps_per_pass)
            total, count = total + float(plain), count + batch.num_labels
            progress(f"pass {index + 1}", number + 1, steps_per_pass, {"loss": total / count})
        run.finish_pass(validation)
        progress("passes", run.num_passes, config.num_passes, {"loss": total / count, "validation": run.losses[-1]})
    run.take_best()
    return run.losses


class _Run:
    """Weights, moments, averages and progress of one training, as they are kept in the state file."""

    def __init__(self, model: Marian, config: TranslationTraining, state_file: Path) -> None:
        self.model, self.config, self.state_file = model, config, state_file
        self.names = [name for name, _ in model.named_parameters()]
        self.parameters = [parameter for _, parameter in model.named_parameters()]
        matrices = [parameter for parameter in self.parameters if parameter.dim() > 1]
        others = [parameter for parameter in self.parameters if parameter.dim() <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=config.learning_rate,
            betas=(0.9, 0.98),
            fused=True,
        )
        self.average = [parameter.detach().clone() for parameter in self.parameters]
        self.best = [parameter.detach().clone() for parameter in self.parameters]
        self.num_passes, self.num_steps = 0, 0
        self.losses: list[float] = []
        if state_file.exists():
            self._restore()

    def seed_of(self, index: int) -> int:
        return self.config.seed * 1_000_003 + index

    def step(self, loss: torch.Tensor, num_steps: int) -> None:
        """One step of AdamW and of the running mean."""
        rise = min(1.0, (self.num_steps + 1) / max(1, self.config.warm_up_steps))
        fall = min(1.0, (1.0 - self.num_steps / num_steps) / max(1e-9, self.config.decay_share))
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * rise * fall
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.num_steps += 1
        # The mean reaches back over no more than a tenth of the steps so far, or it would remember the first ones.
        kept = min(self.config.averaging, self.num_steps / (self.num_steps + 10.0))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, [value.detach() for value in self.parameters], 1.0 - kept)

    def finish_pass(self, validation: Sequence[Pair]) -> None:
        """Judge the averaged weights, keep them where they are the best so far, and write the state."""
        current = [value.detach().clone() for value in self.parameters]
        self._put(self.average)
        self.losses.append(validation_loss(self.model, validation, self.config) if validation else 0.0)
        if self.losses[-1] <= min(self.losses):
            self.best = [value.clone() for value in self.average]
        self._put(current)
        self.num_passes += 1
        self._keep()

    def take_best(self) -> None:
        """Give the model the weights that were judged best, and switch dropout off."""
        self._put(self.best)
        self.model.dropout.hidden = self.model.dropout.inner = 0.0
        self.model.eval()

    @torch.no_grad()
    def _put(self, values: Sequence[torch.Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)

    def _keep(self) -> None:
        tensors: dict[str, torch.Tensor] = {}
        for index, (name, value) in enumerate(zip(self.names, self.parameters, strict=True)):
            tensors[f"weight.{name}"] = value.detach().contiguous()
            tensors[f"average.{name}"], tensors[f"best.{name}"] = self.average[index], self.best[index]
            for key, moment in self.optimizer.state[value].items():
                tensors[f"{key}.{name}"] = moment.detach().clone()
        metadata = {key: str(value) for key, value in asdict(self.config).items()}
        metadata |= {"passes": str(self.num_passes), "steps": str(self.num_steps)}
        metadata["losses"] = " ".join(repr(loss) for loss in self.losses)
        atomic_write_bytes(self.state_file, to_safetensors(tensors, metadata))

    def _restore(self) -> None:
        with safe_open(str(self.state_file), framework="pt") as stored:
            metadata = stored.metadata() or {}
            done = int(metadata.get("passes", 0))
            begun = min(self.config.num_passes, int(metadata.get("num_passes", 0))) * (1.0 - self.config.decay_share)
            for key, value in asdict(self.config).items():
                if key == "num_passes" and done <= begun:
                    continue  # the rate has not begun to fall, so nothing so far depends on it
                if metadata.get(key) != str(value):
                    raise ConfigError(
                        f"{self.state_file} is of a training with {key} {metadata.get(key)}",
                        needed=f"{key} {value}",
                        remedy="train into another folder, or with the settings it was begun with",
                    )
            names = set(stored.keys())
            if f"weight.{self.names[0]}" not in names:
                raise ConfigError(f"{self.state_file} is of another model", remedy="train into another folder")
            with torch.no_grad():
                for index, (name, value) in enumerate(zip(self.names, self.parameters, strict=True)):
                    value.copy_(stored.get_tensor(f"weight.{name}"))
                    self.average[index].copy_(stored.get_tensor(f"average.{name}"))
                    self.best[index].copy_(stored.get_tensor(f"best.{name}"))
                    keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in names]
                    self.optimizer.state[value] = {key: stored.get_tensor(f"{key}.{name}") for key in keys}
            self.num_passes, self.num_steps = done, int(metadata["steps"])
            self.losses = [float(loss) for loss in metadata["losses"].split()]
