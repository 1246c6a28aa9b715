"""`edgevl serve` over real sockets on the demo model: OpenAI's form, and the answers of `generate`."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import numpy as np
import openai
import pytest
from native_oracle import usable_library
from PIL import Image
from serving import DEMO, NAME, QUESTIONS, Server, demo_bundle, long, open_model, ours, serving, until, user

from edgevl.export.exporter import ExportOptions, export_bundle
from edgevl.runtime import pauses
from edgevl.runtime import scheduler as scheduler_module
from edgevl.runtime.errors import MemoryLimitError
from edgevl.runtime.image_loading import load_image
from edgevl.runtime.jobs import BusyError, Done, Event, Failed, Job, Text
from edgevl.runtime.preflight import Planner
from edgevl.runtime.results import Completion
from edgevl.runtime.scheduler import Scheduler
from edgevl.runtime.serve_metrics import Metrics


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo_bundle(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def alone(bundle: Path) -> list[Completion]:
    """What `generate` says to QUESTIONS."""
    with open_model(bundle) as model:
        return [model.generate(ours(q, *([p] if p else []))) for p, q in QUESTIONS]


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[Server]:
    with serving(bundle, max_tokens=4000) as running:
        yield running


def events(response: httpx.Response) -> list[Any]:
    """The values of a stream, [DONE] as text."""
    lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    values = [line[len("data: ") :] for line in lines]
    return [v if v == "[DONE]" else json.loads(v) for v in values]


# ------------------------------------------------------------------------------------------- one answer


def test_an_answer_is_that_of_generate(server: Server, alone: list[Completion]) -> None:
    answer = server.ask({"messages": user("Read the text.", "line.png")})
    assert answer.status_code == 200
    data, expected = answer.json(), alone[0]
    assert data["id"].startswith("chatcmpl-") and data["object"] == "chat.completion" and data["model"] == NAME
    assert isinstance(data["created"], int)
    message = {"role": "assistant", "content": expected.text, "refusal": None}
    assert data["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}]
    tokens = expected.usage.prompt_tokens, expected.usage.completion_tokens
    assert data["usage"] == {
        "prompt_tokens": tokens[0],
        "completion_tokens": tokens[1],
        "total_tokens": sum(tokens),
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_a_stream_is_chunk_by_chunk_openais(server: Server, alone: list[Completion]) -> None:
    body = {"model": NAME, "messages": user("Read the text.", "line.png"), "stream": True}
    with server.client.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        *chunks, done = events(response)
    assert done == "[DONE]"
    assert len({(c["id"], c["created"], c["model"], c["object"]) for c in chunks}) == 1
    assert chunks[0]["object"] == "chat.completion.chunk" and all("usage" not in c for c in chunks)
    choices = [c["choices"][0] for c in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(c["delta"]["content"] for c in choices[1:-1]) == alone[0].text and len(choices) > 5
    assert choices[-1]["delta"] == {} and choices[-1]["finish_reason"] == "stop"
    assert all(c["finish_reason"] is None for c in choices[:-1])

    body["stream_options"] = {"include_usage": True}
    with server.client.stream("POST", "/v1/chat/completions", json=body) as response:
        *chunks, done = events(response)
    assert all(c["usage"] is None for c in chunks[:-1])
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == len(alone[0].token_ids)


@pytest.mark.parametrize("stream", [False, True])
def test_length_and_stop(server: Server, alone: list[Completion], stream: bool) -> None:
    def ask(**settings: Any) -> tuple[str, str]:
        body = {"model": NAME, "messages": user("Read the text.", "line.png"), "stream": stream, **settings}
        response = server.client.post("/v1/chat/completions", json=body)
        if not stream:
            (choice,) = response.json()["choices"]
            return choice["message"]["content"], choice["finish_reason"]
        choices = [e["choices"][0] for e in events(response)[:-1]]
        return "".join(c["delta"].get("content", "") for c in choices), choices[-1]["finish_reason"]

    text = alone[0].text
    assert ask(max_tokens=3) == (text[:3], "length")
    assert ask(max_tokens=1, max_completion_tokens=4) == (text[:4], "length")
    assert ask(stop=text[2:5]) == (text[:2], "stop")  # the demo's tokens are single characters: across tokens
    assert ask(stop=["never", text[4:6]]) == (text[:4], "stop")
    assert ask(stop=None, seed=3, top_k=-1, user="me", metadata={"a": "b"}, store=False) == (text, "stop")


def test_the_cap_holds(bundle: Path) -> None:
    with serving(bundle, max_tokens=5) as server:
        for settings in ({}, {"max_tokens": 500}):
            answer = server.ask({"messages": user("Read the text.", "line.png"), **settings}).json()
            assert answer["usage"]["completion_tokens"] == 5 and answer["choices"][0]["finish_reason"] == "length"


def test_sampling_settings_reach_the_sampler(server: Server, bundle: Path) -> None:
    settings = {"temperature": 1.7, "top_p": 0.9, "top_k": 40, "min_p": 0.01, "repetition_penalty": 1.2, "seed": 11}
    with open_model(bundle) as model:
        expected = model.generate(ours("Read the text."), max_new_tokens=40, **settings).text
    assert server.text({"messages": user("Read the text."), "max_tokens": 40, **settings}) == expected
    assert server.text({"messages": user("Read the text."), "max_tokens": 40, **settings, "seed": 12}) != expected


def test_response_formats(server: Server) -> None:
    schema = {
        "type": "object",
        "properties": {"total": {"type": "integer", "maximum": 99, "minimum": 0}},
        "required": ["total"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "receipt", "strict": True, "schema": schema}}
    asked = {"messages": user("What is the total?", "receipt.png"), "max_tokens": 60}
    jsonschema.validate(json.loads(server.text({**asked, "response_format": form})), schema)
    assert server.text({**asked, "response_format": {"type": "json_object"}}).startswith("{")
    assert server.text({**asked, "response_format": {"type": "text"}}) == server.text(asked)
    form["json_schema"]["schema"] = {"type": "nope"}
    refused = server.ask({**asked, "response_format": form})
    assert refused.status_code == 400 and "Invalid type: nope" in refused.json()["error"]["message"]


def test_several_turns_pictures_and_roles(server: Server, bundle: Path) -> None:
    first, second = user("Read both.", "two-1.png", "two-2.png"), user("What is the total?", "receipt.png")
    between = {"role": "assistant", "content": "Scrolled 89"}
    with open_model(bundle) as model:
        expected = model.generate(
            [
                {"role": "system", "content": "Be brief."},
                *ours("Read both.", "two-1.png", "two-2.png"),
                between,
                *ours("What is the total?", "receipt.png"),
            ]
        ).text
    messages = [{"role": "developer", "content": "Be brief."}, *first, {**between, "refusal": None}, *second]
    assert server.text({"messages": messages}) == expected


def test_low_detail_is_a_smaller_picture(bundle: Path, server: Server) -> None:
    """The demo's own limit is below OpenAI's 512 × 512, so nothing grows."""
    buffer = io.BytesIO()
    Image.new("RGB", (900, 900), (200, 30, 40)).save(buffer, "PNG")
    messages = user("What colour?", buffer.getvalue())
    usual = server.ask({"messages": messages}).json()["usage"]["prompt_tokens"]
    messages[0]["content"][0]["image_url"]["detail"] = "low"
    assert server.ask({"messages": messages}).json()["usage"]["prompt_tokens"] == usual


# ------------------------------------------------------------------------------------------- OpenAI's own client


def test_the_official_client(server: Server, alone: list[Completion]) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        assert [m.id for m in client.models.list()] == [NAME] and client.models.retrieve(NAME).owned_by == "edgevl"
        for expected, (picture, question) in zip(alone, QUESTIONS):
            messages: Any = user(question, *([picture] if picture else []))
            whole = client.chat.completions.create(model=NAME, messages=messages)
            assert whole.choices[0].message.content == expected.text and whole.usage is not None
            assert whole.usage.total_tokens == expected.usage.prompt_tokens + len(expected.token_ids)
        messages = user("Read the text.", "line.png")
        stream = client.chat.completions.create(
            model=NAME, messages=messages, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == alone[0].text and chunks[-1].usage is not None
        with pytest.raises(openai.NotFoundError, match="'gpt' does not exist here") as missing:
            client.chat.completions.create(model="gpt", messages=messages)
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError, match="n is 2: not supported here") as several:
            client.chat.completions.create(model=NAME, messages=messages, n=2)
        assert several.value.param == "n"


# ------------------------------------------------------------------------------------------- many at once


def test_answers_together_are_those_alone(bundle: Path, alone: list[Completion]) -> None:
    """Three rows, sixteen requests: they join and leave between the steps of others, and each gets its own answer."""
    with serving(bundle, max_batch=3) as server, ThreadPoolExecutor(16) as pool:
        asked = [user(q, *([p] if p else [])) for p, q in QUESTIONS] * 2
        texts = list(pool.map(lambda m: server.text({"messages": m}), asked))
        assert texts == [c.text for c in alone] * 2
        page = server.client.get("/metrics").text
        assert f"edgevl_completion_tokens_total {2 * sum(len(c.token_ids) for c in alone)}\n" in page


def test_a_request_joins_while_another_is_answered(server: Server, alone: list[Completion]) -> None:
    body = {"model": NAME, **long(), "stream": True}
    with server.client.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        for expected, (picture, question) in zip(alone[:4], QUESTIONS):
            assert server.text({"messages": user(question, *([picture] if picture else []))}) == expected.text
        assert server.scheduler.running == 1  # the long one still is
    until(lambda: server.scheduler.running == 0)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_takes_its_answer_along(server: Server, stream: bool) -> None:
    def tokens() -> int:
        page = server.client.get("/metrics").text
        return int(page.partition("\nedgevl_completion_tokens_total ")[2].partition("\n")[0])

    before = tokens()
    if stream:
        with server.client.stream("POST", "/v1/chat/completions", json={"model": NAME, **long(), "stream": True}) as r:
            next(r.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            server.client.post("/v1/chat/completions", json={"model": NAME, **long()}, timeout=1)
    until(lambda: server.scheduler.running == 0, 5)
    assert 0 < tokens() - before < 3000
    assert not server.notes


def test_a_client_that_leaves_the_queue_is_never_answered(bundle: Path) -> None:
    with serving(bundle, max_batch=1, max_tokens=4000) as server, ThreadPoolExecutor(1) as pool:
        running = pool.submit(server.ask, long(1500))
        until(lambda: server.scheduler.running == 1)
        for _ in range(3):  # one is read, one waits for the reader
            with pytest.raises(httpx.ReadTimeout):
                server.client.post("/v1/chat/completions", json={"model": NAME, **long()}, timeout=0.1)
        assert running.result().json()["usage"]["completion_tokens"] == 1500
        until(lambda: server.scheduler.waiting == 0)
        assert "edgevl_time_to_first_token_seconds_count 1\n" in server.client.get("/metrics").text


def test_a_full_queue_says_when_to_come_again(bundle: Path, alone: list[Completion]) -> None:
    with serving(bundle, max_batch=1, max_queue=1, max_tokens=4000) as server, ThreadPoolExecutor(2) as pool:
        first = pool.submit(server.ask, long(1000))
        until(lambda: server.scheduler.running == 1)
        second = pool.submit(server.text, {"messages": user("How many stars?", "count.png")})
        until(lambda: server.scheduler.waiting == 1)
        refused = server.ask({"messages": user("How many stars?")})
        assert refused.status_code == 429 and 1 <= int(refused.headers["Retry-After"]) <= 60
        error = refused.json()["error"]
        assert error["type"] == "rate_limit_error" and error["code"] == "rate_limit_exceeded"
        assert "1 requests are being answered and 1 wait" in error["message"]
        assert server.client.get("/health").status_code == 200  # busy is not ill
        assert first.result().status_code == 200 and second.result() == alone[3].text
        assert server.ask({"messages": user("How many stars?")}).status_code == 200


def test_a_client_that_leaves_gives_its_place_in_the_queue_away(bundle: Path) -> None:
    with serving(bundle, max_batch=1, max_queue=4) as server:
        ended: list[str] = []

        def job(name: str, tokens: int = 2) -> Job:
            def deliver(event: Event) -> None:
                if isinstance(event, Done):
                    ended.append(name)

            return Job(lambda: ours("How many stars?"), {"max_new_tokens": tokens, "eos_token_ids": (-1,)}, deliver)

        jobs = [job("long", 1000), *map(job, "abcd")]
        for one in jobs:
            server.scheduler.submit(one)
        with pytest.raises(BusyError, match="as many as this server takes"):
            server.scheduler.submit(job("e"))
        jobs[3].cancel()  # not the first in the queue, which the reader would drop
        server.scheduler.submit(job("f"))
        until(lambda: "f" in ended)
        assert ended == ["long", "a", "b", "d", "f"]


def test_first_come_first_served_and_none_is_starved(bundle: Path) -> None:
    """All seen from the worker: requests begin as they came, and a running answer gets a token between the beginnings
    of two others."""
    begun: list[tuple[str, int]] = []  # a request, and how many tokens the long answer had when it began
    ended: list[str] = []
    with serving(bundle, max_batch=4) as server:

        def job(name: str, tokens: int) -> Job:
            def deliver(event: Event) -> None:
                if not isinstance(event, Text):
                    ended.append(name)
                elif name not in dict(begun):
                    begun.append((name, len(server.scheduler._loop.rows[0].tokens)))

            return Job(lambda: ours("How many stars?"), {"max_new_tokens": tokens, "eos_token_ids": (-1,)}, deliver)

        for one in (job("long", 400), *(job(str(i), 20) for i in range(8))):
            server.scheduler.submit(one)
        until(lambda: len(ended) == 9)
    assert [name for name, _ in begun] == ["long", *map(str, range(8))] and ended[-1] == "long"
    counts = [tokens for _, tokens in begun]
    assert counts == sorted(set(counts))


def test_several_tokens_of_one_step_are_one_text(bundle: Path) -> None:
    """An answer by prompt lookup may end with the last of them."""
    settings = {"max_new_tokens": 60, "eos_token_ids": (-1,), "lookup_tokens": 8}
    told: list[Event] = []
    with open_model(bundle) as model:
        expected = model.generate(ours("words " * 20), **settings)
        assert expected.usage.accepted_tokens > 0
        scheduler = Scheduler(model, 2, 8, Metrics())
        scheduler.submit(Job(lambda: ours("words " * 20), settings, told.append))
        until(lambda: bool(told) and not isinstance(told[-1], Text))
        assert scheduler.problem is None and scheduler.close(10)
    *texts, done = told
    assert isinstance(done, Done) and done.completion.token_ids == expected.token_ids
    assert "".join(t.text for t in texts if isinstance(t, Text)) == expected.text


# ------------------------------------------------------------------------------------------- when things break


def test_a_broken_engine_is_a_500_without_internals(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(bundle, max_tokens=4000) as server:
        loop = server.scheduler._loop
        with monkeypatch.context() as patch:

            def fail() -> None:
                raise RuntimeError("secret: /etc/weights at 0x7f")

            patch.setattr(loop, "step", fail)
            refused = server.ask({"messages": user("How many stars?", "count.png")})
            assert refused.status_code == 500
            assert refused.json()["error"] == {
                "message": "the server could not compute this answer",
                "type": "server_error",
                "param": None,
                "code": "internal_error",
            }
            with server.client.stream(
                "POST", "/v1/chat/completions", json={"model": NAME, **long(), "stream": True}
            ) as r:
                *_, last = events(r)  # after the headers: an error event, and no [DONE]
            assert last["error"]["code"] == "internal_error"
            health = server.client.get("/health")
            assert health.status_code == 503 and health.json() == {"status": "the engine failed: RuntimeError"}
        assert any("RuntimeError: secret" in n for n in server.notes)  # whoever runs it is told
        assert server.ask({"messages": user("How many stars?", "count.png")}).status_code == 200
        assert server.client.get("/health").status_code == 200


def test_a_call_of_the_engine_that_fails_makes_the_server_ill(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that raises an error of ours, as those of ONNX Runtime do; numbers of one picture that cannot be do not."""
    with serving(bundle) as server:
        question = {"messages": user("How many stars?", "count.png")}
        graph = server.model.engine.vision
        real = graph.run
        for run, status in (
            (lambda feeds, cache=None: real(feeds | {"patches": feeds["patches"][..., :-1]}, cache), 503),
            (lambda feeds, cache=None: {"image_embeds": real(feeds, cache)["image_embeds"] * np.nan}, 200),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(graph, "run", run)
                assert server.ask(question).status_code == 500
            assert server.client.get("/health").status_code == status
            assert server.ask(question).status_code == 200
            assert server.client.get("/health").json() == {"status": "ok"}
            server.model.image_cache.clear()


def test_what_a_long_answer_has_taken_is_not_asked_for_again(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The KV cache keeps its memory. Counted twice, a server that has had one long prompt refuses the next for ever."""
    with serving(bundle) as server:
        planner = Planner(server.model.bundle)
        long = {"messages": user("words " * 400), "max_tokens": 2}
        used = server.ask(long).json()["usage"]
        with monkeypatch.context() as patch:
            patch.setattr("edgevl.runtime.admission.available_bytes", lambda: planner.cache(16))
            assert server.ask(long).status_code == 200
            more = server.ask({"messages": user("words " * 600), "max_tokens": 2})
            assert more.status_code == 503, used


def test_a_request_without_memory_may_come_again(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(bundle) as server:
        with monkeypatch.context() as patch:
            patch.setattr("edgevl.runtime.admission.available_bytes", lambda: 1000)
            refused = server.ask({"messages": user("How many stars?", "count.png")})
        assert refused.status_code == 503 and refused.headers["Retry-After"] == "5"
        assert "available here" in refused.json()["error"]["message"]
        assert server.ask({"messages": user("How many stars?", "count.png")}).status_code == 200


def test_a_trace_for_whoever_looks_for_it(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(bundle) as server:
        monkeypatch.setenv("EDGEVL_DEBUG", "1")
        monkeypatch.setattr(server.scheduler._loop, "join", None)
        assert server.ask({"messages": user("How many stars?")}).status_code == 500
        assert "TypeError" in server.notes[0] and "in _join" in server.notes[1]


def test_ending_lets_running_answers_finish(bundle: Path) -> None:
    with serving(bundle, max_batch=1, max_tokens=4000) as server, ThreadPoolExecutor(4) as pool:
        running = pool.submit(server.ask, long(400))
        until(lambda: server.scheduler.running == 1)
        waiting = [pool.submit(server.ask, long(400)) for _ in range(3)]
        until(lambda: server.scheduler.waiting == 3)
        server.scheduler.drain()
        answers = [w.result() for w in waiting]
        refused = [a for a in answers if a.status_code == 503]
        assert len(refused) >= 1 and all(a.status_code in (200, 503) for a in answers)  # one or two were read already
        assert refused[0].headers["Retry-After"] == "1" and refused[0].json()["error"]["code"] == "unavailable"
        late = server.ask({"messages": user("How many stars?")})
        assert late.status_code == 503 and server.client.get("/health").status_code == 503
        assert running.result().json()["usage"]["completion_tokens"] == 400


def test_closing_gives_running_answers_up(bundle: Path) -> None:
    with serving(bundle, max_tokens=4000) as server, ThreadPoolExecutor(2) as pool:
        whole = pool.submit(server.ask, long(4000))
        until(lambda: server.scheduler.running == 1)
        assert server.scheduler.close(5)
        assert whole.result().status_code == 503


def test_answers_go_on_while_a_picture_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its first pixel and its first word others get theirs; every answer is that of `generate`."""
    usable_library()
    monkeypatch.setattr(pauses, "PASS_SHARE", 0)
    export_bundle(DEMO / "model", tmp_path / NAME, ExportOptions(precision="int8"))
    with open_model(tmp_path / NAME, image_cache_mb=0) as model:
        expected = [model.generate(ours("Read the text.", "three-lines.png")).text, *(
            model.generate(ours("How many stars?"), max_new_tokens=n, eos_token_ids=(-1,)).text for n in (600, 20)
        )]  # fmt: skip
        scheduler = Scheduler(model, 3, 8, Metrics())
        texts: list[list[str]] = [[], [], []]
        ended, meanwhile = [threading.Event() for _ in range(3)], []
        prepare = model.prepare

        def watched(*args: Any, **settings: Any) -> Any:
            rows = [*scheduler._running]
            before = sum(len(row.tokens) for row in rows)
            prompt = prepare(*args, **settings)
            meanwhile.append(sum(len(row.tokens) for row in rows) - before)
            return prompt

        monkeypatch.setattr(model, "prepare", watched)

        def deliver(number: int, event: Event) -> None:
            if isinstance(event, Text):
                texts[number].append(event.text)
            else:
                assert isinstance(event, Done), event
                ended[number].set()

        def ask(number: int, messages: list[dict[str, Any]], **settings: Any) -> None:
            scheduler.submit(Job(lambda: messages, settings, lambda event: deliver(number, event)))

        for number, tokens in ((1, 600), (2, 20)):
            ask(number, ours("How many stars?"), max_new_tokens=tokens, eos_token_ids=(-1,))
            until(lambda number=number: bool(texts[number]))
        ask(0, ours("Read the text.", "three-lines.png"))
        assert all(e.wait(20) for e in ended)
        assert scheduler.close(10)
    assert ["".join(t) for t in texts] == expected
    assert meanwhile[-1] > 5


def test_a_short_request_overtakes_a_long_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not another picture, not a longer text, not where no row would be left; and all say what they say alone."""
    usable_library()
    monkeypatch.setattr(pauses, "PASS_SHARE", 0)
    monkeypatch.setattr(scheduler_module, "PASS_SHARE", 0)
    monkeypatch.setattr(scheduler_module, "_LONG", 128)
    export_bundle(DEMO / "model", tmp_path / NAME, ExportOptions(precision="int8"))
    forever = {"max_new_tokens": 300, "eos_token_ids": (-1,)}
    asked: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
        "running": (ours("How many stars?"), forever),
        "picture": (_decoded("Read the text.", "three-lines.png"), {}),
        "long": (ours("words " * 300), {"max_new_tokens": 5, "eos_token_ids": (-1,)}),
        "short": (ours("What is it?"), {"max_new_tokens": 5, "eos_token_ids": (-1,)}),
        "longer": (ours("words " * 100), {"max_new_tokens": 5, "eos_token_ids": (-1,)}),
        "large picture": (_decoded("Read the text.", "three-lines.png", 3), {}),
        "another picture": (_decoded("How many stars?", "count.png"), {}),
    }

    def begun(rows: int, first: str, *names: str) -> list[str]:
        """The order in which requests begin that come while the pictures of `first` are encoded, or its prompt read."""
        order: list[str] = []
        told: dict[str, list[Event]] = {name: [] for name in ("running", first, *names)}
        scheduler = Scheduler(model, rows, 8, Metrics())
        reading, go_on = threading.Event(), threading.Event()
        paused = scheduler._go_on

        def once(joining: Job) -> None:
            if scheduler._overtakable and not reading.is_set():
                reading.set()
                assert go_on.wait(20)
            paused(joining)

        monkeypatch.setattr(scheduler, "_go_on", once)

        def submit(name: str) -> None:
            def deliver(event: Event) -> None:
                if not told[name]:
                    order.append(name)
                told[name].append(event)

            messages, settings = asked[name]
            scheduler.submit(Job(lambda: messages, settings, deliver))

        submit("running")
        until(lambda: bool(told["running"]))
        submit(first)
        assert reading.wait(20)
        for name in names:
            submit(name)
        until(lambda: scheduler._ready.full())
        go_on.set()
        until(lambda: all(events and isinstance(events[-1], Done) for events in told.values()), 30)
        assert scheduler.close(10)
        for name, events in told.items():
            assert "".join(e.text for e in events if isinstance(e, Text)) == alone[name], name
        return order[1:]

    with open_model(tmp_path / NAME, image_cache_mb=0) as model:
        alone = {name: model.generate(messages, **settings).text for name, (messages, settings) in asked.items()}
        assert begun(3, "picture", "short", "longer") == ["short", "picture", "longer"]
        assert begun(4, "picture", "short", "short") == ["short", "picture"]
        assert begun(2, "picture", "short") == ["picture", "short"]
        assert begun(3, "picture", "longer", "short") == ["picture", "longer", "short"]
        assert begun(3, "picture", "another picture") == ["picture", "another picture"]
        assert begun(3, "large picture", "another picture") == ["another picture", "large picture"]
        assert begun(4, "large picture", "another picture", "short")[-1] == "large picture"
        assert begun(3, "long", "short", "longer") == ["short", "long", "longer"]
        assert begun(2, "long", "short") == ["long", "short"]
        assert begun(3, "long", "large picture") == ["long", "large picture"]

        def begun_aside() -> bool:
            scheduler = Scheduler(model, 2, 8, Metrics())
            messages, config = asked["long"][0], model.generation_config(max_new_tokens=5)
            ready = scheduler_module._Ready(Job(list, {}, print), messages, config, *model.prompt_size(messages))
            aside = scheduler._row(ready, model.prepare(messages), overtakes=False)[1]
            assert scheduler.close(10)
            return aside

        memory = model.row
        assert begun_aside()

        def no_memory_twice(*args: Any, spare: int, **settings: Any) -> Any:
            if spare < 0:
                raise MemoryLimitError("for a prompt that is read aside")
            return memory(*args, spare=spare, **settings)

        monkeypatch.setattr(model, "row", no_memory_twice)
        assert begun_aside() is False


def _decoded(text: str, picture: str, enlarged: int = 1) -> list[dict[str, Any]]:
    """As `MessageReader` gives it."""
    messages, image = ours(text, picture), load_image(DEMO / "pictures" / picture)
    item = messages[0]["content"][0]
    item["image"] = image.resize((enlarged * image.width, enlarged * image.height))
    item["max_pixels"] = enlarged**2 * 100_000
    return messages


@pytest.mark.parametrize("how", ["its client leaves", "the server ends"])
def test_a_picture_that_nobody_waits_for_is_not_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    usable_library()
    monkeypatch.setattr(pauses, "PASS_SHARE", 0)
    export_bundle(DEMO / "model", tmp_path / NAME, ExportOptions(precision="int8"))
    reading, decided = threading.Event(), threading.Event()
    encoded: list[bool] = []
    with open_model(tmp_path / NAME, image_cache_mb=0) as model:
        scheduler = Scheduler(model, 2, 8, Metrics())
        go_on, encode, calls = scheduler._go_on, model._vision.run, [0]

        def watched_pause(joining: Job) -> None:
            calls[0] += 1
            if calls[0] == 5:  # one of the encoder's, behind those before the picture's stages
                reading.set()
                assert decided.wait(20)
            go_on(joining)

        def watched_encoder(*args: Any) -> Any:
            embeds = encode(*args)
            encoded.append(True)
            return embeds

        monkeypatch.setattr(scheduler, "_go_on", watched_pause)
        monkeypatch.setattr(model._vision, "run", watched_encoder)
        told: list[Event] = []
        job = Job(lambda: ours("Read the text.", "line.png"), {}, told.append)
        scheduler.submit(job)
        assert reading.wait(20)
        if how == "its client leaves":
            job.cancel()
            decided.set()
            until(lambda: scheduler.waiting == 0)
            assert told == [] and scheduler.problem is None
        else:
            ending = threading.Thread(target=lambda: (until(lambda: scheduler._stop), decided.set()))
            ending.start()
            assert scheduler.close(10)
            ending.join()
            (event,) = told
            assert isinstance(event, Failed) and isinstance(event.error, BusyError)
        assert calls == [5] and encoded == []
        if how == "its client leaves":  # and the next one is answered
            answer: list[Event] = []
            scheduler.submit(Job(lambda: ours("Read the text.", "line.png"), {"max_new_tokens": 3}, answer.append))
            until(lambda: bool(answer) and isinstance(answer[-1], Done))
            assert encoded == [True] and scheduler.close(10)
