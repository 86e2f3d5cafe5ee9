"""The server keeps to its own OpenAPI description: schemathesis makes requests of it, and it says what may come."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings

from tests.serve.serving import Served, served

EXAMPLES = 4
"""Requests to each operation."""

USUAL = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(request_timeout_s=20) as found:
        yield found


def test_responses_are_described(server: Served) -> None:
    schema = schemathesis.openapi.from_dict(server.get("/openapi.json").json())
    operations = [result.ok() for result in schema.get_all_operations()]
    assert {(operation.method, operation.path) for operation in operations} >= {
        ("post", "/v1/chat/completions"),
        ("post", "/v1/completions"),
        ("get", "/v1/models/{name}"),
    }
    answered: set[int] = set()
    for operation in operations:

        @USUAL
        @given(case=operation.as_strategy())
        def check(case: Any) -> None:
            described = case.operation.definition.raw["responses"]
            sent = case.as_transport_kwargs(base_url="http://127.0.0.1")
            sent = {key: sent[key] for key in ("method", "url", "params", "json", "headers") if key in sent}
            response = server.request(sent.pop("method"), sent.pop("url"), **sent)
            answered.add(response.status_code)
            assert str(response.status_code) in described, (case.path, response.status_code, response.text[:500])
            assert response.status_code < 500 or case.path == "/ready", response.text

        check()
    assert 200 in answered
    assert server.service.engine.stats().error is None
