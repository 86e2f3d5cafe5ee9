"""Requests that mean harm: damaged JSON, huge and odd numbers, invalid UTF-8, paths that lead astray, wrong types.

Made from a seed, so that any of them can be made again. What a server must do with each is the same: answer with an
error (or an answer) in its own form, and go on working.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/tokenize", "/detokenize")

PATHS = (
    "/page/../../../../etc/passwd",
    "/page/%2e%2e/%2e%2e/etc/passwd",
    "/page/..%2f..%2fpyproject.toml",
    "/page/app.js%00.html",
    "/page//etc/passwd",
    "/v1/models/../../etc/passwd",
    "/v1/models/%ff%fe",
    "/%2e%2e/%2e%2e/",
    "//evil.example/",
    "/v1/dseek/attention?layer=99999999999999999999&blocks=-1",
    "/v1/dseek/attention?layer=NaN",
    "/v1/dseek/attention?layer[]=1",
    "/v1/models/" + "a" * 5000,
)

ODD_VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    2**31,
    2**63,
    2**200,
    -(2**200),
    1e308,
    -0.0,
    float("nan"),
    float("inf"),
    "",
    "\0",
    "\ud800",
    "\udfff\ud800",
    "A" * 5000,
    "' OR 1=1 --",
    "<script>alert(1)</script>",
    "{{7*7}}",
    "{% for x in range(100000) %}{% endfor %}",
    "../../etc/passwd",
    [],
    [[]],
    [None],
    [-1],
    [2**40],
    ["a"] * 200,
    {},
    {"a": {"b": {"c": []}}},
    {"__class__": "x"},
)

FIELDS = (
    "model",
    "messages",
    "prompt",
    "input",
    "tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "n",
    "seed",
    "stop",
    "stream",
    "stream_options",
    "max_tokens",
    "max_completion_tokens",
    "logprobs",
    "top_logprobs",
    "echo",
    "tools",
    "tool_choice",
    "response_format",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "priority",
    "repetition_penalty",
    "chat_template_kwargs",
    "encoding_format",
    "dimensions",
    "add_special_tokens",
    "continue_final_message",
)

SCHEMAS: tuple[Any, ...] = (
    {"type": "object", "properties": {"a": {"$ref": "#"}}},
    {"$ref": "http://169.254.169.254/latest"},
    {"$ref": "file:///etc/passwd"},
    {"type": "string", "pattern": "(a+)+$"},
    {"type": "string", "pattern": "("},
    {"type": "array", "minItems": 10**9, "items": {"type": "array", "minItems": 10**9}},
    {"enum": list(range(3000))},
    {"allOf": [{"type": "object"}] * 50},
    {"not": {}},
    {"type": ["nothing"]},
)


@dataclass(frozen=True, slots=True)
class Hostile:
    """One request."""

    method: str
    path: str
    body: bytes
    headers: tuple[tuple[str, str], ...] = (("content-type", "application/json"),)


def hostile_requests(count: int, seed: int = 0) -> list[Hostile]:
    """Make requests.

    Args:
        count: how many.
        seed: of the draw.

    Returns:
        The requests, every kind among them.
    """
    draw = random.Random(seed)
    kinds = (_odd_field, _odd_field, _odd_field, _damaged, _damaged, _noise, _deep, _path, _schema, _headers)
    return [draw.choice(kinds)(draw) for _ in range(count)]


def _plain(draw: random.Random) -> tuple[str, dict[str, Any]]:
    path = draw.choice(ENDPOINTS)
    body: dict[str, Any] = {"max_tokens": 2}
    if "chat" in path:
        body["messages"] = [{"role": "user", "content": "hi"}]
    elif "embeddings" in path:
        body["input"] = "hi"
    elif "detokenize" in path:
        body["tokens"] = [1, 2]
    else:
        body["prompt"] = "hi"
    return path, body


def _odd_field(draw: random.Random) -> Hostile:
    path, body = _plain(draw)
    for _ in range(draw.randint(1, 3)):
        value = draw.choice(ODD_VALUES)
        if draw.random() < 0.2:
            value = [{"role": value, "content": value}]
        body[draw.choice(FIELDS)] = value
    return Hostile("POST", path, json.dumps(body).encode())


def _damaged(draw: random.Random) -> Hostile:
    path, body = _plain(draw)
    data = bytearray(json.dumps(body).encode())
    for _ in range(draw.randint(1, 6)):
        place = draw.randrange(len(data))
        if draw.random() < 0.5:
            data[place] = draw.randrange(256)
        else:
            del data[place:]
            data += draw.choice((b"\xff\xfe", b"\xed\xa0\x80", b'"', b"}}", b"1" * 5000, b"\0", b"1e999999"))
    return Hostile("POST", path, bytes(data))


def _noise(draw: random.Random) -> Hostile:
    return Hostile("POST", draw.choice(ENDPOINTS), draw.randbytes(draw.randint(0, 400)))


def _deep(draw: random.Random) -> Hostile:
    depth = draw.choice((100, 1000, 20_000))
    opening, closing = draw.choice(((b"[", b"]"), (b'{"a":', b"}")))
    whole = opening * depth + b"1" + closing * depth
    if draw.random() < 0.5:
        whole = b'{"prompt":"x","messages":' + whole + b',"guided_json":' + whole + b"}"
    return Hostile("POST", draw.choice(ENDPOINTS), whole)


def _path(draw: random.Random) -> Hostile:
    return Hostile(draw.choice(("GET", "POST", "PUT", "DELETE", "OPTIONS", "TRACE")), draw.choice(PATHS), b"", ())


def _schema(draw: random.Random) -> Hostile:
    path, body = _plain(draw)
    schema = draw.choice(SCHEMAS)
    if draw.random() < 0.5:
        body["guided_json"] = schema
    else:
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    return Hostile("POST", path, json.dumps(body).encode())


def _headers(draw: random.Random) -> Hostile:
    path, body = _plain(draw)
    odd = draw.choice(
        (
            ("content-type", "text/plain"),
            ("content-type", "application/json; charset=utf-7"),
            ("content-type", "multipart/form-data; boundary=x"),
            ("content-encoding", "gzip"),
            ("authorization", "Bearer " + "x" * 3000),
            ("x-request-id", "a" * 3000),
            ("x-forwarded-for", "127.0.0.1, 10.0.0.1"),
            ("expect", "100-continue"),
            ("accept", "text/html"),
            ("range", "bytes=0-999999999999"),
        )
    )
    return Hostile("POST", path, json.dumps(body).encode(), (("content-type", "application/json"), odd))


def complaint(status: int, headers: dict[str, str], body: bytes) -> str | None:
    """Judge a server's answer to a hostile request.

    Args:
        status: of HTTP.
        headers: names in small letters.
        body: the response.

    Returns:
        What is wrong with it, or None.
    """
    if status >= 500:
        return f"status {status}"
    if b"root:" in body or b"Traceback" in body or b"site-packages" in body:
        return "it tells what it should not"
    if "x-request-id" not in headers:
        return "no request id"
    if status >= 400 and headers.get("content-type", "").startswith("application/json"):
        error = json.loads(body)["error"]
        if set(error) != {"message", "type", "param", "code"} or len(error["message"]) > 500:
            return f"an error of another form: {error}"
    return None
