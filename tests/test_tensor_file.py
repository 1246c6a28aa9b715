"""The small safetensors reader and writer, against the safetensors library and malformed files."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edgevl.runtime.errors import BundleError
from edgevl.runtime.tensor_file import read_tensors, write_tensors


def sample_tensors():
    rng = np.random.default_rng(1)
    return {
        "bytes": rng.integers(0, 256, (3, 5, 3), np.uint8),
        "floats": rng.normal(size=(2, 7)).astype(np.float32),
        "ids": np.array([1, -2, 1 << 40]),
        "empty": np.zeros((0, 4), np.float32),
        "scalar": np.array(7, np.int64),
    }


def test_tensor_files_are_safetensors(tmp_path):
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    tensors = sample_tensors()
    write_tensors(ours, tensors, {"name": "ein Fall, žluťoučký"})
    save_file(tensors, theirs, {"name": "ein Fall, žluťoučký"})
    read, (again, metadata) = load_file(ours), read_tensors(ours)
    (other, other_metadata) = read_tensors(theirs)
    assert metadata == other_metadata == {"name": "ein Fall, žluťoučký"}
    for name, tensor in tensors.items():
        for got in (read[name], again[name], other[name]):
            assert got.dtype == tensor.dtype and got.shape == tensor.shape and (got == tensor).all()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours.safetensors", "theirs.safetensors"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": np.zeros(3, np.float32)}, {})
    before = path.read_bytes()
    with pytest.raises(ValueError, match="float64"):
        write_tensors(path, {"a": np.zeros(3)}, {})
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def safetensors_bytes(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def spec(dtype="F32", shape=(2,), begin=0, end=8):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        (1 << 60).to_bytes(8, "little"),
        safetensors_bytes(b"{"),
        safetensors_bytes(b"\xff\xfe"),
        safetensors_bytes([]),
        safetensors_bytes({"__metadata__": {"a": 1}}),
        safetensors_bytes({"__metadata__": "a"}),
        safetensors_bytes({"a": []}),
        safetensors_bytes({"a": spec("BF16", (4,))}, bytes(8)),
        safetensors_bytes({"a": spec(shape=(-2,))}, bytes(8)),
        safetensors_bytes({"a": spec(shape=(2.0,))}, bytes(8)),
        safetensors_bytes({"a": spec(shape=(True, 2))}, bytes(8)),
        safetensors_bytes({"a": spec(shape=(3,))}, bytes(8)),
        safetensors_bytes({"a": spec()}, bytes(7)),
        safetensors_bytes({"a": spec()}, bytes(9)),
        safetensors_bytes({"a": spec(begin=4, end=12)}, bytes(12)),
        safetensors_bytes({"a": spec(), "b": spec(begin=4, end=12)}, bytes(12)),
        safetensors_bytes({"a": spec() | {"more": 1}}, bytes(8)),
        safetensors_bytes({"a": spec() | {"data_offsets": [0, 4, 8]}}, bytes(8)),
        safetensors_bytes(b'{"a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}, "a": 1}'),
        safetensors_bytes(b"[" * 100_000),
    ],
)
def test_malformed_tensor_files_are_refused(tmp_path, content):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(BundleError, match="not a safetensors file"):
        read_tensors(path)


def test_a_missing_tensor_file_is_refused(tmp_path):
    with pytest.raises(BundleError, match="cannot be read"):
        read_tensors(tmp_path / "a.safetensors")
