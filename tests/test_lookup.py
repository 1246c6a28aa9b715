"""Prompt lookup: drafts, the judgement of their worth, and that no token changes whatever is drafted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Pair

from edgevl.export.exporter import ExportOptions, export_bundle
from edgevl.runtime import lookup
from edgevl.runtime.errors import InputError
from edgevl.runtime.generation import VisionLanguageModel
from edgevl.runtime.lookup import PromptLookup
from edgevl.runtime.results import Completion
from edgevl.runtime.sampling import GenerationConfig
from edgevl.tasks import TASKS

DEMO = Path(__file__).parent.parent / "demo" / "model"


def ready(tokens: int = 5, placeholders: tuple[int, ...] = ()) -> PromptLookup:
    found = PromptLookup(tokens, placeholders)
    found.stepped(1.0)
    return found


def slow(sequence: list[int], limit: int, placeholders: tuple[int, ...] = ()) -> list[int]:
    """The definition, place by place."""
    for size in range(lookup.LONGEST, lookup.SHORTEST - 1, -1):
        tail = sequence[-size:]
        for start in range(len(sequence) - size - 1, -1, -1):
            if len(tail) == size and sequence[start : start + size] == tail:
                draft = sequence[start + size : start + size + limit]
                stop = next((i for i, token in enumerate(draft) if token in placeholders), len(draft))
                return draft[:stop]
    return []


def test_drafts_equal_the_definition() -> None:
    rng, proposed = np.random.default_rng(0), 0
    for _ in range(600):
        sequence = rng.integers(0, rng.integers(2, 12), rng.integers(1, 60))
        limit = int(rng.integers(0, 8))
        draft = ready(6, (1,)).propose(sequence, limit)
        assert draft.tolist() == slow(sequence.tolist(), min(limit, 6), (1,))
        proposed += len(draft) > 0
    assert proposed > 100


def test_examples() -> None:
    assert ready().propose(np.array([7, 1, 2, 3, 4, 5, 9, 1, 2]), 5).tolist() == [3, 4, 5, 9, 1]
    assert ready().propose(np.array([1, 2, 8, 1, 2, 9, 1, 2]), 1).tolist() == [9]  # the latest place
    assert ready().propose(np.array([5, 1, 2, 8, 6, 1, 2, 9, 5, 1, 2]), 1).tolist() == [8]  # the longest run first
    assert ready().propose(np.array([1, 2, 3]), 5).tolist() == []
    assert ready().propose(np.array([4, 4, 4]), 5).tolist() == [4]
    assert PromptLookup(5).propose(np.array([4, 4, 4]), 5).tolist() == []  # the cost of a step is not known yet


def test_drafts_that_cost_more_than_they_save_pause() -> None:
    sequence = np.array([4] * 50)
    found = ready()
    for length in (50, 51, 52):
        assert len(found.propose(sequence[:length], 5))
        found.checked(5, 0, seconds=1.5, length=length + 1)  # 1 token in the time of one and a half steps
    resume = 53 + lookup._PAUSE
    assert not len(found.propose(np.array([4] * (resume - 1)), 5)) and len(found.propose(np.array([4] * resume), 5))
    for length in range(3):
        found.checked(5, 0, seconds=1.5, length=resume + length)
    longer = resume + 2 + 2 * lookup._PAUSE  # twice as long the second time
    assert not len(found.propose(np.array([4] * (longer - 1)), 5)) and len(found.propose(np.array([4] * longer), 5))
    assert (found.drafted, found.accepted) == (30, 0)


def test_drafts_that_save_time_go_on() -> None:
    found, sequence = ready(), np.array([4] * 50)
    for _ in range(20):
        found.checked(5, 3, seconds=1.5, length=50)  # 4 tokens in the time of one and a half steps
        assert len(found.propose(sequence, 5))
    assert (found.drafted, found.accepted) == (100, 60)


@pytest.fixture(scope="module")
def always() -> Iterator[None]:
    """Never pause: what is drafted must not depend on how busy the machine is."""
    patch = pytest.MonkeyPatch()
    patch.setattr(lookup, "_TRIAL", 10**9)
    yield
    patch.undo()


Draft = Callable[[np.ndarray, int], np.ndarray]


def drafting(patch: pytest.MonkeyPatch, propose: Draft) -> None:
    patch.setattr(PromptLookup, "propose", lambda self, sequence, limit: propose(sequence, min(limit, self.tokens)))


def ask(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def oracle(prompt: int, tokens: tuple[int, ...], wrong: float, seed: int = 0) -> Draft:
    """The tokens that will come, each with the chance `wrong` of being another one."""
    rng = np.random.default_rng(seed)

    def propose(sequence: np.ndarray, limit: int) -> np.ndarray:
        at = len(sequence) - prompt
        draft = np.array([*tokens[at:], *[3] * 20][:limit], np.int64)
        return np.where(rng.random(len(draft)) < wrong, (draft + 1) % 400, draft)

    return propose


@pytest.mark.parametrize("wrong", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("size", [1, 2, 7])
def test_any_draft_leaves_the_tokens_as_they_are(
    tiny: Pair, always: None, monkeypatch: pytest.MonkeyPatch, size: int, wrong: float
) -> None:
    with tiny.open(prefill_chunk=5) as model:
        for text in ("Read the text.", "How many shapes?", "Where is it?"):
            plain = model.generate(ask(text), max_new_tokens=24, eos_token_ids=(-1,))
            with monkeypatch.context() as patch:
                drafting(patch, oracle(plain.usage.prompt_tokens, plain.token_ids, wrong))
                done = model.generate(ask(text), max_new_tokens=24, eos_token_ids=(-1,), lookup_tokens=size)
            assert done.token_ids == plain.token_ids and done.text == plain.text
            assert done.usage.drafted_tokens > 0 and (done.usage.accepted_tokens > 0) == (wrong < 1)
            if wrong == 0:
                calls = -(-23 // (size + 1))
                assert done.usage.accepted_tokens == 23 - calls


def test_ends_inside_a_draft(tiny: Pair, always: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """An end token, a stop string, the last allowed token and a full cache, each in the middle of right drafts."""
    with tiny.open() as model:
        free = model.generate(ask("Read the text."), max_new_tokens=30, eos_token_ids=(-1,))
        prompt = free.usage.prompt_tokens
        cases: list[dict[str, Any]] = [
            {"eos_token_ids": (token,), "max_new_tokens": 30} for token in dict.fromkeys(free.token_ids[1:8])
        ]
        cases += [{"eos_token_ids": (-1,), "max_new_tokens": n} for n in range(1, 12)]
        text = free.text
        cases += [{"eos_token_ids": (-1,), "max_new_tokens": 30, "stop": text[i : i + 2]} for i in range(2, 12, 3)]
        for settings in cases:
            plain = model.generate(ask("Read the text."), **settings)
            with monkeypatch.context() as patch:
                drafting(patch, oracle(prompt, free.token_ids, 0.0))
                done = model.generate(ask("Read the text."), lookup_tokens=6, **settings)
            assert _answer(done) == _answer(plain), settings
    for room in range(1, 10):
        with tiny.open(capacity=prompt + room) as model, monkeypatch.context() as patch:
            drafting(patch, oracle(prompt, free.token_ids, 0.0))
            done = model.generate(ask("Read the text."), max_new_tokens=30, eos_token_ids=(-1,), lookup_tokens=4)
            assert done.finish_reason == "length" and done.token_ids == free.token_ids[: room + 1]


def _answer(done: Completion) -> tuple[Any, ...]:
    return done.text, done.token_ids, done.finish_reason


def test_draws_stay_as_they_are(tiny: Pair, always: None, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"max_new_tokens": 20, "temperature": 1.2, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 5}
    with tiny.open() as model:
        plain = model.generate(ask("Read the text."), eos_token_ids=(-1,), **settings)
        drafting(monkeypatch, oracle(plain.usage.prompt_tokens, plain.token_ids, 0.3))
        done = model.generate(ask("Read the text."), eos_token_ids=(-1,), lookup_tokens=5, **settings)
    assert done.token_ids == plain.token_ids and done.usage.accepted_tokens > 0


def test_a_chat_goes_on_after_drafts(tiny: Pair, always: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a rejected draft left in the cache is not built upon, also when the stream is left among accepted tokens."""
    settings: dict[str, Any] = {"max_new_tokens": 12, "eos_token_ids": (-1,)}
    with tiny.open() as model:
        plain = model.chat()
        answers = [plain.send(text, **settings) for text in ("Read the text.", "And now?", "How many?")]
        for wrong in (0.0, 0.4):
            chat = model.chat()
            for text, expected in zip(("Read the text.", "And now?", "How many?"), answers):
                with monkeypatch.context() as patch:
                    drafting(patch, oracle(expected.usage.prompt_tokens, expected.token_ids, wrong))
                    left = chat.stream(text, lookup_tokens=5, **settings)
                    for _ in range(3):
                        next(left)
                    left.close()
                    done = chat.send(text, lookup_tokens=5, **settings)
                assert done.token_ids == expected.token_ids and done.usage.accepted_tokens > 0


def test_rows_of_a_batch_draft_once_alone(tiny: Pair, always: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the row that is left had been moved into the place of one that ended."""
    with tiny.open() as model:
        texts = ("Read the text.", "How many shapes are there?")
        plain = [model.generate(ask(t), max_new_tokens=20, eos_token_ids=(-1,)) for t in texts]
        first, second = plain[0].token_ids, plain[1].token_ids
        at = next(i for i in range(2, 12) if first[i] not in (*first[:i], *second))
        end = (first[at],)
        drafting(monkeypatch, oracle(plain[1].usage.prompt_tokens, second, 0.0))
        done = model.generate_batch([ask(t) for t in texts], max_new_tokens=20, eos_token_ids=end, lookup_tokens=4)
    assert [d.token_ids for d in done] == [first[: at + 1], second]
    assert done[0].usage.drafted_tokens == 0 < done[1].usage.accepted_tokens


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VisionLanguageModel]:
    folder = tmp_path_factory.mktemp("demo") / "bundle"
    export_bundle(DEMO, folder, ExportOptions(precision="fp32"))
    with VisionLanguageModel.open(folder, "ort-cpu", threads=1) as model:
        yield model


def test_real_lookup_on_the_demo_model(demo: VisionLanguageModel, always: None) -> None:
    """Answers about held-out pictures, asked twice in one conversation: the second repeats the first, if it does, from
    the prompt."""
    drafted = accepted = 0
    for task in ("read_1_line", "read_3_lines", "receipt_items", "receipt_total", "two_pictures", "where"):
        for index in range(2):
            question = TASKS[task].case("test", index).messages[0]
            said = demo.generate([question], max_new_tokens=64)
            told = {"role": "assistant", "content": said.text}
            for messages in ([question], [question, told, question], [question, told, question, told, question]):
                plain = demo.generate(messages, max_new_tokens=64)
                done = demo.generate(messages, max_new_tokens=64, lookup_tokens=5)
                assert _answer(done) == _answer(plain) or tie(demo, messages, plain, done), (task, index)
                drafted, accepted = drafted + done.usage.drafted_tokens, accepted + done.usage.accepted_tokens
    assert drafted > 0 and accepted <= drafted


def tie(model: VisionLanguageModel, messages: list[dict[str, Any]], a: Completion, b: Completion) -> bool:
    """Whether the two first differ where the model cannot choose: logits as close as kernels are to each other."""
    at = next(i for i, (x, y) in enumerate(zip(a.token_ids, b.token_ids)) if x != y)
    prompt, decoder = model.prepare(messages), model.decoder()
    logits = decoder.prefill(0, prompt.ids, prompt.positions, np.concatenate([i.embeds for i in prompt.images]))
    for step, token in enumerate(a.token_ids[:at]):
        logits = decoder.step(np.array([token]), np.array([prompt.next_position + step]))[0]
    return abs(logits[a.token_ids[at]] - logits[b.token_ids[at]]) < 1e-3


def test_settings() -> None:
    assert GenerationConfig(lookup_tokens=3).lookup_tokens == 3
    for value in (-1, 1.5, True):
        with pytest.raises(InputError, match=r"lookup_tokens is .*whole number of at least 0; 0 drafts none"):
            GenerationConfig(lookup_tokens=value)  # type: ignore[arg-type]
