"""The benchmarks' KL is of the engine's own logits, all words of a conversation, against transformers and a formula."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Pair
from PIL import Image

from edgevl.benchmarks import language_model, smollm2
from edgevl.benchmarks.divergence import answer_logits, conversation_logits, divergence
from edgevl.benchmarks.language_model import calibration_texts, held_out_texts
from edgevl.calibration.dataset import SampleSource
from edgevl.runtime.tokenizer import Tokenizer


def conversations() -> list[list[dict[str, Any]]]:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (56, 84, 3), dtype=np.uint8))
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "What?"}]
    answer = {"role": "assistant", "content": "A picture of noise."}
    return [[{"role": "user", "content": content}, answer], [{"role": "user", "content": "Hello."}, answer]]


def test_logits_are_transformers(tiny: Pair) -> None:
    found = list(conversation_logits(tiny.bundle, conversations()))
    source = SampleSource(tiny.checkpoint)
    for (got, following), messages in zip(found, conversations(), strict=True):
        sample = source.sample(messages)
        vision = {}
        if sample.vision:
            grid = sample.vision[0].grid
            vision["pixel_values"] = torch.from_numpy(sample.vision[0].pixel_values)
            vision["image_grid_thw"] = torch.tensor([[grid.t, grid.h, grid.w]])
        with torch.no_grad():
            out = tiny.model(
                input_ids=torch.from_numpy(sample.ids)[None],
                position_ids=torch.from_numpy(sample.positions)[:, None],
                use_cache=False,
                **vision,
            ).logits[0]
        np.testing.assert_allclose(got, out[torch.from_numpy(~sample.visual)].numpy(), atol=2e-4)
        assert following.tolist() == [*sample.ids[1:], -1] if not sample.vision else following[-1] == -1
        assert len(following) == len(got)


def test_divergence_by_hand() -> None:
    """Two positions over three tokens: sum of p log(p / q), top tokens, and the words' own perplexity."""
    p, q = np.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]), np.array([[0.25, 0.5, 0.25], [0.2, 0.6, 0.2]])
    following = np.array([2, -1])
    kl = [0.5 * np.log(2) - 0.25 * np.log(2), 0.2 * np.log(0.5) + 0.8 * np.log(0.8 / 0.6)]
    got = divergence([(np.log(p) + 3, following)], iter([(np.log(q) - 7, following)]))
    assert got.kl == pytest.approx(np.mean(kl)) and got.top1 == 0.5 and got.tokens == 2
    assert got.perplexity == pytest.approx(1 / 0.25)
    with pytest.raises(ValueError):
        divergence([(p, following)], iter([]))


def test_texts_are_apart() -> None:
    ours, others = calibration_texts(40), held_out_texts()
    texts = [m["content"] for c in ours for m in c]
    assert len(ours) == 40 and len(others) == 12
    for conversation in others:
        assert conversation[1]["content"] not in texts and conversation[0]["content"] not in texts
        assert 300 <= len(conversation[1]["content"]) <= 700


def test_checkpoints_are_kept_by_what_they_were_calibrated_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made once for the same texts, anew for others: another number of them, or another Python's."""
    made: list[Path] = []

    def command(name: str, _: object, flag: str, output: Path, *options: object) -> None:
        assert flag == "-o"
        if name == "quantize":
            made.append(output)
            assert options[options.index("--samples") + 1] == samples
            output.mkdir()
        else:
            output.mkdir(exist_ok=True)
            (output / "decoder.onnx.data").write_bytes(b"0")

    monkeypatch.setattr(language_model, "_edgevl", command)
    monkeypatch.setattr(language_model, "conversation_logits", lambda *_: iter([]))
    monkeypatch.setattr(language_model, "divergence", lambda *_: None)
    for text, samples, times in (("a", 8, 1), ("a", 8, 1), ("a", 9, 2), ("b", 9, 3), ("a", 8, 3)):
        (tmp_path / "calibration.jsonl").write_text(text)
        language_model._measure("gptq-int4", tmp_path, [], [], samples)
        assert len(made) == times, (text, samples)
    assert len(set(made)) == 3 and "gptq-int4" in made[0].name


def test_rotary_pairs_become_halves() -> None:
    """GGUF keeps a head's rows as a0 b0 a1 b1 ...; transformers as a0 a1 ... b0 b1 ..."""
    heads, d = 3, 8
    names = np.array([[f"{h}{part}{i}" for i in range(d // 2) for part in "ab"] for h in range(heads)])
    rows = np.arange(heads * d, dtype=np.float32)[:, None] * np.ones((1, 5), np.float32)
    got = smollm2._halves(rows, heads)[:, 0].astype(int)
    wanted = [f"{h}{part}{i}" for h in range(heads) for part in "ab" for i in range(d // 2)]
    assert names.ravel()[got].tolist() == wanted


def test_the_tokenizer_that_is_written() -> None:
    """Qwen2-VL's special tokens in the place of unused ones; digits one by one; bytes back to text."""
    level = [chr(c) for c in range(33, 127)]
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<unused{i}>" for i in range(14))]
    words = ["Ġ", "Ċ", "1", "12", "he", "Ġhe"]
    tokens = [*specials, *level, *(w for w in words if w not in level)]
    field = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": ["1 2", "h e", "Ġ he"]}
    tokenizer = Tokenizer(json.dumps(smollm2._tokenizer(field)))
    ids = tokenizer.encode("he 12 he", specials=False)
    assert [tokens[i] for i in ids] == ["he", "Ġ", "1", "2", "Ġhe"] and tokenizer.decode(ids) == "he 12 he"
    assert tokenizer.token_to_id("<|image_pad|>") == 12 and tokenizer.token_to_id("<|vision_start|>") == 9


def test_divergence_on_answers(tiny: Pair) -> None:
    """Answers through the decoder, token by token's graph, are the whole conversation's last rows."""
    asked = [{"role": "user", "content": "Read the text."}]
    said = "ab c"
    ((whole, following),) = conversation_logits(tiny.bundle, [[*asked, {"role": "assistant", "content": said}]])
    ((logits, told),) = answer_logits(tiny.bundle, [(asked, said)])
    tail = len(whole) - 1 - int(np.flatnonzero(following == told[-1])[-1])  # behind the end token the template goes on
    rows = slice(len(whole) - tail - len(told), len(whole) - tail)
    assert np.array_equal(following[rows], told)
    np.testing.assert_allclose(logits, whole[rows], atol=1e-4)
