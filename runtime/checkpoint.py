"""Reads Qwen2-VL checkpoints: safetensors by name, one tensor at a time, as float32; knows neither torch nor graphs.

Everything that can be wrong with a checkpoint is found when it is opened, except the values, which are checked as they
are read. Layers that are stored quantized are recognized (edgevl.runtime.quantized_layers); their codes are read by
edgevl.calibration.quantized.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from edgevl.runtime.cache_scales import CacheScales, take_cache_scales
from edgevl.runtime.config import ModelConfig
from edgevl.runtime.errors import CheckpointError
from edgevl.runtime.quantized_layers import QuantizedLayer, own_precision, take_layers
from edgevl.runtime.schemes import Quantization, quantization_config, read_quantization, read_rotation
from edgevl.runtime.shards import (
    AGAIN,
    CHUNK,
    DTYPES,
    INDEX,
    SINGLE,
    Entry,
    ShardReader,
    more,
    read_header,
    weight_files,
)

__all__ = ["DECODER_LAYERS", "DTYPES", "IGNORED_SUFFIXES", "RENAMES", "Checkpoint", "canonical_name", "expected_shapes"]

# Prefix found -> prefix of the released naming; the first that fits applies.
RENAMES = (
    ("model.language_model.", "model."),  # as transformers holds it in memory, save_original_format=False
    ("model.visual.", "visual."),
    ("language_model.", "model."),  # Qwen2VLModel (without the head) saved on its own
)

# Buffers that old versions of transformers saved; they are recomputed from the config.
IGNORED_SUFFIXES = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq")

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
DECODER_LAYERS = "model.layers."
HUB_PATTERNS = ["*.safetensors", "*.json", "merges.txt", "*.jinja"]


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


class Checkpoint:
    """A checkpoint whose tensors are all there, with the right shapes; made by `Checkpoint.open`.

    Names are the released ones, whatever the files say. A layer that is stored quantized is listed under the name of
    its weight; `layer` says how it is stored. Reading is safe from several threads. A context manager.
    """

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        entries: dict[str, Entry],
        quantization: Quantization | None = None,
        layers: dict[str, QuantizedLayer] | None = None,
        cache: CacheScales | None = None,
        rotation: dict[str, Any] | None = None,
    ) -> None:
        self.folder = folder
        self.config = config
        self.quantization = quantization
        self.files = ShardReader()
        self.layers = layers or {}
        self.cache = cache or CacheScales(folder, config.text, None, {})
        self.rotation = rotation
        self._entries = entries

    @classmethod
    def open(cls, source: str | Path) -> Checkpoint:
        """Open a checkpoint folder, or a hub id such as "Qwen/Qwen2-VL-2B-Instruct" when there is no such path.

        Raises:
            CheckpointError: the folder, its config or a tensor is missing, malformed, mis-shaped, of another
                architecture or in a format that is not read.
        """
        folder = _resolve(source)
        config = ModelConfig.from_folder(folder)
        said = read_quantization(folder)
        paths, index = weight_files(folder)
        stored: dict[str, Entry] = {}
        for path in paths:
            for entry in read_header(path):
                if entry.stored_name in stored:
                    raise CheckpointError(
                        f"{path}: tensor {entry.stored_name!r} is also in {stored[entry.stored_name].path.name}; "
                        f"remove the file that does not belong to the checkpoint"
                    )
                stored[entry.stored_name] = entry
        _check_index(folder, index, stored)
        rotation = read_rotation(folder)
        named = _released(stored)
        shapes = expected_shapes(config)
        cache = take_cache_scales(folder, config.text, named, quantization_config(folder)[0])
        layers, zeros = take_layers(folder, named, shapes, said)
        plain = {name: shape for name, shape in shapes.items() if name.removesuffix(".weight") not in layers}
        _match(folder, config, plain, named, index)
        out = cls(folder, config, {name: named[name] for name in plain}, said, layers, cache, rotation)
        try:
            for name, entry in zeros.items():
                out._check_zero(name, entry)
            if config.text.tie_word_embeddings and HEAD in named:
                out._check_tied(named[HEAD])
            out.layers = {name: out._with_input_scale(layer) for name, layer in out.layers.items()}
        except BaseException:
            out.close()
            raise
        return out

    def names(self) -> list[str]:
        """The released names, in the order of computation; no `lm_head.weight` where it is tied to the embedding."""
        return [n for n in expected_shapes(self.config) if n in self._entries or self.layer(n) is not None]

    def layer(self, name: str) -> QuantizedLayer | None:
        """How the layer `name` (with or without `.weight`) is stored; None where its weight is plain."""
        return self.layers.get(name.removesuffix(".weight"))

    def describe_quantization(self) -> dict[str, Any] | None:
        """Method, format, and the bits and group sizes (-1: whole rows) of the quantized layers."""
        if self.quantization is None:
            return None
        return {
            "method": self.quantization.method,
            "format": self.quantization.format,
            "bits": sorted({layer.bits for layer in self.layers.values()}),
            "group_size": sorted({layer.group_size for layer in self.layers.values()}),
            "layers": len(self.layers),
            "precision": own_precision(self.layers.values()),
            "vision_precision": own_precision(self.layers.values(), "visual."),
            "static_activations": sum(layer.input_scale is not None for layer in self.layers.values()),
        }

    def cache_scale(self, layer: int, kind: str) -> np.ndarray:
        """float32 [kv_heads, head_dim]: the scales of an INT8 KV cache, `kind` "k" or "v".

        Raises:
            CheckpointError: the checkpoint has no such scales, or one that cannot be.
        """
        self.cache.check()
        return self.cache.read(self.files, layer, kind)

    def shape(self, name: str) -> tuple[int, ...]:
        """As computed with: the codes of a quantized layer lie in other shapes."""
        layer = self.layer(name) if name.endswith(".weight") else None
        return self._entries[name].shape if layer is None else layer.shape

    def dtype(self, name: str) -> str:
        """As stored: "BF16", "F16" or "F32", and "INT4" or "INT8" for a quantized layer."""
        layer = self.layer(name) if name.endswith(".weight") else None
        return self._entries[name].dtype if layer is None else f"INT{layer.bits}"

    def nbytes(self, name: str) -> int:
        """As stored; of a quantized layer its scales and zero points too."""
        layer = self.layer(name) if name.endswith(".weight") else None
        entries = [self._entries[name]] if layer is None else list(layer.entries.values())
        return sum(entry.end - entry.begin for entry in entries)

    def read(self, name: str) -> np.ndarray:
        """The whole tensor, float32, in its shape.

        Raises:
            CheckpointError: a value is NaN or infinite, the file cannot be read any more, or the layer is quantized.
            KeyError: no such tensor (see `names`).
        """
        entry = self._plain(name)
        return self.files.floats(name, entry, 0, math.prod(entry.shape)).reshape(entry.shape)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows start..stop of the first axis, float32 [stop - start, product of the other axes].

        Raises:
            CheckpointError: as `read`.
            KeyError: no such tensor.
            IndexError: the range does not lie within the first axis.
        """
        entry = self._plain(name)
        count = entry.shape[0] if entry.shape else 0
        if not 0 <= start <= stop <= count:
            raise IndexError(f"{name}: rows {start}..{stop} of {count}")
        flat = self.files.floats(name, entry, start * entry.row_size, (stop - start) * entry.row_size)
        return flat.reshape(stop - start, entry.row_size)

    def close(self) -> None:
        self.files.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _plain(self, name: str) -> Entry:
        if name not in self._entries and self.quantization is not None and self.layer(name) is not None:
            raise CheckpointError(
                f"{self.folder}: {name!r} is stored quantized ({self.quantization.method}), expected plain numbers: "
                "use the unquantized checkpoint"
            )
        return self._entries[name]

    def _with_input_scale(self, layer: QuantizedLayer) -> QuantizedLayer:
        """The layer with its static scale read, where it has one."""
        entry, zero = (layer.entries.get(s) for s in ("input_scale", "input_zero_point"))
        if entry is None:
            return layer
        scale = float(self.files.floats(entry.stored_name, entry, 0, 1)[0])
        if scale <= 0:
            raise layer.error("input_scale", f"holds {scale:g}, expected a positive number; {AGAIN}")
        if zero is not None and self.files.integers(zero).any():
            raise layer.error("input_zero_point", "is not zero; static activations are read symmetric only")
        return replace(layer, input_scale=scale)

    def _check_zero(self, name: str, entry: Entry) -> None:
        """The bias of a layer that has none: old AutoGPTQ wrote zeros for all."""
        if entry.dtype not in DTYPES or self.files.floats(name, entry, 0, math.prod(entry.shape)).any():
            raise CheckpointError(
                f"{entry.path}: unexpected tensor {entry.stored_name!r}: the layer has no bias in Qwen2-VL, and this "
                f"one is not zero; {AGAIN}"
            )

    def _check_tied(self, head: Entry) -> None:
        embedding = self._entries[EMBEDDING]
        count = math.prod(head.shape)
        for start in range(0, count, CHUNK):
            size = min(CHUNK, count - start)
            ours = self.files.floats(EMBEDDING, embedding, start, size)
            if not np.array_equal(ours, self.files.floats(HEAD, head, start, size)):
                raise CheckpointError(
                    f"{head.path}: tensor {HEAD!r} differs from {EMBEDDING!r}, but config.json has tie_word_embeddings "
                    f"true: set it to false if the head is meant to be its own"
                )


def _resolve(source: str | Path) -> Path:
    """The folder of `source`, downloaded first when it is a hub id."""
    folder = Path(source)
    try:
        if folder.is_dir():
            return folder
        if folder.exists():
            raise CheckpointError(f"{source}: a file, expected the checkpoint's folder")
    except OSError as e:  # a name that is too long, a folder above that may not be looked into
        raise CheckpointError(f"{str(source)[:200]}: cannot be read ({e.strerror}); check the path") from None
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


def _check_index(folder: Path, index: dict[str, str], stored: dict[str, Entry]) -> None:
    wrong = [name for name, file in index.items() if name not in stored or stored[name].path.name != file]
    if wrong:
        raise CheckpointError(
            f"{folder / index[wrong[0]]}: tensor {wrong[0]!r} is not in it, but {INDEX} places it there"
            f"{more(wrong, 'tensors')}; {AGAIN}"
        )


def _released(stored: dict[str, Entry]) -> dict[str, Entry]:
    """Released name -> entry; ignored ones left out, none under two names."""
    named: dict[str, Entry] = {}
    for entry in stored.values():
        name = canonical_name(entry.stored_name)
        if entry.stored_name.endswith(IGNORED_SUFFIXES):
            continue
        if name in named:
            raise CheckpointError(
                f"{entry.path}: tensors {entry.stored_name!r} and {named[name].stored_name!r} (in "
                f"{named[name].path.name}) are the same one under two names; keep one"
            )
        named[name] = entry
    return named


def _match(
    folder: Path,
    config: ModelConfig,
    shapes: dict[str, tuple[int, ...]],
    entries: dict[str, Entry],
    index: dict[str, str],
) -> None:
    """Every expected plain tensor must be there and no other, but for a tied head."""
    allowed = {**shapes, HEAD: shapes[EMBEDDING]}
    where = folder / (INDEX if index else SINGLE if (folder / SINGLE).exists() else "*.safetensors")
    unexpected = [entry for name, entry in entries.items() if name not in allowed]
    missing = [name for name in shapes if name not in entries]
    if missing:
        raise CheckpointError(
            f"{where}: tensor {missing[0]!r} is missing{more(missing, 'tensors')}; config.json says that it is "
            f"{list(shapes[missing[0]])}: {AGAIN}, or correct config.json"
        )
    if unexpected:
        raise CheckpointError(
            f"{unexpected[0].path}: unexpected tensor {unexpected[0].stored_name!r}{more(unexpected, 'tensors')}; "
            f"config.json does not describe it: an adapter, another architecture or more layers than configured"
        )
    wrong = [name for name, entry in entries.items() if entry.shape != allowed[name]]
    if wrong:
        entry = entries[wrong[0]]
        raise CheckpointError(
            f"{entry.path}: tensor {entry.stored_name!r} is {list(entry.shape)}, expected {list(allowed[wrong[0]])} by "
            f"config.json{more(wrong, 'tensors')}"
        )
    foreign = [entry for entry in entries.values() if entry.dtype not in DTYPES]
    if foreign:
        raise CheckpointError(
            f"{foreign[0].path}: tensor {foreign[0].stored_name!r} is {foreign[0].dtype}, expected one of "
            f"{', '.join(DTYPES)}{more(foreign, 'tensors')}"
        )
