"""`DseekLM`: lets EleutherAI's lm-evaluation-harness run on a loaded model.

    from dseek import load
    from dseek.engine.lm_eval_adapter import DseekLM
    lm_eval.simple_evaluate(model=DseekLM(load("smollm2")), tasks=["arc_easy"])

Importing this module needs the extra `eval` (`pip install dseek[eval]`); nothing else in dseek imports it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from dseek.core.errors import RequestError
from dseek.engine.evaluate import score
from dseek.engine.llm import LLM
from dseek.engine.request import Request, SamplingParams

DEFAULT_MAX_NEW_TOKENS = 256
"""Longest answer where a task names none (less where that is over half the context)."""


class DseekLM(TemplateLM):
    """The harness's view of a model.

    Args:
        llm: a loaded model; stays the caller's to close.
    """

    def __init__(self, llm: LLM) -> None:
        super().__init__()
        self.llm = llm

    @property
    def eot_token_id(self) -> int:
        """The end token's id, which also stands before a text that begins from nothing."""
        return min(self.llm.engine.eos_token_ids)

    @property
    def prefix_token_id(self) -> int:
        """The start token's id, or the end token's where the model has no start token."""
        start = self.llm.tokenizer.bos_token_id
        return self.eot_token_id if start is None else start

    @property
    def tokenizer_name(self) -> str:
        """Name under which the harness caches tokenised requests."""
        return self.llm.files.name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Make ids of a text.

        Args:
            string: the text.
            add_special_tokens: put the start token before it; None does what the model does.
            kwargs: options of other tokenizers, which do not matter here.

        Returns:
            Token ids.
        """
        return self.llm.tokenizer.encode(string, add_special_tokens=add_special_tokens is not False)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Write a conversation as the model expects it.

        Args:
            chat_history: messages with `role` and `content`.
            add_generation_prompt: end where the answer begins.

        Returns:
            The text.
        """
        return self.llm.tokenizer.apply_chat_template(chat_history, add_generation_prompt=add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Give the model's chat template, which the harness keeps in its records.

        Args:
            chat_template: False for none; models here have one template, so a name changes nothing.

        Returns:
            The template's source.
        """
        return self.llm.files.chat_template if chat_template else None

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Score whole texts, windows of the context's length one after another.

        Args:
            requests: each with one text.
            disable_tqdm: show no progress.

        Returns:
            Log likelihood of each text.
        """
        results = []
        for (text,) in tqdm([request.args for request in requests], disable=disable_tqdm, desc="texts"):
            windows = get_rolling_token_windows(
                self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.llm.engine.context_tokens - 1,
                context_len=1,
            )
            total = sum(self._score(*make_disjoint_window(window))[0] for window in windows)
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
            results.append(total)
        return results

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answer prompts, as many at a time as the plan allows.

        Args:
            requests: each with a prompt and its generation arguments.
            disable_tqdm: show no progress.

        Returns:
            The answers.
        """
        engine = self.llm.engine
        running: list[Request] = []
        try:
            for prompt, arguments in (request.args for request in requests):
                params = sampling_params(arguments, min(DEFAULT_MAX_NEW_TOKENS, engine.context_tokens // 2))
                room = engine.context_tokens - params.max_new_tokens
                if room < 1:
                    raise RequestError(
                        f"an answer of {params.max_new_tokens} tokens",
                        needed=f"fewer than the context's {engine.context_tokens}",
                    )
                running.append(self.llm.submit(self.tok_encode(prompt)[-room:], params))
            with tqdm(total=len(running), disable=disable_tqdm, desc="answers") as bar:
                while not all(request.finished for request in running):
                    bar.update(sum(request.finished for request in engine.step()))
        finally:
            for request in running:
                engine.abort(request)
        answers = [request.output().text for request in running]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, answer)
        return answers

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Score continuations after their contexts."""
        results = []
        for texts, context, continuation in tqdm(requests, disable=disable_tqdm, desc="continuations"):
            results.append(self._score(context, continuation))
            self.cache_hook.add_partial("loglikelihood", texts, results[-1])
        return results

    def _score(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
        """Log likelihood of a continuation and whether greedy decoding would give it; cuts the context's front."""
        token_ids = [*context, *continuation][-self.llm.engine.context_tokens :]
        if not continuation:
            return 0.0, True
        if len(continuation) >= len(token_ids):
            raise RequestError(
                f"a continuation of {len(continuation)} tokens",
                needed=f"fewer than the context's {self.llm.engine.context_tokens}",
            )
        log_likelihoods, right = score(self.llm, token_ids)
        return float(log_likelihoods[-len(continuation) :].sum()), bool(right[-len(continuation) :].all())


def sampling_params(arguments: dict[str, Any], default_max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS) -> SamplingParams:
    """Translate a task's generation arguments.

    Args:
        arguments: such as `until`, `max_gen_toks`, `do_sample`, `temperature`.
        default_max_new_tokens: longest answer where the arguments name none.

    Returns:
        Sampling parameters; greedy unless `do_sample` is true or a temperature is given.

    Raises:
        RequestError: an argument is unknown here or has a bad value.
    """
    left = dict(arguments)
    until = left.pop("until", [])
    lengths = [
        left.pop(name, None) for name in ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    ]
    max_new_tokens = next((length for length in lengths if length is not None), default_max_new_tokens)
    temperature = left.pop("temperature", None)
    samples = left.pop("do_sample", temperature is not None and temperature > 0)
    fields = {
        name: left.pop(name) for name in ("top_k", "top_p", "min_p", "repetition_penalty", "seed") if name in left
    }
    if left:
        raise RequestError(f"generation arguments {sorted(left)} are not known", needed="Hugging Face's sampling names")
    return SamplingParams(
        temperature=(1.0 if temperature is None else temperature) if samples else 0.0,
        max_new_tokens=max_new_tokens,
        stop=(until,) if isinstance(until, str) else tuple(until or ()),
        **fields,
    )
