"""What a plan is for: the user's wishes, in numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dseek.core.errors import ConfigError

ObjectiveKind = Literal["latency", "throughput", "memory"]
KINDS: tuple[ObjectiveKind, ...] = ("latency", "throughput", "memory")

DEFAULT_QUALITY_LOSS = 0.005
DEFAULT_PROMPT_TOKENS = 512
DEFAULT_ANSWER_TOKENS = 128
MAX_CONTEXT_TOKENS = 2**24
MAX_BATCH = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """The job that the plan is made for."""

    kind: ObjectiveKind = "latency"
    """latency: one answer soonest; throughput: most tokens a second over all sequences; memory: least memory."""
    context_tokens: int | None = None
    """Tokens a sequence may hold, prompt and answer; None takes the model's own limit, at most 8192."""
    batch: int | None = None
    """Sequences at a time; None is 1, or what serves throughput best."""
    prompt_tokens: int | None = None
    """Prompt of a typical request; None fills a context that was stated, else takes 512."""
    answer_tokens: int | None = None
    """Answer of a typical request; None is 128, or a fifth of a stated context that is short."""
    max_quality_loss: float = DEFAULT_QUALITY_LOSS
    """Accepted rise of perplexity over the file's own weights in fp32, as a fraction."""
    memory_limit_bytes: int | None = None
    """Memory the process may use; None takes 90 % of what the machine allows."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: a value out of its range.
        """
        if self.kind not in KINDS:
            raise ConfigError(f"the objective is {self.kind!r}", needed="one of " + ", ".join(KINDS))
        ranges = (
            ("context", self.context_tokens, 1, MAX_CONTEXT_TOKENS),
            ("batch", self.batch, 1, MAX_BATCH),
            ("typical prompt", self.prompt_tokens, 1, MAX_CONTEXT_TOKENS),
            ("typical answer", self.answer_tokens, 1, MAX_CONTEXT_TOKENS),
            ("memory limit", self.memory_limit_bytes, 1, 2**60),
        )
        for what, value, low, high in ranges:
            if value is not None and not low <= value <= high:
                raise ConfigError(f"the {what} is {value}", needed=f"{low} to {high}")
        if not 0.0 <= self.max_quality_loss <= 10.0:
            raise ConfigError(
                f"the accepted quality loss is {self.max_quality_loss}", needed="a fraction from 0 to 10, such as 0.005"
            )

    def request(self, context_tokens: int) -> tuple[int, int]:
        """Say what the typical request is in a context.

        Args:
            context_tokens: tokens a sequence may hold. A prompt of no stated length fills it if it was the user's wish,
                that is, if `self.context_tokens` is set.

        Returns:
            Tokens of the prompt and of the answer. Lengths that nobody stated are shortened to the context.

        Raises:
            ConfigError: the lengths that were stated do not fit into the context.
        """
        prompt, answer = self.prompt_tokens, self.answer_tokens
        stated = (prompt or 1) + (answer or 1)
        if (prompt or answer) and stated > max(2, context_tokens):
            raise ConfigError(
                f"a typical request of {stated} tokens, prompt and answer, was asked for",
                needed=f"at most the context's {context_tokens}",
                remedy="raise --context, or shorten --prompt-tokens and --answer-tokens",
            )
        if self.context_tokens is None:
            prompt = prompt or max(1, min(DEFAULT_PROMPT_TOKENS, context_tokens - (answer or 1)))
            return prompt, answer or max(1, min(DEFAULT_ANSWER_TOKENS, context_tokens - prompt))
        if answer is None:
            room = context_tokens // 5 if prompt is None else context_tokens - prompt
            answer = max(1, min(DEFAULT_ANSWER_TOKENS, room))
        return prompt or max(1, context_tokens - answer), answer
