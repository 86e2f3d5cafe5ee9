"""Hostile requests get errors of the usual form, and the server answers as before."""

from __future__ import annotations

import asyncio

import httpx

from tests.serve.hostile import complaint, hostile_requests
from tests.serve.serving import BASE_URL, served

COUNT = 300


def test_hostile_requests_harm_nothing() -> None:
    with served(request_timeout_s=20) as server:
        before = server.chat("are you well?", temperature=0).json()["choices"]
        stats = server.service.engine.stats

        async def send_all() -> list[str]:
            wrong = []
            transport = httpx.ASGITransport(server.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url=BASE_URL) as client:
                for number, hostile in enumerate(hostile_requests(COUNT)):
                    response = await client.request(
                        hostile.method, hostile.path, content=hostile.body, headers=dict(hostile.headers)
                    )
                    found = complaint(response.status_code, dict(response.headers), response.content)
                    if found is not None:
                        wrong.append(f"{number}: {found}: {hostile.path} {hostile.body[:200]!r} {response.text[:200]}")
            return wrong

        assert not (wrong := asyncio.run(send_all())), "\n".join(wrong)
        assert stats().running == stats().waiting == 0 and stats().error is None
        assert server.chat("are you well?", temperature=0).json()["choices"] == before
