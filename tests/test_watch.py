"""runtime/watch*.py: the right frames are answered, none are queued, and it ends and reconnects as it should."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from conftest import Pair
from PIL import Image
from videos import frame, number_of, write_video

from edgevl.runtime import cli, watch_sources
from edgevl.runtime.errors import CapacityError, InputError
from edgevl.runtime.video_reading import open_video
from edgevl.runtime.watch import WatchOptions, _Latest, _live, change, signature, watch
from edgevl.runtime.watch_sources import FileSource, FolderSource, Frame, Source, StreamSource, open_source

PROMPT = "Read the text."
GENERATION = {"max_new_tokens": 3}


def answers(pair: Pair, source: Source, limit: int = 1000, notes: list[str] | None = None, **options: Any) -> list[Any]:
    wanted, stop = WatchOptions(PROMPT, generation=GENERATION, **options), threading.Event()
    with pair.open() as model:
        out = []
        for answer in watch(model, source, wanted, stop, (notes if notes is not None else []).append):
            out.append(answer)
            if len(out) == limit:
                break
        return out


def picture(number: int) -> Image.Image:
    return Image.fromarray(frame(number))


# ---------------------------------------------------------------- what changed


def test_change_is_that_of_the_block_that_differs_most() -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 256, (64, 64), dtype=np.uint8) for _ in range(2))
    most = max(
        sum(abs(int(a[y + i, x + j]) - int(b[y + i, x + j])) for i in range(8) for j in range(8)) / 64 / 255
        for y in range(0, 64, 8)
        for x in range(0, 64, 8)
    )
    got = change(signature(Image.fromarray(a)), signature(Image.fromarray(b)))
    assert got == pytest.approx(most, abs=1e-6)
    assert change(signature(Image.fromarray(a)), signature(Image.fromarray(a))) == 0


def test_a_small_thing_counts_and_noise_does_not() -> None:
    rng = np.random.default_rng(0)
    scene = np.full((480, 640, 3), 128, np.uint8)
    noisy = (scene + rng.integers(-12, 13, scene.shape)).astype(np.uint8)
    person = scene.copy()
    person[200:260, 300:330] = 30
    base = signature(Image.fromarray(scene))
    noise, moved = (change(base, signature(Image.fromarray(p))) for p in (noisy, person))
    assert noise < 0.01 and moved > 0.05 and np.abs(noisy.astype(float) - scene).mean() > np.abs(person - 128.0).mean()


# ---------------------------------------------------------------- files


def test_a_file_is_answered_at_every_tick(tiny: Pair, tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 95)
    got = answers(tiny, open_source(str(path), print, 2.0), every_s=2.0)
    assert [a.frame.time_s for a in got] == [0, 2, 4, 6, 8] and [a.number for a in got] == [0, 1, 2, 3, 4]
    with tiny.open() as model, open_video(path) as video:
        for answer, image in zip(got, video.read([0, 20, 40, 60, 80])):
            content = [{"type": "image", "image": image}, {"type": "text", "text": PROMPT}]
            expected = model.generate([{"role": "user", "content": content}], **GENERATION)
            assert answer.completion.token_ids == expected.token_ids
    assert all(a.frames == 1 and a.missed == 0 and a.size == (96, 64) for a in got)


def test_several_frames_make_a_video(tiny: Pair, tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 70)
    got = answers(tiny, open_source(str(path), print, 0.5), every_s=2.0, frames=4)
    assert [a.frames for a in got] == [4, 4, 4, 2] and [a.frame.time_s for a in got] == [1.5, 3.5, 5.5, 6.5]
    with tiny.open() as model, open_video(path) as video:
        seen = list(video.read([20, 25, 30, 35]))
        content = [{"type": "video", "video": seen}, {"type": "text", "text": PROMPT}]
        expected = model.generate([{"role": "user", "content": content}], **GENERATION)
    assert got[1].completion.token_ids == expected.token_ids and got[1].completion.videos[0].frames == 4


def test_unchanged_frames_are_skipped(tiny: Pair, tmp_path: Path) -> None:
    frames = [frame(1)] * 30 + [frame(9)] * 30
    path = write_video(tmp_path / "a.mp4", frames)
    got = answers(tiny, FileSource(path, 0.5), every_s=0.5, skip_unchanged=0.05)
    assert [(a.frame.time_s, a.skipped, a.received) for a in got] == [(0, 0, 1), (3, 5, 6)]
    assert len(answers(tiny, FileSource(path, 0.5), every_s=0.5)) == 12


# ---------------------------------------------------------------- folders


def test_a_folder_that_a_script_fills(tiny: Pair, tmp_path: Path) -> None:
    """In order, each once; a half-written picture is waited for, a removed one and a broken one are passed over."""
    picture(0).save(tmp_path / "f0.png")
    done = threading.Event()

    def script() -> None:
        data = {}
        for i in range(1, 6):
            picture(i).save(tmp_path / f".tmp{i}.png")
            data[i] = (tmp_path / f".tmp{i}.png").read_bytes()
        time.sleep(0.2)
        (tmp_path / "f1.png").write_bytes(data[1][: len(data[1]) // 2])  # slowly, in place
        (tmp_path / "f2.png").write_bytes(data[2])
        time.sleep(0.4)
        (tmp_path / "f1.png").write_bytes(data[1])
        (tmp_path / "f3.png").write_bytes(data[3])
        time.sleep(0.3)
        (tmp_path / "f3.png").write_bytes(data[4])  # overwritten: new content, new answer
        done.set()

    notes: list[str] = []
    thread = threading.Thread(target=script)
    thread.start()
    got = answers(tiny, FolderSource(tmp_path, notes.append, idle_s=1.5))
    thread.join()
    assert done.is_set()
    assert [(a.frame.name, number_of(a.frame.load())) for a in got] == [
        ("f0.png", 0),
        ("f1.png", 1),
        ("f2.png", 2),
        ("f3.png", 3),
        ("f3.png", 4),
    ]
    assert not notes


def test_a_broken_and_a_removed_picture_do_not_end_it(
    tiny: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch_sources, "_SETTLE_S", 0.3)
    picture(1).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    picture(2).save(tmp_path / "c.png")
    picture(3).save(tmp_path / "d.png")
    Image.new("RGB", (1000, 2)).save(tmp_path / "e.png")  # an aspect ratio that the model refuses
    load = watch_sources.load_image

    def vanishing(path: Path) -> Image.Image:
        if path.name == "c.png":
            path.unlink()
        return load(path)

    monkeypatch.setattr(watch_sources, "load_image", vanishing)
    notes: list[str] = []
    got = answers(tiny, FolderSource(tmp_path, notes.append, idle_s=0.3), notes=notes)
    assert [a.frame.name for a in got] == ["a.png", "d.png"]
    assert len(notes) == 3 and "b.png" in notes[0] and "damaged or truncated" in notes[0]
    assert notes[1] == "c.png: removed before it was read" and "aspect ratio" in notes[2]


def test_a_picture_without_memory_does_not_end_it(tiny: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program may have taken it for a moment."""
    for name in "abc":
        picture(ord(name)).save(tmp_path / f"{name}.png")
    left = iter([10**10, 10**10, 10**10, 1000])  # on opening, for the first's picture and prompt, the second's picture
    monkeypatch.setattr("edgevl.runtime.admission.available_bytes", lambda: next(left, 10**10))
    notes: list[str] = []
    got = answers(tiny, FolderSource(tmp_path, notes.append, idle_s=0.3), notes=notes)
    assert [a.frame.name for a in got] == ["a.png", "c.png"]
    assert len(notes) == 1 and "skipped: a picture of" in notes[0]


# ---------------------------------------------------------------- cameras


class Camera(Source):
    """Fifty frames while nobody looks, after the first was taken."""

    live = True

    def __init__(self) -> None:
        self.looked_away, self.sent = threading.Event(), threading.Event()

    def frames(self, stop: threading.Event) -> Iterator[Frame]:
        yield Frame(0, 0.0, time.time(), lambda: picture(0))
        self.looked_away.wait(30)
        for i in range(1, 51):
            yield Frame(i, i / 10, time.time(), lambda: picture(0))
        self.sent.set()
        stop.wait(30)


def test_the_latest_frame_is_taken_and_the_others_are_dropped() -> None:
    camera, got = Camera(), []
    for frames, came, late in _live(camera, WatchOptions(PROMPT, every_s=0.05), threading.Event()):
        got.append(([f.index for f in frames], came))
        if len(got) == 2:
            assert late >= 5
            break
        camera.looked_away.set()
        assert camera.sent.wait(30)
        time.sleep(0.26)  # five answers and more were due meanwhile
    assert got == [([0], 1), ([50], 50)]


class Metronome(Source):
    """A frame every 10 ms for a second."""

    live = True

    def frames(self, stop: threading.Event) -> Iterator[Frame]:
        began = time.monotonic()
        for i in range(100):
            if stop.wait(max(0.0, began + i / 100 - time.monotonic())):
                return
            yield Frame(i, i / 100, time.time(), lambda: picture(0))


def test_a_slow_beat_is_kept() -> None:
    """Every 300 ms, and what came after the last beat once the source has ended."""
    got = [f[-1].time_s for f, _, _ in _live(Metronome(), WatchOptions(PROMPT, every_s=0.3), threading.Event())]
    assert got[0] < 0.2 and 3 <= len(got) <= 5 and got[-1] == 0.99
    assert all(b - a > 0.15 for a, b in pairwise(got[:-1]))


def test_frames_of_one_answer_are_spread() -> None:
    latest = _Latest(3, 0.1)
    for i in range(100):
        latest.add(Frame(i, i / 100, 0.0, lambda: picture(0)))
    frames, came = latest.take(0)
    times = [f.time_s for f in frames]
    assert came == 100 and times[-1] == 0.99 and len(times) == 3 and times[1] - times[0] >= 0.1 - 1e-9
    assert latest.take(0) == ([], 0)


def serve(data: bytes, times: int) -> tuple[int, threading.Thread]:
    """A camera at a TCP port that breaks down after `data`, and comes back."""
    listener = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        with listener:
            for _ in range(times):
                connection, _ = listener.accept()
                with connection:
                    connection.sendall(data)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return listener.getsockname()[1], thread


def test_a_lost_stream_is_connected_again(tiny: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_sources, "_BACKOFF_S", (0.05, 0.1))
    data = write_video(tmp_path / "a.ts", 40, fps=25, codec="mpeg2video").read_bytes()
    port, _ = serve(data, 3)
    notes: list[str] = []
    source = StreamSource(f"tcp://127.0.0.1:{port}", notes.append, timeout_s=5, retries=2)
    with pytest.raises(InputError, match="lost, and not back after 2 retries"):
        answers(tiny, source, every_s=0.0, notes=notes)
    frames = [f.index for f in _frames_until_lost(data)]
    assert frames == list(range(80))
    assert sum("lost (it ended)" in note for note in notes) == 3 and "next try in 0.05 s" in notes[0]


def _frames_until_lost(data: bytes) -> list[Frame]:
    port, _ = serve(data, 2)
    out: list[Frame] = []
    with pytest.raises(InputError, match="not back after 1 retries"):
        for f in StreamSource(f"tcp://127.0.0.1:{port}", lambda _: None, 5, 1).frames(threading.Event()):
            out.append(f)
    assert number_of(out[7].load()) == number_of(out[47].load()) == 7
    return out


def test_an_rtsp_address_that_does_not_answer(tiny: Pair, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"rtsp://127.0.0.1:{silent.getsockname()[1]}/camera"
        began = time.monotonic()
        status = cli.run(["watch", str(tiny.bundle), PROMPT, "--source", url, "--timeout", "1s"])
        assert time.monotonic() - began < 20
    out, err = capfd.readouterr()
    assert status == 2 and out == "" and err.count("edgevl: error:") == 1
    assert f"{url}: no picture within 1 s" in err and "--timeout" in err
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"rtsp://127.0.0.1:{closed.getsockname()[1]}/camera"
    assert cli.run(["watch", str(tiny.bundle), PROMPT, "--source", url, "--timeout", "500ms"]) == 2
    assert "Connection refused" in capfd.readouterr().err


# ---------------------------------------------------------------- the command line


def start(pair: Pair, *arguments: object) -> subprocess.Popen[str]:
    common = [sys.executable, "-m", "edgevl.runtime", "watch", str(pair.bundle), PROMPT, "--max-new-tokens", "2"]
    command = [*common, "--threads", "1", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_json_lines(tiny: Pair, tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 40)
    process = start(tiny, "--source", path, "--every", "500ms", "--max-answers", 3, "--engine", "ort-cpu")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and err == "watch: 3 answers\n"
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["frame"]["time_s"] for line in lines] == [0, 0.5, 1.0]
    for line in lines:
        assert set(line) >= {"text", "boxes", "wall_time", "answered_at", "latency_s", "missed", "skipped", "timings"}
        assert line["wall_time"] < line["answered_at"] and line["wall_time"].endswith("+00:00")
        assert line["latency_s"] > 0 and line["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_signals_end_it_cleanly(tiny: Pair, tmp_path: Path, number: signal.Signals, status: int) -> None:
    picture(0).save(tmp_path / "a.png")
    process = start(tiny, "--source", tmp_path)
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())["frame"]["name"] == "a.png"
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == status and out == "" and err.endswith("watch: 1 answers\n")


def test_memory_is_flat_over_a_thousand_frames(tiny: Pair, tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 1001, fps=1, codec="mpeg4", size=(64, 48))
    process = start(tiny, "--source", path, "--every", "1s")
    assert process.stdout is not None
    watched, rss, number = psutil.Process(process.pid), {}, -1
    for number, _ in enumerate(process.stdout):
        if number in (100, 1000):
            rss[number] = watched.memory_info().rss
    assert process.wait(timeout=60) == 0 and number == 1000
    assert rss[1000] - rss[100] < 12e6, rss


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source", "{tmp}/absent.mp4"], "not found; check the path of the video"),
        (["--source", "/dev/video977"], "/dev/video977: no such device"),
        (["--source", "{tmp}/text.mp4"], "not a video"),
        (["--source", "{tmp}", "--every", "soon"], "'soon' is not a time; expected for example 1s"),
        (["--source", "{tmp}", "--max-frames-per-answer", "0"], "0 frames for an answer"),
        (["--source", "{tmp}", "--skip-unchanged", "5"], "skip_unchanged is 5.0, expected 0 (never) to 1"),
        (["--source", "{tmp}", "--max-answers", "0"], "--max-answers is 0"),
        (["--source", "{tmp}", "--timeout", "0s"], "--timeout is 0"),
        ([], "Missing option '--source'"),
    ],
)
def test_bad_input(
    tiny: Pair, tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (tmp_path / "text.mp4").write_text("hello" * 99)
    status = cli.run(["watch", str(tiny.bundle), PROMPT, *(a.format(tmp=tmp_path) for a in arguments)])
    out, err = capfd.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("edgevl: error:")]
    assert status == 2 and out == "" and len(errors) == 1 and message in errors[0], err


def test_without_pyav(monkeypatch: pytest.MonkeyPatch, tiny: Pair, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    assert cli.run(["watch", str(tiny.bundle), PROMPT, "--source", "rtsp://127.0.0.1/x"]) == 2
    assert "pip install 'edgevl[video]'" in capfd.readouterr().err


def test_a_prompt_that_never_fits_ends_it(tiny: Pair, tmp_path: Path) -> None:
    picture(0).save(tmp_path / "a.png")
    source, stop = FolderSource(tmp_path, print, idle_s=1), threading.Event()
    with tiny.open(capacity=24) as model, pytest.raises(CapacityError):
        list(watch(model, source, WatchOptions(PROMPT, generation=GENERATION), stop, print))
