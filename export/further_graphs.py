"""The weights in further graphs of a CPU bundle, which one engine or machine uses and another does not."""

from __future__ import annotations

from collections.abc import Sequence

from edgevl.export.decoder import write_decoder
from edgevl.export.dialect_native import (
    NativeDialect,
    NativeVisionDialect,
    has_native_decoder,
    has_native_vision,
)
from edgevl.export.dialect_openvino import OpenVinoDialect, is_offered
from edgevl.export.dialect_ort import OrtDialect
from edgevl.export.graph import DataFile
from edgevl.export.precision import Precision
from edgevl.export.vision_encoder import write_vision_encoder
from edgevl.runtime.bundle import NATIVE_DECODER, NATIVE_VISION, OPENVINO_PREFILL, GraphEntry
from edgevl.runtime.checkpoint import Checkpoint
from edgevl.runtime.graph_spec import GraphSpec, cache_filling_spec

__all__ = ["write_further_decoders", "write_further_encoders"]


def write_further_encoders(
    source: Checkpoint, precision: Precision, spec: GraphSpec, data: DataFile
) -> dict[str, GraphEntry]:
    """As `write_further_decoders`, of the vision encoder."""
    if not has_native_vision(precision, source):
        return {}
    written = NativeVisionDialect(spec, source.config, source, data, precision)
    write_vision_encoder(written, source.config.vision)
    return {NATIVE_VISION: _saved(written, NATIVE_VISION, precision, data)}


def write_further_decoders(
    sources: Sequence[Checkpoint], precisions: Sequence[Precision], spec: GraphSpec, data: DataFile
) -> dict[str, GraphEntry]:
    """Write what the bundle can have of them, beside `data`, after the graphs whose weights they share.

    Args:
        sources, precisions: of the graph for prompts and of the decoder, or of the one that is both.
        spec: the decoder's.

    Returns:
        By role.
    """
    found = {}
    if is_offered(precisions[0], sources[0]):
        filling = cache_filling_spec(sources[0].config, OPENVINO_PREFILL)
        found[OPENVINO_PREFILL] = _write(OpenVinoDialect, OPENVINO_PREFILL, filling, sources[0], precisions[0], data)
    if has_native_decoder(precisions[-1], sources[-1]):
        found[NATIVE_DECODER] = _write(NativeDialect, NATIVE_DECODER, spec, sources[-1], precisions[-1], data)
    return found


def _write(
    dialect: type[OpenVinoDialect] | type[NativeDialect],
    role: str,
    spec: GraphSpec,
    source: Checkpoint,
    precision: Precision,
    data: DataFile,
) -> GraphEntry:
    written = dialect(spec, source.config, source, data, precision)
    write_decoder(written, source.config.text)
    return _saved(written, role, precision, data)


def _saved(written: OrtDialect, role: str, precision: Precision, data: DataFile) -> GraphEntry:
    written.builder.save(data.path.with_name(f"{role}.onnx"))
    return GraphEntry(f"{role}.onnx", precision.name, written.builder.spec)
