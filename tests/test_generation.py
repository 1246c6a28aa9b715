"""The whole runtime against transformers in fp32: greedy tokens equal, case by case."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conftest import MakePair, Pair
from PIL import Image

from edgevl.runtime.errors import CapacityError, EngineError, InputError
from edgevl.runtime.generation import VisionLanguageModel

STEPS = 12


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


A, B, C, D = picture(84, 112, 1), picture(168, 56, 2), picture(56, 56, 3), picture(84, 112, 4)
FRAMES = [picture(84, 56, s) for s in range(10, 16)]


def user(*parts: Any) -> dict[str, Any]:
    """A user's message of texts, pictures, and videos as lists of frames, in that order."""
    content = [
        {"type": "text", "text": p}
        if isinstance(p, str)
        else {"type": "video", "video": p}
        if isinstance(p, list)
        else {"type": "image", "image": p}
        for p in parts
    ]
    return {"role": "user", "content": content}


def vision_of(messages: list[dict[str, Any]]) -> list[Any]:
    items = [i for m in messages if isinstance(m["content"], list) for i in m["content"]]
    return [i.get("image") or i.get("video") for i in items if i["type"] != "text"]


CASES = {
    "text": [user("Read the text.")],
    "system": [{"role": "system", "content": "Be brief."}, user("How many shapes?")],
    "one picture": [user(A, "Read the text.")],
    "three unequal pictures": [user(A, B, "and", C, "Which one?")],
    "two adjacent equal sizes": [user(A, D, "Read both.")],
    "video": [user(FRAMES, "Which way does the shape move?")],
    "odd frames": [user(FRAMES[:5], "Which way?")],
    "later picture": [
        user(A, "Read the text."),
        {"role": "assistant", "content": [{"type": "text", "text": "five"}]},
        user("And this one?", B),
    ],
}


def expected(pair: Pair, model: VisionLanguageModel, messages: list[dict[str, Any]], steps: int = STEPS) -> list[int]:
    return pair.reference().greedy(model.prepare(messages).ids.tolist(), vision_of(messages), steps)


@pytest.mark.parametrize("case", CASES)
def test_greedy_equals_transformers(tiny: Pair, case: str) -> None:
    with tiny.open() as model:
        answer = model.generate(CASES[case], max_new_tokens=STEPS)
        assert list(answer.token_ids) == expected(tiny, model, CASES[case])
        assert answer.usage.prompt_tokens == len(model.prepare(CASES[case]).ids)


@pytest.mark.parametrize(
    "fields",
    [
        {"tie_word_embeddings": False, "hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2},
        {"mrope_section": [1, 5, 2]},
        {"mrope_section": [8, 0, 0]},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1, "num_hidden_layers": 3},
    ],
    ids=["untied like 7B", "odd sections", "time only", "no grouping", "one kv head"],
)
def test_other_shapes(make_pair: MakePair, fields: dict[str, Any]) -> None:
    pair = make_pair(**fields)
    with pair.open() as model:
        for case in ("three unequal pictures", "video"):
            answer = model.generate(CASES[case], max_new_tokens=8)
            assert list(answer.token_ids) == expected(pair, model, CASES[case], 8)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunked_prefill(tiny: Pair, chunk: int) -> None:
    for case in ("three unequal pictures", "video"):
        with tiny.open() as whole, tiny.open(prefill_chunk=chunk) as chunked:
            a, b = (m.generate(CASES[case], max_new_tokens=STEPS) for m in (whole, chunked))
            assert a.token_ids == b.token_ids


def test_logits_equal_transformers(tiny: Pair) -> None:
    with tiny.open() as model:
        prompt = model.prepare(CASES["three unequal pictures"])
        decoder = model.decoder()
        embeds = np.concatenate([i.embeds for i in prompt.images])
        ours = decoder.prefill(0, prompt.ids, prompt.positions, embeds)
        theirs = tiny.reference().logits(prompt.ids.tolist(), vision_of(CASES["three unequal pictures"]))
        assert np.abs(ours - theirs[-1]).max() < 1e-4 * np.abs(theirs).max()


def test_batch_of_unequal_prompts(tiny: Pair) -> None:
    conversations = [CASES[c] for c in ("text", "three unequal pictures", "video", "one picture", "system")]
    with tiny.open() as model:
        answers = model.generate_batch(conversations, max_new_tokens=STEPS)
        for messages, answer in zip(conversations, answers):
            assert list(answer.token_ids) == expected(tiny, model, messages)
            assert answer.text == model.generate(messages, max_new_tokens=STEPS).text


def test_batch_rows_end_apart(tiny: Pair) -> None:
    """Rows that stop early leave; the others must not notice the cache being moved."""
    conversations = [CASES[c] for c in ("one picture", "text", "video", "system")]
    with tiny.open() as model:
        alone = [model.generate(c, max_new_tokens=24) for c in conversations]
        ends = tuple({a.token_ids[n] for a, n in zip(alone, (3, 11, 6, 9))})
        alone = [model.generate(c, max_new_tokens=24, eos_token_ids=ends) for c in conversations]
        together = model.generate_batch(conversations, max_new_tokens=24, eos_token_ids=ends)
        assert [a.token_ids for a in together] == [a.token_ids for a in alone]
        assert len({len(a.token_ids) for a in alone}) > 1


def test_second_turn_equals_whole_conversation(tiny: Pair) -> None:
    with tiny.open() as model:
        chat = model.chat(system="Be brief.")
        chat.send("Read the text.", images=[A], max_new_tokens=STEPS)
        second = chat.send("And now?", max_new_tokens=STEPS)
        third = chat.send("And this?", images=[B], max_new_tokens=STEPS)
        assert second.usage.cached_tokens > 20 and third.usage.cached_tokens > second.usage.cached_tokens
        history = [dict(m) for m in chat.messages[:-1]]
        # EncodedImage objects stand for the pictures in the session's own messages
        plain = [user(A, "Read the text."), user("And now?"), user(B, "And this?")]
        whole = [plain.pop(0) if m["role"] == "user" else m for m in history]
        assert list(third.token_ids) == expected(tiny, model, whole)


def test_chat_undo_reset_and_changed_picture(tiny: Pair) -> None:
    with tiny.open() as model:
        chat = model.chat()
        first = chat.send("Read the text.", images=[A], max_new_tokens=6)
        assert chat.undo() and not chat.undo()
        # the same words about another picture of the same size: the cache must not be taken for it
        other = chat.send("Read the text.", images=[D], max_new_tokens=6)
        assert list(other.token_ids) == expected(tiny, model, [user(D, "Read the text.")], 6)
        chat.reset()
        again = chat.send("Read the text.", images=[A], max_new_tokens=6)
        assert again.token_ids == first.token_ids


def test_abandoned_chat_stream_leaves_no_trace(tiny: Pair) -> None:
    with tiny.open() as model:
        chat = model.chat()
        stream = chat.stream("Read the text.", images=[A], max_new_tokens=8)
        next(stream)
        stream.close()
        assert chat.messages == []
        answer = chat.send("How many?", max_new_tokens=6)
        assert list(answer.token_ids) == expected(tiny, model, [user("How many?")], 6)


def test_encoded_image_is_reused(tiny: Pair) -> None:
    with tiny.open() as model:
        encoded = model.encode_image(A)
        assert encoded.embeds.shape == (12, 64) and encoded.original_size == (84, 112)
        direct, reused = (model.generate([user(x, "Read.")], max_new_tokens=6) for x in (A, encoded))
        assert direct.token_ids == reused.token_ids


def test_stream_pieces_make_the_text(tiny: Pair) -> None:
    with tiny.open() as model:
        stream = model.stream(CASES["one picture"], max_new_tokens=STEPS)
        pieces = list(stream)
        assert "".join(p.text for p in pieces) == stream.completion.text
        assert [p.token_id for p in pieces] == list(stream.completion.token_ids)
        assert stream.completion.finish_reason in ("stop", "length")
        t = stream.completion.timings
        assert 0 < t.vision_s < t.first_token_s and t.decode_steps == len(pieces) - 1


def test_sampling_is_reproducible(tiny: Pair) -> None:
    settings = {"max_new_tokens": STEPS, "temperature": 1.5, "seed": 7}
    with tiny.open() as model:
        a, b = (model.generate(CASES["text"], **settings) for _ in range(2))
        c = model.generate(CASES["text"], **{**settings, "seed": 8})
        assert a.token_ids == b.token_ids != c.token_ids


def test_stop_string(tiny: Pair) -> None:
    with tiny.open() as model:
        free = model.generate(CASES["text"], max_new_tokens=STEPS)
        stop = free.text[3:5]
        stopped = model.generate(CASES["text"], max_new_tokens=STEPS, stop=stop)
        assert stopped.text == free.text[: free.text.index(stop)] and stopped.finish_reason == "stop"


def test_full_cache_ends_the_answer(tiny: Pair) -> None:
    with tiny.open(capacity=64) as model:
        prompt = len(model.prepare(CASES["text"]).ids)
        answer = model.generate(CASES["text"], max_new_tokens=500, eos_token_ids=(-1,))
        # every slot is used, and the last token needs none
        assert answer.finish_reason == "length" and len(answer.token_ids) == 64 - prompt + 1


def test_prompt_beyond_capacity_says_by_how_much(tiny: Pair) -> None:
    with tiny.open(capacity=40) as model:
        length = len(tiny.open().prepare(CASES["one picture"]).ids)
        with pytest.raises(CapacityError, match=f"the prompt is {length} tokens, {length - 39} more") as caught:
            model.generate(CASES["one picture"])
        assert "lower max_pixels (12 tokens are pictures)" in str(caught.value)
        assert "larger capacity (up to 2048)" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": 0}, "capacity is 0"),
        ({"capacity": 10**6}, "expected 1 to 2048"),
        ({"threads": 0}, "threads"),
        ({"image_cache_mb": -1}, "image_cache_mb is -1"),
    ],
)
def test_bad_options(tiny: Pair, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        VisionLanguageModel.open(tiny.bundle, "ort-cpu", **options)
    with pytest.raises(InputError, match="prefill chunk"):
        tiny.open(prefill_chunk=0).generate(CASES["text"])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (None, "a NoneType"),
        (5, "a int"),
        ("hello", "a str"),
        ({"role": "user", "content": "x"}, "a dict"),
        ([], "empty"),
    ],
)
def test_messages_that_are_no_list(tiny: Pair, wrong: Any, message: str) -> None:
    with tiny.open() as model:
        calls = [model.generate, model.stream, model.prepare, model.encode_vision, lambda m: model.generate_batch([m])]
        for call in calls:
            with pytest.raises(InputError, match=f"messages are {message}"):
                call(wrong)
        for batch in (None, 5, "hello", {}):
            with pytest.raises(InputError, match=r"conversations are a .*, expected a list of lists of messages"):
                model.generate_batch(batch)  # type: ignore[arg-type]
        assert model.generate(tuple(CASES["text"]), max_new_tokens=1).text is not None  # any sequence will do


@pytest.mark.parametrize("wrong", ["receipt.png", b"bytes", A, None, {"image": A}, np.zeros((4, 4, 3), np.uint8)])
def test_one_picture_where_a_list_is_expected(tiny: Pair, wrong: Any) -> None:
    with tiny.open() as model:
        chat = model.chat()
        for name, one in (("images", "pictures"), ("videos", "videos")):
            with pytest.raises(InputError, match=rf"{name} is a \w+, expected a list of {one}: {name}=\[\.\.\.\]"):
                chat.send("What is this?", **{name: wrong})
        chat.send("What is this?", images=[A], max_new_tokens=2)
        if wrong is not None:
            with pytest.raises(InputError, match="images is a"):
                chat.edit("And this?", images=wrong)


def test_a_closed_model_says_so(tiny: Pair) -> None:
    with tiny.open() as model:
        chat = model.chat()
        chat.send("Read the text.", max_new_tokens=2)
        prompt, config, decoder = model.prepare(CASES["text"]), model.generation_config(), model.decoder()
        stream = model.stream(CASES["text"], max_new_tokens=5, eos_token_ids=(-1,))
        spoken = model.chat().stream("Read.", max_new_tokens=5, eos_token_ids=(-1,))
        for started in (stream, spoken):
            next(started)
    asked = CASES["one picture"]
    for call in (
        lambda: model.generate(asked),
        lambda: model.stream(CASES["text"]),
        lambda: model.generate_batch([asked]),
        lambda: model.prepare(CASES["text"]),
        lambda: model.locate(A, "the box"),
        lambda: model.encode_image(A),
        lambda: model.encode_video(FRAMES),
        lambda: model.decoder(),
        lambda: model.stream_prompt(prompt, config, decoder).completion,
        lambda: chat.send("And now?"),
        lambda: chat.send("And this?", images=[A]),
        lambda: chat.edit("And now?"),
        lambda: model.chat().send("x"),
        lambda: list(stream),
        lambda: list(spoken),
    ):
        with pytest.raises(EngineError, match=r"the model is closed; ask inside its `with` block, or open it again"):
            call()
    model.close()  # again


def test_empty_batch_and_empty_video(tiny: Pair) -> None:
    with tiny.open() as model:
        with pytest.raises(InputError, match="no conversations"):
            model.generate_batch([])
        with pytest.raises(InputError, match="no frames"):
            model.generate([user([], "What?")])


def test_nan_in_logits_and_in_vision(tiny: Pair) -> None:
    with tiny.open() as model:
        encoded = model.encode_image(A)
        encoded = replace(encoded, embeds=np.full_like(encoded.embeds, np.nan))
        with pytest.raises(EngineError, match=r"(?i)nan"):
            model.generate([user(encoded, "Read.")])
        broken = np.array(A, np.float32) / 255
        processed = model._vision.preprocess(
            __import__("edgevl.runtime.prompt", fromlist=["x"]).VisionInput("image", broken)
        )
        processed.pixel_values[:] = np.inf
        with pytest.raises(EngineError, match="vision encoder gave NaN"):
            model._vision.run(processed)
