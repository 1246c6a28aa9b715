"""runtime/guided.py: answers held to a form on the demo model, against jsonschema, re and the lists themselves."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from checkpoints import DEMO
from PIL import Image

from edgevl.export.exporter import ExportOptions, export_bundle
from edgevl.runtime import cli
from edgevl.runtime.errors import EdgeVLError, EngineError, InputError
from edgevl.runtime.generation import VisionLanguageModel
from edgevl.runtime.guided import Guide
from edgevl.runtime.sampling import GenerationConfig

ASK = [{"role": "user", "content": "What is the total?"}]
OBJECT = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}, "ok": {"type": "boolean"}},
    "required": ["n", "ok"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guided") / "bundle"
    export_bundle(DEMO, folder, ExportOptions(precision="fp32"))
    return folder


@pytest.fixture(scope="module")
def model(bundle: Path) -> Iterator[VisionLanguageModel]:
    with VisionLanguageModel.open(bundle, "ort-cpu", threads=1) as opened:
        yield opened


# ------------------------------------------------------------------------------------------- many schemas


def random_schema(rng: np.random.Generator, depth: int = 2) -> dict[str, Any]:
    """A schema whose every instance is at most a few dozen characters: strings, numbers and arrays are bounded, so
    that no answer can run into max_new_tokens."""
    kinds = ["string", "integer", "boolean", "null", "enum", "const", "anyOf"]
    kinds += ["object", "object", "array"] if depth else []
    kind = str(rng.choice(kinds))
    if kind == "string":
        return {"type": "string", "minLength": int(rng.integers(0, 2)), "maxLength": int(rng.integers(2, 5))}
    if kind == "integer":
        low = int(rng.integers(-50, 50))
        return {"type": "integer", "minimum": low, "maximum": low + int(rng.integers(0, 200))}
    if kind == "enum":
        return {"enum": [["a", 1, None, True, "é\n", 2.5][i] for i in rng.permutation(6)[: rng.integers(1, 4)]]}
    if kind == "const":
        return {"const": [7, "x", False][int(rng.integers(3))]}
    if kind == "anyOf":
        return {"anyOf": [random_schema(rng, 0), random_schema(rng, 0)]}
    if kind == "array":
        return {"type": "array", "items": random_schema(rng, 0), "minItems": 1, "maxItems": int(rng.integers(1, 3))}
    if kind == "object":
        names = [str(n) for n in rng.permutation(["k", "id", "total", "ok"])[: rng.integers(1, 3)]]
        properties = {name: random_schema(rng, depth - 1) for name in names}
        required = [n for n in names if rng.random() < 0.7]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return {"type": kind}


def test_two_hundred_random_schemas_are_all_followed(model: VisionLanguageModel) -> None:
    rng = np.random.default_rng(7)
    seen: set[str] = set()
    for i in range(200):
        schema = random_schema(rng)
        answer = model.generate(ASK, json_schema=schema, max_new_tokens=160, temperature=float(i % 2), seed=i)
        assert answer.finish_reason == "stop", (schema, answer.text)
        jsonschema.validate(json.loads(answer.text), schema)
        seen.add(answer.text)
    assert len(seen) > 80  # the model's own answers, not one text for all


# ------------------------------------------------------------------------------------------- each form


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 1.5, "seed": 3}, {"repetition_penalty": 1.3}])
def test_every_way_of_sampling_follows_the_form(model: VisionLanguageModel, settings: dict[str, Any]) -> None:
    for pattern in ("[0-9]{1,3}\\.[0-9]{2}", "(ab|c)+d", "é[^a]x"):
        answer = model.generate(ASK, regex=pattern, max_new_tokens=64, **settings)
        assert answer.finish_reason == "stop" and re.fullmatch(pattern, answer.text), answer.text
    answer = model.generate(ASK, json_schema=OBJECT, max_new_tokens=64, **settings)
    jsonschema.validate(json.loads(answer.text), OBJECT)
    assert answer.text == json.dumps(json.loads(answer.text))  # one line, Python's separators


def test_choices_are_answered_as_they_are_written(model: VisionLanguageModel) -> None:
    odd = ['a "b"', "\\n", "猫", "one\ntwo", "1"]
    answers = {model.generate(ASK, choices=odd, temperature=4.0, seed=s).text for s in range(30)}
    assert answers <= set(odd) and len(answers) > 1
    assert model.generate(ASK, choices=["only"]).text == "only"
    assert model.generate(ASK, choices="only").text == "only"
    # One choice begins another: the end token decides.
    assert {model.generate(ASK, choices=["1", "12"], temperature=3.0, seed=s).text for s in range(20)} == {"1", "12"}


def test_the_likeliest_allowed_token_is_taken(model: VisionLanguageModel) -> None:
    """Greedy under a form is the argmax over its tokens; the oracle tries every digit."""
    prompt = model.prepare(ASK)
    logits = model.decoder().prefill(0, prompt.ids, prompt.positions)
    digits = {d: model.tokenizer.encode(d, specials=False) for d in "0123456789"}
    assert all(len(ids) == 1 for ids in digits.values())
    best = max(digits, key=lambda d: logits[digits[d][0]])
    assert model.generate(ASK, regex="[0-9]").text == best


def test_special_tokens_never_match(model: VisionLanguageModel) -> None:
    guide = model.generation_config(regex="(?s).{0,20}").guide
    assert guide is not None
    masked = guide.start().mask(np.zeros(model.config.text.vocab_size, np.float32))
    allowed = set(np.flatnonzero(masked == 0).tolist())
    special = set(model.tokenizer.special_ids)
    assert allowed & special == set(model.config.tokens.eos_token_ids)  # an empty answer may end at once
    assert len(allowed) > 200
    guide = model.generation_config(regex="x{1,3}").guide
    assert guide is not None
    first = guide.start().mask(np.zeros(model.config.text.vocab_size, np.float32))
    assert not {i for i in special if first[i] == 0}  # and not before the form is complete


def test_a_form_stops_by_itself_and_keeps_the_end_tokens_to_the_end(model: VisionLanguageModel) -> None:
    answer = model.generate(ASK, regex="ab", eos_token_ids=(-1,))  # no end token at all
    assert (answer.text, answer.finish_reason) == ("ab", "stop")
    cut = model.generate(ASK, regex="a{50}", max_new_tokens=5)
    assert cut.finish_reason == "length" and set(cut.text) == {"a"}


def test_rows_of_a_batch_stand_each_in_their_own_place(model: VisionLanguageModel) -> None:
    asks = [[{"role": "user", "content": q}] for q in ("How many?", "Read the text.", "What is the total of it all?")]
    alone = [model.generate(a, json_schema=OBJECT).text for a in asks]
    assert [c.text for c in model.generate_batch(asks, json_schema=OBJECT)] == alone


def test_a_form_is_prepared_once(model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server does that while other answers are written; a row only begins with it."""
    guide = model.generation_config(regex="[0-9]{3}").guide
    monkeypatch.setattr("llguidance.LLMatcher", None)  # nothing is left to be made
    assert guide is not None
    first, second = guide.start(), guide.start()
    digit = model.tokenizer.encode("7", specials=False)[0]
    for _ in range(2):
        assert not first.accept(digit)
    assert first.accept(digit) and first.complete and not second.complete  # each stands in its own place


def test_chats_and_pictures(model: VisionLanguageModel) -> None:
    picture = Image.new("RGB", (84, 84), (200, 30, 40))
    chat = model.chat()
    assert chat.send("What colour?", images=[picture], choices=["red", "blue"]).text in ("red", "blue")
    assert re.fullmatch("[0-9]", chat.send("How many?", regex="[0-9]").text)
    free = chat.send("Read the text.", max_new_tokens=4)  # the form does not stay
    assert free.usage.cached_tokens > 0


def test_a_schema_as_text_or_true_is_taken(model: VisionLanguageModel) -> None:
    assert model.generate(ASK, json_schema='{"const": [1, {"a": null}]}').text == '[1, {"a": null}]'
    guide = model.generation_config(json_schema=True).guide
    assert isinstance(guide, Guide) and guide.kind == "json_schema"


# ------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"json_schema": "{nope"}, "the json_schema {nope is not JSON"),
        ({"json_schema": "[1]"}, "expected an object"),
        ({"json_schema": 7}, "expected an object"),
        ({"json_schema": {"type": "nope"}}, "cannot be used: Invalid type: nope"),
        ({"json_schema": {"$ref": "http://x/y"}}, "cannot be used"),
        ({"json_schema": {"type": {1, 2}}}, "expected plain JSON values"),
        ({"regex": "("}, "unclosed group"),
        ({"regex": "a(?=b)"}, "look-around"),
        ({"regex": ""}, "the regex is '', expected a pattern"),
        (
            {"regex": "a\udcff"},
            r"the regex holds '\udcff' at 1, half of a character; expected text that UTF-8 can hold",
        ),
        ({"choices": ["a", "\udcff"]}, r"a choice holds '\udcff' at 0, half of a character"),
        ({"json_schema": {"enum": ["\udcff"]}}, "expected plain JSON values"),
        ({"regex": 5}, "expected a pattern"),
        ({"choices": []}, "at least one text"),
        ({"choices": ["a", ""]}, "none of them empty"),
        ({"choices": [1]}, "at least one text"),
        ({"choices": 3}, "at least one text"),
        ({"regex": "a", "choices": ["a"]}, "regex and choices were given"),
    ],
)
def test_what_cannot_be_used_is_one_clear_error(model: VisionLanguageModel, form: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        model.generate(ASK, **form)
    assert message in str(caught.value)


def test_llguidance_missing_names_the_extra(model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(EdgeVLError, match=r"pip install 'edgevl\[guided\]'"):
        model.generate(ASK, regex="a")
    assert model.generate(ASK, max_new_tokens=1).text is not None  # needed for forms only


def test_a_token_outside_the_form_is_an_error(model: VisionLanguageModel) -> None:
    guide = model.generation_config(regex="ab").guide
    assert guide is not None
    state = guide.start()
    assert not state.complete
    with pytest.raises(EngineError, match="the regex 'ab' cannot be followed"):
        state.accept(model.tokenizer.encode("z", specials=False)[0])


def test_a_checkpoint_cannot_bring_a_guide() -> None:
    assert GenerationConfig.from_defaults({"guide": "x", "top_k": 3}).guide is None


def test_masking_leaves_the_logits_alone_and_pads_nothing(model: VisionLanguageModel) -> None:
    guide = model.generation_config(choices=["a"]).guide
    assert guide is not None
    logits = np.arange(model.config.text.vocab_size, dtype=np.float32)
    masked = guide.start().mask(logits)
    (a,) = model.tokenizer.encode("a", specials=False)
    assert np.flatnonzero(np.isfinite(masked)).tolist() == [a] and masked[a] == a and logits[0] == 0


# ------------------------------------------------------------------------------------------- the command line


def test_command_line(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(OBJECT))
    base = ["run", str(bundle), "How many?", "--engine", "ort-cpu"]
    assert cli.run([*base, "--json-schema", str(schema)]) == 0
    jsonschema.validate(json.loads(capsys.readouterr().out), OBJECT)
    assert cli.run([*base, "--choices", "one, two"]) == 0
    assert capsys.readouterr().out.strip() in ("one", "two")
    assert cli.run([*base, "--regex", "a{30}", "--max-new-tokens", "4"]) == 0
    assert "cut before it was complete" in capsys.readouterr().err
    schema.write_text("not json")
    for arguments, message in (
        (["--json-schema", str(schema)], "is not JSON"),
        (["--json-schema", str(tmp_path / "none.json")], "not readable as text"),
        (["--regex", "("], "unclosed group"),
        (["--choices", " , "], "at least one text"),
    ):
        assert cli.run([*base, *arguments]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and message in error
