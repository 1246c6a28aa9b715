"""runtime/serve_request.py: every field of a chat completion is read, known to be harmless, or refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from edgevl.runtime.serve_request import ChatRequest, PictureUrl, RequestError, parse_json, parse_request

HELLO = [{"role": "user", "content": "Hello"}]
DATA = "data:image/png;base64,AAAA"


def parse(body: dict[str, Any], **options: Any) -> ChatRequest:
    return parse_request({"model": "m", "messages": HELLO, **body}, "m", 100, **options)


def test_the_least_request() -> None:
    assert parse({}) == ChatRequest(HELLO, {"max_new_tokens": 100, "stop": ()}, False, False)


def test_what_is_read() -> None:
    settings = {"temperature": 0, "top_p": 0.5, "top_k": 3, "min_p": 0.1, "repetition_penalty": 1.1}
    asked = parse({**settings, "max_tokens": 7, "stop": ["a", "b"], "seed": -1, "stream": True,
                   "stream_options": {"include_usage": True, "include_obfuscation": False}})  # fmt: skip
    stops = {"max_new_tokens": 7, "stop": ("a", "b"), "seed": 2**63 - 1}
    assert asked.generation == {**settings, **stops} and asked.stream and asked.include_usage
    assert parse({"max_tokens": 10**400}).generation["max_new_tokens"] == 100
    assert parse({"max_tokens": 9, "max_completion_tokens": 8}).generation["max_new_tokens"] == 8
    assert parse({"top_k": -1}).generation["top_k"] == 0


def test_what_asks_for_nothing_passes() -> None:
    nothing = {
        "n": 1, "logprobs": False, "top_logprobs": 0, "presence_penalty": 0.0, "frequency_penalty": 0,
        "logit_bias": {}, "tools": [], "tool_choice": "auto", "functions": [], "function_call": "none",
        "modalities": ["text"], "audio": None, "user": "u", "metadata": {"a": "b"}, "store": True,
        "service_tier": "auto", "parallel_tool_calls": True, "prediction": {"type": "content", "content": "x"},
        "stop": None, "seed": None, "temperature": None, "stream": None, "response_format": {"type": "text"},
        "reasoning_effort": "none", "verbosity": "medium",
    }  # fmt: skip
    assert parse(nothing) == parse({})


def test_messages_and_pictures() -> None:
    content = [
        {"type": "text", "text": "a"},
        {"type": "image_url", "image_url": {"url": DATA, "detail": "low"}},
        {"type": "image_url", "image_url": DATA.replace("data", "DATA")},
        {"type": "image_url", "image_url": {"url": "data:x", "detail": "auto"}},
    ]
    messages = [
        {"role": "developer", "content": "s", "name": "n"},
        {"role": "assistant", "content": "t", "refusal": None, "tool_calls": [], "audio": None},
        {"role": "user", "content": content},
    ]
    assert parse({"messages": messages}).messages == [
        {"role": "system", "content": "s"},
        {"role": "assistant", "content": "t"},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "a"},
                {"type": "image", "image": PictureUrl(DATA, True)},
                {"type": "image", "image": PictureUrl(DATA.replace("data", "DATA"))},
                {"type": "image", "image": PictureUrl("data:x")},
            ],
        },
    ]


def picture(url: Any, **more: Any) -> dict[str, Any]:
    part = {"type": "image_url", "image_url": {"url": url, **more}}
    return {"messages": [{"role": "user", "content": [part]}]}


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"model": None}, "model", "model is missing"),
        ({"messages": None}, "messages", "messages is missing"),
        ({"messages": []}, "messages", "expected a list with at least one"),
        ({"messages": "hello"}, "messages", "expected a list"),
        ({"messages": ["hello"]}, "messages[0]", "expected an object with role and content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "tools are not supported"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role", "expected one of system"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "expected a text or a list of parts"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "is 5, expected"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]", "expected {"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0]", "expected {"),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
            "messages[0].content[0]",
            '"image_url"',
        ),
        (
            {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]},
            "messages[0].tool_calls",
            "not supported here",
        ),
        (picture(None), "messages[0].content[0].image_url", "expected {"),
        (picture(DATA, detail="huge"), "messages[0].content[0].image_url.detail", "auto, low or high"),
        (picture("https://x.example/a.png"), "messages[0].content[0].image_url", "this server fetches nothing"),
        (picture("HTTP://x.example/a.png"), "messages[0].content[0].image_url", "this server fetches nothing"),
        (picture("file:///etc/passwd"), "messages[0].content[0].image_url", "this server reads no files"),
        (picture("/etc/passwd"), "messages[0].content[0].image_url", "this server reads no files"),
        (picture("a.png"), "messages[0].content[0].image_url", "this server reads no files"),
        ({"n": 2}, "n", "n is 2: not supported here; leave it away, or give 1"),
        ({"logprobs": True}, "logprobs", "not supported"),
        ({"top_logprobs": 5}, "top_logprobs", "not supported"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "an object of 1: not supported"),
        ({"tools": [{}]}, "tools", "not supported"),
        ({"tool_choice": "required"}, "tool_choice", "not supported"),
        ({"audio": {"voice": "x"}}, "audio", "not supported here; leave it away"),
        ({"modalities": ["text", "audio"]}, "modalities", "not supported"),
        ({"presence_penalty": 0.5}, "presence_penalty", "not supported"),
        ({"web_search_options": {}}, "web_search_options", "not supported"),
        ({"best_of": 3}, "best_of", "unknown field 'best_of'"),
        ({"temperature": -1}, "temperature", "expected a number of 0 to 2"),
        ({"temperature": 10**400}, "temperature", "a very large number, expected"),
        ({"temperature": "0.5"}, "temperature", "is '0.5', expected a number"),
        ({"temperature": True}, "temperature", "is true, expected a number"),
        ({"top_p": 0}, "top_p", "expected a number of 1e-06 to 1"),
        ({"repetition_penalty": 1e300}, "repetition_penalty", "expected a number of 0.1 to 10"),
        ({"top_k": 1.5}, "top_k", "expected a whole number"),
        ({"top_k": -2}, "top_k", "expected a whole number of -1"),
        ({"max_tokens": 0}, "max_tokens", "expected a whole number of 1 or more"),
        ({"max_completion_tokens": 2.0}, "max_completion_tokens", "expected a whole number"),
        ({"seed": 1.5}, "seed", "expected a whole number"),
        ({"stop": ""}, "stop", "none empty"),
        ({"stop": ["x"] * 17}, "stop", "a list of 17, expected a text or up to 16"),
        ({"stop": [1]}, "stop", "expected a text"),
        ({"stream": 1}, "stream", "expected true or false"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "for stream true only"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options", "expected include_usage"),
        ({"stream": True, "stream_options": {"include_usage": "yes"}}, "include_usage", "expected true or false"),
        ({"response_format": "json"}, "response_format", "expected {"),
        ({"response_format": {"type": "xml"}}, "response_format", "expected {"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "expected {"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": 1}}}, "response_format", "expected {"),
    ],
)
def test_what_is_refused(body: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse(body)
    assert caught.value.param == param and message in str(caught.value) and caught.value.status == 400
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_another_model_is_a_404() -> None:
    with pytest.raises(RequestError, match="the model 'gpt' does not exist here; this server has 'm'") as caught:
        parse({"model": "gpt"})
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")
    with pytest.raises(RequestError, match="the model an object of 0 does not exist"):
        parse({"model": {}})


@pytest.mark.parametrize("value", [None, [], "x", 5])
def test_a_body_that_is_no_object(value: Any) -> None:
    with pytest.raises(RequestError, match="expected an object with model and messages"):
        parse_request(value, "m", 100)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff\xfe", b'{"temperature": NaN}', b"[" * 100_000, b'{"seed": ' + b"9" * 5000 + b"}"]
)
def test_what_is_not_json(body: bytes) -> None:
    with pytest.raises(RequestError, match="the body is not JSON"):
        parse_json(body)


def test_infinity_in_disguise() -> None:
    for name in ("temperature", "top_p"):
        with pytest.raises(RequestError, match=f"{name} is Infinity, expected"):
            parse(json.loads(f'{{"{name}": 1e999}}'))


def test_files_only_where_they_are_allowed() -> None:
    asked = parse(picture("file:///a.png"), files=True)
    assert asked.messages[0]["content"][0]["image"] == PictureUrl("file:///a.png")
    with pytest.raises(RequestError, match="fetches nothing"):
        parse(picture("https://x.example/a.png"), files=True)
