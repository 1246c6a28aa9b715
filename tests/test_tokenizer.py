"""The tokenizer against transformers' Qwen2 tokenizer; streaming detokenization against the full decode."""

from __future__ import annotations

import json
import random
import shutil
import threading

import pytest
from checkpoints import DEMO
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, Qwen2Tokenizer

from edgevl.runtime.errors import CheckpointError, InputError
from edgevl.runtime.tokenizer import GROUNDING_TOKENS, IncrementalDetokenizer, Tokenizer

TRICKY = [
    "",
    " ",
    "\n\n  \n",
    "What is the total?",
    "  leading and trailing  ",
    "it's we'LL THEY'RE I'd",
    "1234567890 3.14159",
    "tabs\tand\r\nCRLF\rCR",
    "e\u0301 \u00e9 \u1e9b\u0323 \ufb01",  # composed and not: the normalizer joins them
    "漢字かな交じり文、混合。",
    "👩‍👩‍👧‍👦🇩🇪🏳️‍🌈 emoji",
    "مرحبا हिन्दी ไทย",
    "\u0000\u0007\u200b\ufeff",
    "𠮷𡈽 rare",
    "def f(x):\n    return x**2  # code\n",
    "<|im_end|>",
    "a<|im_start|>user\n<|image_pad|>b <|im_end|>",
    "<|not_a_token|> <|im_ end|>",
]


@pytest.fixture(scope="module")
def ours():
    return Tokenizer.from_folder(DEMO)


@pytest.fixture(scope="module")
def theirs():
    return AutoTokenizer.from_pretrained(DEMO)


@pytest.fixture(scope="module")
def slow_folder(tmp_path_factory):
    """The tokenizer's files without tokenizer.json."""
    folder = tmp_path_factory.mktemp("slow")
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder)
    return folder


@pytest.mark.parametrize("text", TRICKY)
def test_encode_equals_transformers(ours, theirs, text):
    assert ours.encode(text, specials=True) == theirs(text, add_special_tokens=False)["input_ids"]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.one_of(st.text(max_size=12), st.sampled_from(TRICKY)), max_size=4).map("".join))
def test_encode_equals_transformers_on_any_text(text):
    ours, theirs = Tokenizer.from_folder(DEMO), _theirs()
    assert ours.encode(text, specials=True) == theirs(text, add_special_tokens=False)["input_ids"]


def _theirs(cache=[]):  # noqa: B006
    if not cache:
        cache.append(AutoTokenizer.from_pretrained(DEMO))
    return cache[0]


@pytest.mark.parametrize("text", TRICKY)
def test_specials_spelt_out(ours, theirs, text):
    ids = ours.encode(text, specials=False)
    assert not set(ids) & ours.special_ids
    assert ids == theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


@pytest.mark.parametrize("specials", [True, False])
def test_built_from_vocab_and_merges(ours, slow_folder, specials):
    built = Tokenizer.from_folder(slow_folder)
    assert built.special_tokens == ours.special_tokens and built.vocab_size == ours.vocab_size
    for text in TRICKY:
        assert built.encode(text, specials) == ours.encode(text, specials)
        ids = ours.encode(text, specials)
        assert built.decode(ids, skip_special_tokens=False) == ours.decode(ids, skip_special_tokens=False)


def test_built_from_vocab_and_merges_equals_transformers_slow_files(slow_folder):
    theirs = Qwen2Tokenizer.from_pretrained(slow_folder)
    built = Tokenizer.from_folder(slow_folder)
    for text in TRICKY:
        assert built.encode(text, True) == theirs(text, add_special_tokens=False)["input_ids"]


def test_to_file_and_back(slow_folder, tmp_path, ours):
    Tokenizer.from_folder(slow_folder).to_file(tmp_path / "tokenizer.json")
    again = Tokenizer.from_file(tmp_path / "tokenizer.json")
    for text in TRICKY:
        for specials in (True, False):
            assert again.encode(text, specials) == ours.encode(text, specials)
    assert AutoTokenizer.from_pretrained(tmp_path)("a<|im_end|>")["input_ids"] == ours.encode("a<|im_end|>", True)


def test_ids_and_names(ours):
    assert ours.token_to_id("<|image_pad|>") == 429 and ours.id_to_token(429) == "<|image_pad|>"
    assert ours.token_to_id("nothing such") is None and ours.id_to_token(511) is None and ours.id_to_token(-1) is None
    assert ours.special_ids == frozenset(range(417, 431))
    assert ours.vocab_size == 431
    assert all(token in ours.special_tokens for token in GROUNDING_TOKENS)


def test_decode_drops_control_tokens_but_keeps_those_of_boxes(ours, theirs):
    text = "<|object_ref_start|>cup<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|><|im_end|>"
    ids = ours.encode(text, specials=True)
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True) == "cup(1,2),(3,4)"
    assert ours.decode(ids, skip_special_tokens=False) == text
    keep = frozenset(ours.special_tokens[t] for t in GROUNDING_TOKENS)
    assert ours.decode(ids, keep_special=keep) == text.removesuffix("<|im_end|>")
    assert ours.decode([500, 511, 64]) == "a"  # the logits have columns that no token stands for


def test_threads_share_one_tokenizer(ours):
    text = "a<|im_end|>b"
    want = {s: ours.encode(text, s) for s in (True, False)}
    wrong = []

    def work(specials):
        wrong.extend(1 for _ in range(300) if ours.encode(text, specials) != want[specials])

    threads = [threading.Thread(target=work, args=(i % 2 == 0,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert want[True] != want[False] and not wrong


def test_half_a_character_is_an_input_error(ours):
    with pytest.raises(InputError, match=r"'\\ud83d' at 1, half of a character"):
        ours.encode("a\ud83d", specials=False)


# streaming


def stream(tokenizer, ids, **options):
    detokenizer = IncrementalDetokenizer(tokenizer, **options)
    return [*(detokenizer.push(i) for i in ids), detokenizer.finish()]


@pytest.mark.parametrize("text", TRICKY)
def test_stream_never_shows_half_a_character(ours, text):
    ids = ours.encode(text, specials=False)
    pieces = stream(ours, ids)
    assert "".join(pieces) == ours.decode(ids)
    if text.isprintable():
        assert "\ufffd" not in "".join(pieces)


def test_stream_of_an_emoji_split_over_four_tokens(ours):
    ids = ours.encode(" 👍!", specials=False)
    assert len(ids) == 6
    assert stream(ours, ids) == [" ", "", "", "", "👍", "!", ""]


def test_stream_that_ends_inside_a_character_says_so_at_the_end_only(ours):
    ids = ours.encode("a👍", specials=False)[:-1]
    assert stream(ours, ids) == ["a", "", "", "", "\ufffd"]
    assert ours.decode(ids) == "a\ufffd"


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 511), max_size=40), st.booleans())
def test_stream_equals_decode_on_any_ids(ids, skip):
    """Random ids are mostly invalid UTF-8: the replacement characters fall in the same places."""
    tokenizer = _ours()
    keep = frozenset({422, 423})
    want = tokenizer.decode(ids, skip_special_tokens=skip, keep_special=keep)
    assert "".join(stream(tokenizer, ids, skip_special_tokens=skip, keep_special=keep)) == want


def _ours(cache=[]):  # noqa: B006
    if not cache:
        cache.append(Tokenizer.from_folder(DEMO))
    return cache[0]


def test_stream_equals_transformers_decode(ours, theirs):
    rng = random.Random(0)
    for _ in range(100):
        ids = [rng.randrange(431) for _ in range(rng.randrange(30))]
        want = theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert "".join(stream(ours, ids)) == want


def test_detokenizer_starts_anew_after_finish(ours):
    detokenizer = IncrementalDetokenizer(ours)
    detokenizer.push(ours.encode("👍", False)[0])
    assert detokenizer.finish() == "\ufffd"
    assert detokenizer.push(64) == "a" and detokenizer.finish() == ""


# errors


def test_missing_files(tmp_path):
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json, and no vocab\.json with merges\.txt"):
        Tokenizer.from_folder(tmp_path)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not found"):
        Tokenizer.from_file(tmp_path / "tokenizer.json")
    shutil.copy(DEMO / "vocab.json", tmp_path)
    shutil.copy(DEMO / "merges.txt", tmp_path)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: not found"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"model": 1}', b"\xff\xfe"])
def test_malformed_tokenizer_json(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not "):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda spec: spec.update(decoder={"type": "Fuse"}), "its decoder is Fuse, expected ByteLevel"),
        (lambda spec: spec["added_tokens"][2].update(lstrip=True), r"419 '<\|im_end\|>' sets \['lstrip'\]"),
    ],
)
def test_tokenizers_of_another_kind_are_refused(change, message):
    spec = json.loads((DEMO / "tokenizer.json").read_text())
    change(spec)
    with pytest.raises(CheckpointError, match=message):
        Tokenizer(json.dumps(spec))


def test_malformed_slow_files(slow_folder, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(slow_folder, folder)
    (folder / "merges.txt").write_text("#version: 0.2\na b c\n")
    with pytest.raises(CheckpointError, match="'a b c' is no pair of tokens"):
        Tokenizer.from_folder(folder)
    (folder / "merges.txt").write_text("Qq zz\n")
    with pytest.raises(CheckpointError, match="not a tokenizer"):
        Tokenizer.from_folder(folder)
    shutil.copy(slow_folder / "merges.txt", folder)
    (folder / "vocab.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="expected a JSON object, got list"):
        Tokenizer.from_folder(folder)
    shutil.copy(slow_folder / "vocab.json", folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["added_tokens_decoder"]["417"]  # the vocabulary's next id is now another token's
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"'<\|im_start\|>' is declared as 418 but vocab.json makes it 417"):
        Tokenizer.from_folder(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="added_tokens_decoder must map ids"):
        Tokenizer.from_folder(folder)
