"""`LLM`: a loaded model, ready to answer; `load` makes one from a name.

The friendly face of the engine for Python users and for the command line. It opens the model, takes (or makes) a plan,
builds what the plan says, and turns texts into requests and requests into texts. Imports PyTorch only for `module()`
or where the plan runs on it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from dseek.core.errors import DseekError
from dseek.core.logs import get_logger
from dseek.engine.engine import Engine
from dseek.engine.prompts import chat_token_ids, text_token_ids
from dseek.engine.request import Request, RequestOutput, SamplingParams

if TYPE_CHECKING:
    from dseek.core.shape import ModelShape
    from dseek.engine.runner import Runner
    from dseek.hardware.machine import Machine
    from dseek.models.decoder import Decoder
    from dseek.models.files import ModelFiles
    from dseek.models.long_positions import Scaling
    from dseek.models.tokenizer import Tokenizer
    from dseek.parallel.strategy import ShardStrategy
    from dseek.plan.objective import ObjectiveKind
    from dseek.plan.plan import Plan

logger = get_logger("dseek.engine")

Prompt = str | Sequence[int]


@contextlib.contextmanager
def _paused_collector() -> Iterator[None]:
    """Keep Python's garbage collector from running.

    A vocabulary is some 200,000 objects that stay; the collector would look through them again and again while they
    are made, which takes as long as a tenth of the whole load.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@_paused_collector()
def load(
    model: str | ModelFiles,
    *,
    precision: str | None = None,
    cache_dtype: str | None = None,
    plan: Plan | str | Path | None = None,
    context: int | None = None,
    prompt_tokens: int | None = None,
    answer_tokens: int | None = None,
    threads: int | None = None,
    batch: int = 4,
    objective: ObjectiveKind = "latency",
    max_quality_loss: float | None = None,
    memory_limit_bytes: int | None = None,
    max_position_embeddings: int | None = None,
    rope_scaling: Scaling | None = None,
    machine: Machine | None = None,
    attention: str | None = None,
    attention_window: int | str | None = None,
    attention_top_blocks: int | None = None,
    attention_far: bool | None = None,
    attention_min_share: float | None = None,
    shard_strategy: ShardStrategy | None = None,
    calibration: str | Path | None = None,
) -> LLM:
    """Open a model, plan its run and make it ready to answer.

    Args:
        model: a folder in Hugging Face layout, a `.gguf` file, an alias or a hub id; or the opened files of one, which
            then belong to what is returned.
        precision: auto, fp32, bf16, fp16, int8 or int4; None takes DSEEK_PRECISION_MODE.
        cache_dtype: fp32, bf16 or int8, of the cache of keys and values; None takes the plan's choice.
        plan: a plan, or a file that `dseek plan --save` wrote; excludes the options that would make another one.
        context: longest prompt with its answer, in tokens; None takes the model's, at most 4096.
        prompt_tokens: prompt of the typical request that is planned for; None takes what fills `context` if that is
            given, else 512.
        answer_tokens: answer of the typical request; None takes 128, fewer in a short context.
        threads: threads of the kernels; None takes DSEEK_NUM_THREADS, else the plan's choice.
        batch: requests that may run at once.
        objective: what to plan for: latency, throughput or memory.
        max_quality_loss: fraction of perplexity that a faster precision may cost; None takes the plan's default.
        memory_limit_bytes: peak memory that the plan may foresee; None takes the machine's.
        max_position_embeddings: positions to run with, from the model's own up; None takes those of a given plan, else
            the model's. It permits a longer `context` and does not ask for one.
        rope_scaling: how positions beyond the model's own are rotated: auto, yarn, dynamic, linear or none; None is
            auto. See `dseek.models.long_positions`.
        machine: a measured machine; None takes this one's measurements, made on first use.
        attention: auto, dense, window or dynamic; None is auto, or what the options below are about. What is asked for
            is had whatever quality it costs.
        attention_window: tokens that every position sees before its own block: 64, 128, ... 4096; auto gives every
            key-value head its own, from the model's gate file or measured once; None chooses one for all.
        attention_top_blocks: blocks of 64 tokens that dynamic attention selects beside the window; None chooses.
        attention_far: whether what dynamic attention does not select counts by its means; None is False.
        attention_min_share: least share of a head's attention, above 0 and below 1, that makes a query open a block;
            None chooses, or lets a block's first query choose where `attention_top_blocks` or `attention_far` says so.
        shard_strategy: how ranks share out long prompts: auto, contiguous or zigzag; None runs alone. All ranks of the
            default process group, or of torchrun, then call this and everything else alike.
        calibration: file that `dseek calibrate` wrote for this model, whose losses and ranges the plan is made from;
            None takes the one beside the model, if there is one.

    Returns:
        The loaded model.

    Raises:
        DseekError: the model cannot be found, read or run, an option is wrong, or memory would not suffice.
    """
    from dseek.engine.build import build_runner
    from dseek.engine.planning import given_plan, make_plan, warn_of_idle_positions
    from dseek.models.files import open_model
    from dseek.models.long_positions import extend_positions
    from dseek.plan.attention_wish import AttentionWish

    wish = AttentionWish(
        kind=attention,
        window_tokens=attention_window,
        top_blocks=attention_top_blocks,
        far=attention_far,
        min_share=attention_min_share,
    )
    ranks = None
    if shard_strategy is not None:
        from dseek.engine import sharding

        ranks = sharding.meet(shard_strategy)
    files = open_model(model) if isinstance(model, str) else model

    def decide() -> Plan:
        if plan is not None:
            return given_plan(
                plan,
                files,
                precision=precision,
                cache_dtype=cache_dtype,
                context=context,
                threads=threads,
                prompt_tokens=prompt_tokens,
                answer_tokens=answer_tokens,
                max_position_embeddings=max_position_embeddings,
                attention=wish,
                calibration=calibration,
            )
        host: dict[str, Any] = {"machine": machine, "threads": threads, "memory_limit_bytes": memory_limit_bytes}
        made = make_plan(
            files,
            precision=precision,
            cache_dtype=cache_dtype,
            context=context,
            prompt_tokens=prompt_tokens,
            answer_tokens=answer_tokens,
            batch=batch,
            objective=objective,
            max_quality_loss=max_quality_loss,
            attention=wish,
            calibration=calibration,
            **(host if ranks is None else sharding.share_of_host(**host)),
        )
        return made if ranks is None else sharding.with_longer_steps(made, ranks.world_size)

    # The tokenizer is built beside the planning and packing; whoever needs it first waits for it.
    threading.Thread(target=_build_tokenizer, args=(files,), daemon=True).start()
    try:
        files.shape = extend_positions(files.shape, max_position_embeddings, rope_scaling)
        decided = decide() if ranks is None else sharding.shared_plan(ranks, decide)
        if ranks is not None and ranks.rank > 0:
            given_plan(decided, files, precision=None, context=None, threads=None)
        warn_of_idle_positions(files.shape, decided, max_position_embeddings)
        runner = build_runner(files, decided)
        if ranks is not None and shard_strategy is not None:
            runner = sharding.sharded(runner, decided, ranks, shard_strategy)
        return LLM(files, decided, runner)
    except BaseException:
        files.close()
        raise


def _build_tokenizer(files: ModelFiles) -> None:
    """Build a model's tokenizer ahead of its use; an error comes again, and is reported, when it is used."""
    with contextlib.suppress(DseekError, OSError):
        files.tokenizer()


class LLM:
    """A loaded model.

    One thread at a time may use it. It is a context manager: leaving it frees the weights.

    Args:
        files: the opened model; closed with this object.
        plan: what runs.
        runner: computes it; closed with this object.
    """

    def __init__(self, files: ModelFiles, plan: Plan, runner: Runner) -> None:
        self.files = files
        self.plan = plan
        self.engine = Engine(files, plan, runner)

    @property
    def shape(self) -> ModelShape:
        """Sizes of the model."""
        return self.files.shape

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self.engine.tokenizer

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | None = None, **sampling: Any
    ) -> list[RequestOutput]:
        """Answer prompts, many at a time.

        Args:
            prompts: one text, or a list of texts or of lists of token ids.
            params: how to sample, the same for all; None is greedy.
            sampling: fields of `SamplingParams` that replace those of `params`.

        Returns:
            One output a prompt, in the order of the prompts.

        Raises:
            RequestError: a prompt or a sampling value cannot be served; nothing is generated then.
        """
        params = _merged(params, sampling)
        requests: list[Request] = []
        try:
            for prompt in _as_list(prompts):
                requests.append(self.submit(prompt, params))
            while not all(request.finished for request in requests):
                self.engine.step()
        finally:
            self._abort_unfinished(requests)
        return [request.output() for request in requests]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, **sampling: Any) -> Iterator[str]:
        """Answer one prompt piece by piece.

        Args:
            prompt: a text or token ids.
            params: how to sample; None is greedy.
            sampling: fields of `SamplingParams` that replace those of `params`.

        Yields:
            Pieces of text, none empty; leaving early ends the answer.

        Raises:
            RequestError: the prompt or a sampling value cannot be served.
        """
        yield from self.pieces(self.submit(prompt, _merged(params, sampling)))

    def chat(
        self, messages: Sequence[Mapping[str, str]], params: SamplingParams | None = None, **sampling: Any
    ) -> RequestOutput:
        """Answer a conversation through the model's chat template.

        Args:
            messages: each with `role` (system, user, assistant) and `content`.
            params: how to sample; None is greedy.
            sampling: fields of `SamplingParams` that replace those of `params`.

        Returns:
            The answer.

        Raises:
            RequestError: the model has no chat template, or the conversation cannot be served.
        """
        return self.generate([self.chat_token_ids(messages)], params, **sampling)[0]

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """Compute the logits of every position of a text, through the engine's kernels and precision.

        Args:
            token_ids: T ids, at most the context.

        Returns:
            float32 [T, V]; row t predicts token t + 1.

        Raises:
            RequestError: an id is out of range, or the text is empty or too long.
        """
        pieces = [piece.copy() for _, piece in self.engine.logits(token_ids)]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def module(self) -> Decoder:
        """Make the same model as an ordinary PyTorch module, for training or another device.

        Returns:
            A new float32 decoder with the file's weights, widened; independent of this object.
        """
        import torch

        from dseek.models.decoder import Decoder

        return Decoder.from_files(self.files, torch.float32)

    def submit(self, prompt: Prompt, params: SamplingParams) -> Request:
        """Queue one prompt without computing anything.

        Args:
            prompt: a text or token ids.
            params: how to sample.

        Returns:
            The request, for `pieces` or for a loop over `engine.step`.

        Raises:
            RequestError: the prompt cannot be served.
        """
        token_ids = text_token_ids(self.files, prompt) if isinstance(prompt, str) else prompt
        return self.engine.add(token_ids, params)

    def pieces(self, request: Request) -> Iterator[str]:
        """Step the engine until a request is done, yielding its text as it becomes final.

        Args:
            request: from `submit`.

        Yields:
            Pieces of the answer, none empty. Leaving early aborts the request.
        """
        try:
            while not request.finished:
                self.engine.step()
                piece = request.take_text()
                if piece:
                    yield piece
        finally:
            self._abort_unfinished([request])

    def chat_token_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Write a conversation as the model expects it, up to where its answer begins.

        Args:
            messages: each with `role` and `content`.

        Returns:
            Token ids of the prompt.

        Raises:
            RequestError: the model has no chat template.
        """
        return chat_token_ids(self.files, messages)

    def close(self) -> None:
        """Free the weights and the cache. May be called twice."""
        self.engine.close()
        self.files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _abort_unfinished(self, requests: Sequence[Request]) -> None:
        """Take requests out of the engine that an error, Ctrl-C or an early exit left in it."""
        for request in requests:
            if not request.finished:
                self.engine.abort(request)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    """Make a list of one prompt; leave a list of prompts as it is."""
    if isinstance(prompts, str):
        return [prompts]
    items: Sequence[Any] = prompts
    one = len(items) > 0 and not isinstance(items[0], (str, Sequence, np.ndarray))
    return [items] if one else items


def _merged(params: SamplingParams | None, sampling: Mapping[str, Any]) -> SamplingParams:
    """Replace fields of sampling parameters."""
    if params is None:
        return SamplingParams(**sampling)
    return dataclasses.replace(params, **sampling) if sampling else params
