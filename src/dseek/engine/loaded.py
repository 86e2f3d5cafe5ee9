"""`LLM`: a loaded model, ready to answer.

The friendly face of the engine for Python users and for the command line: turns texts into requests and requests into
texts. Imports PyTorch only for `module()` or where the plan runs on it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from dseek.engine.engine import Engine, EngineOptions
from dseek.engine.prompts import chat_token_ids, text_token_ids
from dseek.engine.request import Request, RequestOutput, SamplingParams

if TYPE_CHECKING:
    from dseek.core.shape import ModelShape
    from dseek.engine.runner import Runner
    from dseek.models.decoder import Decoder
    from dseek.models.files import ModelFiles
    from dseek.models.tokenizer import Tokenizer
    from dseek.plan.plan import Plan

Prompt = str | Sequence[int]


class LLM:
    """A loaded model.

    One thread at a time may use it. It is a context manager: leaving it frees the weights.

    Args:
        files: the opened model; closed with this object.
        plan: what runs.
        runner: computes it; closed with this object.
        options: what else the user decides about the loop; None is the defaults.
    """

    def __init__(self, files: ModelFiles, plan: Plan, runner: Runner, options: EngineOptions | None = None) -> None:
        self.files = files
        self.plan = plan
        self.engine = Engine(files, plan, runner, options)

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
