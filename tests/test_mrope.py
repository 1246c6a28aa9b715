"""M-RoPE: positions worked out by hand, against a loop oracle and against transformers; rotary rows likewise."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import random_config, random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_vl import modeling_qwen2_vl as reference

from edgevl.runtime.config import ModelConfig, SpecialTokens
from edgevl.runtime.errors import InputError
from edgevl.runtime.image_processing import VisionGrid
from edgevl.runtime.mrope import MROPE_RULES, Positions, position_ids, rope_delta, rotary_rows, vision_rotary_rows

IMAGE, VIDEO, START, END = 429, 430, 426, 427
TOKENS = SpecialTokens(IMAGE, VIDEO, START, END, (419,))
MERGE = 2


def segments_to_prompt(segments):
    """("text", n) | ("image" | "video", t, h, w) with h, w in merged rows -> input_ids, grids."""
    ids, grids = [], []
    for kind, *size in segments:
        if kind == "text":
            ids += [7] * size[0]
        else:
            t, h, w = size
            grids.append(VisionGrid(t, h * MERGE, w * MERGE))
            ids += [START] + [IMAGE if kind == "image" else VIDEO] * (t * h * w) + [END]
    return np.array(ids, np.int64), grids


def oracle(segments, rule, start=0):
    """The rules spelt out token by token."""
    out, p = [], start
    for kind, *size in segments:
        if kind == "text":
            for _ in range(size[0]):
                out.append((p, p, p))
                p += 1
            continue
        t, h, w = size
        out.append((p, p, p))
        p += 1
        for i in range(t):
            for j in range(h):
                for k in range(w):
                    out.append((p + i, p + j, p + k))
        p += max(t, h, w) if rule == "released" else max(h, w)
        out.append((p, p, p))
        p += 1
    highest = max((max(row) for row in out), default=start - 1)
    return np.array(out, np.int64).reshape(-1, 3).T, max(highest + 1, start), p


def compute(segments, rule="released", start=0) -> Positions:
    ids, grids = segments_to_prompt(segments)
    return position_ids(ids, grids, TOKENS, MERGE, rule, start)


SEGMENTS = st.lists(
    st.one_of(
        st.tuples(st.just("text"), st.integers(0, 9)),
        st.tuples(st.just("image"), st.just(1), st.integers(1, 7), st.integers(1, 7)),
        st.tuples(st.just("video"), st.integers(1, 12), st.integers(1, 5), st.integers(1, 5)),
    ),
    max_size=6,
)


def test_golden_text():
    got = position_ids(np.array([5, 6, 7, 8]), [], TOKENS, MERGE)
    assert got.ids.tolist() == [[0, 1, 2, 3]] * 3
    assert (got.next_position, got.resume_position, rope_delta(got)) == (4, 4, 0)
    assert got.ids.dtype == np.int64


def test_golden_one_image():
    # two text tokens, vision_start, 2 x 3 tokens, vision_end, one text token
    got = compute([("text", 2), ("image", 1, 2, 3), ("text", 1)])
    assert got.ids.tolist() == [
        [0, 1, 2, 3, 3, 3, 3, 3, 3, 6, 7],
        [0, 1, 2, 3, 3, 3, 4, 4, 4, 6, 7],
        [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7],
    ]
    assert (got.next_position, rope_delta(got)) == (8, -3)


def test_golden_video_under_both_rules():
    # vision_start, 3 frames of 1 x 2 tokens, vision_end, one text token
    video = [("video", 3, 1, 2), ("text", 1)]
    span = [[0, 1, 1, 2, 2, 3, 3], [0, 1, 1, 1, 1, 1, 1], [0, 1, 2, 1, 2, 1, 2]]
    released = compute(video)
    assert released.ids.tolist() == [[*row, 4, 5] for row in span]
    assert (released.next_position, released.resume_position, rope_delta(released)) == (6, 6, -3)
    five = compute(video, "transformers-5")
    assert five.ids.tolist() == [[*row, 3, 4] for row in span]
    assert (five.next_position, five.resume_position, rope_delta(five)) == (5, 5, -4)


def test_golden_long_video_where_text_stands_before_the_last_frame():
    # 6 frames of 1 x 1 from position 1 reach 6; under transformers-5 vision_end gets 2, decoding goes on at 7
    got = compute([("video", 6, 1, 1)], "transformers-5")
    assert got.ids[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 2]
    assert (got.next_position, got.resume_position) == (7, 3)


def test_golden_two_equal_images_side_by_side():
    got = compute([("image", 1, 2, 2), ("image", 1, 2, 2)])
    assert got.ids.tolist() == [
        [0, 1, 1, 1, 1, 3, 4, 5, 5, 5, 5, 7],
        [0, 1, 1, 2, 2, 3, 4, 5, 5, 6, 6, 7],
        [0, 1, 2, 1, 2, 3, 4, 5, 6, 5, 6, 7],
    ]
    assert got.next_position == 8


def test_spans_without_anything_between_them_are_told_apart():
    ids = np.array([IMAGE] * 4 + [IMAGE] * 2 + [VIDEO] * 2)
    grids = [VisionGrid(1, 4, 4), VisionGrid(1, 2, 4), VisionGrid(2, 2, 2)]
    got = position_ids(ids, grids, TOKENS, MERGE)
    assert got.ids.tolist() == [
        [0, 0, 0, 0, 2, 2, 4, 5],
        [0, 0, 1, 1, 2, 2, 4, 4],
        [0, 1, 0, 1, 2, 3, 4, 4],
    ]
    assert got.next_position == 6


@settings(max_examples=150, deadline=None, derandomize=True)
@given(SEGMENTS, st.sampled_from(MROPE_RULES), st.integers(0, 5000))
def test_equals_the_loop_oracle(segments, rule, start):
    got = compute(segments, rule, start)
    ids, next_position, resume = oracle(segments, rule, start)
    assert np.array_equal(got.ids, ids)
    assert (got.next_position, got.resume_position) == (next_position, resume)
    if rule == "released":
        assert got.next_position == got.resume_position


@settings(max_examples=100, deadline=None, derandomize=True)
@given(SEGMENTS, st.sampled_from(MROPE_RULES), st.data())
def test_chunks_of_a_prompt_stand_where_the_whole_does(segments, rule, data):
    whole = compute(segments, rule)
    texts = [i for i, s in enumerate(segments) if s[0] == "text"]
    cut = data.draw(st.sampled_from(texts)) if texts else 0
    first, second = list(segments[:cut]), list(segments[cut:])
    if texts:  # inside a text
        inside = data.draw(st.integers(0, segments[cut][1]))
        first, second = [*first, ("text", inside)], [("text", segments[cut][1] - inside), *second[1:]]
    a = compute(first, rule)
    b = compute(second, rule, start=a.resume_position)
    assert np.array_equal(np.concatenate([a.ids, b.ids], axis=1), whole.ids)
    assert b.resume_position == whole.resume_position
    assert max(a.next_position, b.next_position) == whole.next_position


# against transformers


@pytest.fixture(scope="module")
def theirs():
    return random_model()


def theirs_positions(model, ids, grids):
    types = torch.tensor((ids == IMAGE) * 1 + (ids == VIDEO) * 2)[None]
    # grids stand in prompt order; the reference wants pictures and videos apart
    starts = np.flatnonzero(ids == START) + 1
    rows = {IMAGE: [], VIDEO: []}
    for at, grid in zip(starts, grids, strict=True):
        rows[int(ids[at])].append((grid.t, grid.h, grid.w))
    positions, delta = model.model.get_rope_index(
        torch.tensor(ids)[None],
        mm_token_type_ids=types,
        image_grid_thw=torch.tensor(rows[IMAGE]) if rows[IMAGE] else None,
        video_grid_thw=torch.tensor(rows[VIDEO]) if rows[VIDEO] else None,
    )
    return positions[:, 0].numpy(), int(delta)


def test_equals_transformers_on_random_prompts(theirs):
    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(SEGMENTS)
    def check(segments):
        ids, grids = segments_to_prompt(segments)
        if not ids.size:
            return
        positions, delta = theirs_positions(theirs, ids, grids)
        ours = position_ids(ids, grids, TOKENS, MERGE, "transformers-5")
        assert np.array_equal(ours.ids, positions)
        assert rope_delta(ours) == delta
        if not any(s[0] == "video" for s in segments):  # still pictures: no rule to choose
            released = position_ids(ids, grids, TOKENS, MERGE)
            assert np.array_equal(released.ids, positions)
            assert rope_delta(released) == delta

    check()


def test_which_rule_the_installed_transformers_follows(theirs):
    """The figures of a 20 x 16 x 16 video with two text tokens: if this fails, the reference has moved again."""
    ids, grids = segments_to_prompt([("text", 2), ("video", 20, 8, 8), ("text", 2)])
    positions, _ = theirs_positions(theirs, ids, grids)
    follows = [
        rule for rule in MROPE_RULES if np.array_equal(position_ids(ids, grids, TOKENS, MERGE, rule).ids, positions)
    ]
    assert follows == ["transformers-5"]
    assert positions[0, -1] == 13  # 2 text, vision_start, 8 for the video, vision_end, 2 text
    assert position_ids(ids, grids, TOKENS, MERGE, "released").ids[0, -1] == 25  # 20 for the video


# errors


def test_placeholders_must_fit_the_grids():
    ids, grids = segments_to_prompt([("image", 1, 2, 3), ("text", 1), ("image", 1, 1, 1)])
    with pytest.raises(InputError, match="1 pictures or videos need 6 placeholder tokens, the prompt has 7"):
        position_ids(ids, grids[:1], TOKENS, MERGE)
    with pytest.raises(InputError, match="3 pictures or videos need 8 placeholder tokens, the prompt has 7"):
        position_ids(ids, [*grids, VisionGrid(1, 2, 2)], TOKENS, MERGE)
    with pytest.raises(InputError, match="picture or video 2 needs 6 placeholders in one piece"):
        position_ids(ids, grids[::-1], TOKENS, MERGE)
    with pytest.raises(InputError, match="in one piece"):
        position_ids(np.array([IMAGE, VIDEO]), [VisionGrid(1, 2, 4)], TOKENS, MERGE)


def test_unknown_rule_and_shape():
    with pytest.raises(InputError, match="'newest' is unknown; expected one of released, transformers-5"):
        position_ids(np.array([1]), [], TOKENS, MERGE, "newest")
    with pytest.raises(InputError, match=r"shape \[1, 2\]"):
        position_ids(np.array([[1, 2]]), [], TOKENS, MERGE)


# rotary rows


def text_config(section=(2, 3, 3), theta=1e6, heads=4):
    hidden = sum(section) * 2 * heads
    hf: Any = random_config(
        hidden_size=hidden,
        num_attention_heads=heads,
        rope_parameters={"rope_type": "default", "mrope_section": list(section), "rope_theta": theta},
    )
    hf.vision_config.hidden_size = hidden
    data = hf.to_dict()
    return hf.text_config, ModelConfig.from_hf(data, {}).text


@pytest.mark.parametrize("section", [(2, 3, 3), (16, 24, 24), (8, 0, 8), (0, 0, 8), (1, 6, 1)])
@pytest.mark.parametrize("theta", [1e6, 10000.0, 10.0])
def test_rotary_rows_turn_q_and_k_as_transformers_does(section, theta):
    hf, ours = text_config(section, theta)
    rng = np.random.default_rng(0)
    positions = rng.integers(0, 32768, (3, 50))
    positions[:, 0] = 0
    q = rng.standard_normal((1, 4, 50, ours.head_dim)).astype(np.float32)
    k = rng.standard_normal((1, 2, 50, ours.head_dim)).astype(np.float32)
    rotary = reference.Qwen2VLRotaryEmbedding(hf)
    their_cos, their_sin = rotary(torch.tensor(q), torch.tensor(positions)[:, None])
    their_q, their_k = reference.apply_rotary_pos_emb(torch.tensor(q), torch.tensor(k), their_cos, their_sin)

    cos, sin = rotary_rows(positions, ours)
    assert cos.shape == sin.shape == (50, ours.head_dim // 2)
    assert cos.dtype == sin.dtype == np.float32
    for x, want in ((q, their_q), (k, their_k)):
        a, b = np.split(x, 2, axis=-1)
        got = np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
        # The angles are the same float32 numbers but for the last bit of a frequency or two.
        error = np.abs(got - want.numpy())
        assert error.max() < 5e-3 and error.mean() < 1e-5
    cos, sin = rotary_rows(positions % 4096, ours)
    their_cos, their_sin = rotary(torch.tensor(q), torch.tensor(positions % 4096)[:, None])
    half = ours.head_dim // 2
    assert np.abs(cos - their_cos[0, :, :half].numpy()).max() < 5e-4
    assert np.abs(sin - their_sin[0, :, half:].numpy()).max() < 5e-4


def test_rotary_rows_against_an_obvious_oracle():
    _, config = text_config((2, 3, 3), 10000.0)
    positions = np.random.default_rng(1).integers(0, 300, (3, 5))
    cos, sin = rotary_rows(positions, config)
    axis = [0, 0, 1, 1, 1, 2, 2, 2]
    for s in range(5):
        for i in range(8):
            angle = positions[axis[i], s] * 10000.0 ** (-2 * i / 16)
            assert cos[s, i] == pytest.approx(np.cos(angle), abs=5e-5)
            assert sin[s, i] == pytest.approx(np.sin(angle), abs=5e-5)


def test_rotary_rows_of_any_shape_and_one_token_fast():
    _, config = text_config((16, 24, 24))
    positions = np.random.default_rng(2).integers(0, 9999, (3, 4, 6))
    cos, sin = rotary_rows(positions, config)
    assert cos.shape == (4, 6, 64)
    for b in range(4):
        row_cos, row_sin = rotary_rows(positions[:, b], config)
        assert np.array_equal(cos[b], row_cos) and np.array_equal(sin[b], row_sin)
    one_cos, _ = rotary_rows(positions[:, 2, 3], config)
    assert one_cos.shape == (64,) and np.array_equal(one_cos, cos[2, 3])

    one = np.full((3, 1), 4321)
    best = min(_timed(lambda: rotary_rows(one, config)) for _ in range(300))
    assert best < 200e-6  # about 10 us here; the bound only catches a table built per token


def _timed(call):
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


@pytest.mark.parametrize(("h", "w"), [(2, 2), (4, 6), (10, 4), (2, 40)])
def test_vision_rows_are_those_of_the_transformers_tower(theirs, h, w):
    tower = theirs.model.visual
    ids = reference.get_vision_position_ids(  # pyright: ignore[reportPrivateImportUsage]
        torch.tensor([[1, h, w]]), MERGE
    )
    their_cos, their_sin = tower.rotary_pos_emb(torch.zeros(1), ids)
    head_dim = their_cos.shape[-1]
    cos, sin = vision_rotary_rows(h, w, MERGE, head_dim)
    assert cos.shape == (h * w, head_dim // 2) and cos.dtype == np.float32
    assert np.abs(cos - their_cos[:, : head_dim // 2].numpy()).max() < 1e-5
    assert np.abs(sin - their_sin[:, : head_dim // 2].numpy()).max() < 1e-5


def test_vision_rows_against_an_obvious_oracle():
    cos, sin = vision_rotary_rows(4, 6, 2, 80)
    row = 0
    for block_row in range(2):
        for block_column in range(3):
            for i in range(2):
                for j in range(2):
                    place = (block_row * 2 + i, block_column * 2 + j)
                    for f in range(40):
                        angle = place[f // 20] * 10000.0 ** (-2 * (f % 20) / 40)
                        assert cos[row, f] == pytest.approx(np.cos(angle), abs=1e-6)
                        assert sin[row, f] == pytest.approx(np.sin(angle), abs=1e-6)
                    row += 1


def test_vision_rows_are_shared_and_read_only():
    cos, _ = vision_rotary_rows(4, 4, 2, 32)
    assert vision_rotary_rows(4, 4, 2, 32)[0] is cos
    with pytest.raises(ValueError, match="read-only"):
        cos[0, 0] = 1
    with pytest.raises(InputError, match="3 x 4 patches, expected positive multiples of 2"):
        vision_rotary_rows(3, 4, 2, 32)


def test_tokens_config_of_the_tests_is_the_checkpoints():
    config = ModelConfig.from_hf(random_config().to_dict() | {"eos_token_id": 419}, {})
    assert replace(config.tokens, eos_token_ids=(419,)) == TOKENS
