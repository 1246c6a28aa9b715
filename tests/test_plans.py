"""runtime/plans.py: what is written is read again, and every way in which plans may not fit is told."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Pair

from edgevl.runtime import cli
from edgevl.runtime.bundle import Bundle, FileEntry, file_sha256
from edgevl.runtime.errors import BundleError
from edgevl.runtime.plan_choice import choose_plans
from edgevl.runtime.plans import (
    ENGINES_FOLDER,
    PLANS,
    FoundPlans,
    PlanFile,
    PlanProfile,
    PlanSet,
    ShapeRange,
    check_plan_hashes,
    find_plans,
    plan_folder_name,
)


def _plan_set(folder: Path, sources: dict[str, str]) -> PlanSet:
    plans = {}
    for role, names in (("vision", ("vision",)), ("decoder", ("decode", "prefill"))):
        (folder / f"{role}.plan").write_bytes(role.encode())
        profiles = tuple(PlanProfile(n, {"x": ShapeRange((1, 1), (1, 4), (2, 8))}) for n in names)
        plans[role] = PlanFile(
            f"{role}.plan", len(role), file_sha256(folder / f"{role}.plan"), "float16", dict(sources), profiles
        )
    return PlanSet(folder, "tensorrt", "10.16.2.1", "Orin", ((8, 7),), 1024, 2, 512, 4, 4096, plans)


@pytest.fixture
def bundle(tiny: Pair, tmp_path: Path) -> Bundle:
    shutil.copytree(tiny.bundle, tmp_path / "b")
    return Bundle.open(tmp_path / "b")


@pytest.fixture
def plans(bundle: Bundle) -> PlanSet:
    folder = bundle.path(ENGINES_FOLDER) / plan_folder_name("tensorrt", "10.16.2.1", "Orin")
    folder.mkdir(parents=True)
    made = _plan_set(folder, {"decoder.onnx": bundle.files["decoder.onnx"].sha256})
    made.write()
    return made


def test_what_is_written_is_found_again(bundle: Bundle, plans: PlanSet) -> None:
    assert find_plans(bundle) == FoundPlans((plans,), ())
    plans.check_files(verify_hashes=True)
    assert plans.path("vision").read_bytes() == b"vision"
    assert plans.plans["decoder"].profile("prefill")[0] == 1
    with pytest.raises(KeyError, match="no profile 'x'"):
        plans.plans["decoder"].profile("x")


def test_a_build_that_did_not_end_is_not_found(bundle: Bundle, plans: PlanSet) -> None:
    shutil.copytree(plans.folder, plans.folder.with_name(".half.partial"))
    (plans.folder.with_name("empty")).mkdir()
    (plans.folder.with_name("empty") / "decoder.plan").write_bytes(b"half")
    found = find_plans(bundle)
    assert [p.folder for p in found.sets] == [plans.folder] and found.problems == ()


def test_why_plans_do_not_match(plans: PlanSet) -> None:
    assert plans.matches("10.16.2.1", (8, 7)) is None
    assert plans.matches("10.16.2.1", (8, 7), "tensorrt") is None
    assert plans.matches("10.3.0", (8, 7)) == "built with tensorrt 10.16.2.1, this machine has 10.3.0"
    assert "compute capability 8.7 (Orin), this device has 9.0" in str(plans.matches("10.16.2.1", (9, 0)))
    assert "this machine has tensorrt_rtx" in str(plans.matches("10.16.2.1", (8, 7), "tensorrt_rtx"))


def test_plans_of_another_graph_are_stale(bundle: Bundle, plans: PlanSet) -> None:
    assert plans.stale(bundle) is None
    entry = bundle.files["decoder.onnx"]
    other = replace(bundle, files={**bundle.files, "decoder.onnx": FileEntry(entry.size, "0" * 64)})
    assert "built from another decoder.onnx" in str(plans.stale(other))
    assert "no longer has" in str(plans.stale(replace(bundle, files={})))


def test_shape_ranges() -> None:
    shapes = ShapeRange((1, 2), (1, 3), (4, 5))
    assert shapes.holds((1, 5)) and not shapes.holds((1, 6)) and not shapes.holds((0, 2)) and not shapes.holds((1,))


def test_folder_names_are_plain() -> None:
    assert plan_folder_name("tensorrt", "10.3.0", "NVIDIA Orin (nvgpu)/x") == "tensorrt-10.3.0-nvidia-orin-nvgpu-x"
    assert plan_folder_name("tensorrt_rtx", "1.7", "sm86+sm89") == "tensorrt_rtx-1.7-sm86+sm89"


def _changed(data: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    *parents, last = path.split(".")
    at: Any = data
    for key in parents:
        at = at[int(key)] if isinstance(at, list) else at[key]
    at[int(last) if isinstance(at, list) else last] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("schema_version", 99, "schema version 99, this edgevl reads 1"),
        ("flavour", "tensorflow", "flavour 'tensorflow'"),
        ("version", "", "version is ''"),
        ("extra", 1, "unknown keys \\['extra'\\]"),
        ("weight_streaming", 1, "weight_streaming is 1, expected true"),
        ("capabilities", [], "no compute capabilities"),
        ("capabilities", ["sm86"], "compute capability 'sm86'"),
        ("capacity", 0, "capacity is 0"),
        ("max_rows", True, "max_rows is True"),
        ("min_patches", 5000, "min_patches 5000 is above"),
        ("plans", {}, "plans \\[\\]"),
        ("plans.vision.file", "../vision.plan", "is not a name"),
        ("plans.vision.dtype", "int4", "dtype 'int4'"),
        ("plans.vision.sha256", "abc", "is not a sha256"),
        ("plans.vision.size", 7, "7 bytes|says 7"),
        ("plans.decoder.profiles.0.name", "wide", "decoder profiles \\['wide', 'prefill'\\]"),
        ("plans.decoder.profiles.0.shapes.x.opt", [9, 9], "expected equal ranks that grow"),
        ("plans.decoder.profiles.0.shapes.x.opt", [1], "expected equal ranks that grow"),
        ("plans.decoder.profiles.0.shapes.x.min", [-1, 1], "is -1"),
    ],
)
def test_malformed_plans_are_told(plans: PlanSet, path: str, value: Any, message: str) -> None:
    data = _changed(json.loads((plans.folder / PLANS).read_text()), path, value)
    (plans.folder / PLANS).write_text(json.dumps(data))
    with pytest.raises(BundleError, match=message) as caught:
        PlanSet.read(plans.folder)
    assert "edgevl build" in str(caught.value)


def test_damaged_files_are_told(bundle: Bundle, plans: PlanSet) -> None:
    (plans.folder / "vision.plan").write_bytes(b"VISION")
    found = PlanSet.read(plans.folder)
    with pytest.raises(BundleError, match="its sha256 is not that of"):
        found.check_files(verify_hashes=True)
    with pytest.raises(BundleError, match=r"vision\.plan: its sha256 is not that of .*; run `edgevl build` again"):
        check_plan_hashes(bundle)
    with pytest.raises(BundleError, match="its sha256 is not that of"):
        Bundle.open(bundle.folder, verify_hashes=True)
    (plans.folder / "vision.plan").unlink()
    (problem,) = find_plans(bundle).problems
    assert problem.endswith("vision.plan: missing, though plans.json lists it")
    with pytest.raises(BundleError, match=r"vision\.plan: missing"):
        check_plan_hashes(bundle)
    (plans.folder / PLANS).write_text("{")
    assert "not readable as JSON" in find_plans(bundle).problems[0]


def test_a_damaged_set_does_not_stand_in_the_way_of_the_others(bundle: Bundle, plans: PlanSet) -> None:
    damaged = plans.folder.with_name("tensorrt-10.3.0-orin")  # before the good one, by name
    shutil.copytree(plans.folder, damaged)
    (damaged / PLANS).write_text("{}")
    found = find_plans(bundle)
    assert found.sets == (plans,) and len(found.problems) == 1 and "schema version None" in found.problems[0]
    here = {"tensorrt": "10.16.2.1"}
    assert choose_plans(bundle, found, here, (8, 7)) == (plans, [])
    chosen, reasons = choose_plans(bundle, found, here, (9, 0))
    assert chosen is None and len(reasons) == 2 and reasons[1] == found.problems[0]


def test_that_weights_stream_is_kept(bundle: Bundle, plans: PlanSet) -> None:
    assert "weight_streaming" not in plans.to_dict()
    streaming = replace(plans, weight_streaming=True)
    streaming.write()
    assert find_plans(bundle).sets == (streaming,)


def test_verify_checks_the_plans_too(bundle: Bundle, plans: PlanSet, capsys: pytest.CaptureFixture[str]) -> None:
    (plans.folder / "vision.plan").write_bytes(b"VISION")
    assert cli.run(["verify", str(bundle.folder), "--engine", "ort-cpu"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "vision.plan: its sha256 is not that of plans.json; run `edgevl build` again" in err
