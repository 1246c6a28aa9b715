"""Reads Qwen2-VL checkpoints: safetensors by name, one tensor at a time, as float32; knows neither torch nor graphs.

Format of a safetensors file: 8 bytes little-endian header length, that many bytes of JSON
(name -> dtype, shape, data_offsets), then the data without holes (github.com/huggingface/safetensors, "Format").
The header is parsed here because numpy has no bfloat16. Everything that can be wrong with a checkpoint is found when it
is opened, except the values, which are checked as they are read.

Data is read with `read`, not mapped: mapped pages count as the process's memory until given back, and a file that
shrinks under a mapping kills the process instead of raising.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from edgevl.runtime.config import ModelConfig
from edgevl.runtime.errors import CheckpointError

__all__ = ["DTYPES", "IGNORED_SUFFIXES", "RENAMES", "Checkpoint", "canonical_name", "expected_shapes"]

# How each accepted dtype lies in the file; BF16 is read as bit patterns.
DTYPES = {"BF16": np.dtype("<u2"), "F16": np.dtype("<f2"), "F32": np.dtype("<f4")}

# Prefix found -> prefix of the released naming; the first that fits applies.
RENAMES = (
    ("model.language_model.", "model."),  # as transformers holds it in memory, save_original_format=False
    ("model.visual.", "visual."),
    ("language_model.", "model."),  # Qwen2VLModel (without the head) saved on its own
)

# Buffers that old versions of transformers saved; they are recomputed from the config.
IGNORED_SUFFIXES = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq")

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
HUB_PATTERNS = ["*.safetensors", "*.json", "merges.txt", "*.jinja"]
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
CHUNK = 1 << 20  # numbers converted at once: 4 MB of float32 stays in cache
AGAIN = "re-download the checkpoint"


def canonical_name(name: str) -> str:
    """The released name of a tensor; a name that no rule fits is returned as it is."""
    for found, released in RENAMES:
        if name.startswith(found):
            return released + name[len(found) :]
    return name


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Released name -> shape of every tensor of this config, in the order of computation.

    Linear weights are [out, in], the patch embedding [embed, channels, temporal, patch, patch]. With tied embeddings
    there is no `lm_head.weight`. Source: modeling_qwen2_vl.py of transformers.
    """
    v, t = config.vision, config.text
    shapes: dict[str, tuple[int, ...]] = {}

    def put(name: str, *shape: int, bias: bool = False) -> None:
        shapes[f"{name}.weight"] = shape
        if bias:
            shapes[f"{name}.bias"] = shape[:1]

    put("visual.patch_embed.proj", v.embed_dim, v.in_channels, v.temporal_patch_size, v.patch_size, v.patch_size)
    for block in (f"visual.blocks.{i}" for i in range(v.depth)):
        put(f"{block}.norm1", v.embed_dim, bias=True)
        put(f"{block}.attn.qkv", 3 * v.embed_dim, v.embed_dim, bias=True)
        put(f"{block}.attn.proj", v.embed_dim, v.embed_dim, bias=True)
        put(f"{block}.norm2", v.embed_dim, bias=True)
        put(f"{block}.mlp.fc1", v.intermediate_size, v.embed_dim, bias=True)
        put(f"{block}.mlp.fc2", v.embed_dim, v.intermediate_size, bias=True)
    put("visual.merger.ln_q", v.embed_dim, bias=True)
    put("visual.merger.mlp.0", v.merged_dim, v.merged_dim, bias=True)
    put("visual.merger.mlp.2", v.hidden_size, v.merged_dim, bias=True)

    shapes[EMBEDDING] = (t.vocab_size, t.hidden_size)
    queries, keys = t.num_attention_heads * t.head_dim, t.num_key_value_heads * t.head_dim
    for layer in (f"model.layers.{i}" for i in range(t.num_hidden_layers)):
        put(f"{layer}.input_layernorm", t.hidden_size)
        put(f"{layer}.self_attn.q_proj", queries, t.hidden_size, bias=True)
        put(f"{layer}.self_attn.k_proj", keys, t.hidden_size, bias=True)
        put(f"{layer}.self_attn.v_proj", keys, t.hidden_size, bias=True)
        put(f"{layer}.self_attn.o_proj", t.hidden_size, queries)
        put(f"{layer}.post_attention_layernorm", t.hidden_size)
        put(f"{layer}.mlp.gate_proj", t.intermediate_size, t.hidden_size)
        put(f"{layer}.mlp.up_proj", t.intermediate_size, t.hidden_size)
        put(f"{layer}.mlp.down_proj", t.hidden_size, t.intermediate_size)
    put("model.norm", t.hidden_size)
    if not t.tie_word_embeddings:
        shapes[HEAD] = (t.vocab_size, t.hidden_size)
    return shapes


@dataclass(frozen=True)
class _Entry:
    """Where one tensor lies: file, its name there, dtype as safetensors spells it, shape, byte range in the file."""

    path: Path
    stored_name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def row_size(self) -> int:
        return math.prod(self.shape[1:])


class Checkpoint:
    """A checkpoint whose tensors are all there, with the right shapes; made by `Checkpoint.open`.

    Names are the released ones, whatever the files say. Reading is safe from several threads. A context manager.
    """

    def __init__(self, folder: Path, config: ModelConfig, entries: dict[str, _Entry]) -> None:
        self.folder = folder
        self.config = config
        self._entries = entries
        self._files: dict[Path, FileIO] = {}
        self._lock = threading.Lock()
        self._closed = False

    @classmethod
    def open(cls, source: str | Path) -> Checkpoint:
        """Open a checkpoint folder, or a hub id such as "Qwen/Qwen2-VL-2B-Instruct" when there is no such path.

        Raises:
            CheckpointError: the folder, its config or a tensor is missing, malformed, mis-shaped, of another
                architecture or in a format that is not read.
        """
        folder = _resolve(source)
        config = ModelConfig.from_folder(folder)
        paths, index = _weight_files(folder)
        stored: dict[str, _Entry] = {}
        for path in paths:
            for entry in _read_header(path):
                if entry.stored_name in stored:
                    raise CheckpointError(
                        f"{path}: tensor {entry.stored_name!r} is also in {stored[entry.stored_name].path.name}; "
                        f"remove the file that does not belong to the checkpoint"
                    )
                stored[entry.stored_name] = entry
        _refuse_quantized(folder, stored)
        _check_index(folder, index, stored)
        entries = _match(folder, config, stored, index)
        head = entries.pop(HEAD) if config.text.tie_word_embeddings and HEAD in entries else None
        out = cls(folder, config, {name: entries[name] for name in expected_shapes(config)})
        if head is not None:
            try:
                out._check_tied(head)
            except BaseException:
                out.close()
                raise
        return out

    def names(self) -> list[str]:
        """The released names, in the order of computation; no `lm_head.weight` where it is tied to the embedding."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def dtype(self, name: str) -> str:
        """As stored: "BF16", "F16" or "F32"."""
        return self._entries[name].dtype

    def read(self, name: str) -> np.ndarray:
        """The whole tensor, float32, in its shape.

        Raises:
            CheckpointError: a value is NaN or infinite, or the file cannot be read any more.
            KeyError: no such tensor (see `names`).
        """
        entry = self._entries[name]
        return self._read(name, entry, 0, math.prod(entry.shape)).reshape(entry.shape)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows start..stop of the first axis, float32 [stop - start, product of the other axes].

        Raises:
            CheckpointError: as `read`.
            KeyError: no such tensor.
            IndexError: the range does not lie within the first axis.
        """
        entry = self._entries[name]
        count = entry.shape[0] if entry.shape else 0
        if not 0 <= start <= stop <= count:
            raise IndexError(f"{name}: rows {start}..{stop} of {count}")
        flat = self._read(name, entry, start * entry.row_size, (stop - start) * entry.row_size)
        return flat.reshape(stop - start, entry.row_size)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for file in self._files.values():
                file.close()
            self._files.clear()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self, name: str, entry: _Entry, first: int, count: int) -> np.ndarray:
        out = np.empty(count, np.float32)
        for at, raw in self._raw_chunks(entry, first, count):
            part = out[at : at + raw.size]
            if entry.dtype == "BF16":  # the upper half of a float32
                bits = part.view(np.uint32)
                bits[:] = raw
                bits <<= np.uint32(16)
            else:
                part[:] = raw
            if not np.isfinite(part).all():
                where = first + at + int(np.argmin(np.isfinite(part)))
                position = ", ".join(str(int(i)) for i in np.unravel_index(where, entry.shape))
                raise CheckpointError(
                    f"{entry.path}: tensor {name!r} holds {part[where - first - at]} at [{position}]; "
                    f"weights must be finite: {AGAIN}"
                )
        return out

    def _raw_chunks(self, entry: _Entry, first: int, count: int) -> Iterator[tuple[int, np.ndarray]]:
        """(offset, numbers as stored) of `count` numbers from the `first`; a chunk is valid until the next one."""
        dtype = DTYPES[entry.dtype]
        buffer = np.empty(min(CHUNK, count), dtype)
        for at in range(0, count, CHUNK):
            chunk = buffer[: min(CHUNK, count - at)]
            self._read_into(entry, entry.begin + (first + at) * dtype.itemsize, chunk.view(np.uint8).data)
            yield at, chunk

    def _read_into(self, entry: _Entry, position: int, target: memoryview) -> None:
        with self._lock:  # one position per file
            if self._closed:
                raise ValueError("read of a closed Checkpoint")
            try:
                file = self._files.get(entry.path)
                if file is None:
                    file = self._files[entry.path] = FileIO(entry.path)
                file.seek(position)
                done = 0
                while done < len(target):
                    got = file.readinto(target[done:])
                    if not got:
                        raise CheckpointError(f"{entry.path}: ended within tensor {entry.stored_name!r}; {AGAIN}")
                    done += got
            except OSError as e:
                raise CheckpointError(f"{entry.path}: cannot be read ({e}); tensor {entry.stored_name!r}") from None

    def _check_tied(self, head: _Entry) -> None:
        embedding = self._entries[EMBEDDING]
        count = math.prod(head.shape)
        for start in range(0, count, CHUNK):
            size = min(CHUNK, count - start)
            ours = self._read(EMBEDDING, embedding, start, size)
            if not np.array_equal(ours, self._read(HEAD, head, start, size)):
                raise CheckpointError(
                    f"{head.path}: tensor {HEAD!r} differs from {EMBEDDING!r}, but config.json has tie_word_embeddings "
                    f"true: set it to false if the head is meant to be its own"
                )


def _resolve(source: str | Path) -> Path:
    """The folder of `source`, downloaded first when it is a hub id."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{source}: a file, expected the checkpoint's folder")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", str(source)):
        raise CheckpointError(f"{source}: no such folder, and not a hub id (owner/name)")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(
            f"{source}: no such folder; to download it as a hub id, pip install 'edgevl[hub]'"
        ) from None
    try:
        return Path(snapshot_download(str(source), allow_patterns=HUB_PATTERNS))
    except Exception as e:  # the hub client raises its own, its HTTP client's and the system's errors
        reason = " ".join(str(e).split())[:300] or type(e).__name__
        raise CheckpointError(f"{source}: no such folder, and the hub did not give it: {reason}") from None


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: not readable as JSON ({e}); {AGAIN}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}; {AGAIN}")
    return value


def _weight_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The safetensors files, and tensor -> file name of the index ({} without one)."""
    if (folder / SINGLE).exists():  # transformers, too, prefers it over an index
        return [folder / SINGLE], {}
    path = folder / INDEX
    if path.exists():
        index = _read_object(path).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise CheckpointError(f"{path}: weight_map must map tensors to files; {AGAIN}")
        for name, file in index.items():
            if not isinstance(file, str) or not re.fullmatch(r"[\w.-]+\.safetensors", file):
                raise CheckpointError(f"{path}: {name!r} lies in {file!r}, expected a *.safetensors file beside it")
        files = [folder / file for file in sorted(set(index.values()))]
        absent = [file.name for file in files if not file.exists()]
        if absent:
            tensor = next(name for name, file in index.items() if file == absent[0])
            raise CheckpointError(
                f"{folder / absent[0]}: not found, but {INDEX} places tensor {tensor!r} in it"
                f"{_more(absent, 'files')}; {AGAIN}"
            )
        return files, index
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return files, {}
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder / pickles[0]}: a pickle, which runs code when it is read, so edgevl does not; convert it: "
            f"load it with transformers where you trust it and save_pretrained(..., safe_serialization=True)"
        )
    raise CheckpointError(f"{folder}: no {SINGLE}, {INDEX} or other *.safetensors; {AGAIN}")


def _read_header(path: Path) -> list[_Entry]:
    """The tensors of one file, in the order of their data; every byte of the file must belong to one."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > MAX_HEADER or 8 + length > size:
                raise CheckpointError(
                    f"{path}: header of {length} bytes in a file of {size}: truncated or not safetensors; {AGAIN}"
                )
            text = file.read(length)
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read ({e})") from None
    try:
        header = json.loads(text, object_pairs_hook=_no_duplicates)
    except (UnicodeDecodeError, ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: the header is not readable as JSON ({e}); {AGAIN}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is not a JSON object; {AGAIN}")
    entries = [_entry(path, name, spec, 8 + length) for name, spec in header.items() if name != "__metadata__"]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    beyond = [entry for entry in entries if entry.end > size]
    if beyond:
        raise CheckpointError(
            f"{path}: truncated: tensor {beyond[0].stored_name!r} ends at byte {beyond[0].end}, the file at {size}"
            f"{_more(beyond, 'tensors')}; {AGAIN}"
        )
    position = 8 + length
    for entry in entries:
        if entry.begin != position:
            problem = "overlaps the tensor before it" if entry.begin < position else "leaves a hole before it"
            raise CheckpointError(f"{path}: malformed: tensor {entry.stored_name!r} {problem}; {AGAIN}")
        position = entry.end
    if position != size:
        raise CheckpointError(f"{path}: malformed: {size - position} bytes after the last tensor; {AGAIN}")
    return entries


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} twice")
    return out


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _entry(path: Path, name: str, spec: Any, base: int) -> _Entry:
    """One line of the header, checked; `base` is where the data starts."""
    what = f"{path}: malformed header of tensor {name!r}"
    if not isinstance(spec, dict) or not isinstance(spec.get("dtype"), str):
        raise CheckpointError(f"{what}: expected dtype, shape and data_offsets; {AGAIN}")
    shape, offsets = spec.get("shape"), spec.get("data_offsets")
    if not isinstance(shape, list) or not all(_is_count(n) for n in shape):
        raise CheckpointError(f"{what}: shape is {shape!r}; {AGAIN}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(n) for n in offsets):
        raise CheckpointError(f"{what}: data_offsets is {offsets!r}; {AGAIN}")
    dtype, (begin, end) = spec["dtype"], offsets
    if end < begin or (dtype in DTYPES and end - begin != math.prod(shape) * DTYPES[dtype].itemsize):
        raise CheckpointError(f"{what}: {dtype} {shape} does not fill the bytes {begin}..{end}; {AGAIN}")
    return _Entry(path, name, dtype, tuple(shape), base + begin, base + end)


def _refuse_quantized(folder: Path, stored: dict[str, _Entry]) -> None:
    """The one place that knows of quantized checkpoints: they are not read yet."""
    config = _read_object(folder / "config.json")
    packed = next((n for n in stored if n.endswith((".qweight", ".weight_packed", ".weight_scale"))), None)
    method = config.get("quantization_config") or config.get("compression_config")
    if packed is None and not method:
        return
    kind = method.get("quant_method", "quantized") if isinstance(method, dict) else "quantized"
    found = f"{stored[packed].path}: tensor {packed!r}" if packed else f"{folder / 'config.json'}: quantization_config"
    raise CheckpointError(
        f"{found}: a {kind} checkpoint, not read yet by this version; export the unquantized checkpoint"
    )


def _check_index(folder: Path, index: dict[str, str], stored: dict[str, _Entry]) -> None:
    wrong = [name for name, file in index.items() if name not in stored or stored[name].path.name != file]
    if wrong:
        raise CheckpointError(
            f"{folder / index[wrong[0]]}: tensor {wrong[0]!r} is not in it, but {INDEX} places it there"
            f"{_more(wrong, 'tensors')}; {AGAIN}"
        )


def _match(folder: Path, config: ModelConfig, stored: dict[str, _Entry], index: dict[str, str]) -> dict[str, _Entry]:
    """Released name -> entry, once every expected tensor is there and no other; includes a tied head if stored."""
    shapes = expected_shapes(config)
    allowed = {**shapes, HEAD: shapes[EMBEDDING]}
    where = folder / (INDEX if index else SINGLE if (folder / SINGLE).exists() else "*.safetensors")
    entries: dict[str, _Entry] = {}
    unexpected = []
    for entry in stored.values():
        name = canonical_name(entry.stored_name)
        if entry.stored_name.endswith(IGNORED_SUFFIXES):
            continue
        if name not in allowed:
            unexpected.append(entry)
        elif name in entries:
            raise CheckpointError(
                f"{entry.path}: tensors {entry.stored_name!r} and {entries[name].stored_name!r} (in "
                f"{entries[name].path.name}) are the same one under two names; keep one"
            )
        else:
            entries[name] = entry
    missing = [name for name in shapes if name not in entries]
    if missing:
        raise CheckpointError(
            f"{where}: tensor {missing[0]!r} is missing{_more(missing, 'tensors')}; config.json says that it is "
            f"{list(shapes[missing[0]])}: {AGAIN}, or correct config.json"
        )
    if unexpected:
        raise CheckpointError(
            f"{unexpected[0].path}: unexpected tensor {unexpected[0].stored_name!r}{_more(unexpected, 'tensors')}; "
            f"config.json does not describe it: an adapter, another architecture or more layers than configured"
        )
    wrong = [name for name, entry in entries.items() if entry.shape != allowed[name]]
    if wrong:
        entry = entries[wrong[0]]
        raise CheckpointError(
            f"{entry.path}: tensor {entry.stored_name!r} is {list(entry.shape)}, expected {list(allowed[wrong[0]])} by "
            f"config.json{_more(wrong, 'tensors')}"
        )
    foreign = [entry for entry in entries.values() if entry.dtype not in DTYPES]
    if foreign:
        raise CheckpointError(
            f"{foreign[0].path}: tensor {foreign[0].stored_name!r} is {foreign[0].dtype}, expected one of "
            f"{', '.join(DTYPES)}{_more(foreign, 'tensors')}"
        )
    return entries


def _more(items: list[Any], what: str) -> str:
    return f" (and {len(items) - 1} more {what})" if len(items) > 1 else ""
