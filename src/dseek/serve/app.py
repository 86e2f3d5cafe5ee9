"""`create_app`: the whole application, routes and doorman, for uvicorn or for a test."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI

from dseek import __version__
from dseek.core.logs import get_logger
from dseek.serve import chat, completions, errors, page_files, status, tokens
from dseek.serve.doorman import Doorman
from dseek.serve.service import Service

logger = get_logger("dseek.serve")


def create_app(service: Service) -> Doorman:
    """Make the application of a served model.

    Args:
        service: the model; warmed up when the application starts and closed when it ends.

    Returns:
        An ASGI application.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        warming = asyncio.create_task(_warm_up(service))
        try:
            yield
        finally:
            warming.cancel()
            await asyncio.gather(warming, return_exceptions=True)
            await service.close()

    app = FastAPI(
        title="dseek",
        version=__version__,
        summary="An OpenAI-compatible server for one model",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
        responses=_error_responses(),
    )
    errors.install(app)
    routers = [chat.router(service), completions.router(service), tokens.router(service), status.router(service)]
    if service.config.page:
        routers.append(page_files.router())
    for router in routers:
        app.include_router(router)
    return Doorman(app, service.config, service.metrics, lambda: service.is_draining)


async def _warm_up(service: Service) -> None:
    """Warm the model up; what fails here fails every request too, and readiness says so."""
    try:
        await service.warm_up()
    except Exception:
        logger.exception("the warm-up failed")


def _error_responses() -> dict[int | str, dict[str, Any]]:
    """Errors that any route may answer, for the schema."""
    error = {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type", "param", "code"],
                "properties": {
                    "message": {"type": "string"},
                    "type": {"type": "string"},
                    "param": {"type": ["string", "null"]},
                    "code": {"type": ["string", "null"]},
                },
            }
        },
    }
    content = {"application/json": {"schema": error}}
    told = {
        400: "The request is wrong",
        401: "No API key, or a wrong one",
        403: "This Host is not served",
        404: "No such model or path",
        408: "The body did not arrive in time",
        413: "The body is too long",
        422: "The request is wrong",
        429: "The server is full; try again later",
        500: "The server failed",
        503: "The server is not ready",
        504: "The answer took too long",
    }
    return {status: {"description": text, "content": content} for status, text in told.items()}
