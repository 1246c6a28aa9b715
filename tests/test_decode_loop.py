"""Rows that join and leave between decode steps: each answer is the one that its prompt has alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from conftest import Pair
from test_generation import CASES

from edgevl.runtime.errors import EngineError, InputError
from edgevl.runtime.generation import VisionLanguageModel
from edgevl.runtime.row import Row

STEPS = 24
NAMES = ("text", "three unequal pictures", "video", "one picture", "system")


def join(model: VisionLanguageModel, loop, name: str, steps: int = STEPS, **settings) -> Row:
    config = model.generation_config(max_new_tokens=steps, eos_token_ids=(-1,), **settings)
    prompt = model.prepare(CASES[name])
    row = model.row(prompt, config)
    loop.join(row, prompt)
    return row


def alone(model: VisionLanguageModel, name: str, steps: int = STEPS, **settings) -> tuple[int, ...]:
    return model.generate(CASES[name], max_new_tokens=steps, eos_token_ids=(-1,), **settings).token_ids


@pytest.mark.parametrize("lookup", [0, 8])
def test_rows_join_and_end_at_any_step(tiny: Pair, lookup: int) -> None:
    rng = np.random.default_rng(3)
    with tiny.open() as model:
        steps = [int(rng.integers(1, STEPS)) for _ in range(12)]
        names = [NAMES[i % len(NAMES)] for i in range(12)]
        expected = [alone(model, n, s) for n, s in zip(names, steps)]
        loop, rows, together = model.decode_loop(3), [], 0
        while len(rows) < 12 or loop.rows:
            while len(rows) < 12 and len(loop.rows) < loop.capacity and rng.random() < 0.6:
                rows.append(join(model, loop, names[len(rows)], steps[len(rows)], lookup_tokens=lookup))
            if loop.rows:
                together = max(together, len(loop.rows))
                loop.step()
        assert [r.completion().token_ids for r in rows] == expected and together == 3


def test_a_row_that_leaves_changes_no_other(tiny: Pair) -> None:
    with tiny.open(prefix_cache_mb=8) as model:
        expected = {n: alone(model, n) for n in NAMES}
        loop = model.decode_loop(3)
        gone, a, b = (join(model, loop, n) for n in ("video", "text", "one picture"))
        for _ in range(4):
            loop.step()
        loop.leave(gone)
        assert set(loop.rows) == {a, b}
        loop.leave(gone)  # nothing more happens
        c = join(model, loop, "video")  # in the place of one that has left, and over its prefix
        assert c.cached > 0
        while loop.rows:
            loop.step()
        assert [r.completion().token_ids for r in (a, b, c)] == [
            expected[n] for n in ("text", "one picture", "video")
        ]  # fmt: skip
        with pytest.raises(EngineError, match="has not ended"):
            gone.completion()


def test_a_row_takes_what_it_begins_with_from_one_that_answers(tiny: Pair) -> None:
    with tiny.open() as model:
        loop = model.decode_loop(4)
        first = join(model, loop, "one picture")
        for _ in range(5):
            loop.step()
        again, other = join(model, loop, "one picture"), join(model, loop, "three unequal pictures")
        prompt = model.prepare(CASES["one picture"])
        assert (first.cached, again.cached) == (0, len(prompt.ids) - 1)
        unequal = model.prepare(CASES["three unequal pictures"]).identity
        assert other.cached == [a.tolist() == b.tolist() for a, b in zip(prompt.identity, unequal)].index(False) > 0
        # A prompt that goes on with what `first` has answered: that was said, not read, and is computed anew.
        more = np.concatenate([prompt.ids, first.tokens[:3]])
        longer = replace(
            prompt,
            ids=more,
            positions=np.concatenate([prompt.positions, prompt.next_position + np.tile(np.arange(3), (3, 1))], axis=1),
            next_position=prompt.next_position + 3,
            identity=np.concatenate([prompt.identity, np.array([[t, 0, 0] for t in first.tokens[:3]])]),
        )
        row = model.row(longer, model.generation_config(max_new_tokens=STEPS - 3, eos_token_ids=(-1,)))
        loop.join(row, longer)
        assert row.cached == len(prompt.ids)
        while loop.rows:
            loop.step()
        expected = list(alone(model, "one picture"))
        assert first.tokens == again.tokens == expected and row.tokens == expected[3:]
        assert tuple(other.tokens) == alone(model, "three unequal pictures")


def test_a_long_answer_leaves_the_next_ones_no_wide_cache(tiny: Pair) -> None:
    """Steps go over all the room between heads."""
    with tiny.open() as model:
        loop, expected = model.decode_loop(3), alone(model, "one picture")
        cache = loop._decoder.cache

        def room() -> int:
            return next(iter(cache.view(0, 1).buffers.values())).shape[2]

        long, other = join(model, loop, "text", 200), join(model, loop, "system", 100)
        while loop.rows:
            loop.step()
        assert len(long.tokens) == 200 and len(other.tokens) == 100 and room() >= 256
        assert loop.spare >= 300
        row = join(model, loop, "one picture")
        assert room() == 64 and loop.spare == cache.held - int(cache.lengths[0])
        while loop.rows:
            loop.step()
        assert row.completion().token_ids == expected


def test_an_answer_may_be_as_long_as_it_likes(tiny: Pair) -> None:
    """A limit beyond what the cache and the machine hold costs nothing."""
    with tiny.open(capacity=200) as model:
        done = model.generate(CASES["text"], max_new_tokens=10**15, eos_token_ids=(-1,))
        assert done.finish_reason == "length"
        assert done.usage.prompt_tokens + done.usage.completion_tokens == 201  # the last token is never fed
        assert done.token_ids[:24] == alone(model, "text")


def test_a_full_loop_says_so_and_goes_on(tiny: Pair) -> None:
    with tiny.open() as model:
        loop = model.decode_loop(1)
        row = join(model, loop, "text")
        with pytest.raises(InputError, match="1 rows are active, as many as the KV cache has"):
            join(model, loop, "system")
        while loop.rows:
            loop.step()
        assert row.completion().token_ids == alone(model, "text")


def test_wrong_numbers_end_one_row_alone(tiny: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    with tiny.open() as model:
        loop = model.decode_loop(3)
        a, bad, c = (join(model, loop, n) for n in ("text", "one picture", "video"))
        step = loop._decoder.step

        def broken(ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
            logits = step(ids, positions)
            logits[1] = np.nan
            return logits

        with monkeypatch.context() as patch:
            patch.setattr(loop._decoder, "step", broken)
            pieces = loop.step()
        assert [row for row, _ in pieces] == [a, c] and set(loop.rows) == {a, c}
        assert isinstance(bad.error, EngineError) and "nan" in str(bad.error)
        while loop.rows:
            loop.step()
        assert a.completion().token_ids == alone(model, "text") and c.completion().token_ids == alone(model, "video")


def test_wrong_numbers_end_a_batch_of_generate(tiny: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgevl.runtime.decoding import Decoder

    def broken(self, ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
        return np.full((len(ids), 512), np.nan, np.float32)

    with tiny.open() as model:
        monkeypatch.setattr(Decoder, "step", broken)
        with pytest.raises(EngineError, match="nan"):
            model.generate_batch([CASES["text"], CASES["system"]], max_new_tokens=4, eos_token_ids=(-1,))


def test_a_prompt_that_fails_leaves_the_others_alone(tiny: Pair) -> None:
    with tiny.open() as model:
        loop = model.decode_loop(2)
        row = join(model, loop, "text")
        loop.step()
        prompt = model.prepare(CASES["one picture"])
        fewer = model.row(prompt, model.generation_config())
        with pytest.raises(InputError, match="image embeddings for"):
            loop.join(fewer, replace(prompt, images=prompt.images * 2))
        other = join(model, loop, "system")
        while loop.rows:
            loop.step()
        assert row.completion().token_ids == alone(model, "text")
        assert other.completion().token_ids == alone(model, "system")
