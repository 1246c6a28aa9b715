"""runtime/video_reading.py: every kind of source gives the right frames, every damaged one an error or a note."""

from __future__ import annotations

import base64
import os
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from videos import frame, number_of, write_video

from edgevl.runtime.errors import EngineError, InputError
from edgevl.runtime.image_loading import load_image
from edgevl.runtime.video_reading import list_pictures, open_video


def numbers(source: Any, indices: list[int]) -> list[int]:
    with open_video(source) as video:
        return [number_of(p) for p in video.read(indices)]


CONTAINERS = [
    ("a.mp4", "libx264"),
    ("a.mkv", "libx264"),
    ("a.mov", "mpeg4"),
    ("a.avi", "mpeg4"),
    ("a.webm", "libvpx"),
    ("a.ts", "mpeg2video"),
    ("a.h264", "libx264"),  # no container: no times and no index
]


@pytest.mark.parametrize(("name", "codec"), CONTAINERS)
def test_the_right_frames_of_every_container(tmp_path: Path, name: str, codec: str) -> None:
    path = write_video(tmp_path / name, 90, fps=10 if codec != "mpeg2video" else 25, codec=codec)
    fps = 25 if name in ("a.ts", "a.h264") else 10
    with open_video(path) as video:
        assert len(video) == 90 and video.constant and video.size == (96, 64) and not video.notes
        assert video.fps == pytest.approx(fps) and video.times[-1] == pytest.approx(89 / fps, abs=2e-3)
        assert video.duration == pytest.approx(90 / fps)
        for indices in ([0, 1, 2], [0, 89], [31, 31, 32, 75], [88], list(range(90))):
            assert [number_of(p) for p in video.read(indices)] == [i % 16 for i in indices], indices
        assert not video.notes


def test_jumping_gives_the_same_pictures_as_decoding_everything(tmp_path: Path) -> None:
    """Frames with content that depends on all before them, B-frames, keyframes 60 apart."""
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, (64, 96, 3), dtype=np.uint8) // 4 + frame(i)[..., :] // 2 for i in range(400)]
    for name in ("a.mp4", "a.mkv"):
        path = write_video(tmp_path / name, frames, gop=60)
        with av.open(str(path)) as container:
            every = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
        with open_video(path) as video:
            for indices in ([0, 200, 399], [119, 120, 121, 359], [61, 62, 301]):
                for index, picture in zip(indices, video.read(indices)):
                    np.testing.assert_array_equal(np.asarray(picture), every[index])


def test_varying_rate(tmp_path: Path) -> None:
    times = [0, 100, 200, 5000, 5100, 5200, 9000, 9100, 9200, 9300]
    for name in ("a.mp4", "a.mkv"):
        with open_video(write_video(tmp_path / name, 10, times_ms=times)) as video:
            assert not video.constant and video.times == pytest.approx([t / 1000 for t in times], abs=2e-3)
            assert [number_of(p) for p in video.read([0, 3, 9])] == [0, 3, 9]
            assert video.duration == pytest.approx(9.4, abs=0.01)


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_rotation_metadata_turns_frames_upright(tmp_path: Path, rotation: int) -> None:
    """The left half is dark: where it goes tells the turn. FFmpeg's angle is counterclockwise."""
    with open_video(write_video(tmp_path / "a.mp4", 4, rotation=rotation)) as video:
        [picture] = video.read([2])
        assert video.size == picture.size == ((64, 96) if rotation != 180 else (96, 64))
    grey = np.asarray(picture.convert("L"), np.float32)
    h, w = grey.shape
    halves = {"left": grey[:, : w // 2], "right": grey[:, w // 2 :], "top": grey[: h // 2], "bottom": grey[h // 2 :]}
    assert min(halves, key=lambda k: halves[k].mean()) == {90: "bottom", 180: "right", -90: "top"}[rotation]


def pictures(count: int, size: tuple[int, int] = (96, 64)) -> list[Image.Image]:
    return [Image.fromarray(frame(i, size)) for i in range(count)]


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_animations_through_pillow(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)  # not needed for them
    path = tmp_path / f"a.{suffix}"
    frames = pictures(6)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=[100, 100, 400, 100, 100, 200], loop=0)
    with open_video(path) as video:
        assert len(video) == 6 and video.size == (96, 64) and not video.constant
        assert video.times == pytest.approx([0, 0.1, 0.2, 0.6, 0.7, 0.8]) and video.duration == pytest.approx(1.0)
        assert [number_of(p) for p in video.read([0, 2, 2, 5])] == [0, 2, 2, 5]
        assert all(p.mode == "RGB" for p in video.read([1]))


def test_transparent_animation_is_put_on_white(tmp_path: Path) -> None:
    path = tmp_path / "a.webp"
    clear = [Image.new("RGBA", (32, 32), (255, 0, 0, 0)), Image.new("RGBA", (32, 32), (0, 0, 255, 255))]
    clear[0].save(path, save_all=True, append_images=clear[1:], lossless=True)
    with open_video(path) as video:
        assert [p.getpixel((3, 3)) for p in video.read([0, 1])] == [(255, 255, 255), (0, 0, 255)]


def test_lists_arrays_folders_bytes_and_urls(tmp_path: Path) -> None:
    frames = pictures(3)
    array = np.stack([np.asarray(f) for f in frames])
    for i, f in enumerate(frames):
        f.save(tmp_path / f"frame{i * 9}.png")  # 0, 9, 18: by value, not by letter
    (tmp_path / "notes.txt").write_text("not a frame")
    (tmp_path / ".frame1.png").write_text("half written")
    assert [p.name for p in list_pictures(tmp_path)] == ["frame0.png", "frame9.png", "frame18.png"]
    for source in (
        frames,
        tuple(frames),
        array,
        tmp_path,
        str(tmp_path),
        f"file://{tmp_path}",
        list_pictures(tmp_path),
    ):
        with open_video(source, sample_fps=4) as video:
            assert video.whole and video.fps == 4 and video.times.tolist() == [0, 0.25, 0.5]
            for index, picture in enumerate(video.read([0, 1, 2])):
                np.testing.assert_array_equal(np.asarray(picture), array[index])
    data = write_video(tmp_path / "a.mp4", 20).read_bytes()
    url = "data:video/mp4;base64," + base64.b64encode(data).decode()
    for source in (data, bytearray(data), url, f"file://{tmp_path}/a.mp4"):
        assert numbers(source, [0, 7, 19]) == [0, 7, 3]


def cut(path: Path, share: float) -> Path:
    data = path.read_bytes()
    out = path.with_name(f"cut-{path.name}")
    out.write_bytes(data[: int(len(data) * share)])
    return out


def test_truncated_files_give_what_is_there_with_a_note(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    frames = [frame(i) // 2 + rng.integers(0, 100, (64, 96, 3), dtype=np.uint8) for i in range(100)]
    for name, codec in (("a.mkv", "libx264"), ("a.avi", "mpeg4"), ("a.mp4", "libx264")):
        whole = write_video(tmp_path / name, frames, codec=codec, movflags="faststart" if name == "a.mp4" else "")
        with open_video(cut(whole, 0.6)) as video:
            assert 10 < len(video) < 95 and any("cut short" in note for note in video.notes), video.notes
            last = len(video) - 1
            got = list(video.read([0, last // 2, last]))  # the last packet itself may be cut
        with open_video(whole) as video:
            for ours, theirs in zip(got[:2], video.read([0, last // 2])):
                np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


def test_damage_in_the_middle_is_said(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 60, gop=10)
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packets = [p for p in container.demux(video=0) if p.size]
        for packet in packets[20:30]:
            assert packet.pos is not None
            data[packet.pos : packet.pos + packet.size] = b"\x55" * packet.size
    path.write_bytes(data)
    with open_video(path) as video:
        got = [number_of(p) for p in video.read([0, 24, 25, 59])]
        assert got[0] == 0 and got[3] == 59 % 16
        assert video.notes == ["damaged: 2 frames could not be decoded, their neighbours stand for them"]


def test_truncated_gif(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)) for i in range(8)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=100)
    with open_video(cut(tmp_path / "a.gif", 0.5)) as video:
        assert 1 < len(video) < 8 and len(list(video.read([0, len(video) - 1]))) == 2


def test_frames_are_decoded_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Any] = []
    monkeypatch.setattr(
        "edgevl.runtime.video_reading.load_image", lambda source: loaded.append(source) or load_image(source)
    )
    with open_video(pictures(50)) as video:
        reader = video.read(range(50))
        next(reader)
        next(reader)
    assert len(loaded) == 3  # the first one for its size


def test_a_frame_that_is_gone_when_its_turn_comes(tmp_path: Path) -> None:
    for i, f in enumerate(pictures(4)):
        f.save(tmp_path / f"{i}.png")
    with open_video(tmp_path) as video:
        reader = video.read([0, 1, 2])
        next(reader)
        (tmp_path / "1.png").unlink()
        with pytest.raises(InputError, match=r"1\.png.*not found"):
            next(reader)


def bad_sources(folder: Path) -> dict[str, tuple[Any, str]]:
    empty, text, still = folder / "empty.mp4", folder / "text.mp4", folder / "still.jpg"
    empty.touch()
    text.write_text("hello " * 100)
    Image.new("RGB", (32, 32)).save(still)
    (folder / "nothing").mkdir()
    Image.new("RGB", (32, 32)).save(folder / "one.png")
    whole = write_video(folder / "a.mp4", 30)
    avi = write_video(folder / "a.avi", 30, codec="mpeg4").read_bytes()
    (folder / "codec.avi").write_bytes(avi.replace(b"FMP4", b"XYZ0"))
    with av.open(str(folder / "audio.mp4"), "w") as container:
        sound: Any = container.add_stream("aac", rate=16000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 16000
        container.mux(sound.encode(silence))
        container.mux(sound.encode())
    # a header that announces a picture track, without one packet
    with av.open(str(folder / "none.mp4"), "w", options={"movflags": "frag_keyframe+empty_moov"}) as container:
        stream: Any = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        container.start_encoding()
    return {
        "absent": (folder / "absent.mp4", "not found; check the path of the video"),
        "empty": (empty, "the file is empty; expected a video"),
        "text": (text, "not a video, or cut off in its header"),
        "still": (still, "is a JPEG picture, not a video; pass it as a picture"),
        "one png": (folder / "one.png", "is a PNG picture"),
        "empty folder": (folder / "nothing", "a video has no frames"),
        "empty list": ([], "a video has no frames"),
        "no index": (cut(whole, 0.7), "no video stream in it"),
        "codec": (folder / "codec.avi", "no decoder for its codec.*ffmpeg -i IN"),
        "audio": (folder / "audio.mp4", r"no video stream in it \(audio only\)"),
        "no packets": (folder / "none.mp4", "the video has no frames"),
        "http": ("http://localhost/a.mp4", "edgevl fetches nothing; download it first"),
        "number": (7, "a video of type int; expected a file, a folder of frames or a list"),
        "flat array": (np.zeros((4, 4, 3), np.uint8), r"expected \[frames, height, width, 3\]"),
        "bad url": ("data:video/mp4;base64,####", "not valid base64"),
        "bytes": (b"\x00" * 100, "video of 100 bytes: not a video"),
    }


def test_bad_sources(tmp_path: Path) -> None:
    for name, (source, message) in bad_sources(tmp_path).items():
        with pytest.raises(InputError, match=message) as caught:
            open_video(source)
        assert "\n" not in str(caught.value), name


def test_frames_of_unequal_sizes() -> None:
    with (
        open_video([Image.new("RGB", (56, 56)), Image.new("RGB", (56, 84))]) as video,
        pytest.raises(InputError, match="frame 2 is 56×84 pixels, the first is 56×56"),
    ):
        list(video.read([0, 1]))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 4)
    path.chmod(0)
    with pytest.raises(InputError, match="Permission denied"):
        open_video(path)


def test_unreadable_reasons_come_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4", 4)

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match="Permission denied; make the file readable"):
        open_video(path)
    with pytest.raises(InputError, match=r"cannot be read .*null"):
        monkeypatch.undo()
        open_video("a\0b.mp4")


def test_without_pyav(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4", 4)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(EngineError, match=r"pip install 'edgevl\[video\]', or pass a folder of frames"):
        open_video(path)
