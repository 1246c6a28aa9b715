"""`edgevl run --draw-boxes`: the place is looked at before the model is opened, and written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import Pair
from PIL import Image

from edgevl.runtime import cli, run_options
from edgevl.runtime.errors import InputError
from edgevl.runtime.generation import VisionLanguageModel
from edgevl.runtime.grounding import Box
from edgevl.runtime.results import Completion, Timings, Usage


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.new("RGB", (112, 84), (90, 120, 200)).save(path)
    return path


def boxes(*images: int) -> Completion:
    found = tuple(Box("shape", 10, 10, 60, 60, image) for image in images)
    return Completion("", (), found, "stop", Usage(1, 1, 0, 1), Timings(0, 0, 0, 0, 0, 0))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("d.png", "d.png: a folder, expected the name of a picture"),
        ("", "the name of an output is empty"),
        ("no/out.png", "no such folder"),
        ("out.xyz", "no colour pictures are written with the suffix '.xyz'; expected a name such as out.png"),
        ("out", "the suffix ''"),
        ("out.xbm", "the suffix '.xbm'"),  # black and white
        ("out.psd", "the suffix '.psd'"),  # read only
    ],
)
def test_refused_before_the_model_is_opened(
    tiny: Pair,
    photo: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    name: str,
    message: str,
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("opened")

    monkeypatch.setattr(VisionLanguageModel, "open", never)
    monkeypatch.chdir(photo.parent)
    Path("d.png").mkdir()
    assert cli.run(["run", str(tiny.bundle), "Where?", "--image", str(photo), "--draw-boxes", name]) == 2
    err = capfd.readouterr().err
    assert message in err and err.count("\n") == 1
    assert sorted(p.name for p in photo.parent.iterdir()) == ["d.png", "photo.png"]


def test_every_name_of_several_pictures_is_looked_at(photo: Path) -> None:
    (photo.parent / "out-2.png").mkdir()
    run_options.check_drawing([str(photo)], str(photo.parent / "out.png"))
    with pytest.raises(InputError, match=r"out-2\.png: a folder"):
        run_options.check_drawing([str(photo)] * 2, str(photo.parent / "out.png"))


@pytest.mark.parametrize("suffix", [".png", ".JPG", ".webp", ".ppm"])
def test_drawn_whole(photo: Path, suffix: str) -> None:
    run_options.draw([str(photo)], boxes(0), photo.parent / f"out{suffix}")
    run_options.draw([str(photo)] * 2, boxes(0, 1), photo.parent / f"two{suffix}")
    names = [f"out{suffix}", "photo.png", f"two-1{suffix}", f"two-2{suffix}"]
    assert sorted(p.name for p in photo.parent.iterdir()) == sorted(names)
    with Image.open(photo.parent / f"out{suffix}") as drawn, Image.open(photo) as plain:
        assert drawn.size == plain.size and not np.array_equal(np.asarray(drawn.convert("RGB")), np.asarray(plain))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("too large")])
def test_a_failure_leaves_nothing(photo: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(picture: Image.Image, path: Path, *_: object) -> None:
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(InputError, match=r"out\.png: cannot be written"):
        run_options.draw([str(photo)], boxes(0), photo.parent / "out.png")
    (photo.parent / "d.png").mkdir()
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"d\.png: cannot be written"):
        run_options.draw([str(photo)], boxes(0), photo.parent / "d.png")
    assert sorted(p.name for p in photo.parent.iterdir()) == ["d.png", "photo.png"]
