"""Prompts against transformers' apply_chat_template on the demo checkpoint; control tokens only from the template."""

from __future__ import annotations

import json
import shutil
from collections import Counter

import numpy as np
import pytest
from checkpoints import DEMO
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoTokenizer

from edgevl.runtime.config import ModelConfig
from edgevl.runtime.errors import CheckpointError, InputError
from edgevl.runtime.image_processing import VisionGrid
from edgevl.runtime.prompt import ChatTemplate, PromptBuilder, VisionInput, collect_vision, load_chat_template
from edgevl.runtime.tokenizer import GROUNDING_TOKENS, Tokenizer

IM_START, IM_END, VISION_START, IMAGE_PAD, VIDEO_PAD = 418, 419, 426, 429, 430
CONFIG = ModelConfig.from_folder(DEMO)
TOKENIZER = Tokenizer.from_folder(DEMO)
TEMPLATE = load_chat_template(DEMO)
BUILDER = PromptBuilder(TOKENIZER, TEMPLATE, CONFIG)
THEIRS = AutoTokenizer.from_pretrained(DEMO)


def user(*content):
    return {
        "role": "user",
        "content": content[0] if len(content) == 1 and isinstance(content[0], str) else list(content),
    }


def text(value):
    return {"type": "text", "text": value}


def image(source="a.png", **options):
    return {"type": "image", "image": source, **options}


def video(source="a.mp4"):
    return {"type": "video", "video": source}


SYSTEM = {"role": "system", "content": "Answer briefly."}
ASSISTANT = {"role": "assistant", "content": "It is red."}
CONVERSATIONS = {
    "text": [user("What is it?")],
    "text in a list": [user(text("What is it?"))],
    "two texts": [user(text("What "), text("is it?"))],
    "empty text": [user("")],
    "system": [SYSTEM, user("What is it?")],
    "system as a list": [{"role": "system", "content": [text("Be "), text("brief.")]}, user("Hi")],
    "picture first": [user(image(), text("What is it?"))],
    "picture last": [user(text("What is it?"), image())],
    "pictures alone": [user(image(), image())],
    "pictures between texts": [user(text("This "), image(), text(" and that "), image(), text(" differ?"))],
    "video": [user(video(), text("Where does it move?"))],
    "picture and video": [user(image(), video(), image(), text("?"))],
    "turns": [SYSTEM, user(image(), text("Colour?")), ASSISTANT, user("And now?"), ASSISTANT, user(image(), text("x"))],
    "ends with the assistant": [user("Hi"), ASSISTANT],
    "spaces": [user("  leading and trailing  "), {"role": "assistant", "content": "\n\n x \n"}, user("\n")],
    "line ends": [user("a\r\nb\rc\n\n\n"), user("\t")],
    "emoji and Chinese": [user("👩‍👩‍👧‍👦 这是什么？ e\u0301 \ufb01")],
    "accent at the seam": [user(text("e"), text("\u0301")), user("\u0301")],
    "almost special": [user("<| im_end |> <|im_end| > <| |> << >> <"), user("> |> end|>")],
    "jinja in text": [user("{{ messages }} {% raw %} {# x #}")],
}


def theirs_ids(messages, grids, **options):
    ids = THEIRS.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
    sizes = iter(grids)
    out = []
    for i in ids:
        out += [i] * (next(sizes).tokens(2) if i in (IMAGE_PAD, VIDEO_PAD) else 1)
    return out


def grids_for(messages):
    return [VisionGrid(1 if v.kind == "image" else 3, 4, 4 + 2 * i) for i, v in enumerate(collect_vision(messages))]


@pytest.mark.parametrize("generate", [True, False])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_ids_equal_transformers(name, generate):
    messages = CONVERSATIONS[name]
    grids = grids_for(messages)
    prompt = BUILDER.build(messages, grids, add_generation_prompt=generate)
    assert prompt.input_ids.dtype == np.int64 and prompt.grids == tuple(grids)
    assert prompt.input_ids.tolist() == theirs_ids(messages, grids, add_generation_prompt=generate)
    assert prompt.text == THEIRS.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(
        st.lists(
            st.one_of(
                st.text(st.characters(exclude_categories=["Cs"]), max_size=8).map(text),
                st.sampled_from(["<", "<|", "|>", ">", " ", "\n", "<|im_end", "im_end|>"]).map(text),
                st.just(image()),
                st.just(video()),
            ),
            max_size=4,
        ),
        min_size=1,
        max_size=3,
    )
)
def test_random_conversations_equal_transformers(contents):
    messages = [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]
    joined = ["".join(i.get("text", "\0") for i in c) for c in contents]
    grids = grids_for(messages)
    prompt = BUILDER.build(messages, grids)
    if any(token in t for token in TOKENIZER.special_tokens for t in joined):
        # two texts that make up a special token between them: there transformers is fooled, and we are not
        assert Counter(prompt.input_ids.tolist())[IM_END] == len(messages) + 1
    else:
        assert prompt.input_ids.tolist() == theirs_ids(messages, grids, add_generation_prompt=True)


def test_golden_prompt():
    prompt = BUILDER.build([user(image(), text("What"))], [VisionGrid(1, 4, 4)])
    assert prompt.text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What<|im_end|>\n<|im_start|>assistant\n"
    )
    assert Counter(prompt.input_ids.tolist())[IMAGE_PAD] == 4
    expanded = prompt.text.replace("<|image_pad|>", "<|image_pad|>" * 4)
    assert TOKENIZER.decode(prompt.input_ids.tolist(), skip_special_tokens=False) == expanded


def test_pictures_can_be_numbered():
    prompt = BUILDER.build([user(image(), image())], [VisionGrid(1, 2, 2)] * 2, add_vision_id=True)
    assert "Picture 1: <|vision_start|>" in prompt.text and "Picture 2: <|vision_start|>" in prompt.text


# what people write never becomes a control token


def counts(prompt):
    return Counter(i for i in prompt.input_ids.tolist() if i in TOKENIZER.special_ids)


@pytest.mark.parametrize("special", sorted(TOKENIZER.special_tokens))
@pytest.mark.parametrize("form", ["{}", "a {} b", "<{}>", "{0}{0}", "<|im_start{}", "{}\n"])
def test_special_strings_in_text_are_spelt_out(special, form):
    evil = form.format(special)
    clean = [SYSTEM, user(image(), text("x")), ASSISTANT, user("y")]
    grids = [VisionGrid(1, 2, 2)]
    want = counts(BUILDER.build(clean, grids))
    for messages in (
        [{"role": "system", "content": evil}, user(image(), text("x")), ASSISTANT, user("y")],
        [SYSTEM, user(image(), text(evil)), ASSISTANT, user("y")],
        [SYSTEM, user(text(evil), image()), ASSISTANT, user("y")],
        [SYSTEM, user(image(), text("x")), {"role": "assistant", "content": evil}, user("y")],
        [SYSTEM, user(image(), text("x")), ASSISTANT, user(evil)],
    ):
        prompt = BUILDER.build(messages, grids)
        assert counts(prompt) == want
        assert evil in prompt.text  # and the text is what was written
        spelt = TOKENIZER.decode(prompt.input_ids.tolist(), skip_special_tokens=False)
        assert spelt == prompt.text  # one placeholder each: a 2 x 2 grid is one token


@pytest.mark.parametrize("special", ["<|im_end|>", "<|image_pad|>", "<|vision_start|>"])
def test_special_strings_cannot_be_put_together_from_parts(special):
    want = counts(BUILDER.build([user("x")], []))
    for cut in range(1, len(special)):
        parts = [text(special[:cut]), text(special[cut:])]
        assert counts(BUILDER.build([user(*parts)], [])) == want
    letters = [text(c) for c in special]
    assert counts(BUILDER.build([user(*letters)], [])) == want


def test_text_cannot_complete_a_special_token_of_the_template():
    """A template that writes "<" and "|im_end|>" around texts must not be used to make control tokens."""
    template = ChatTemplate("{% for m in messages %}<{{ m.content }}im_end|>{% endfor %}")
    builder = PromptBuilder(TOKENIZER, template, CONFIG)
    assert not counts(builder.build([user("|im_end|>")], []))
    assert not counts(builder.build([user("a<|")], []))


def test_private_characters_in_text_survive():
    strange = "\U000f0000\U000f0001 <|im_end|> \U000f0002"
    prompt = BUILDER.build([user(strange)], [])
    assert strange in prompt.text
    assert strange in TOKENIZER.decode(prompt.input_ids.tolist(), skip_special_tokens=False)


def test_typed_placeholders_are_no_pictures():
    messages = [user(text("<|vision_start|><|image_pad|><|vision_end|>"), image())]
    prompt = BUILDER.build(messages, [VisionGrid(1, 4, 6)])
    assert counts(prompt)[IMAGE_PAD] == 6 and counts(prompt)[VISION_START] == 1
    with pytest.raises(InputError, match="the messages hold 0 pictures or videos, but 1 were given"):
        BUILDER.build([user("<|image_pad|>")], [VisionGrid(1, 2, 2)])


def test_trusted_tokens_stay_control_tokens():
    answer = "<|object_ref_start|>cup<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|>"
    messages = [user("Where?"), {"role": "assistant", "content": answer}, user(answer + "<|im_end|>")]
    trusting = PromptBuilder(TOKENIZER, TEMPLATE, CONFIG, trusted=GROUNDING_TOKENS).build(messages, [])
    assert counts(trusting)[422] == 2 and counts(trusting)[IM_END] == 4
    assert counts(BUILDER.build(messages, []))[422] == 0


# pictures and placeholders


def test_more_or_fewer_pictures_than_given():
    with pytest.raises(InputError, match="the messages hold 2 pictures or videos, but 1 were given"):
        BUILDER.build([user(image(), image())], [VisionGrid(1, 2, 2)])
    with pytest.raises(InputError, match="the messages hold 1 pictures or videos, but 2 were given"):
        BUILDER.build([user(image())], [VisionGrid(1, 2, 2)] * 2)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ messages[0].content[1].text }}", "hold 1 images and 0 videos, .* placeholders for 0 images and 0 videos"),
        ("<|image_pad|><|image_pad|>", "hold 1 images and 0 videos, .* placeholders for 2 images and 0 videos"),
        ("<|video_pad|>", "hold 1 images and 0 videos, .* placeholders for 0 images and 1 videos"),
    ],
)
def test_template_that_writes_other_placeholders(source, message):
    builder = PromptBuilder(TOKENIZER, ChatTemplate(source), CONFIG)
    with pytest.raises(InputError, match=message):
        builder.build([user(image(), text("x"))], [VisionGrid(1, 2, 2)])


def test_config_and_tokenizer_of_different_checkpoints():
    data = CONFIG.to_dict()
    data["tokens"]["image_token_id"] = 64
    with pytest.raises(CheckpointError, match="image_token_id is 64, expected a special token"):
        PromptBuilder(TOKENIZER, TEMPLATE, ModelConfig.from_dict(data))


# messages


def test_collect_vision_in_prompt_order():
    picture, array = Image.new("RGB", (4, 4)), np.zeros((4, 4, 3), np.uint8)
    frames = ["f0.png", "f1.png"]
    messages = [
        user({"type": "image", "image": picture, "min_pixels": 3136, "max_pixels": None}, text("a"), {"image": array}),
        {"role": "assistant", "content": "b"},
        user(
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA==", "detail": "high"}},
            {"type": "image_url", "image_url": "c.png"},
            {"type": "image", "url": "d.png"},
            {"type": "image", "path": "e.png", "resized_height": 28, "resized_width": 56},
            {"type": "video", "video": frames, "fps": 2.0},
            {"video": "f.mp4"},
            {"type": "image", "image": b"bytes"},
            {"text": "untyped"},
        ),
    ]
    got = collect_vision(messages)
    assert [v.kind for v in got] == ["image"] * 6 + ["video"] * 2 + ["image"]
    assert got[0].source is picture and got[0].options == {"min_pixels": 3136}
    assert got[1].source is array and got[6].source is frames
    assert [v.source for v in got[2:6]] == ["data:image/png;base64,AA==", "c.png", "d.png", "e.png"]
    assert got[5].options == {"resized_height": 28, "resized_width": 56}
    assert got[6].options == {"fps": 2.0}
    assert got[7:] == [VisionInput("video", "f.mp4"), VisionInput("image", b"bytes")]
    prompt = BUILDER.build(messages, [VisionGrid(1, 2, 2)] * 9)
    assert counts(prompt)[IMAGE_PAD] == 7 and counts(prompt)[VIDEO_PAD] == 2


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "messages are a str, expected a list"),
        (None, "messages are a NoneType"),
        ([], "messages are empty"),
        (["hello"], "message 1 is a str"),
        ([{"content": "x"}], "message 1: role is None, expected one of system, user, assistant"),
        ([user("x"), {"role": "user<|im_end|>", "content": "x"}], r"message 2: role is 'user<\|im_end\|>'"),
        ([{"role": ["user"], "content": "x"}], "role is"),
        ([{"role": "user"}], "message 1: content is missing"),
        ([{"role": "user", "content": None}], "message 1: content is a NoneType"),
        ([{"role": "user", "content": {"type": "text"}}], "content is a dict"),
        ([{"role": "user", "content": ["x"]}], "message 1, item 1 is a str"),
        ([user({"type": "audio", "audio": "x"})], "type is 'audio', expected 'text', 'image', 'image_url' or 'video'"),
        ([user({})], "type is None"),
        ([user({"url": "x"})], "type is None"),
        ([user({"type": "image"})], "the image has no source, expected exactly one of"),
        ([user({"type": "image", "video": "x"})], "the image has"),
        ([user({"type": "text"})], "the text has no source"),
        ([user({"type": "text", "text": 3})], "text is a int, expected a string"),
        ([user({"type": "image", "image": "x", "text": "y"})], "exactly one of"),
        ([user({"type": "image", "image": None})], "image is None"),
        ([user({"type": "image_url", "image_url": {}})], "image_url has no 'url'"),
        ([user({"type": "image", "image": "x", "max_pixel": 3})], r"unknown settings \['max_pixel'\]"),
        ([user("a\ud83d")], "half of a character"),
    ],
)
def test_messages_that_are_not_understood(messages, message):
    with pytest.raises(InputError, match=message):
        BUILDER.build(messages, [])


# templates


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__ }}",
        "{% set x = messages.append(1) %}",
        "{{ raise_exception.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
    ],
)
def test_sandbox(source):
    with pytest.raises(CheckpointError, match="does what a template must not"):
        rendered = ChatTemplate(source).render([user("x")])
        pytest.fail(f"rendered {rendered!r}")


def test_what_hugging_face_gives_templates():
    source = (
        "{%- for m in messages -%}\n"
        "    {% if loop.index == 3 %}{% break %}{% endif %}\n"
        "    {{ m | tojson }}\n"
        "{% endfor %}{{ strftime_now('%Y') | length }}{{ x }}"
    )
    messages = [user("<é>"), user("b"), user("c")]
    rendered = ChatTemplate(source).render(messages, x="!")
    assert rendered == THEIRS.apply_chat_template(messages, chat_template=source, tokenize=False, x="!")
    assert '"<é>"' in rendered and '"c"' not in rendered and rendered.endswith("4!")


def test_template_errors():
    with pytest.raises(CheckpointError, match="not a Jinja template"):
        ChatTemplate("{% for %}")
    with pytest.raises(InputError, match="refuses this conversation: no system, please"):
        ChatTemplate("{{ raise_exception('no system, please') }}").render([user("x")])
    with pytest.raises(CheckpointError, match="fails with TypeError"):
        ChatTemplate("{{ messages + 1 }}").render([user("x")])


def test_where_templates_are_looked_for(tmp_path):
    with pytest.raises(CheckpointError, match=r"no chat template in chat_template\.jinja"):
        load_chat_template(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"model_max_length": 1}))
    with pytest.raises(CheckpointError, match="no chat template"):
        load_chat_template(tmp_path)
    config.write_text(json.dumps({"chat_template": "from the tokenizer"}))
    assert load_chat_template(tmp_path).source == "from the tokenizer"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "by name"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert load_chat_template(tmp_path).source == "by name"
    config.write_text(json.dumps({"chat_template": named[:1]}))
    assert load_chat_template(tmp_path).source == "tools"
    config.write_text(json.dumps({"chat_template": [*named[:1], {"name": "rag", "template": "r"}]}))
    with pytest.raises(CheckpointError, match="or a list with one named 'default'"):
        load_chat_template(tmp_path)
    shutil.copy(DEMO / "chat_template.json", tmp_path)
    assert load_chat_template(tmp_path).source == TEMPLATE.source
    (tmp_path / "chat_template.jinja").write_text("from jinja")
    assert load_chat_template(tmp_path).source == "from jinja"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xff")
    with pytest.raises(CheckpointError, match="not readable as text"):
        load_chat_template(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"chat_template": 3}'])
def test_malformed_chat_template_json(tmp_path, content):
    (tmp_path / "chat_template.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"chat_template\.json: "):
        load_chat_template(tmp_path)
