"""Sampling against transformers' logits processors, and against counting; stop strings against str.find."""

from __future__ import annotations

import time
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as reference

from edgevl.runtime.errors import EngineError, InputError
from edgevl.runtime.sampling import GenerationConfig, Sampler, StopStrings, _draw, _kth_largest, _nucleus

VOCAB = 1000


def logits_of(seed, size=VOCAB, scale=3.0):
    return (np.random.default_rng(seed).standard_normal(size) * scale).astype(np.float32)


def sampler(**options):
    return Sampler(GenerationConfig(do_sample=True, **options))


def theirs(logits, seen=(), *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0):
    """Probabilities as transformers' generate makes them, in its order."""
    scores, ids = torch.tensor(logits)[None], torch.tensor([list(seen)], dtype=torch.long)
    steps = []
    if repetition_penalty != 1:
        steps.append(reference.RepetitionPenaltyLogitsProcessor(repetition_penalty))
    if temperature != 1:
        steps.append(reference.TemperatureLogitsWarper(temperature))
    if top_k:
        steps.append(reference.TopKLogitsWarper(top_k))
    if top_p < 1:
        steps.append(reference.TopPLogitsWarper(top_p))
    if min_p:
        steps.append(reference.MinPLogitsWarper(min_p))
    for step in steps:
        scores = step(ids, scores)
    return scores.softmax(dim=-1)[0].numpy()


SETTINGS = [
    {},
    {"temperature": 0.1},
    {"temperature": 0.7},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 300},
    {"top_k": 5000},
    {"top_p": 1e-6},
    {"top_p": 0.3},
    {"top_p": 0.9},
    {"top_p": 0.999},
    {"min_p": 0.02},
    {"min_p": 1.0},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.8},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.85, "min_p": 0.05, "repetition_penalty": 1.1},
    {"temperature": 0.01, "top_k": 1, "top_p": 0.001},  # as Qwen2-VL is released
    {"temperature": 1.5, "top_k": 700, "top_p": 0.97},
]


@pytest.mark.parametrize("options", SETTINGS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_probabilities_equal_transformers(options, seed):
    logits, seen = logits_of(seed), np.random.default_rng(seed).integers(0, VOCAB, 60)
    got = sampler(**options).probabilities(logits, seen)
    want = theirs(logits, seen, **options)
    assert np.abs(got - want).max() < 1e-6
    assert np.array_equal(got > 0, want > 0)
    assert got.sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("size", [3000, 4096, 151936])
@pytest.mark.parametrize(
    "options", [{"top_k": 50}, {"top_p": 0.9}, {"top_k": 50, "top_p": 0.5, "temperature": 0.7}], ids=str
)
def test_large_vocabularies_equal_transformers(size, options):
    """Sizes at which the block and quickselect paths are taken."""
    logits = logits_of(size, size)
    got, want = sampler(**options).probabilities(logits), theirs(logits, **options)
    assert np.abs(got - want).max() < 1e-6
    # the reference adds float32 up from the smallest: the last token of a nucleus may fall either way
    assert np.count_nonzero((got > 0) != (want > 0)) <= (2 if "top_p" in options else 0)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=40), st.floats(0.01, 0.99), st.integers(1, 45))
def test_top_p_and_top_k_against_obvious_oracles(values, top_p, k):
    weights = np.array(values, np.float32) + 1  # many ties
    kept, mass = [], 0.0
    for i in sorted(range(len(weights)), key=lambda i: (-weights[i], i)):
        if mass >= top_p * weights.sum(dtype=np.float64):
            break
        kept.append(i)
        mass += float(weights[i])
    assert _nucleus(weights, top_p).tolist() == sorted(kept)
    k = min(k, len(values))
    assert _kth_largest(weights, k) == sorted(weights)[-k]


def test_nucleus_of_many_equal_weights_takes_the_lowest_ids():
    weights = np.ones(5000, np.float32)
    assert _nucleus(weights, 0.5).tolist() == list(range(2500))
    weights[4000] = 2000
    assert _nucleus(weights, 0.5).tolist() == [*range(1500), 4000]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.sampled_from([1, 63, 64, 640, 5000, 40000]), st.integers(1, 400))
def test_kth_largest_of_any_size(seed, size, k):
    values = np.random.default_rng(seed).integers(0, 2000, size).astype(np.float32)
    k = min(k, size)
    assert _kth_largest(values, k) == np.sort(values)[-k]


# greedy


def test_greedy_takes_the_most_likely_and_the_lowest_of_equals():
    logits = np.array([1, 5, 5, -np.inf, 2], np.float32)
    greedy = Sampler(GenerationConfig())
    assert greedy.next(logits) == 1
    assert greedy.probabilities(logits).tolist() == [0, 1, 0, 0, 0]
    assert type(greedy.next(logits)) is int


def test_greedy_obeys_the_repetition_penalty_only():
    logits = np.array([3.0, 2.9, -1.0], np.float32)
    greedy = Sampler(GenerationConfig(repetition_penalty=1.2, temperature=0.1, top_k=1))
    assert greedy.next(logits, np.array([2, 2])) == 0
    assert greedy.next(logits, np.array([0, 0, 0])) == 1  # once, however often it was seen
    assert greedy.next(logits, np.array([], np.int64)) == 0
    assert logits.tolist() == pytest.approx([3.0, 2.9, -1.0])  # the caller's array is left alone


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("temperature", [1e-38, 1e-45, 1e-50, 1e-300, 5e-324])
def test_the_limit_of_small_temperatures_is_greedy(temperature):
    logits = logits_of(0)
    for _ in range(2):
        best = int(np.argmax(logits))
        cold = sampler(temperature=temperature, top_p=0.9, min_p=0.1)
        assert [cold.next(logits) for _ in range(3)] == [best] * 3
        np.testing.assert_array_equal(cold.probabilities(logits), np.eye(VOCAB)[best])
        logits = np.where(logits == logits[best], -np.inf, logits)  # as a form that holds the answer leaves them
    logits[[3, 7]] = logits.max() + 1  # equals share
    got = sampler(temperature=temperature).probabilities(logits)
    assert got[3] == got[7] == 0.5 and got.sum() == 1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("temperature", [1e30, 1e38, 1e50, 1e300, 10**400])
def test_the_limit_of_large_temperatures_is_flat(temperature):
    logits = logits_of(0)
    logits[5:] = -np.inf
    got = sampler(temperature=temperature).probabilities(logits)
    np.testing.assert_allclose(got[:5], 0.2, rtol=1e-6)
    assert not got[5:].any()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("penalty", "first"), [(1e-50, True), (1e-300, True), (1e50, False), (1e300, False)])
def test_extreme_penalties_stay_finite(penalty, first):
    logits, seen = np.array([1.0, 2.0, 3.0, -1.0, -np.inf, 0.0], np.float32), np.array([1, 4, 5])
    greedy = Sampler(GenerationConfig(repetition_penalty=penalty))
    assert greedy.next(logits, seen) == (1 if first else 2)
    got = sampler(repetition_penalty=penalty).probabilities(logits, seen)
    assert np.isfinite(got).all() and got[4] == 0 and got.sum() == pytest.approx(1)
    assert got.argmax() == (1 if first else 2)


# drawing


def test_draws_follow_the_distribution():
    """Chi-square over 20,000 draws of 50 tokens: 49 degrees of freedom, 99.99 % below 98."""
    options = {"temperature": 1.3, "top_p": 0.98}
    logits = logits_of(5, 50, 1.5)
    s = sampler(seed=0, **options)
    p, n = s.probabilities(logits), 20_000
    counts = np.bincount([s.next(logits) for _ in range(n)], minlength=50)
    assert not counts[p == 0].any()
    live = p > 0
    chi = float((((counts - n * p) ** 2)[live] / (n * p)[live]).sum())
    assert 10 < chi < 98


def test_draws_over_a_large_vocabulary_follow_the_distribution():
    """The block sums: the share of draws below each tenth of the vocabulary, and which blocks."""
    logits = np.linspace(-2, 2, 100_000).astype(np.float32)
    s = sampler(seed=1)
    cumulative = np.cumsum(s.probabilities(logits))
    draws = np.sort([s.next(logits) for _ in range(4000)])
    # Kolmogorov-Smirnov: 99.99 % below 2.23 / sqrt(n)
    distance = np.abs(cumulative[draws] - np.arange(1, 4001) / 4000).max()
    assert distance < 2.23 / np.sqrt(4000)


@pytest.mark.parametrize("size", [1, 5, 511, 512, 513, 1024, 5000])
def test_draw_equals_the_obvious_search_and_never_takes_a_zero(size):
    rng = np.random.default_rng(size)
    weights = (rng.random(size) * (rng.random(size) < 0.3)).astype(np.float32)
    weights[rng.integers(size)] = 1
    cumulative = np.cumsum(weights.astype(np.float64))
    for u in [0.0, *rng.random(300), 1 - 2**-53]:
        place = _draw(weights, u)
        assert weights[place] > 0
        want = min(int(np.searchsorted(cumulative, u * cumulative[-1], side="right")), size - 1)
        assert place == want or abs(cumulative[place] - cumulative[want]) < 1e-9 or weights[want] == 0


def test_seeds():
    logits = logits_of(7)

    def draws(**options):
        s = sampler(**options)
        return [s.next(logits) for _ in range(30)]

    assert draws(seed=3) == draws(seed=3) != draws(seed=4)
    assert draws() != draws()
    one, other = (Sampler(GenerationConfig(do_sample=True, seed=9), np.random.default_rng(3)) for _ in "ab")
    assert [one.next(logits) for _ in range(30)] == [other.next(logits) for _ in range(30)] == draws(seed=3)


@pytest.mark.parametrize("options", [{"top_p": 1e-9}, {"top_k": 1}, {"min_p": 1.0}, {"temperature": 1e-6}], ids=str)
def test_extremes_keep_the_most_likely(options):
    logits = logits_of(8)
    s = sampler(seed=0, **options)
    assert {s.next(logits) for _ in range(50)} == {int(np.argmax(logits))}


def test_masked_tokens_are_never_drawn():
    logits = np.full(2000, -np.inf, np.float32)
    logits[[3, 1999]] = 1.0
    for options in ({}, {"top_k": 50}, {"top_p": 0.9}, {"min_p": 0.1}):
        s = sampler(seed=0, **options)
        assert {s.next(logits) for _ in range(100)} == {3, 1999}


@pytest.mark.filterwarnings("error")
def test_large_logits_and_small_temperatures_do_not_overflow():
    logits = np.array([3e38, 3e38, -3e38], np.float32)
    assert sampler().probabilities(np.array([1e4, 1e4 - 1, 0], np.float32))[0] == pytest.approx(0.7310586)
    assert sampler(temperature=0.5).probabilities(logits).tolist() == [0.5, 0.5, 0]


def test_half_precision_logits():
    logits = logits_of(9).astype(np.float16)
    assert np.abs(sampler(top_p=0.9).probabilities(logits) - theirs(logits.astype(np.float32), top_p=0.9)).max() < 1e-6


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({7: np.nan}, "logit 7 of 1000 is nan, expected finite numbers"),
        ({9: np.inf}, "logit 9 of 1000 is inf"),
        ({20: np.nan, 3: np.inf}, "logit 20 of 1000 is nan"),
        (dict.fromkeys(range(VOCAB), -np.inf), "all 1000 logits are -inf"),
    ],
)
def test_broken_logits_are_an_engine_error(bad, message, do_sample):
    logits = logits_of(0)
    logits[list(bad)] = list(bad.values())
    with pytest.raises(EngineError, match=message):
        Sampler(GenerationConfig(do_sample=do_sample)).next(logits)


@pytest.mark.parametrize("shape", [(1, 5), (0,), ()])
def test_logits_of_another_shape_are_an_engine_error(shape):
    with pytest.raises(EngineError, match=r"expected those of one token, \[V\]"):
        Sampler(GenerationConfig()).next(np.zeros(shape, np.float32))


def test_speed_over_the_full_vocabulary():
    """0.1 to 0.6 ms here; the bound is loose for busy machines but below what one full argsort costs (10 ms)."""
    logits = logits_of(0, 151936, 2.0)
    logits[:20] += np.linspace(8, 16, 20, dtype=np.float32)
    for options in ({}, {"top_k": 50}, {"top_p": 0.9}, {"top_k": 20, "top_p": 0.8, "min_p": 0.05}):
        s = sampler(seed=0, **options)
        times = []
        for _ in range(15):
            begin = time.perf_counter()
            s.next(logits)
            times.append(time.perf_counter() - begin)
        assert min(times) < 4e-3, options


# settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0, expected a whole number of at least 1"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5"),
        ({"max_new_tokens": True}, "max_new_tokens is True"),
        ({"top_k": -1}, "top_k is -1, expected a whole number of at least 0; 0 keeps all tokens"),
        ({"top_p": 0}, "top_p is 0, expected a number above 0 and at most 1; 1 keeps all tokens"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_p": "0.9"}, "top_p is '0.9'"),
        ({"min_p": -0.1}, "min_p is -0.1, expected a number of at least 0 and at most 1"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0, expected a number above 0; 1 changes nothing"),
        ({"temperature": -1}, "temperature is -1, expected a number of at least 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": 0, "do_sample": True}, "temperature 0 with do_sample=True"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": "x"}, "seed is 'x'"),
        ({"do_sample": 1}, "do_sample is 1, expected True or False"),
        ({"stop": ("a", "")}, r"stop is \['a', ''\], expected strings that are not empty"),
        ({"stop": (3,)}, r"stop is \[3\]"),
        ({"stop": 3}, "stop is 3, expected a list of strings"),
        ({"eos_token_ids": 3}, "eos_token_ids is 3, expected a list of token ids"),
    ],
)
def test_settings_out_of_range(options, message):
    with pytest.raises(InputError, match=message):
        GenerationConfig(**options)


def test_defaults_of_the_checkpoint_and_overrides():
    released = {
        "do_sample": True,
        "temperature": 0.01,
        "top_k": 1,
        "top_p": 0.001,
        "repetition_penalty": 1.0,
        "min_p": None,
    }
    got = GenerationConfig.from_defaults(released)
    assert got == GenerationConfig(do_sample=True, temperature=0.01, top_k=1, top_p=0.001)
    got = GenerationConfig.from_defaults(released, temperature=None, top_k=20, max_new_tokens=7, stop=["x"])
    assert (got.top_k, got.max_new_tokens, got.stop, got.temperature) == (20, 7, ("x",), 0.01)
    assert GenerationConfig.from_defaults({}, eos_token_ids=[1, 2]) == GenerationConfig(eos_token_ids=(1, 2))


@pytest.mark.parametrize(
    ("generation", "overrides", "samples"),
    [
        ({}, {}, False),
        ({"do_sample": True}, {}, True),
        ({"do_sample": False}, {"temperature": 0.7}, True),
        ({"do_sample": True}, {"temperature": 0}, False),
        ({}, {"temperature": 0.7, "do_sample": False}, False),
        ({"temperature": 0.7}, {}, False),
        ({"do_sample": True}, {"do_sample": False}, False),
    ],
)
def test_a_temperature_that_was_asked_for_says_whether_to_sample(generation, overrides, samples):
    assert GenerationConfig.from_defaults(generation, **overrides).do_sample is samples


def test_from_defaults_errors():
    with pytest.raises(InputError, match=r"unknown generation settings \['temprature'\]"):
        GenerationConfig.from_defaults({}, temprature=1)
    with pytest.raises(InputError, match="temperature is 'hot'"):
        GenerationConfig.from_defaults({}, temperature="hot")
    with pytest.raises(InputError, match="top_p is 7"):
        GenerationConfig.from_defaults({"top_p": 7})


def test_one_stop_string_is_not_its_letters():
    assert GenerationConfig(stop="END").stop == ("END",)  # type: ignore[arg-type]


# stop strings


def run(stop, pieces):
    cutter, out = StopStrings(tuple(stop)), ""
    for piece in pieces:
        emit, stopped = cutter.push(piece)
        out += emit
        if stopped:
            return out, True
    return out + cutter.flush(), False


def test_stop_string_across_pieces():
    cutter = StopStrings(("</end>",))
    assert cutter.push("Hello <") == ("Hello ", False)
    assert cutter.push("/e") == ("", False)
    assert cutter.push("nd") == ("", False)
    assert cutter.push("> and more") == ("", True)
    assert cutter.push("more") == ("", True)
    assert cutter.flush() == ""


def test_a_false_beginning_is_given_back():
    cutter = StopStrings(("aab",))
    assert cutter.push("xa") == ("x", False)
    assert cutter.push("aa") == ("a", False)  # "aa" is still a beginning, the first a no longer
    assert cutter.push("c") == ("aac", False)
    assert cutter.push("a") == ("", False)
    assert cutter.flush() == "a" and cutter.flush() == ""


def test_no_stop_strings_hold_nothing_back():
    assert StopStrings(()).push("anything") == ("anything", False)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.text("ab", max_size=4), max_size=8),
)
def test_the_result_does_not_depend_on_the_pieces(stop, pieces):
    text = "".join(pieces)
    # oracle: the shortest beginning of the text that ends with a stop string
    ends = [n for n in range(len(text) + 1) if any(text[:n].endswith(s) for s in stop)]
    if ends:
        done = text[: ends[0]]
        want = min((done.removesuffix(s) for s in stop if done.endswith(s)), key=len), True
    else:
        want = text, False
    assert run(stop, pieces) == want
    assert run(stop, text) == want  # letter by letter
    assert run(stop, [text]) == want


def test_text_that_cannot_stop_is_emitted_at_once():
    counts = Counter(len(StopStrings(("zq",)).push(piece)[0]) for piece in ("hello", "world"))
    assert counts == {5: 2}
