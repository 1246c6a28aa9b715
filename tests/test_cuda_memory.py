"""Device memory as far as it can be tested without a device: the library's interface, addresses, pitches, errors."""

from __future__ import annotations

import ctypes
import gc
import importlib.util
from pathlib import Path

import numpy as np
import pytest
from host_memory import HostCuda

from edgevl.runtime import cuda_memory
from edgevl.runtime.config import ModelConfig
from edgevl.runtime.cuda_memory import FUNCTIONS, CudaRuntime, out_of_memory
from edgevl.runtime.device_cache import BufferPool, DeviceKVCache
from edgevl.runtime.device_tensor import ALIGNMENT, DeviceTensor, Staging, freeze, join_rows, plan_offsets
from edgevl.runtime.errors import CapacityError, EngineError
from edgevl.runtime.gpu import current_gpu
from edgevl.runtime.graph_spec import GraphSpec, decoder_spec, tensorrt_decoder_spec
from edgevl.runtime.kv_cache import KVCache

NO_GPU = pytest.mark.skipif(current_gpu() is not None, reason="a GPU is here")


def cuda_runtimes() -> list[Path]:
    """NVIDIA's own libcudart of CUDA 12 and 13, from PyPI; they load without a driver."""
    spec = importlib.util.find_spec("nvidia")
    places = spec.submodule_search_locations if spec else None
    return sorted(p for place in places or () for p in Path(place).glob("*/lib/libcudart.so.*"))


def test_every_function_is_in_cuda_12_and_13() -> None:
    libraries = cuda_runtimes()
    assert {p.name for p in libraries} == {"libcudart.so.12", "libcudart.so.13"}
    for path in libraries:
        library = ctypes.CDLL(str(path))
        assert [n for n in FUNCTIONS if not hasattr(library, n)] == [], path


@NO_GPU
def test_no_driver_is_one_clear_error() -> None:
    with pytest.raises(EngineError, match=r"cudaGetDeviceCount failed: cudaError\w+ \(.*(driver|device)"):
        CudaRuntime()


def test_a_library_without_the_functions_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_memory, "_candidates", lambda: iter(["libm.so.6", "libabsent.so.1"]))
    with pytest.raises(EngineError, match=r"runtime library is not found here.*pip install nvidia-cuda-runtime-cu12"):
        CudaRuntime()


def test_out_of_memory_says_what_was_needed_and_what_is_free() -> None:
    text = out_of_memory("the KV cache", 2_340_000_000, 1_000_000_000, 8_000_000_000, "lower --capacity")
    assert text == "the KV cache needs 2.34 GB of GPU memory, 1.00 GB of 8.00 GB are free; lower --capacity"


def test_offsets_are_aligned_and_apart() -> None:
    offsets, size = plan_offsets({"a": 1, "b": 256, "c": 0, "d": 257})
    assert offsets == {"a": 0, "b": 256, "c": 512, "d": 768} and size == 1280
    assert all(o % ALIGNMENT == 0 for o in offsets.values())


def test_staging_puts_every_array_at_its_address() -> None:
    cuda = HostCuda()
    staging = Staging(cuda, cuda.stream())
    arrays = {
        "ids": np.arange(7, dtype=np.int64)[None],
        "rows": np.ones((3, 5), np.float16).T,
        "none": np.zeros((0, 4)),
    }
    places = staging.write(arrays)
    staging.send()
    for name, array in arrays.items():
        found = np.empty(array.shape, array.dtype)
        ctypes.memmove(found.ctypes.data, places[name], array.nbytes)
        assert np.array_equal(found, array), name
    before = staging.addresses
    assert staging.write({"ids": arrays["ids"]})["ids"] == places["ids"] and staging.addresses == before
    staging.write({"ids": np.zeros(5000, np.int64)})
    assert staging.addresses != before  # a larger block: whoever captured addresses must notice


def device(cuda: HostCuda, array: np.ndarray, dtype: str | None = None) -> DeviceTensor:
    memory = cuda.allocate(array.nbytes, "x", "")
    ctypes.memmove(memory.pointer, array.ctypes.data, array.nbytes)
    return DeviceTensor(memory, cuda.stream(), dtype or array.dtype.name, array.shape)


def test_rows_of_a_device_tensor_share_its_memory() -> None:
    cuda = HostCuda()
    values = np.arange(24, dtype=np.float16).reshape(6, 4)
    tensor = device(cuda, values)
    assert len(tensor) == 6 and tensor.nbytes == 48
    assert np.array_equal(np.asarray(tensor[2:5]), values[2:5]) and tensor[2:5].pointer == tensor.pointer + 16
    assert tensor[4:4].shape == (0, 4) and np.asarray(tensor[4:4]).shape == (0, 4)
    assert np.array_equal(tensor[1:][1:3].numpy(), values[2:4])
    assert np.array_equal(np.concatenate([np.asarray(tensor), np.asarray(tensor)]), np.concatenate([values, values]))
    with pytest.raises(ValueError, match="step is 2"):
        tensor[::2]
    with pytest.raises(ValueError, match="without a copy"):
        np.asarray(tensor, copy=False)
    freeze(tensor)


def test_bfloat16_comes_as_float32() -> None:
    values = np.array([1.5, -2.0, 3.140625], np.float32)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    assert np.array_equal(device(HostCuda(), bits, "bfloat16").numpy(), values)


def test_joined_rows_stay_on_the_device_where_they_can() -> None:
    cuda = HostCuda()
    a, b = np.arange(8, dtype=np.float16).reshape(2, 4), np.arange(12, dtype=np.float16).reshape(3, 4) + 100
    one, two = device(cuda, a), device(cuda, b)
    joined = join_rows([one, two])
    assert isinstance(joined, DeviceTensor) and np.array_equal(joined.numpy(), np.concatenate([a, b]))
    assert join_rows([one]) is one
    mixed = join_rows([one, b.astype(np.float32)])
    assert isinstance(mixed, np.ndarray) and np.array_equal(mixed, np.concatenate([a, b]))


@pytest.fixture(scope="module", params=["lengths", "mask"])
def spec(request: pytest.FixtureRequest) -> GraphSpec:
    config = ModelConfig.from_dict(_config())
    return (
        decoder_spec(config, "float16") if request.param == "lengths" else tensorrt_decoder_spec(config, "float16", 32)
    )


def _config() -> dict:
    from edgevl.runtime.checkpoint import Checkpoint

    with Checkpoint.open(Path(__file__).parent.parent / "demo" / "model") as checkpoint:
        return checkpoint.config.to_dict()


def write(cache: KVCache, row: int, values: dict[str, np.ndarray]) -> None:
    """What a graph does: new tokens [heads, n, d] behind those of `row`, at the addresses of the view."""
    start = int(cache.lengths[row])
    count = next(iter(values.values())).shape[1]
    for name, buffer in cache.view(row, row + 1).buffers.items():
        _, heads, capacity, dim = buffer.shape
        pointer = buffer.pointer if isinstance(buffer, DeviceTensor) else buffer.ctypes.data
        for head in range(heads):
            chunk = np.ascontiguousarray(values[name][head])
            ctypes.memmove(pointer + (head * capacity + start) * dim * 2, chunk.ctypes.data, chunk.nbytes)
    cache.advance(row, count)


def test_a_device_cache_moves_forks_and_rewinds_like_one_on_the_host(spec: GraphSpec) -> None:
    cuda, rng = HostCuda(), np.random.default_rng(0)
    stream = cuda.stream()
    pool = BufferPool(cuda, stream)
    ours, theirs = DeviceKVCache(spec, 32, 3, pool, stream), KVCache(spec, 32, 3)
    assert ours.nbytes == theirs.nbytes

    def both(work) -> None:
        for cache in (ours, theirs):
            work(cache)

    def same(a: KVCache, b: KVCache) -> None:
        assert a.lengths.tolist() == b.lengths.tolist()
        for row in range(3):
            length = int(a.lengths[row])
            mine, other = a.read(row, 0, length), b.read(row, 0, length)
            assert mine.keys() == other.keys() and len(mine) == len(spec.cache)
            for name in mine:
                assert np.array_equal(mine[name], other[name]), (row, name)

    for row, count in ((0, 5), (1, 9), (2, 1), (0, 3)):
        values = {
            past: rng.standard_normal((int(spec.input(past).shape[1]), count, int(spec.input(past).shape[3]))).astype(
                np.float16
            )
            for past, _ in spec.cache
        }
        both(lambda c, row=row, values=values: write(c, row, values))
    same(ours, theirs)
    other, reference = ours.fork(), theirs.fork()
    both(lambda c: c.rewind(1, 4))
    both(lambda c: c.move(0, 2))
    same(ours, theirs)
    same(other, reference)
    kept = ours.read(0, 2, 7)
    assert all(np.array_equal(kept[n], v) for n, v in theirs.read(0, 2, 7).items())
    both(lambda c: c.append(1, kept, 3))
    same(ours, theirs)
    for cache in (ours, theirs):
        with pytest.raises(CapacityError):
            cache.append(0, kept, 40)
        with pytest.raises(ValueError, match="cannot read"):
            cache.read(0, 0, 33)


def test_memory_of_a_cache_is_zero_at_first_and_comes_back(spec: GraphSpec) -> None:
    cuda = HostCuda()
    stream = cuda.stream()
    pool = BufferPool(cuda, stream)
    cache = DeviceKVCache(spec, 32, 1, pool, stream)
    assert all(not np.asarray(b).any() for b in cache.view(0, 1).buffers.values())  # no NaN for masked positions
    pointers = [b.pointer for b in cache.view(0, 1).buffers.values()]
    del cache
    gc.collect()
    again = DeviceKVCache(spec, 32, 1, pool, stream)
    assert [b.pointer for b in again.view(0, 1).buffers.values()] == pointers  # a captured step still fits
    other = DeviceKVCache(spec, 32, 1, pool, stream)
    assert [b.pointer for b in other.view(0, 1).buffers.values()] != pointers
    del again, other
    gc.collect()
    pool.close()
    assert not cuda.blocks  # and nothing is freed twice


def test_a_full_device_is_told_of(spec: GraphSpec) -> None:
    cuda = HostCuda(total=4096)
    stream = cuda.stream()
    with pytest.raises(EngineError, match="the KV cache needs"):
        DeviceKVCache(spec, 32, 1, BufferPool(cuda, stream), stream)


def test_a_fixed_capacity_is_held(spec: GraphSpec) -> None:
    if spec.input(spec.cache[0][0]).shape[2] != 32:
        pytest.skip("this graph takes any capacity")
    cuda = HostCuda()
    stream = cuda.stream()
    with pytest.raises(CapacityError, match="exactly 32"):
        DeviceKVCache(spec, 16, 1, BufferPool(cuda, stream), stream)
