"""Features kept by content: what must hit, what must not, and the limit."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Pair
from PIL import Image

from edgevl.runtime.errors import InputError
from edgevl.runtime.generation import VisionLanguageModel
from edgevl.runtime.image_cache import ImageCache, cached_rows, content_key, picture_key
from edgevl.runtime.image_processing import ImageProcessorConfig
from edgevl.runtime.kv_cache import CacheView


def picture(seed: int, width: int = 84, height: int = 112) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


class Counted:
    """The engine's vision graph, counting the frame groups that go through it."""

    def __init__(self, graph: Any) -> None:
        self._graph, self.spec, self.groups = graph, graph.spec, 0

    def run(self, feeds: Mapping[str, np.ndarray], cache: CacheView | None = None) -> dict[str, np.ndarray]:
        self.groups += len(feeds["patches"])
        return self._graph.run(feeds, cache)


@pytest.fixture
def counted(tiny: Pair) -> Iterator[tuple[VisionLanguageModel, Counted]]:
    with tiny.open() as model:
        graph = Counted(model.engine.vision)
        model._vision._graph = graph
        yield model, graph


def test_the_same_content_is_encoded_once(counted: tuple[VisionLanguageModel, Counted], tmp_path: Path) -> None:
    model, graph = counted
    first = model.encode_image(picture(1))
    assert graph.groups == 1 and not first.cached and first.vision_s > 0
    picture(1).save(tmp_path / "a.png")
    file = io.BytesIO()
    picture(1).save(file, "BMP")
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), np.asarray(picture(1)), file.getvalue()):
        again = model.encode_image(source)
        assert again.cached and again.key == first.key and np.array_equal(again.embeds, first.embeds)
        assert (again.grid, again.resized_size) == (first.grid, first.resized_size) and again.preprocess_s > 0
    assert graph.groups == 1


def test_an_overwritten_file_gives_new_features(counted: tuple[VisionLanguageModel, Counted], tmp_path: Path) -> None:
    model, graph = counted
    path = tmp_path / "frame.png"
    for seed in (1, 2):
        picture(seed).save(path)
        found = model.encode_image(path)
        assert not found.cached
        with_none = model._vision.run(model._vision.preprocess(_item(picture(seed))))
        assert np.array_equal(found.embeds, with_none)
    assert graph.groups == 4


def _item(source: Any, **options: Any) -> Any:
    from edgevl.runtime.prompt import VisionInput

    return VisionInput("image", source, options)


def test_what_changes_the_features_changes_the_key(counted: tuple[VisionLanguageModel, Counted]) -> None:
    model, _ = counted
    base = picture(1, 112, 112)
    keys = {model.encode_image(base).key}
    dot = np.asarray(base).copy()
    dot[50, 50, 1] ^= 1
    keys.add(model.encode_image(dot).key)  # one bit of one pixel
    keys.add(model.encode_image(base, max_pixels=84 * 84).key)  # another size
    keys.add(model.encode_image(base.transpose(Image.Transpose.ROTATE_90)).key)
    upright = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned before it is looked at
    base.save(upright, "PNG", exif=exif)
    keys.add(model.encode_image(upright.getvalue()).key)
    keys.add(model.encode_video([base]).key)  # the same pixels, but other tokens stand for them
    assert len(keys) == 6
    # other limits, the same size: nothing new
    assert model.encode_image(base, max_pixels=112 * 112).cached
    assert model.encode_image(base.convert("RGBA")).cached  # opaque: alpha changes nothing
    config = model._vision._processor
    grey = replace(config, image_mean=(0.5, 0.5, 0.5))
    assert picture_key(base, grey, (112, 112)) != picture_key(base, config, (112, 112))


def test_a_window_of_frames_encodes_what_is_new(counted: tuple[VisionLanguageModel, Counted]) -> None:
    model, graph = counted
    frames = [picture(s, 84, 56) for s in range(8)]
    model.encode_video(frames[:6])
    assert graph.groups == 3
    moved = model.encode_video(frames[2:8])
    assert graph.groups == 4 and not moved.cached
    plain = model._vision.run(model._vision.preprocess(replace(_item(frames[2:8]), kind="video")))
    np.testing.assert_allclose(moved.embeds, plain, atol=1e-5)
    assert model.encode_video(frames[2:8]).cached
    still = model.encode_video([frames[0]] * 6)  # equal groups within one video
    assert graph.groups == 7 + 1 + 0 and len(still.embeds) == 3 * 6


def test_a_video_beyond_the_limit_leaves_the_pictures_alone(tiny: Pair) -> None:
    tokens = 12 * 64 * 4  # bytes of one picture
    with tiny.open(image_cache_mb=3 * tokens / 1e6) as model:
        model.encode_image(picture(1))
        model.encode_video([picture(s) for s in range(10, 20)])
        assert model.encode_image(picture(1)).cached and len(model.image_cache) == 1


def test_least_recently_used_goes_first(tiny: Pair) -> None:
    tokens = 12 * 64 * 4
    with tiny.open(image_cache_mb=2 * tokens / 1e6) as model:
        for seed, hit in ((1, False), (2, False), (1, True), (3, False), (1, True), (2, False), (3, False)):
            assert model.encode_image(picture(seed)).cached is hit, seed
            assert model.image_cache.nbytes <= 2 * tokens
        assert len(model.image_cache) == 2 and model.image_cache.hits == 2 and model.image_cache.misses == 5
        model.image_cache.clear()
        assert model.image_cache.nbytes == 0 and not model.encode_image(picture(1)).cached


def test_off(tiny: Pair) -> None:
    with tiny.open(image_cache_mb=0) as model:
        assert not model.encode_image(picture(1)).cached and not model.encode_image(picture(1)).cached
        assert not model.encode_video([picture(1)] * 2).cached and len(model.image_cache) == 0


def test_features_cannot_be_written_to(tiny: Pair) -> None:
    with tiny.open() as model:
        for encoded in (
            model.encode_image(picture(1)),
            model.encode_image(picture(1)),
            model.encode_video([picture(1)]),
        ):
            with pytest.raises(ValueError, match="read-only"):
                np.asarray(encoded.embeds)[0, 0] = 0


def test_usage_counts_hits(tiny: Pair) -> None:
    def ask(*seeds: int) -> list[dict[str, Any]]:
        items = [{"type": "image", "image": picture(s)} for s in seeds]
        return [{"role": "user", "content": [*items, {"type": "text", "text": "Read."}]}]

    with tiny.open() as model:
        first = model.generate(ask(1, 2, 1), max_new_tokens=2)
        assert (first.usage.images, first.usage.cached_images) == (3, 1)
        again = model.generate(ask(2, 3), max_new_tokens=2)
        assert (again.usage.images, again.usage.cached_images) == (2, 1)
        encoded = model.encode_image(picture(9))
        passed = model.generate([{"role": "user", "content": [{"type": "image", "image": encoded}]}], max_new_tokens=2)
        assert passed.usage.cached_images == 1 and passed.timings.vision_s == 0 == passed.timings.preprocess_s
        batch = model.generate_batch([ask(20), ask(20), ask(20)], max_new_tokens=2)
        assert [b.usage.cached_images for b in batch] == [0, 1, 1]


def test_cached_rows_keeps_slices_apart() -> None:
    cache, asked = ImageCache(1000), []

    def encode(indices: list[int]) -> np.ndarray:
        asked.append(indices)
        return np.array([[[float(i)]] for i in indices], np.float32)

    rows, hits = cached_rows(cache, ["a", "b", "a"], encode)
    assert rows.tolist() == [[0], [1], [0]] and hits == 0 and asked == [[0, 1]]
    rows, hits = cached_rows(cache, ["c", "b", "c", "a"], encode)
    assert rows.tolist() == [[0], [1], [0], [0]] and hits == 2 and asked[1] == [0]
    assert cache.nbytes == 3 * 4  # copies, not views of the call's whole result
    kept = cache.get("a")
    assert isinstance(kept, np.ndarray) and kept.base is None


def test_keys_take_shape_and_settings_into_account() -> None:
    values = np.arange(12, dtype=np.uint8)
    keys = {content_key(values), content_key(values.reshape(3, 4)), content_key(values, 1), content_key(values * 2)}
    keys |= {content_key(values.view(np.int8)), content_key(values.reshape(3, 4).T)}
    assert len(keys) == 6 and content_key(values[::-1]) == content_key(values[::-1].copy())


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf")])
def test_bad_limits(tiny: Pair, value: float) -> None:
    for name in ("image_cache_mb", "prefix_cache_mb"):
        with pytest.raises(InputError, match=rf"{name} is .*expected 0 \(off\)"):
            tiny.open(**{name: value})
    with pytest.raises(InputError, match="image cache is -1 bytes"):
        ImageCache(-1)


def test_settings_in_the_key_are_those_that_matter() -> None:
    """A new field of the processor's config must be put into the key, or be known not to change the features."""
    config = ImageProcessorConfig.from_folder(Path(__file__).parent.parent / "demo" / "model")
    size_only = {"min_pixels", "max_pixels"}  # they are in the resized size
    changed = {
        name: value * 2 if isinstance(value, (int, float)) else tuple(2 * v for v in value)
        for name, value in vars(config).items()
    }
    base = picture_key(picture(1), config, (84, 112))
    for name, value in changed.items():
        same = picture_key(picture(1), replace(config, **{name: value}), (84, 112)) == base
        assert same == (name in size_only), name
