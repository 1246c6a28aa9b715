"""From a checkpoint to a bundle: graphs, tokenizer, template, golden vectors and, last of all, the manifest.

Everything is written to a folder beside the target and renamed when complete: killed at any moment, an export leaves
nothing that opens. Needs no torch; golden vectors are added where torch and transformers are installed.
"""

from __future__ import annotations

import errno
import importlib.metadata
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from edgevl.export.decoder import write_decoder
from edgevl.export.further_graphs import write_further_decoders, write_further_encoders
from edgevl.export.graph import DataFile
from edgevl.export.precision import Precision
from edgevl.export.swap import swap
from edgevl.export.targets import TARGETS, Target, find_target
from edgevl.export.vision_encoder import write_vision_encoder
from edgevl.runtime.bundle import MANIFEST, OPENVINO_PREFILL, Bundle, FileEntry, GraphEntry, file_sha256
from edgevl.runtime.checkpoint import DECODER_LAYERS, Checkpoint, expected_shapes
from edgevl.runtime.doctor import peak_rss_bytes
from edgevl.runtime.errors import BundleError, InputError
from edgevl.runtime.image_processing import ImageProcessorConfig
from edgevl.runtime.mrope import MROPE_RULES
from edgevl.runtime.prompt import load_chat_template
from edgevl.runtime.quantized_layers import QuantizedLayer, own_precision
from edgevl.runtime.tokenizer import Tokenizer

__all__ = ["KV_CACHES", "PRECISIONS", "TARGETS", "ExportOptions", "ExportReport", "PartReport", "export_bundle"]

PRECISIONS = TARGETS["cpu"].precisions  # overall name -> (vision, decoder)
DEFAULT_PRECISION = "int4"
DEFAULT_MAX_TOKENS = TARGETS["cpu"].default_max_tokens
KV_CACHES = ("float", "int8")


@dataclass(frozen=True)
class ExportOptions:
    """What to export; `vision_precision` and `decoder_precision` default to what `precision` implies.

    `precision` defaults to int4, and to what the checkpoint is where it is quantized. `block_size`, `symmetric` and
    `head_bits` are for layers that are rounded here; `head_bits` and `max_tokens` default to what the target has.
    `kv_cache` int8 takes its scales from the checkpoint. `prefill_from` makes a weight-only quantized checkpoint
    hybrid: prefill in W8A8, rounded from the original there.
    """

    precision: str | None = None
    vision_precision: str | None = None
    decoder_precision: str | None = None
    block_size: int = 128
    symmetric: bool = True
    head_bits: int | None = None
    kv_cache: str = "float"
    prefill_from: str | None = None
    max_tokens: int | None = None
    mrope_rule: str = "released"
    target: str = "cpu"


@dataclass(frozen=True)
class PartReport:
    part: str
    precision: str
    nbytes: int


@dataclass(frozen=True)
class ExportReport:
    bundle: Path
    parts: tuple[PartReport, ...]
    seconds: float
    peak_rss_bytes: int


Progress = Callable[[str, int, int], None]  # tensor, its bytes, bytes expected in all
Finish = Callable[[Path, Bundle], dict[str, FileEntry]]


@dataclass(frozen=True)
class _Plan:
    target: Target
    vision: Precision
    decoder: tuple[Precision, ...]
    max_tokens: int
    original: Checkpoint | None = None  # what a prefill graph is rounded from, where it is not the checkpoint itself


def export_bundle(
    source: str | Path,
    output: str | Path,
    options: ExportOptions = ExportOptions(),
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    finish: Finish | None = None,
) -> ExportReport:
    """Write the bundle `output` for the checkpoint `source` (a folder, or a hub id).

    Args:
        overwrite: replace an existing bundle at `output`; without it an existing path is an error.
        progress: told of every tensor written.
        finish: called with the unfinished folder and its bundle before the manifest is written (golden vectors);
            returns the files that it added.

    Raises:
        CheckpointError, InputError: the checkpoint or an option cannot be used.
        BundleError: the output exists, or the disk is full.
    """
    started = time.monotonic()
    target = Path(os.path.realpath(output))  # a link stays, and what it leads to is replaced
    _check_output(target, overwrite)
    with ExitStack() as stack:
        checkpoint = stack.enter_context(Checkpoint.open(source))
        original = options.prefill_from and stack.enter_context(Checkpoint.open(options.prefill_from))
        plan = _plan(checkpoint, options, original or None)
        _check_space(target, checkpoint, plan)
        with _partial_folder(target, overwrite) as folder:
            bundle = _write(checkpoint, folder, plan, options, progress)
            if finish is not None:
                bundle.files.update(finish(folder, bundle))
            bundle.write_manifest()
    parts = tuple(_part_reports(target, bundle))
    return ExportReport(Path(output), parts, time.monotonic() - started, peak_rss_bytes())


def _plan(checkpoint: Checkpoint, options: ExportOptions, original: Checkpoint | None = None) -> _Plan:
    target = find_target(options.target)
    if options.precision is not None and options.precision not in target.precisions:
        raise InputError(
            f"precision {options.precision!r} is unknown for target {target.name!r}; expected one of "
            f"{', '.join(target.precisions)}"
        )
    if options.mrope_rule not in MROPE_RULES:
        raise InputError(f"M-RoPE rule {options.mrope_rule!r} is unknown; expected one of {', '.join(MROPE_RULES)}")
    vision, decoder = _precisions(checkpoint, options, target)
    longest = checkpoint.config.text.max_position_embeddings
    max_tokens = min(target.default_max_tokens, longest) if options.max_tokens is None else options.max_tokens
    if not 1 <= max_tokens <= longest:
        raise InputError(f"max tokens is {max_tokens}, expected 1 to {longest} (the model's max_position_embeddings)")
    rounding = (options.block_size, options.symmetric, options.head_bits)
    graphs = target.decoder_precision(decoder, *rounding)
    if original is not None:
        if target.name != "cpu":
            raise InputError(f"--prefill-from is offered for target cpu only, not for {target.name!r}; leave it away")
        _check_original(checkpoint, original, decoder)
        graphs = (*target.decoder_precision("int8", *rounding), *graphs)
    if _int8_cache(checkpoint, options):
        graphs = tuple(replace(precision, cache="int8") for precision in graphs)
    return _Plan(target, target.vision_precision(vision), graphs, max_tokens, original)


def _check_original(checkpoint: Checkpoint, original: Checkpoint, decoder: str) -> None:
    """A prefill graph of another checkpoint must write the KV cache that decode reads: the same model, and no smoothing
    of v_proj into o_proj, so nothing quantized; rotated alike, because image embeddings and values are."""
    if checkpoint.quantization is None or decoder not in ("int4", "int8-weights"):
        raise InputError(
            f"{checkpoint.folder}: --prefill-from goes with a checkpoint of quantized weights (GPTQ, AWQ); "
            "a plain one becomes hybrid with --decoder-precision hybrid"
        )
    if original.quantization is not None:
        raise InputError(
            f"{original.folder}: quantized ({original.quantization.method}); --prefill-from needs the unquantized "
            "checkpoint, the one that was quantized"
        )
    if checkpoint.rotation != original.rotation:
        turned = [
            "not rotated" if r is None else "rotated {kind} with seed {seed}".format(**r)
            for r in (original.rotation, checkpoint.rotation)
        ]
        raise InputError(
            f"{original.folder}: {turned[0]}, the quantized checkpoint {turned[1]}, so that one would not understand "
            "the other's KV cache; make a prefill checkpoint with `edgevl quantize --recipe none` and the same "
            "--rotate and --seed"
        )
    for part, ours in checkpoint.config.to_dict().items():
        theirs = original.config.to_dict()[part]
        wrong = [key for key in ours if ours[key] != theirs[key]]
        if wrong:
            raise InputError(
                f"{original.folder}: {part} {wrong[0]} is {theirs[wrong[0]]!r}, in the quantized checkpoint "
                f"{ours[wrong[0]]!r}; give the checkpoint that was quantized"
            )


def _int8_cache(checkpoint: Checkpoint, options: ExportOptions) -> bool:
    if options.kv_cache not in KV_CACHES:
        raise InputError(f"KV cache {options.kv_cache!r} is unknown; expected one of {', '.join(KV_CACHES)}")
    if options.kv_cache == "float":
        return False
    if options.target != "cpu":
        raise InputError(
            f"an INT8 KV cache is offered for target cpu only (ONNX Runtime), not for {options.target!r}; leave "
            "--kv-cache away"
        )
    checkpoint.cache.check()
    return True


def _precisions(checkpoint: Checkpoint, options: ExportOptions, target: Target) -> tuple[str, str]:
    """(vision, decoder) by name, as asked for; a quantized checkpoint brings its own where it has one."""
    vision, decoder = target.precisions[options.precision or DEFAULT_PRECISION]
    vision = options.vision_precision or vision
    decoder = options.decoder_precision or decoder
    layers = checkpoint.layers.values()
    own = own_precision(layers, "visual."), own_precision(layers)
    asked = options.vision_precision, options.precision or options.decoder_precision
    return (
        _own(checkpoint, "vision", own[0], vision, asked[0] is not None, target.vision_precisions),
        _own(checkpoint, "decoder", own[1], decoder, asked[1] is not None, target.decoder_precisions),
    )


def _own(checkpoint: Checkpoint, part: str, own: str | None, name: str, asked: bool, known: Sequence[str]) -> str:
    if own is None or name not in known:  # an unknown name is told of later
        return name
    if asked and name != own and checkpoint.quantization is not None:
        raise InputError(
            f"{checkpoint.folder}: {part} precision {name!r} was asked for, but the {part} of this "
            f"{checkpoint.quantization.method} checkpoint is {own!r}; leave the precision away, or export the "
            "unquantized checkpoint"
        )
    return own


def _write(
    checkpoint: Checkpoint, folder: Path, plan: _Plan, options: ExportOptions, progress: Progress | None
) -> Bundle:
    config = checkpoint.config
    # Everything small first: a malformed tokenizer must not surface after minutes of rounding.
    image_processor = ImageProcessorConfig.from_folder(checkpoint.folder)
    Tokenizer.from_folder(checkpoint.folder).to_file(folder / "tokenizer.json")
    template = load_chat_template(checkpoint.folder)
    (folder / "chat_template.jinja").write_text(template.source, encoding="utf-8")

    total = _expected_bytes(checkpoint, plan)
    on_tensor = None if progress is None else lambda key, size: progress(key, size, total)
    graphs: dict[str, GraphEntry] = {}
    files: dict[str, FileEntry] = {}
    with DataFile(folder / "vision.onnx.data", on_tensor) as data:
        spec = plan.target.vision_spec(config, plan.vision, plan.decoder[0])
        dialect = plan.target.dialect(spec, config, checkpoint, data, plan.vision)
        write_vision_encoder(dialect, config.vision)
        dialect.builder.save(folder / "vision.onnx")
        graphs["vision"] = GraphEntry("vision.onnx", plan.vision.name, spec)
        if plan.target.name == "cpu":
            graphs |= write_further_encoders(checkpoint, plan.vision, spec, data)
        digest = data.sha256()
    files["vision.onnx.data"] = FileEntry((folder / "vision.onnx.data").stat().st_size, digest)
    with DataFile(folder / "decoder.onnx.data", on_tensor) as data:
        roles = ("prefill", "decoder") if len(plan.decoder) == 2 else ("decoder",)
        sources = (plan.original or checkpoint, checkpoint) if len(plan.decoder) == 2 else (checkpoint,)
        parts = list(zip(roles, plan.decoder, sources))
        # What both graphs share, such as the table and the scales of the cache, is the quantized checkpoint's.
        for role, precision, read in reversed(parts) if plan.original else parts:
            spec = plan.target.decoder_spec(config, precision, role, plan.max_tokens)
            dialect = plan.target.dialect(spec, config, read, data, precision)
            write_decoder(dialect, config.text)
            dialect.builder.save(folder / f"{role}.onnx")
            graphs[role] = GraphEntry(f"{role}.onnx", precision.name, spec)
        if plan.target.name == "cpu":
            graphs |= write_further_decoders(sources, plan.decoder, graphs, data)
        digest = data.sha256()
    files["decoder.onnx.data"] = FileEntry((folder / "decoder.onnx.data").stat().st_size, digest)
    for path in sorted(folder.iterdir()):
        if path.name not in files:
            files[path.name] = FileEntry(path.stat().st_size, file_sha256(path))
    return Bundle(
        folder=folder,
        model=config,
        image_processor=image_processor,
        mrope_rule=options.mrope_rule,
        target=options.target,
        precision=_precision_name(plan),
        max_tokens=plan.max_tokens,
        requires=plan.target.engines(plan.vision, *plan.decoder),
        graphs=graphs,
        files=files,
        edgevl_version=importlib.metadata.version("edgevl"),
        options={
            **asdict(options),
            "prefill_from": options.prefill_from and Path(options.prefill_from).name,
            "precision": options.precision or (DEFAULT_PRECISION if checkpoint.quantization is None else None),
            "source_quantization": checkpoint.describe_quantization(),
        },
    )


def _precision_name(plan: _Plan) -> str:
    decoder = "hybrid" if len(plan.decoder) == 2 else plan.decoder[0].name
    cache = ", KV cache int8" if plan.decoder[0].cache else ""
    return f"vision {plan.vision.name}, decoder {decoder}{cache}"


def _check_output(target: Path, overwrite: bool) -> None:
    if target.is_symlink():  # though links were followed
        raise BundleError(f"{target}: a symbolic link that leads to itself; choose another output")
    if not target.parent.is_dir():
        raise BundleError(f"{target.parent}: no such folder; create it, or choose another output")
    if not target.exists():
        return
    if not overwrite:
        raise BundleError(f"{target}: exists already; choose another output, or pass --overwrite")
    if not (target / MANIFEST).is_file():
        raise BundleError(f"{target}: exists and is not a bundle; --overwrite replaces bundles only")


@contextmanager
def _partial_folder(target: Path, overwrite: bool) -> Iterator[Path]:
    """A folder that becomes `target` if the block completes, and disappears if it does not."""
    partial = target.with_name(f".{target.name}.partial")
    try:
        if partial.exists():  # of an export that was killed
            shutil.rmtree(partial)
        partial.mkdir()
        yield partial
        if overwrite:
            swap(partial, target)
        else:
            partial.rename(target)
    except OSError as e:
        shutil.rmtree(partial, ignore_errors=True)
        if e.errno == errno.ENOSPC:
            raise BundleError(f"{target}: the disk is full; free some space or choose another output") from None
        raise BundleError(f"{target}: cannot be written ({e})") from None
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _check_space(target: Path, checkpoint: Checkpoint, plan: _Plan) -> None:
    needed = _expected_bytes(checkpoint, plan)
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise BundleError(
            f"{target}: about {needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free; "
            "free some space, choose another output, or a smaller precision"
        )


def _expected_bytes(checkpoint: Checkpoint, plan: _Plan) -> int:
    """Size of the data files, from the shapes: what the disk must hold and what the progress counts towards."""
    total = 0.0
    for name, shape in expected_shapes(checkpoint.config).items():
        size = 1
        for d in shape:
            size *= d
        if name == "lm_head.weight" and checkpoint.config.text.tie_word_embeddings:
            continue
        layer = checkpoint.layer(name) if name.endswith(".weight") else None
        if layer is not None:
            total += _quantized_bytes(layer) + (size + 4 * shape[0] if plan.original else 0)
            continue
        precisions = (plan.vision,) if name.startswith("visual.") else plan.decoder
        is_table = name in ("model.embed_tokens.weight", "lm_head.weight")
        width = set()
        for p in precisions:
            form = p.table if is_table else p.linear
            kept = checkpoint.layers and name.startswith(DECODER_LAYERS)  # see WeightStore.format_of
            if len(shape) < 2 or form.kind == "float" or kept or "patch_embed" in name:
                width.add(4.0 if p.dtype == "float32" else 2.0)
            elif form.kind == "w8a8":
                width.add(1.0)
            else:
                width.add(form.bits / 8 + 4 / form.block_size)
        total += size * sum(width)
    return int(total)


def _quantized_bytes(layer: QuantizedLayer) -> float:
    rows, columns = layer.shape
    if layer.kind == "int8":
        return rows * (columns + 4)
    blocks = -(-columns // layer.block_size)
    zeros = layer.bits / 8 if layer.has_zero_points else 0
    return rows * blocks * (layer.block_size * layer.bits / 8 + 4 + zeros)


def _part_reports(folder: Path, bundle: Bundle) -> Iterator[PartReport]:
    decoder = "hybrid" if "prefill" in bundle.graphs else bundle.graphs["decoder"].precision
    sizes: dict[str, int] = {}
    for name, entry in bundle.files.items():
        part = "golden" if name.startswith("golden/") else name.split(".")[0]
        part = part.removesuffix("_native")
        part = {"prefill": "decoder", OPENVINO_PREFILL: "decoder", "chat_template": "tokenizer"}.get(part, part)
        sizes[part] = sizes.get(part, 0) + entry.size
    for part, precision in (("vision", bundle.graphs["vision"].precision), ("decoder", decoder)):
        yield PartReport(part, precision, sizes.pop(part))
    for part, size in sorted(sizes.items()):
        yield PartReport(part, "", size)
