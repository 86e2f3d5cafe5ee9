"""`POST /tokenize`, `POST /detokenize` and `POST /v1/embeddings`: what needs a tokenizer or one pass, and no answer."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import numpy as np
from fastapi import APIRouter

from dseek.serve.conversation import conversation_token_ids
from dseek.serve.errors import ApiError, JsonResponse
from dseek.serve.schemas import DetokenizeRequest, EmbeddingRequest, TokenizeRequest
from dseek.serve.service import Service
from dseek.serve.token_texts import TokenTexts

MAX_INPUTS = 256
"""Most texts of one embedding request."""


def router(service: Service) -> APIRouter:
    """Make the routes.

    Args:
        service: the model.

    Returns:
        The router.
    """
    routes = APIRouter(tags=["tokens"])
    texts = TokenTexts(service.llm.tokenizer)

    @routes.post("/tokenize", summary="Cut a text or a conversation into tokens")
    async def tokenize(body: TokenizeRequest) -> JsonResponse:
        service.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "needed: either prompt or messages", param="prompt")
        if body.prompt is not None:
            ids = await service.encode(body.prompt, add_special_tokens=body.add_special_tokens)
        else:
            ids = await conversation_token_ids(
                service, body.messages or [], add_generation_prompt=body.add_generation_prompt
            )
        answer: dict[str, Any] = {"count": len(ids), "max_model_len": service.context_tokens, "tokens": ids}
        if body.return_token_strs:
            answer["token_strs"] = [texts.text(token_id) for token_id in ids]
        return JsonResponse(answer)

    @routes.post("/detokenize", summary="Join tokens into text")
    async def detokenize(body: DetokenizeRequest) -> JsonResponse:
        service.check_model(body.model)
        text = service.llm.tokenizer.decode(body.tokens, skip_special_tokens=False)
        return JsonResponse({"prompt": text})

    @routes.post("/v1/embeddings", summary="Turn texts into vectors")
    async def embeddings(body: EmbeddingRequest) -> JsonResponse:
        service.check_model(body.model)
        prompts = await service.prompts(body.input)
        if len(prompts) > MAX_INPUTS:
            raise ApiError(400, f"there are {len(prompts)} inputs; needed: at most {MAX_INPUTS}", param="input")
        data = []
        for index, prompt in enumerate(prompts):
            vector = await asyncio.wrap_future(service.engine.embed(prompt))
            data.append({"object": "embedding", "index": index, "embedding": _shown(vector, body)})
        count = sum(map(len, prompts))
        return JsonResponse(
            {
                "object": "list",
                "data": data,
                "model": body.model or service.model_name,
                "usage": {"prompt_tokens": count, "total_tokens": count},
            }
        )

    return routes


def _shown(vector: np.ndarray, body: EmbeddingRequest) -> list[float] | str:
    """Cut a vector to the dimensions asked for, give it length 1 and write it."""
    if body.dimensions is not None:
        if body.dimensions > len(vector):
            raise ApiError(400, f"dimensions is {body.dimensions}; needed: at most {len(vector)}", param="dimensions")
        vector = vector[: body.dimensions]
    norm = float(np.linalg.norm(vector))
    unit = (vector / norm if norm > 0 else vector).astype("<f4")
    if body.encoding_format == "base64":
        return base64.b64encode(unit.tobytes()).decode("ascii")
    return [float(value) for value in unit]
