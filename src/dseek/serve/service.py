"""`Service`: the model behind the API, with everything that routes share: engine, prompts, parameters, metrics, state.

Routes are thin: they check a body, ask the service for prompts and answers, and word what comes back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from dseek.core.logs import get_logger
from dseek.engine.async_engine import AsyncEngine
from dseek.engine.prompts import text_token_ids
from dseek.engine.request import SamplingParams
from dseek.serve.config import ServeConfig
from dseek.serve.errors import ApiError
from dseek.serve.grammar import GrammarFilter, Grammars
from dseek.serve.metrics import Metrics
from dseek.serve.schemas import Prompt, Sampling

if TYPE_CHECKING:
    from dseek.engine.engine import Engine
    from dseek.engine.llm import LLM

logger = get_logger("dseek.serve")

Result = TypeVar("Result")

LONG_TEXT_CHARS = 16_384
"""Texts from this length on are cut into tokens beside the event loop."""

WARM_UP_TOKENS = 8


class Service:
    """A model that is being served.

    Args:
        llm: the loaded model; stays its owner's to close, after this object.
        config: limits and names.
    """

    def __init__(self, llm: LLM, config: ServeConfig) -> None:
        self.llm = llm
        self.config = config
        self.engine = AsyncEngine(llm.engine)
        self.grammars = Grammars(llm)
        self.metrics = Metrics(config.model_names[0], self.engine.stats)
        self.created = int(time.time())
        self.is_warm = False
        self.is_draining = False

    @property
    def model_name(self) -> str:
        """Name that the model is served under."""
        return self.config.model_names[0]

    @property
    def context_tokens(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return self.llm.engine.context_tokens

    @property
    def is_ready(self) -> bool:
        """New requests are welcome."""
        return self.is_warm and not self.is_draining and self.engine.stats().error is None

    async def warm_up(self) -> None:
        """Answer a short prompt, so that the first client does not pay for what happens once."""
        token_id = self.llm.tokenizer.bos_token_id or 0
        params = SamplingParams(max_new_tokens=WARM_UP_TOKENS, ignore_eos=True)
        async for _ in self.engine.submit([token_id], params):
            pass
        self.is_warm = True
        logger.info("ready", extra={"fields": {"model": self.model_name}})

    async def close(self) -> None:
        """End what still runs."""
        self.is_draining = True
        await asyncio.to_thread(self.engine.close, 0.0)

    def check_model(self, name: str | None) -> None:
        """Refuse a request for another model.

        Args:
            name: the request's `model`; None means the one that is served.

        Raises:
            ApiError: it is not served here.
        """
        if name is not None and name not in self.config.model_names:
            raise ApiError(
                404,
                f"the model {name[:100]!r} is not served here; served: {', '.join(self.config.model_names)}",
                param="model",
                code="model_not_found",
            )

    async def on_engine(self, function: Callable[[Engine], Result]) -> Result:
        """Do something on the engine's thread, between two steps.

        Args:
            function: called with the engine.

        Returns:
            What it returned.
        """
        return await asyncio.wrap_future(self.engine.call(function))

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Cut a text into tokens, beside the event loop where it is long.

        Args:
            text: the text.
            add_special_tokens: begin with the start token where the model has it so.

        Returns:
            Token ids.

        Raises:
            RequestError: the text is no valid Unicode.
        """

        def cut() -> list[int]:
            if add_special_tokens:
                return text_token_ids(self.llm.files, text)
            return self.llm.tokenizer.encode(text, add_special_tokens=False)

        return cut() if len(text) < LONG_TEXT_CHARS else await asyncio.to_thread(cut)

    async def prompts(self, prompt: Prompt, *, add_special_tokens: bool = True) -> list[list[int]]:
        """Make token ids of a completion's prompt.

        Args:
            prompt: a text, several, token ids, or several lists of them.
            add_special_tokens: see `encode`.

        Returns:
            One list of ids a prompt.

        Raises:
            ApiError: there is none, there are too many, or one is empty.
        """
        items: list[Any] = [prompt] if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) else [*prompt]
        if not items:
            raise ApiError(400, "there is no prompt", param="prompt")
        found = []
        for item in items:
            ids = await self.encode(item, add_special_tokens=add_special_tokens) if isinstance(item, str) else [*item]
            found.append(ids)
            self.check_prompt(ids)
        return found

    def check_prompt(self, token_ids: Sequence[int]) -> None:
        """Refuse a prompt that is empty or longer than the server allows.

        Args:
            token_ids: the prompt.

        Raises:
            ApiError: it is.
        """
        limit = self.context_tokens - 1
        if self.config.max_prompt_tokens is not None:
            limit = min(limit, self.config.max_prompt_tokens)
        if not token_ids:
            raise ApiError(400, "the prompt has no tokens; needed: at least one", param="prompt")
        if len(token_ids) > limit:
            raise ApiError(
                400,
                f"the prompt has {len(token_ids)} tokens; needed: at most {limit}",
                param="prompt",
                code="context_length_exceeded",
            )

    def sampling_params(
        self, body: Sampling, *, max_tokens: int | None, num_logprobs: int | None, choice: int = 0
    ) -> SamplingParams:
        """Translate a request's sampling fields.

        Args:
            body: the request.
            max_tokens: longest answer; None takes what the context leaves.
            num_logprobs: likeliest tokens to list beside each token; None gives no log-probabilities.
            choice: which of the `n` answers; each has a seed of its own.

        Returns:
            Checked parameters. A seed below 0 stands for the same number with its sign dropped.

        Raises:
            ApiError: a field cannot be honoured.
            RequestError: a value is out of range.
        """
        if (name := body.unsupported()) is not None:
            raise ApiError(400, f"{name} is not supported here; leave it out", param=name, code="unsupported_parameter")
        seed = None if body.seed is None else (abs(body.seed) + choice) % (2**63)
        return SamplingParams(
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            top_k=max(body.top_k or 0, 0),
            min_p=body.min_p or 0.0,
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            logit_bias=body.biases(),
            repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
            seed=seed,
            max_new_tokens=min(max_tokens or self.context_tokens, self.context_tokens),
            stop=body.stops(),
            ignore_eos=body.ignore_eos,
            logprobs=num_logprobs,
        )

    async def grammar(self, body: Sampling) -> Callable[[], GrammarFilter] | None:
        """Find what an answer is bound to.

        Args:
            body: the request.

        Returns:
            Makes a filter for one answer; None where the answer is free. It has been called once, so that a bad
            grammar is an error before anything runs.

        Raises:
            ApiError: several bindings at once.
            RequestError: the grammar cannot be used.
        """
        makers: list[tuple[str, Callable[[], GrammarFilter]]] = []
        wanted = body.response_format
        if wanted is not None and wanted.type == "json_object":
            makers.append(("response_format", self.grammars.json_object))
        elif wanted is not None and wanted.type == "json_schema":
            given = wanted.json_schema
            if given is None or given.schema_ is None:
                raise ApiError(400, "json_schema needs a schema", param="response_format.json_schema.schema")
            schema = given.schema_
            makers.append(("response_format", lambda: self.grammars.json_schema(schema)))
        for name, method in (
            ("guided_json", self.grammars.json_schema),
            ("guided_regex", self.grammars.regex),
            ("guided_choice", self.grammars.choice),
            ("guided_grammar", self.grammars.lark),
        ):
            if (value := getattr(body, name)) is not None:
                makers.append((name, _bound(method, value)))
        if not makers:
            return None
        if len(makers) > 1:
            names = ", ".join(name for name, _ in makers)
            raise ApiError(400, f"{names} bind the same answer; give one of them", param=makers[1][0])
        return await self.checked(makers[0][1])

    async def checked(self, make: Callable[[], GrammarFilter]) -> Callable[[], GrammarFilter]:
        """Compile a grammar once, beside the event loop, to find its errors early.

        Args:
            make: makes a filter.

        Returns:
            The same function.
        """
        await asyncio.to_thread(make)
        return make

    def model_card(self) -> Mapping[str, Any]:
        """Describe the model as `/v1/models` does."""
        return {
            "id": self.model_name,
            "object": "model",
            "created": self.created,
            "owned_by": "dseek",
            "root": self.llm.files.name,
            "parent": None,
            "max_model_len": self.context_tokens,
            "vocab_size": self.llm.shape.vocab_size,
        }


def _bound(method: Callable[[Any], GrammarFilter], value: Any) -> Callable[[], GrammarFilter]:
    return lambda: method(value)
