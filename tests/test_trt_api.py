"""Every name of TensorRT that the code touches exists in the bindings of 10.3, 10.7, 10.13, 10.16, 11 and RTX."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from trt_api import VARIABLES, Api, missing_names, used_names

ROOT = Path(__file__).parent.parent
SOURCES = [
    path
    for folder in ("export", "runtime")
    for path in sorted((ROOT / folder).glob("*.py"))
    if re.search(r"\btrt\.|\bmodule\.ILogger", path.read_text())
]


@pytest.fixture(scope="module")
def api() -> Api:
    return Api.load()


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.name)
def test_all_versions_have_what_is_used(api: Api, path: Path) -> None:
    variables = dict(VARIABLES)
    if path.name == "trt_plan.py":  # there a config is one of running, which only TensorRT-RTX's is used of
        rtx = tuple(v for v in api.versions if v.startswith("rtx"))
        assert missing_names(path.read_text(), api, {**variables, "config": "IRuntimeConfig"}, rtx) == {}
        del variables["config"]
    assert missing_names(path.read_text(), api, variables) == {}


def test_the_build_is_looked_at(api: Api) -> None:
    used = used_names((ROOT / "export" / "tensorrt_build.py").read_text())
    assert {
        ("", "OnnxParser"),
        ("Builder", "build_serialized_network"),
        ("IBuilderConfig", "set_memory_pool_limit"),
        ("MemoryPoolType", "WORKSPACE"),
        ("OnnxParser", "parse_from_file"),
    } <= used
    assert len(api.versions) >= 5 and api.versions[0] == "10.3.0" and any(v.startswith("11.") for v in api.versions)


@pytest.mark.parametrize(
    ("source", "name", "lacking"),
    [
        ("config.max_workspace_size = 1", "IBuilderConfig.max_workspace_size", {"10.3.0", "11.4.0.106"}),
        ("self._config.int8_calibrator = c", "IBuilderConfig.int8_calibrator", {"11.4.0.106"}),
        ("config.set_flag(trt.BuilderFlag.FP16)", "BuilderFlag.FP16", {"11.4.0.106"}),
        ("decode_context.execute_async_v9(0)", "IExecutionContext.execute_async_v9", {"10.3.0"}),
        ("trt.Nothing.at_all", "trt.Nothing", {"10.3.0"}),
        ("engine.get_aliased_input_tensor(n)", "ICudaEngine.get_aliased_input_tensor", {"10.3.0", "10.13.3.9"}),
    ],
)
def test_a_name_that_some_version_lacks_is_found(api: Api, source: str, name: str, lacking: set[str]) -> None:
    found = missing_names(source, api)
    assert lacking <= set(found[name])
    assert missing_names("x.max_workspace_size = 1", api) == {}


def test_a_name_that_is_asked_for_may_be_missing(api: Api) -> None:
    guarded = 'if hasattr(engine, "get_aliased_input_tensor"):\n    engine.get_aliased_input_tensor(n)'
    assert missing_names(guarded, api) == {}
    assert missing_names('getattr(trt, "Nothing", None)\ntrt.Nothing', api) == {}
    assert missing_names('getattr(trt, "Nothing")\ntrt.Nothing', api)


def test_methods_of_the_file_are_its_own(api: Api) -> None:
    assert missing_names("class C:\n    def feed(self): ...\ncontext.feed()", api) == {}
    assert missing_names("context.feed()", api)


def test_versions_can_be_chosen(api: Api) -> None:
    source = "engine.get_aliased_input_tensor(n)"
    assert missing_names(source, api, versions=("10.16.1.11", "11.4.0.106")) == {}
