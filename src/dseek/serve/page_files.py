"""The web page: files of the package, read once, sent with hashes as their tags. No path comes from a request."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources

from fastapi import APIRouter, Request
from starlette.responses import Response

MEDIA_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}


@dataclass(frozen=True, slots=True)
class PageFile:
    """One file."""

    content: bytes
    """What is sent."""
    media_type: str
    """Its type."""
    tag: str
    """Its ETag."""


def read_files() -> dict[str, PageFile]:
    """Read the files of the page.

    Returns:
        Name to file.
    """
    found = {}
    for entry in resources.files("dseek.serve").joinpath("page").iterdir():
        media_type = MEDIA_TYPES.get(entry.name.rpartition(".")[2])
        if media_type is not None:
            content = entry.read_bytes()
            found[entry.name] = PageFile(content, media_type, f'"{hashlib.sha256(content).hexdigest()[:24]}"')
    return found


def router() -> APIRouter:
    """Make the routes: `/` and one for each file."""
    routes = APIRouter(tags=["page"], include_in_schema=False)
    files = read_files()

    def send(request: Request, file: PageFile) -> Response:
        headers = {"etag": file.tag, "cache-control": "no-cache"}
        if request.headers.get("if-none-match") == file.tag:
            return Response(status_code=304, headers=headers)
        return Response(file.content, media_type=file.media_type, headers=headers)

    @routes.get("/")
    async def index(request: Request) -> Response:
        return send(request, files["index.html"])

    @routes.get("/page/{name}")
    async def page_file(name: str, request: Request) -> Response:
        if name not in files:
            return Response(status_code=404)
        return send(request, files[name])

    return routes
