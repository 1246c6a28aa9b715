"""runtime/profile.py and ttft.py: the fit on synthetic machines, the file, the solution and what is refused."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import DEMO
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from edgevl.benchmarks.profile import measure_profile
from edgevl.export.exporter import ExportOptions, export_bundle
from edgevl.runtime import cli
from edgevl.runtime.bundle import Bundle
from edgevl.runtime.errors import InputError
from edgevl.runtime.generation import VisionLanguageModel
from edgevl.runtime.profile import Machine, Profile, bundle_id, fit, profile_path
from edgevl.runtime.ttft import machine_of, parse_seconds

HERE = Machine("a processor", "ort-cpu", 2, "1.0")


def synthetic(bundle: Bundle, machine: Machine = HERE, speed: float = 1.0, noise: float = 0.0) -> Profile:
    """A machine whose costs are known: `cost` below."""
    rng = np.random.default_rng(0)

    def wobble() -> float:
        return speed * float(np.exp(rng.normal(0, noise)))

    picture = [(s * r, r, cost_picture(s * r, r) * wobble()) for r in (10_000, 50_000, 100_000) for s in (1, 4)]
    vision = [(n, cost_vision(n) * wobble()) for n in (64, 128, 256, 400, 512)]
    prefill = [(n, cost_prefill(n) * wobble()) for n in (16, 64, 128, 256, 384)]
    return Profile(bundle_id(bundle), machine, tuple(picture), tuple(vision), tuple(prefill))


SLOW = 100.0  # the real time that loading takes counts too: on so slow a machine it is nothing


def cost_picture(source: float, resized: float) -> float:
    return 1e-3 + 2e-9 * source + 1e-8 * resized


def cost_vision(patches: float) -> float:
    return 2e-3 + 4e-4 * patches + 5e-7 * patches**2


def cost_prefill(tokens: float) -> float:
    return 5e-3 + 1e-3 * tokens + 2e-7 * tokens**2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profile") / "bundle"
    export_bundle(DEMO, path, ExportOptions(precision="fp32"))
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[VisionLanguageModel]:
    with VisionLanguageModel.open(folder, "ort-cpu", threads=1) as opened:
        yield opened


# --------------------------------------------------------------------------------------------------- the fit


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from([0.0, 1e-6, 1e-3, 1.0, 30.0]), min_size=3, max_size=3).filter(any))
def test_exact_costs_come_back(costs: list[float]) -> None:
    n = np.array([16, 100, 400, 900, 1600.0])
    columns = np.stack([np.ones(5), n, n**2], axis=1)
    seconds = columns @ costs
    assert columns @ fit(columns, seconds.tolist()) == pytest.approx(seconds, rel=1e-6)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.floats(1e-3, 10), min_size=5, max_size=5))
def test_costs_are_never_negative_and_no_feasible_ones_are_better(seconds: list[float]) -> None:
    n = np.array([1, 2, 3, 4, 5.0])
    columns = np.stack([np.ones(5), n, n**2], axis=1)
    found = fit(columns, seconds)
    assert (found >= 0).all()

    def error(c: np.ndarray) -> float:
        return float(((columns @ c / seconds - 1) ** 2).sum())

    rng = np.random.default_rng(0)
    for scale in (1e-3, 1e-2, 0.1):
        for _ in range(40):
            assert error(found) <= error(np.maximum(0, found + rng.normal(0, scale, 3))) + 1e-9


def test_the_quadratic_term_is_found_outside_the_points(model: VisionLanguageModel) -> None:
    exact, noisy = synthetic(model.bundle), synthetic(model.bundle, noise=0.03)
    for patches in (64, 300, 2000):
        assert exact.seconds("vision", patches) == pytest.approx(cost_vision(patches), rel=1e-6)
        assert noisy.seconds("vision", patches) == pytest.approx(cost_vision(patches), rel=0.15)
    assert exact.seconds("prefill", 999) == pytest.approx(cost_prefill(999), rel=1e-6)
    assert exact.seconds("picture", 77_777, 7_777) == pytest.approx(cost_picture(77_777, 7_777), rel=1e-6)


# --------------------------------------------------------------------------------------------------- the solution


def ask(*pictures: Any, **options: Any) -> list[dict[str, Any]]:
    items = [{"type": "image", "image": p, **options} for p in pictures]
    return [{"role": "user", "content": [*items, {"type": "text", "text": "Which?"}]}]


def promised(model: VisionLanguageModel, messages: list[dict[str, Any]]) -> float:
    """The true cost of a request on the synthetic machine, from what the model makes of it."""
    prompt = model.prepare(messages)
    total = cost_prefill(len(prompt.ids))
    for image in prompt.images:
        w, h = image.original_size
        total += cost_picture(w * h, image.resized_size[0] * image.resized_size[1]) + cost_vision(image.grid.patches)
    return SLOW * total


@pytest.mark.parametrize("budget", [12.0, 20.0, 35.0])
@pytest.mark.parametrize("sizes", [[(900, 600)], [(400, 300), (1200, 1100)], [(2000, 200)]])
def test_the_largest_pictures_within_the_budget(
    model: VisionLanguageModel, budget: float, sizes: list[tuple[int, int]]
) -> None:
    profile = synthetic(model.bundle, speed=SLOW)
    messages = ask(*(Image.new("RGB", s) for s in sizes))
    started = time.perf_counter()
    choice = model.choose_pixels(messages, budget, profile, started)
    spent = time.perf_counter() - started  # loading counts
    assert choice.predicted_s <= budget
    cost = promised(model, choice.messages)
    assert cost <= choice.predicted_s <= cost + spent + 1e-9
    # One more row or column of tiles would be too much, or the pictures are whole.
    more = [dict(m) for m in choice.messages]
    more[0] = {**more[0], "content": [i | {"max_pixels": round(choice.max_pixels * 1.3)} if "image" in i else i
                                      for i in more[0]["content"]]}  # fmt: skip
    whole = choice.max_pixels >= model.bundle.image_processor.max_pixels
    assert whole or promised(model, more) > budget - spent - 2


def test_a_generous_budget_enlarges_nothing(model: VisionLanguageModel) -> None:
    messages = ask(Image.new("RGB", (140, 112)))
    choice = model.choose_pixels(messages, 60.0, synthetic(model.bundle))
    assert [i.resized_size for i in model.prepare(choice.messages).images] == [(140, 112)]


def test_limits_of_the_message_hold(model: VisionLanguageModel) -> None:
    messages = ask(Image.new("RGB", (600, 600)), max_pixels=28 * 28 * 9, min_pixels=28 * 28 * 4)
    choice = model.choose_pixels(messages, 60.0, synthetic(model.bundle))
    assert [i.resized_size for i in model.prepare(choice.messages).images] == [(84, 84)]
    assert messages[0]["content"][0]["max_pixels"] == 28 * 28 * 9  # the caller's own are untouched


def test_explicit_sizes_of_the_message_stay(model: VisionLanguageModel) -> None:
    """Beyond the checkpoint's own limit too; the other picture keeps to that."""
    sized = {"resized_height": 364, "resized_width": 336}
    most = model.bundle.image_processor.max_pixels
    assert most < 364 * 336
    both = [{"type": "image", "image": Image.new("RGB", (600, 600)), **o} for o in (sized, {})]
    messages = [{"role": "user", "content": [*both, {"type": "text", "text": "Read the text."}]}]
    choice = model.choose_pixels(messages, 60.0, synthetic(model.bundle))
    first, second = (i.resized_size for i in model.prepare(choice.messages).images)
    assert first == (336, 364) and second[0] * second[1] <= most == choice.max_pixels
    with pytest.raises(InputError, match="cannot be met"):  # it cannot shrink
        model.choose_pixels(messages[:1], 0.02, synthetic(model.bundle, speed=SLOW))


def test_encoded_pictures_cost_their_tokens_only(model: VisionLanguageModel) -> None:
    picture = model.encode_image(Image.new("RGB", (280, 280)))
    choice = model.choose_pixels(ask(picture), 60.0, synthetic(model.bundle))
    tokens = len(model.prepare(ask(picture)).ids)
    assert choice.predicted_s == pytest.approx(cost_prefill(tokens), abs=0.05)


def test_generate_takes_the_budget(model: VisionLanguageModel, tmp_path: Path) -> None:
    profile = synthetic(model.bundle, machine_of(model.engine), speed=SLOW)
    profile.save(tmp_path / "p.json")
    messages = ask(Image.new("RGB", (600, 600)))
    small = model.generate(messages, ttft_budget_s=12, profile=tmp_path / "p.json", max_new_tokens=2)
    same = model.generate(messages, ttft_budget_s=12, profile=profile, max_new_tokens=2)
    large = model.generate(messages, max_new_tokens=2)
    assert 0 < small.usage.image_tokens < large.usage.image_tokens
    assert abs(same.usage.image_tokens - small.usage.image_tokens) <= 15  # at most a row of tiles: loading took longer


# --------------------------------------------------------------------------------------------------- the file


def test_a_profile_comes_back_from_its_file(model: VisionLanguageModel, tmp_path: Path) -> None:
    profile = synthetic(model.bundle)
    path = tmp_path / "deep" / "p.json"
    profile.save(path)
    assert Profile.load(path, model.bundle, HERE) == profile
    assert [p.name for p in path.parent.iterdir()] == ["p.json"]


def test_where_it_is_kept(model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    monkeypatch.delenv("EDGEVL_CACHE", raising=False)
    path = profile_path(model.bundle, HERE)
    assert path.parent == tmp_path / "x" / "edgevl" / "profiles"
    monkeypatch.setenv("EDGEVL_CACHE", str(tmp_path / "own"))
    assert profile_path(model.bundle, HERE) == tmp_path / "own" / "profiles" / path.name
    for change in ({"threads": 3}, {"processor": "x"}, {"engine": "ort-cuda"}, {"onnxruntime": "2"}):
        assert profile_path(model.bundle, dataclasses.replace(HERE, **change)).name != path.name


def test_the_identity_of_a_bundle_is_that_of_its_graphs(model: VisionLanguageModel) -> None:
    files = dict(model.bundle.files)
    name = next(n for n in files if n.endswith(".onnx.data"))
    changed = files | {name: dataclasses.replace(files[name], sha256="0" * 64)}
    assert bundle_id(dataclasses.replace(model.bundle, files=changed)) != bundle_id(model.bundle)
    golden = files | {"golden/x.safetensors": files[name]}
    assert bundle_id(dataclasses.replace(model.bundle, files=golden)) == bundle_id(model.bundle)


SPOILED: dict[str, tuple[dict[str, Any], str]] = {
    "schema": ({"schema_version": 2}, "schema version 2, this edgevl reads 1"),
    "bundle": ({"bundle": "other"}, "measured with another bundle"),
    "threads": ({"machine": {**dataclasses.asdict(HERE), "threads": 4}}, "measured with threads 4, this is 2"),
    "version": ({"machine": {**dataclasses.asdict(HERE), "onnxruntime": "9"}}, "measured with onnxruntime 9"),
    "points": ({"vision": [[1, 2], [2, 3]]}, "at least three points"),
    "numbers": ({"prefill": [[1, 2], [2, 3], [3, -1]]}, "positive numbers"),
    "shape": ({"picture": [[1, 2], [2, 3], [3, 4]]}, "three points of 3"),
    "machine": ({"machine": {"cpu": 1}}, "malformed"),
    "absent": ({"vision": None}, "malformed"),
}


@pytest.mark.parametrize("what", SPOILED)
def test_a_profile_that_cannot_be_used(model: VisionLanguageModel, tmp_path: Path, what: str) -> None:
    synthetic(model.bundle).save(tmp_path / "p.json")
    change, message = SPOILED[what]
    data = json.loads((tmp_path / "p.json").read_text()) | change
    (tmp_path / "p.json").write_text(json.dumps(data))
    with pytest.raises(InputError) as caught:
        Profile.load(tmp_path / "p.json", model.bundle, HERE)
    assert message in str(caught.value) and "python -m edgevl.benchmarks.profile" in str(caught.value)


def test_no_profile_and_no_json(model: VisionLanguageModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no profile of this bundle on this machine; measure one: python -m"):
        model.generate(ask(Image.new("RGB", (99, 99))), ttft_budget_s=1.0, profile=tmp_path / "none.json")
    (tmp_path / "p.json").write_text("{")
    with pytest.raises(InputError, match="not readable as JSON"):
        Profile.load(tmp_path / "p.json", model.bundle, HERE)


# --------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("budget", [0, -1.0, float("nan"), float("inf"), "800ms", True])
def test_budgets_that_are_none(model: VisionLanguageModel, budget: Any) -> None:
    with pytest.raises(InputError, match="expected seconds above 0"):
        model.choose_pixels(ask(Image.new("RGB", (99, 99))), budget, synthetic(model.bundle))


def test_a_budget_needs_pictures_and_enough_time(model: VisionLanguageModel) -> None:
    profile = synthetic(model.bundle)
    with pytest.raises(InputError, match="the messages have none: set max_pixels"):
        model.choose_pixels([{"role": "user", "content": "x"}], 1.0, profile)
    frames = [Image.new("RGB", (56, 56))] * 2
    video = [{"role": "user", "content": [{"type": "video", "video": frames}, {"type": "text", "text": "x"}]}]
    with pytest.raises(InputError, match="the messages have a video"):
        model.choose_pixels(video, 1.0, profile)
    with pytest.raises(InputError, match=r"20 ms cannot be met: with pictures of \d+ pixels, the smallest, it is \d+"):
        model.choose_pixels(ask(Image.new("RGB", (600, 600))), 0.02, profile)


@pytest.mark.parametrize(("text", "seconds"), [("800ms", 0.8), ("1.5s", 1.5), ("2", 2.0), (" 3 s ", 3.0)])
def test_durations(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "fast", "0ms", "-1s", "1m", "1e3"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(InputError, match="expected one such as 800ms"):
        parse_seconds(text)


# --------------------------------------------------------------------------------------------------- measured


def test_a_measured_profile_is_complete_and_used_by_the_command(
    model: VisionLanguageModel, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """No time is asserted, only that the whole way from measuring to choosing works."""
    profile = measure_profile(model, max_pixels=40_000, repeats=1)
    assert len(profile.vision) >= 4 and len(profile.prefill) >= 4 and len(profile.picture) >= 12
    assert profile.machine == machine_of(model.engine) and profile.seconds("vision", 100) > 0
    monkeypatch.setenv("EDGEVL_CACHE", str(tmp_path))
    profile.save(profile_path(model.bundle, profile.machine))
    Image.new("RGB", (800, 500), "red").save(tmp_path / "a.png")
    base = ["run", str(folder), "What?", "--image", str(tmp_path / "a.png"), "--engine", "ort-cpu", "--threads", "1"]
    assert cli.run([*base, "--ttft-budget", "30s"]) == 0
    assert "first token expected after" in capsys.readouterr().err
    assert cli.run([*base, "--ttft-budget", "0.0001ms"]) == 2
    assert "cannot be met" in capsys.readouterr().err
    assert cli.run([*base, "--ttft-budget", "30s", "--profile", str(tmp_path / "none")]) == 2
    assert "no profile of this bundle" in capsys.readouterr().err


def test_too_few_sizes_to_measure(model: VisionLanguageModel) -> None:
    with pytest.raises(InputError, match="too few sizes"):
        measure_profile(model, max_pixels=784, repeats=1)
