"""`Chooser`: judges complete layouts by the objective, takes the best of several and writes down why.

Among values whose predicted cost is within 3 % of the best, which is less than the prediction can tell apart, the one
that comes first in the choice's own order is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dseek.core.errors import ConfigError, MemoryLimitError
from dseek.core.shape import ModelShape
from dseek.hardware.machine import Machine
from dseek.plan import candidates, cost, quality
from dseek.plan.attention_loss import attention_loss
from dseek.plan.candidates import Wishes
from dseek.plan.cost import Prediction
from dseek.plan.explain import Alternative, Choice, loss_text, score_text, size_text
from dseek.plan.layout import PAGE_TOKENS, Layout
from dseek.plan.objective import Objective
from dseek.plan.weights import Weights

TIE = 1.03
MEMORY_SHARE = 0.9
"""Of the machine's memory that a plan may foresee, unless the user sets a limit."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A complete layout with what it is worth."""

    value: str
    """Shown to people."""
    layout: Layout
    """The layout."""
    weights: Weights
    """Its weights."""
    loss: float
    """Rise of perplexity by weights, cache and attention, a fraction."""
    predicted: Prediction
    """For the typical request."""
    score: float
    """What the objective counts; less is better."""
    refused: str
    """Why it is out of the question; empty if it is not."""


class Chooser:
    """Keeps what every step of a search needs, and the choices so far.

    Args:
        shape: the model.
        machine: the measurements.
        objective: what for.
        wishes: what is decided already.
        cache_losses: what cache dtypes lose, where that was measured.

    Raises:
        ConfigError: the objective's lengths do not fit the model.
    """

    def __init__(
        self,
        shape: ModelShape,
        machine: Machine,
        objective: Objective,
        wishes: Wishes,
        cache_losses: Mapping[str, float] | None = None,
    ) -> None:
        self._cache_losses = cache_losses
        self.shape = shape
        self.machine = machine
        self.objective = objective
        self.wishes = wishes
        self.context = candidates.context_of(shape, objective)
        self.prompt, self.answer = objective.request(self.context)
        self.limit = objective.memory_limit_bytes or int(MEMORY_SHARE * machine.memory_limit_bytes)
        self.choices: list[Choice] = []

    def candidate(self, value: str, layout: Layout, weights: Weights, *, batch: int, keep: bool = False) -> Candidate:
        """Predict a layout and judge it.

        Args:
            value: its name for people.
            layout: the layout.
            weights: its weights.
            batch: sequences at a time.
            keep: overlook its quality (the user asked for it, or it was accepted before).
        """
        predicted = cost.predict(
            self.shape, self.machine, layout, prompt_tokens=self.prompt, context_tokens=self.prompt, batch=batch
        )
        loss = weights.loss + self.cache_loss(layout.cache_dtype)
        # Any request may fill the context, so that is the length the loss is foreseen for.
        loss += attention_loss(self.shape, layout.attention_patterns, self.context)
        refused = ""
        if predicted.peak_bytes > self.limit:
            refused = f"needs {size_text(predicted.peak_bytes)} of memory, {size_text(self.limit)} allowed"
        elif loss > self.objective.max_quality_loss + 1e-9 and not keep:
            refused = f"loses {loss_text(loss)} of quality, {loss_text(self.objective.max_quality_loss)} accepted"
        return Candidate(
            value=value,
            layout=layout,
            weights=weights,
            loss=loss,
            predicted=predicted,
            score=self.score(predicted, batch),
            refused=refused,
        )

    def cache_loss(self, cache_dtype: str) -> float:
        """Return what a cache dtype loses.

        Args:
            cache_dtype: the dtype.
        """
        return quality.cache_loss(cache_dtype, self._cache_losses)

    def score(self, predicted: Prediction, batch: int) -> float:
        """Cost of a layout, less is better: seconds of a request, seconds a token, or bytes.

        Args:
            predicted: of the layout.
            batch: sequences at a time.
        """
        seconds = batch * self.prompt / predicted.prefill_tokens_s + batch * self.answer / predicted.decode_tokens_s
        if self.objective.kind == "memory":
            return float(predicted.peak_bytes)
        if self.objective.kind == "throughput":
            return seconds / (batch * (self.prompt + self.answer))
        return seconds

    def choose(
        self, name: str, entries: Sequence[Candidate], order: Callable[[Candidate], tuple[float, ...]], why: str
    ) -> Candidate:
        """Take the best of those allowed; write down the choice.

        Args:
            name: what is decided.
            entries: at least one.
            order: breaks ties, least first.
            why: said of a choice that had alternatives.

        Returns:
            The one taken.

        Raises:
            MemoryLimitError: none fits.
            ConfigError: none is accurate enough (only with a cache dtype that was asked for).
        """
        allowed = [entry for entry in entries if not entry.refused]
        if not allowed:
            raise self.refusal(entries)
        best = min(entry.score for entry in allowed)
        tied = [entry for entry in allowed if entry.score <= best * TIE]
        chosen = min(tied, key=order)
        alternatives = tuple(
            Alternative(
                value=entry.value,
                prefill_tokens_s=entry.predicted.prefill_tokens_s,
                decode_tokens_s=entry.predicted.decode_tokens_s,
                peak_bytes=entry.predicted.peak_bytes,
                quality_loss=entry.loss,
                rejected="" if entry is chosen else self.rejection(entry, chosen),
            )
            for entry in entries
        )
        if len(entries) == 1:
            why = "asked for, or the only one there is"
        self.choices.append(Choice(name=name, chosen=chosen.value, why=why, alternatives=alternatives))
        return chosen

    def rejection(self, entry: Candidate, chosen: Candidate) -> str:
        """Say why a candidate was not taken.

        Args:
            entry: the candidate.
            chosen: the one that was.
        """
        if entry.refused:
            return entry.refused
        text = score_text(self.objective.kind, entry.score / chosen.score)
        if entry.score > chosen.score * TIE:
            return text
        if loss_text(entry.loss) != loss_text(chosen.loss) and entry.loss > chosen.loss:
            return f"{text}, a tie, and loses {loss_text(entry.loss)} of quality instead of {loss_text(chosen.loss)}"
        return f"{text}, a tie: the more modest value is taken"

    def refusal(self, entries: Sequence[Candidate]) -> MemoryLimitError | ConfigError:
        """Make the error for where no candidate is allowed, with the numbers and what would help.

        Args:
            entries: all that were refused.
        """
        fitting = [entry for entry in entries if entry.predicted.peak_bytes <= self.limit]
        if fitting:
            least = min(fitting, key=lambda entry: entry.loss)
            return ConfigError(
                f"no way to run {self.wishes.model} keeps the quality loss within "
                f"{loss_text(self.objective.max_quality_loss)}; the best, {least.value}, loses {loss_text(least.loss)}",
                remedy="accept more with --max-quality-loss, or allow more memory or another precision",
            )
        least = min(entries, key=lambda entry: entry.predicted.peak_bytes)
        sizes, layout = least.predicted, least.layout
        per_token = sizes.cache_bytes / max(1, layout.num_pages * PAGE_TOKENS)
        room = self.limit - sizes.weights_bytes - sizes.workspace_bytes
        longest = int(room / per_token / layout.max_batch) // PAGE_TOKENS * PAGE_TOKENS
        help_text = "free memory, or take a smaller model or a narrower precision (--precision int8, int4)"
        if longest >= PAGE_TOKENS:
            help_text = f"take --context {longest} or less"
            if layout.max_batch > 1:
                help_text += ", or fewer sequences (--batch)"
        return MemoryLimitError(
            f"{self.wishes.model} needs {size_text(sizes.peak_bytes)} in {least.value}: weights "
            f"{size_text(sizes.weights_bytes)}, cache {size_text(sizes.cache_bytes)} for {layout.max_batch} x "
            f"{self.context} tokens, workspace {size_text(sizes.workspace_bytes)}",
            needed=f"at most {size_text(self.limit)}",
            remedy=help_text,
        )
