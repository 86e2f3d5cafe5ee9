"""`SamplingParams`: how a request's tokens are chosen and when its answer ends."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from dseek.core.errors import RequestError

MAX_SEED = 2**63 - 1
"""Largest seed."""

MAX_LOGPROBS = 20
"""Most of the likeliest tokens that are listed beside a chosen one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How the next token is chosen and when an answer ends; checked when it is made.

    The filters work as in Hugging Face `generate`: repetition penalty, temperature, top-k, top-p, min-p, in this order;
    bias, presence and frequency as in OpenAI's interface, the first before and the others after the repetition penalty.
    """

    temperature: float = 0.0
    """Divides the logits; 0 takes the likeliest token and ignores the filters."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the likeliest tokens until their probabilities sum to p; 1 keeps all."""
    min_p: float = 0.0
    """Drop tokens less likely than p times the likeliest; 0 keeps all."""
    repetition_penalty: float = 1.0
    """Logits of tokens already in prompt or answer are divided by it (multiplied where negative); greedy too."""
    presence_penalty: float = 0.0
    """Taken from the logit of every token that is in the answer already."""
    frequency_penalty: float = 0.0
    """The same, as many times as it is there."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Token ids, and what is added to their logits before anything else; ids beyond the vocabulary do nothing."""
    seed: int | None = None
    """Makes the answer repeatable, whatever else runs beside it; None draws a fresh seed."""
    max_new_tokens: int = 128
    """Longest answer in tokens; the context may end it earlier."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer; none of them becomes part of it."""
    ignore_eos: bool = False
    """Go on past the model's end token (for measurements)."""
    logprobs: int | None = None
    """Give each token's log-probability, and those of so many of the likeliest tokens; None gives none."""
    detokenize: bool = True
    """Make text of the tokens; False saves the work where only ids matter."""

    @property
    def changes_logits(self) -> bool:
        """Whether bias or penalties come before the choice."""
        return bool(self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty or self.logit_bias)

    def samples(self, count: int) -> list[SamplingParams]:
        """Make parameters for several answers to one prompt, which share its pages.

        Args:
            count: answers.

        Returns:
            The same parameters, with seeds that follow from this one's; without a seed each draws a fresh one.
        """
        if self.seed is None:
            return [self] * count
        return [dataclasses.replace(self, seed=(self.seed + i) % (MAX_SEED + 1)) for i in range(count)]

    def __post_init__(self) -> None:
        _require(0 <= self.temperature < float("inf"), "temperature", self.temperature, "0 or more")
        _require(self.top_k >= 0, "top_k", self.top_k, "0 (all) or more")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        _require(0 <= self.min_p <= 1, "min_p", self.min_p, "from 0 to 1")
        _require(0 < self.repetition_penalty < float("inf"), "repetition_penalty", self.repetition_penalty, "above 0")
        for name in ("presence_penalty", "frequency_penalty"):
            _require(-2 <= getattr(self, name) <= 2, name, getattr(self, name), "from -2 to 2")
        for token_id, bias in self.logit_bias:
            _require(token_id >= 0 and -100 <= bias <= 100, "logit_bias", (token_id, bias), "an id, and -100 to 100")
        _require(self.seed is None or 0 <= self.seed <= MAX_SEED, "seed", self.seed, f"from 0 to {MAX_SEED}")
        _require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1")
        _require(
            self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS,
            "logprobs",
            self.logprobs,
            f"0 to {MAX_LOGPROBS}",
        )
        _require(not isinstance(self.stop, str), "stop", self.stop, "a tuple of texts")
        _require(all(self.stop), "stop", self.stop, "texts that are not empty")
        _require(self.detokenize or not self.stop, "stop", self.stop, "detokenize=True, stop texts need the text")


def _require(holds: bool, name: str, value: object, needed: str) -> None:
    """Raise a `RequestError` about a sampling parameter unless the condition holds."""
    if not holds:
        raise RequestError(f"{name} is {value!r}", needed=needed)
