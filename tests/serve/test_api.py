"""The API's answers are those of the engine, streamed or not, and worded as OpenAI words them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.engine.fakes import make_llm
from tests.serve.serving import Served, chat_tokens, events, saying, served


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served() as found:
        yield found


def expected(prompt: list[int], **sampling: object) -> str:
    """What the engine alone answers."""
    with make_llm() as llm:
        return llm.generate([prompt], **sampling)[0].text  # type: ignore[arg-type]


def test_a_chat_answer_is_the_engines(server: Served) -> None:
    found = server.chat("hello", temperature=0, model="fake").json()
    prompt = list(b"<user>hello<assistant>")
    (choice,) = found["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": expected(prompt, max_new_tokens=8),
        "refusal": None,
    }
    assert found["object"] == "chat.completion" and found["model"] == "fake"
    assert found["usage"] == {"prompt_tokens": len(prompt), "completion_tokens": 8, "total_tokens": len(prompt) + 8}


def test_a_streamed_chat_answer_is_the_same(server: Served) -> None:
    whole = server.chat("stream me", temperature=0, max_completion_tokens=20).json()
    response = server.chat("stream me", temperature=0, max_completion_tokens=20, stream=True)
    chunks = events(response)
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == whole["choices"][0]["message"]["content"]
    assert chunks[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}


def test_usage_comes_last_where_it_is_asked_for(server: Served) -> None:
    chunks = events(server.chat(stream=True, stream_options={"include_usage": True}))
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 8
    assert all("usage" not in chunk for chunk in chunks[:-1])


def test_a_seed_repeats_and_choices_differ(server: Served) -> None:
    fields = {"n": 3, "seed": 7, "temperature": 1.5, "max_tokens": 12}
    first = [choice["message"]["content"] for choice in server.chat(**fields).json()["choices"]]
    second = [choice["message"]["content"] for choice in server.chat(**fields).json()["choices"]]
    assert first == second
    assert len(set(first)) == 3


def test_streamed_choices_are_those_of_one_response(server: Served) -> None:
    fields = {"n": 2, "seed": 1, "max_tokens": 10}
    whole = [choice["text"] for choice in server.complete("xy", **fields).json()["choices"]]
    texts = ["", ""]
    for chunk in events(server.complete("xy", stream=True, **fields)):
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == whole


def test_several_prompts_of_every_kind(server: Served) -> None:
    ids = [[257, *b"abc"], [257, *b"de"]]
    by_text = server.complete(["abc", "de"], temperature=0).json()
    by_ids = server.complete(ids, temperature=0).json()
    assert [choice["text"] for choice in by_text["choices"]] == [choice["text"] for choice in by_ids["choices"]]
    assert server.complete(ids[1], temperature=0).json()["choices"][0]["text"] == by_ids["choices"][1]["text"]


def test_a_stop_text_ends_the_answer() -> None:
    with served(saying("one two three", prompt_tokens=4)) as server:
        found = server.complete(stop=[" thr", "zzz"], max_tokens=50, temperature=0).json()["choices"][0]
        assert (found["text"], found["finish_reason"]) == ("one two", "stop")
        streamed = events(server.complete(stop=" thr", max_tokens=50, temperature=0, stream=True))
        assert "".join(chunk["choices"][0]["text"] for chunk in streamed) == "one two"


def test_echo_gives_the_prompt_back(server: Served) -> None:
    assert server.complete("abc", echo=True, max_tokens=0).json()["choices"][0]["text"] == "abc"
    assert server.complete("abc", echo=True, temperature=0).json()["choices"][0]["text"].startswith("abc")
    (first, *_) = events(server.complete("abc", echo=True, stream=True))
    assert first["choices"][0]["text"].startswith("abc")


def test_more_tokens_than_the_context_leaves_end_by_length(server: Served) -> None:
    found = server.complete("abc", max_tokens=10**9, ignore_eos=True, temperature=0).json()
    assert found["choices"][0]["finish_reason"] == "length"
    assert found["usage"]["total_tokens"] == server.service.context_tokens


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"stop": 3}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"seed": 2**70}, "seed"),
        ({"stream": "yes"}, "stream"),
        ({"frequency_penalty": 3.0}, "frequency_penalty"),
        ({"logit_bias": {"5": 101.0}}, "logit_bias"),
        ({"logit_bias": {"five": 1.0}}, "logit_bias"),
        ({"messages": []}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
    ],
)
def test_what_is_wrong_is_named(server: Served, fields: dict[str, object], param: str) -> None:
    response = server.chat(**fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"].startswith(param), error


def test_unknown_fields_and_neutral_ones_are_accepted(server: Served) -> None:
    response = server.chat(
        frequency_penalty=0, presence_penalty=0.0, user="me", made_up_field={"x": [1]}, logit_bias={}
    )
    assert response.status_code == 200


def test_bias_and_penalties_change_what_is_said(server: Served) -> None:
    def said(**fields: object) -> str:
        return str(server.complete("abc", temperature=0, max_tokens=20, **fields).json()["choices"][0]["text"])

    assert said(logit_bias={str(ord("z")): 100}) == "z" * 20
    assert len(set(said(logit_bias={str(ord("z")): 20}, frequency_penalty=2.0))) > 1
    refused = server.complete("abc", suffix="x")
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "suffix"


def test_another_model_is_not_found(server: Served) -> None:
    response = server.chat(model="gpt-9")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert server.chat(model="alias").json()["model"] == "alias"


def test_a_prompt_beyond_the_context_is_refused(server: Served) -> None:
    response = server.complete("x" * 2000)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert "1023" in response.json()["error"]["message"]


def test_a_prompt_beyond_the_servers_own_limit_is_refused() -> None:
    with served(max_prompt_tokens=10) as server:
        assert server.complete("x" * 10).status_code == 400
        assert server.complete("x" * 9).status_code == 200


def test_models_are_listed_and_found(server: Served) -> None:
    assert [card["id"] for card in server.get("/v1/models").json()["data"]] == ["fake", "alias"]
    assert server.get("/v1/models/fake").json()["max_model_len"] == 1024
    assert server.get("/v1/models/other").status_code == 404


def test_tokens_there_and_back(server: Served) -> None:
    found = server.post("/tokenize", {"prompt": "naïve", "return_token_strs": True}).json()
    assert found["tokens"] == [257, *"naïve".encode()] and found["count"] == 7
    assert found["token_strs"][1] == "n" and found["token_strs"][3] == f"token_id:{'ï'.encode()[0]}"
    assert server.post("/detokenize", {"tokens": found["tokens"]}).json() == {"prompt": "naïve"}
    talk = server.post("/tokenize", {"messages": [{"role": "user", "content": "hi"}]}).json()
    assert talk["count"] == chat_tokens("hi")
    assert server.post("/tokenize", {}).status_code == 400


def test_status_plan_and_attention(server: Served) -> None:
    status = server.get("/v1/dseek/status").json()
    assert status["num_pages"] == 256 and status["running"] == 0
    view = server.get("/v1/dseek/attention?layer=0&blocks=3").json()
    assert view["rows"] == ["300", "330", "333"] and view["seen"] == 1.0
    assert server.get("/v1/dseek/attention?layer=9").status_code == 400
    assert server.get("/v1/dseek/attention?blocks=1000").status_code == 400


def test_metrics_count_tokens(server: Served) -> None:
    server.chat(max_tokens=4, temperature=0)
    text = server.get("/metrics").text
    assert 'dseek_generation_tokens_total{model_name="fake"}' in text
    assert 'dseek_time_to_first_token_seconds_count{model_name="fake"}' in text
    assert 'dseek_http_requests_total{route="/v1/chat/completions",status="200"}' in text


def test_a_model_without_a_template_says_so() -> None:
    llm = make_llm()
    llm.files.chat_template = None
    with served(llm=llm) as server:
        response = server.chat()
        assert response.status_code == 400 and response.json()["error"]["code"] == "no_chat_template"
