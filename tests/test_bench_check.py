"""Bad input to the guard against regressions: refused before anything is measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from edgevl.benchmarks import check


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was measured: nothing, in these tests."""
    asked: list[str] = []
    monkeypatch.setattr(check, "_measure_all", lambda checkpoint, precisions, work: asked.extend(precisions) or {})
    return asked


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(check.main, [str(a) for a in arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "Expecting property name"),
        ("[]", "'list' object has no attribute 'values'"),
        ('{"here": 1}', "'int' object has no attribute 'values'"),
        ('{"here": {"fp32": [1]}}', "'list' object has no attribute 'values'"),
        ('{"here": {"fp32": {"step": 0}}}', "a count that is no positive whole number"),
        ('{"here": {"fp32": {"step": "1"}}}', "a count that is no positive whole number"),
        (b"\xff\xfe", "can't decode byte"),
    ],
)
@pytest.mark.parametrize("update", [(), ("--update",)], ids=["compare", "update"])
def test_a_broken_baseline(tmp_path: Path, measured: list[str], text: str | bytes, why: str, update: tuple) -> None:
    file = tmp_path / "b.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    before = file.read_bytes()
    status, output = run("--baseline", file, *update)
    assert status == 2 and f"{file}: not a file of baselines" in output and why in output
    assert "take it from git again, or remove it" in output and output.count("\n") == 1
    assert measured == [] and file.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("no/b.json", ("--update",), "no: no such folder; create it"),
        ("d", ("--update",), "d: cannot be read (Is a directory); expected a file of baselines"),
        ("d", (), "d: cannot be read (Is a directory)"),
        ("no/b.json", (), "no baseline of hybrid, fp32 for"),
    ],
)
def test_a_baseline_that_cannot_be(
    tmp_path: Path, measured: list[str], name: str, arguments: tuple[str, ...], message: str
) -> None:
    (tmp_path / "d").mkdir()
    status, output = run("--baseline", tmp_path / name, *arguments)
    assert status == 2 and message in output and output.count("\n") == 1
    assert measured == [] and [p.name for p in tmp_path.rglob("*")] == ["d"]


def test_a_baseline_of_other_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = {f"{check.setting()}, 230×230": {"fp32": {"step": 10, "lexing": 5}}}
    (tmp_path / "b.json").write_text(json.dumps(stored), encoding="utf-8")
    monkeypatch.setattr(check, "_measure_all", lambda *_: {"fp32": {"step": 10}})
    status, output = run("--precision", "fp32", "--baseline", tmp_path / "b.json")
    assert status == 2 and "stages that were not counted: fp32 lexing; make it anew with UPDATE=1" in output


def test_no_baseline_is_written_where_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "b.json"
    file.write_text("{}")
    monkeypatch.setattr(check, "_measure_all", lambda *_: {"fp32": {"step": 10}})

    def full(path: Path, *_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    status, output = run("--precision", "fp32", "--update", "--baseline", file)
    assert status == 2 and "cannot be written (No space left on device)" in output and file.read_text() == "{}"
