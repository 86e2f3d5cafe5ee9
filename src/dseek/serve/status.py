"""Routes about the server itself: `/health`, `/ready`, `/metrics`, `/v1/models`, and what the page's panel shows."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any

from fastapi import APIRouter, Query
from starlette.responses import Response

from dseek import __version__
from dseek.serve import insight, metrics
from dseek.serve.errors import ApiError, JsonResponse
from dseek.serve.service import Service


def router(service: Service) -> APIRouter:
    """Make the routes.

    Args:
        service: the model.

    Returns:
        The router.
    """
    routes = APIRouter(tags=["server"])
    began_s = time.monotonic()
    drawing = asyncio.Lock()

    @routes.get("/health", summary="Whether the process works")
    async def health() -> JsonResponse:
        error = service.engine.stats().error
        if error is not None:
            raise ApiError(503, error, code="engine_failed")
        return JsonResponse({"status": "ok"})

    @routes.get("/ready", summary="Whether new requests are welcome")
    async def ready() -> JsonResponse:
        if not service.is_ready:
            state = "shutting down" if service.is_draining else "warming up"
            raise ApiError(503, f"not ready: {state}", code="not_ready", headers={"retry-after": "1"})
        return JsonResponse({"status": "ready"})

    @routes.get("/version", summary="The version")
    async def version() -> JsonResponse:
        return JsonResponse({"version": __version__})

    @routes.get("/metrics", summary="Figures for Prometheus")
    async def figures() -> Response:
        return Response(service.metrics.text(), media_type=metrics.CONTENT_TYPE)

    @routes.get("/v1/models", summary="The models")
    async def models() -> JsonResponse:
        card = service.model_card()
        data = [{**card, "id": name} for name in service.config.model_names]
        return JsonResponse({"object": "list", "data": data})

    @routes.get("/v1/models/{name:path}", summary="One model")
    async def model(name: str) -> JsonResponse:
        service.check_model(name)
        return JsonResponse({**service.model_card(), "id": name})

    @routes.get("/v1/dseek/status", summary="What the engine is doing")
    async def status() -> JsonResponse:
        stats = service.engine.stats()
        answer: dict[str, Any] = {
            "model": service.model_name,
            "ready": service.is_ready,
            "uptime_s": round(time.monotonic() - began_s, 3),
            **{name: getattr(stats, name) for name in stats.__dataclass_fields__},
        }
        return JsonResponse(answer)

    @routes.get("/v1/dseek/plan", summary="What the model runs with, and why")
    async def plan() -> JsonResponse:
        return JsonResponse(insight.plan_words(service.llm))

    @routes.get("/v1/dseek/attention", summary="What a layer attends to")
    async def attention(
        layer: Annotated[int, Query(ge=0, le=4095)] = 0, blocks: Annotated[int, Query(ge=2, le=64)] = 32
    ) -> JsonResponse:
        async with drawing:
            return JsonResponse(await asyncio.to_thread(insight.attention_view, service.llm, layer, blocks))

    return routes
