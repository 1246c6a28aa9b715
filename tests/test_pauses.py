"""runtime/pauses.py: what is done in the pauses of a pass, and that nothing comes out otherwise for it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import DEMO
from conftest import Pair
from native_oracle import usable_library
from PIL import Image
from test_decode_loop import alone, join
from test_generation import CASES

from edgevl.export.exporter import ExportOptions, export_bundle
from edgevl.runtime import VisionLanguageModel
from edgevl.runtime import decode_loop as decode_loop_module
from edgevl.runtime import pauses as pauses_module
from edgevl.runtime.decode_loop import DecodeLoop
from edgevl.runtime.errors import InputError
from edgevl.runtime.pauses import PASS_SHARE, pause, pauses


@pytest.fixture
def every(monkeypatch: pytest.MonkeyPatch) -> None:
    """In every pause, however short the pass."""
    monkeypatch.setattr(pauses_module, "PASS_SHARE", 0)


@pytest.fixture(scope="module", params=["int4", "int8", "hybrid"])
def native(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    usable_library()
    folder = tmp_path_factory.mktemp("pauses") / "bundle"
    export_bundle(DEMO, folder, ExportOptions(precision=request.param))
    return folder


@pytest.fixture
def model(native: Path) -> Iterator[VisionLanguageModel]:
    with VisionLanguageModel.open(native, "ort-cpu", threads=1, image_cache_mb=0) as opened:
        yield opened


# ------------------------------------------------------------------------------------------- whose turn it is


def test_a_pass_keeps_its_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(pauses_module.time, "perf_counter", lambda: now[0])
    began: list[float] = []

    def call() -> None:
        began.append(now[0])
        now[0] += 0.5

    with pauses(call):
        for _ in range(100):
            pause()
            now[0] += 0.125
    # At once, then as soon as PASS_SHARE times the 0.5 s that it took have gone by: 12 parts of the pass of 0.125 s.
    assert PASS_SHARE == 3 and np.allclose(np.diff(began), 2.0) and began[0] == 100.0 and len(began) == 9
    pause()
    assert len(began) == 9


@pytest.mark.usefixtures("every")
def test_what_is_called_has_no_pauses_of_its_own() -> None:
    count = [0]

    def call() -> None:
        count[0] += 1
        pause()

    with pauses(call):
        pause()
        pause()
    assert count == [2]


def test_a_pass_in_a_pause_has_pauses_and_its_time_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now, began, inner = [100.0], [], []
    monkeypatch.setattr(pauses_module.time, "perf_counter", lambda: now[0])

    def pass_on(call: Callable[[], None], parts: int) -> None:
        with pauses(call):
            for _ in range(parts):
                pause()
                now[0] += 0.125

    def step() -> None:
        inner.append(now[0])
        now[0] += 0.5

    def call() -> None:
        began.append(now[0])
        if len(began) == 2:
            pass_on(lambda: pass_on(step, 1) if len(inner) == 3 else step(), 48)
        now[0] += 0.5

    pass_on(call, 60)
    assert np.allclose(np.diff(inner)[:2], 2.0) and len(inner) > 4
    # Calls of 0.5 s are 2 s apart, the one with a pass of its own likewise: from its end.
    gaps = np.diff(began)
    assert np.allclose(np.delete(gaps, 1), 2.0) and 6 + 2 < gaps[1] < 12 and len(gaps) == 4


def test_an_error_of_a_pass_in_a_pause_is_its_own() -> None:
    caught: list[str] = []

    def fail() -> None:
        raise KeyError("inner")

    def call() -> None:
        try:
            with pauses(fail):
                pause()
        except KeyError as e:
            caught.append(str(e))

    with pauses(call):
        for _ in range(3):
            pause()
    assert 1 <= len(caught) <= 3
    with pytest.raises(KeyError, match="outer"), pauses(lambda: call() or (_ for _ in ()).throw(KeyError("outer"))):
        pause()


@pytest.mark.usefixtures("every")
def test_an_error_ends_the_pass() -> None:
    passed, count = [0], [0]

    def call() -> None:
        count[0] += 1
        raise KeyError("of what was called")

    with pytest.raises(KeyError, match="of what was called"), pauses(call):
        passed[0] += 1
        pause()
        passed[0] += 1
    assert (passed, count) == ([1], [1])
    with pauses(lambda: None):  # nothing is left of it
        pause()


def test_pauses_are_not_nested_and_a_threads_own() -> None:
    called: list[str] = []
    with pauses(lambda: called.append("here")):
        with pytest.raises(RuntimeError, match="within pauses"), pauses(lambda: None):
            pass
        other = threading.Thread(target=pause)
        other.start()
        other.join()
        assert called == []
        pause()
    assert called == ["here"]


# ------------------------------------------------------------------------------------------- our own operators


@pytest.mark.usefixtures("every")
def test_a_call_of_the_encoder_has_a_pause_before_every_product(model: VisionLanguageModel) -> None:
    count = [0]

    def call() -> None:
        count[0] += 1

    picture = Image.effect_noise((224, 224), 80).convert("RGB")
    expected = model.encode_image(picture).embeds
    with pauses(call):
        found = model.encode_image(picture).embeds
    layers = model.config.vision.depth
    assert count[0] >= 1 + 4 * layers and np.array_equal(found, expected)
    seen = count[0]
    model.encode_image(picture)
    other = threading.Thread(target=lambda: model.encode_image(picture))
    with pauses(call):
        other.start()
        other.join()
    assert count[0] == seen


@pytest.mark.usefixtures("every")
def test_every_picture_has_a_pause_before_each_of_its_stages(tiny: Pair) -> None:
    count: list[int] = []
    with tiny.open() as model, pauses(lambda: count.append(1)):  # of fp32: without operators of ours
        model.encode_vision(CASES["three unequal pictures"])
    assert len(count) == 3 * 3  # looked up, resized, encoded


@pytest.mark.usefixtures("every")
@pytest.mark.parametrize("pause_number", [1, 5, 20])
def test_an_error_ends_a_call_of_the_encoder(
    model: VisionLanguageModel, pause_number: int, capfd: pytest.CaptureFixture[str]
) -> None:
    count = [0]

    def call() -> None:
        count[0] += 1
        if count[0] == pause_number:
            raise KeyError("of what was called")

    picture = Image.effect_noise((224, 224), 80).convert("RGB")
    expected = model.encode_image(picture).embeds
    with pytest.raises(KeyError, match="of what was called"), pauses(call):
        model.encode_image(picture)
    assert count == [pause_number]
    assert np.array_equal(model.encode_image(picture).embeds, expected)  # the engine goes on
    assert capfd.readouterr() == ("", "")


# ------------------------------------------------------------------------------------------- answers


def answered(model: VisionLanguageModel, loop: DecodeLoop, steps: dict[str, int], **settings: Any) -> dict[str, Any]:
    """The rows that join one after the other, all but the first while the others step."""
    rows, while_joining = {}, 0

    def step() -> None:
        nonlocal while_joining
        if loop.rows:
            while_joining += len(loop.step())

    for name, count in steps.items():
        with pauses(step):
            rows[name] = join(model, loop, name, count, **settings)
    assert while_joining > 0
    while loop.rows:
        loop.step()
    return {name: tuple(row.tokens) for name, row in rows.items()}


STEPS = {"text": 40, "three unequal pictures": 3, "video": 24, "one picture": 9, "system": 12}


@pytest.mark.usefixtures("every")
@pytest.mark.parametrize("chunk", [1, 5])
@pytest.mark.parametrize("lookup", [0, 8])
def test_rows_go_on_and_end_between_the_chunks_of_a_prompt(tiny: Pair, chunk: int, lookup: int) -> None:
    with tiny.open(prefill_chunk=chunk) as model:
        expected = {name: alone(model, name, count) for name, count in STEPS.items()}
        assert answered(model, model.decode_loop(5), STEPS, lookup_tokens=lookup) == expected


@pytest.mark.usefixtures("every")
def test_what_is_kept_of_a_prompt_is_its_own(tiny: Pair) -> None:
    """Though its row went to another place as a row before it ended."""
    with tiny.open(prefill_chunk=1, prefix_cache_mb=8) as model:
        expected = alone(model, "one picture", 9)
        assert model.prefix_cache is not None
        model.prefix_cache.clear()
        assert answered(model, model.decode_loop(3), {"text": 3, "one picture": 9})["one picture"] == expected
        again = model.generate(CASES["one picture"], max_new_tokens=9, eos_token_ids=(-1,))
        assert again.usage.cached_tokens > 0 and again.token_ids == expected


@pytest.mark.usefixtures("every")
def test_rows_go_on_and_end_between_products(model: VisionLanguageModel) -> None:
    expected = {name: alone(model, name, count) for name, count in STEPS.items()}
    assert answered(model, model.decode_loop(5), STEPS) == expected


@pytest.mark.usefixtures("every")
def test_a_prompt_is_read_in_the_pauses_of_an_encoder(model: VisionLanguageModel) -> None:
    """With pauses of its own; and those of the encoder go on behind it."""
    expected = {name: alone(model, name, count) for name, count in STEPS.items()}
    loop, rows, calls = model.decode_loop(5), {}, []
    rows["text"] = join(model, loop, "text", STEPS["text"])

    def call() -> None:
        calls.append(len(loop.rows))
        if len(calls) == 5:
            with pauses(lambda: steps.append(len(loop.step()))):
                rows["system"] = join(model, loop, "system", STEPS["system"])

    steps: list[int] = []
    with pauses(call):
        prompt = model.prepare(CASES["one picture"])
    assert len(steps) > 4 and calls[-1] == 2 and len(calls) > 10
    config = model.generation_config(max_new_tokens=STEPS["one picture"], eos_token_ids=(-1,))
    rows["one picture"] = model.row(prompt, config)
    loop.join(rows["one picture"], prompt)
    while loop.rows:
        loop.step()
    assert {name: tuple(row.tokens) for name, row in rows.items()} == {name: expected[name] for name in rows}


@pytest.mark.usefixtures("every")
@pytest.mark.parametrize("steps", [3, 200])
@pytest.mark.parametrize("before", [0, 2])
def test_short_prompts_are_read_between_the_products_of_a_long_one(
    model: VisionLanguageModel, steps: int, before: int
) -> None:
    read_aside(model, steps, before)


@pytest.mark.usefixtures("every")
@pytest.mark.parametrize("steps", [3, 200])
@pytest.mark.parametrize("before", [0, 2])
def test_short_prompts_are_read_between_the_chunks_of_a_long_one(tiny: Pair, steps: int, before: int) -> None:
    with tiny.open(prefill_chunk=20, prefix_cache_mb=4) as model:
        read_aside(model, steps, before)


def read_aside(model: VisionLanguageModel, steps: int, before: int) -> None:
    """Two short prompts, one after the other, in the pauses of a long one; their answers begin, go on and end
    meanwhile, as those `before` do, and each says what it says alone."""
    long = [{"role": "user", "content": " ".join(map(str, range(160)))}]
    config = model.generation_config(max_new_tokens=9, eos_token_ids=(-1,))
    expected = {name: alone(model, name, steps) for name in ("text", "system")}
    expected["long"] = model.generate(long, max_new_tokens=9, eos_token_ids=(-1,)).token_ids
    names = ["text", "system"][:before]
    expected |= {f"before {n}": alone(model, n, 30) for n in names}
    if model.prefix_cache is not None:
        model.prefix_cache.clear()
    loop, rows, calls = model.decode_loop(6), {}, [0]
    for name in names:
        rows[f"before {name}"] = join(model, loop, name, 30)

    def call() -> None:
        calls[0] += 1
        name = {2: "text", 6: "system"}.get(calls[0])
        if name is not None:
            prompt = model.prepare(CASES[name])
            assert loop.may_join(len(prompt.ids)) and not loop.may_join(10_000)
            rows[name] = model.row(prompt, model.generation_config(max_new_tokens=steps, eos_token_ids=(-1,)))
            with pauses(step):
                loop.join(rows[name], prompt)
            with pytest.raises(InputError, match="another prompt is being read"):
                loop.join(rows[name], prompt, aside=True)
        step()

    def step() -> None:
        if loop.rows:
            loop.step()

    prompt = model.prepare(long)
    rows["long"] = model.row(prompt, config)
    with pauses(call):
        loop.join(rows["long"], prompt, aside=True)
    assert set(rows) == set(expected) and calls[0] > 6
    if steps == 3:
        assert all(rows[name].finish_reason for name in ("text", "system"))
    while loop.rows:
        loop.step()
    assert {name: tuple(row.tokens) for name, row in rows.items()} == expected


def test_none_joins_while_a_prompt_is_read_that_is_not_aside(tiny: Pair) -> None:
    with tiny.open(prefill_chunk=5) as model:
        prompt, tried = model.prepare(CASES["text"]), []
        loop, config = model.decode_loop(2), model.generation_config(max_new_tokens=2)

        def call() -> None:
            tried.append(loop.may_join(1))
            with pytest.raises(InputError, match="another prompt is being read"):
                loop.join(model.row(prompt, config), prompt)

        with pauses(call):
            loop.join(model.row(prompt, config), prompt)
        assert tried and not any(tried) and loop.may_join(1)


@pytest.mark.usefixtures("every")
def test_a_step_moves_nothing_that_a_graph_is_writing(
    model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads of the cache move apart every 64 tokens: not while a prompt is read, though a row has to wait for it."""
    monkeypatch.setattr(decode_loop_module, "_STEPS_WHILE_JOINING", 0)
    expected = alone(model, "text", 200), alone(model, "one picture", 8)
    loop = model.decode_loop(2)
    first = join(model, loop, "text", 200)
    cache = loop._decoder.cache
    while cache.has_room(0, 2):
        loop.step()
    config = model.generation_config(max_new_tokens=8, eos_token_ids=(-1,))
    prompt = model.prepare(CASES["one picture"])
    row, steps = model.row(prompt, config), []
    # Room for the first row's next token, and none behind it.
    assert len(prompt.ids) <= cache.lengths[0]
    with pauses(lambda: steps.append(len(loop.step()))):
        loop.join(row, prompt)
    assert steps[0] == 1 and set(steps[1:]) == {0}
    while loop.rows:
        loop.step()
    assert (tuple(first.tokens), tuple(row.tokens)) == expected
