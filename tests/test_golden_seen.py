"""The errors that an exporting host saw: kept in the bundle, and held against every later replay."""

from __future__ import annotations

import functools
import json
import shutil

import pytest
from checkpoints import DEMO
from test_cli import edgevl
from test_verify import edit_data, rehash, zero

from edgevl.export.exporter import ExportOptions, export_bundle
from edgevl.export.verify import add_golden, write_golden
from edgevl.runtime.bundle import Bundle
from edgevl.runtime.errors import BundleError
from edgevl.runtime.golden import COSINE_FLOORS, StageResult, VerifyReport, replay
from edgevl.runtime.golden_seen import SEEN_FILE, SeenErrors, record_seen


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """The demo's bundles by precision, with golden vectors and with what this host saw."""
    folder = tmp_path_factory.mktemp("seen")
    for precision in ("int8", "int4"):
        finish = functools.partial(write_golden, source=DEMO)
        export_bundle(DEMO, folder / precision, ExportOptions(precision), finish=finish)
    return folder


def check(folder):
    return replay(Bundle.open(folder), "ort-cpu", threads=2)


def copy(bundles, precision, tmp_path):
    return shutil.copytree(bundles / precision, tmp_path / "bundle")


@pytest.mark.parametrize(
    ("precision", "name"),
    [
        ("int8", "model.layers.1.mlp.down_proj.weight.int8.scales"),
        ("int8", "model.layers.3.mlp.down_proj.weight.int8.scales"),
        ("int4", "model.layers.1.mlp.down_proj.weight.int4b128.scales"),
    ],
)
def test_a_dead_feed_forward_layer_of_the_demo_is_seen(bundles, tmp_path, precision, name):
    """The general floors miss it: the demo does nearly as well without that layer on the golden cases."""
    folder = copy(bundles, precision, tmp_path)
    record_seen(folder, check(folder))
    assert check(folder).passed
    edit_data(folder, "decoder", zero, name)
    report = check(folder)
    assert report.first_drift is not None and report.first_drift.stage in ("prefill", "decode")
    assert report.first_drift.threshold > COSINE_FLOORS["decoder"][precision]


def test_thresholds_are_three_times_the_error_seen(bundles, tmp_path):
    folder = copy(bundles, "int4", tmp_path)
    before = check(folder)
    record_seen(folder, before)
    for was, now in zip(before.results, check(folder).results):
        assert (was.case, was.stage, was.value) == (now.case, now.stage, now.value)
        if was.stage in ("vision", "prefill", "decode"):
            slack = 0.01 * (1 - was.threshold)
            assert now.threshold == pytest.approx(max(was.threshold, 1 - 3 * (1 - was.value) - slack), abs=1e-12)
        else:
            assert now.threshold == was.threshold


@pytest.mark.parametrize(("cosine", "floor"), [(0.99, 0.968), (0.9, 0.8), (1.0, 0.998), (1.0000001, 0.998)])
def test_the_floor_by_hand(cosine, floor):
    seen = SeenErrors("ort-cpu", "1", {"text": {"prefill": cosine}})
    assert seen.floor("text", "prefill", 0.8, "ort-cpu") == pytest.approx(floor)
    other = max(0.8, 1 - 10 * max(0, 1 - cosine) - 0.002)
    assert seen.floor("text", "prefill", 0.8, "tensorrt") == pytest.approx(other)
    assert seen.floor("text", "decode", 0.8, "ort-cpu") == seen.floor("video", "prefill", 0.8, "ort-cpu") == 0.8


def test_the_command_line_records_it_and_a_new_reference_replaces_it(bundles, tmp_path):
    done = edgevl("export", DEMO, "-o", tmp_path / "bundle", "--precision", "int8")
    assert done.returncode == 0, done.stderr
    first = SeenErrors.of(Bundle.open(tmp_path / "bundle", verify_hashes=True))
    assert first is not None and first.engine == "ort-cpu" and set(first.cosines) >= {"text", "picture", "video"}
    add_golden(tmp_path / "bundle", DEMO, steps=2)  # other vectors: what was seen is no measure any more
    assert SEEN_FILE not in Bundle.open(tmp_path / "bundle").files
    assert not (tmp_path / "bundle" / SEEN_FILE).exists()
    done = edgevl("verify", tmp_path / "bundle", "--against", DEMO)
    assert done.returncode == 0, done.stderr
    assert SeenErrors.of(Bundle.open(tmp_path / "bundle", verify_hashes=True)) == first


def test_recording_twice_leaves_a_bundle_that_opens(bundles, tmp_path):
    folder = copy(bundles, "int8", tmp_path)
    report = check(folder)
    for _ in range(2):
        record_seen(folder, report)
        assert SEEN_FILE in Bundle.open(folder, verify_hashes=True).files


def test_a_report_that_drifts_is_no_measure(bundles, tmp_path):
    folder = copy(bundles, "int8", tmp_path)
    failed = VerifyReport("ort-cpu", (StageResult("text", "prefill", 0.1, 0.9, False, "cosine 0.1"),))
    with pytest.raises(ValueError, match="passed"):
        record_seen(folder, failed)
    assert SEEN_FILE not in Bundle.open(folder).files


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(format=2),
        lambda d: d.pop("cosines"),
        lambda d: d.update(cosines=[1]),
        lambda d: d["cosines"].update(text={"prefill": "high"}),
        lambda d: d["cosines"].update(text={"prefill": 7.0}),
    ],
)
def test_a_malformed_record_is_refused(bundles, tmp_path, change):
    folder = copy(bundles, "int8", tmp_path)
    record_seen(folder, check(folder))
    data = json.loads((folder / SEEN_FILE).read_text())
    change(data)
    (folder / SEEN_FILE).write_text(json.dumps(data))
    rehash(folder, SEEN_FILE)
    with pytest.raises(BundleError, match=r"seen\.json: malformed"):
        check(folder)
