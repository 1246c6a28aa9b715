"""The weights in further graphs of a CPU bundle, which one engine or machine uses and another does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgevl.export.decoder import write_decoder
from edgevl.export.dialect_native import (
    NativeDialect,
    has_native_decoder,
    has_native_vision,
)
from edgevl.export.dialect_openvino import OpenVinoDialect, is_offered
from edgevl.export.dialect_ort import OrtDialect
from edgevl.export.graph import DataFile
from edgevl.export.precision import Precision
from edgevl.export.vision_encoder import write_vision_encoder
from edgevl.runtime.bundle import NATIVE_ROLES, OPENVINO_PREFILL, GraphEntry
from edgevl.runtime.checkpoint import Checkpoint
from edgevl.runtime.config import TextConfig
from edgevl.runtime.graph_spec import GraphSpec, cache_filling_spec

__all__ = ["write_further_decoders", "write_further_encoders"]


def write_further_encoders(
    source: Checkpoint, precision: Precision, spec: GraphSpec, data: DataFile
) -> dict[str, GraphEntry]:
    """As `write_further_decoders`, of the vision encoder."""
    if not has_native_vision(precision, source):
        return {}
    written = NativeDialect(spec, source.config, source, data, precision)
    write_vision_encoder(written, source.config.vision)
    return {NATIVE_ROLES["vision"]: _saved(written, NATIVE_ROLES["vision"], precision)}


def write_further_decoders(
    sources: Sequence[Checkpoint],
    precisions: Sequence[Precision],
    graphs: Mapping[str, GraphEntry],
    data: DataFile,
) -> dict[str, GraphEntry]:
    """Write what the bundle can have of them, beside `data`, after the graphs whose weights they share.

    Args:
        sources, precisions: of the graph for prompts and of the decoder, or of the one that is both.
        graphs: these, by role.

    Returns:
        By role.
    """
    found = {}
    if is_offered(precisions[0], sources[0]):
        spec = cache_filling_spec(sources[0].config, OPENVINO_PREFILL)
        found[OPENVINO_PREFILL] = _write(
            OpenVinoDialect(spec, sources[0].config, sources[0], data, precisions[0]),
            OPENVINO_PREFILL,
            precisions[0],
            sources[0].config.text,
        )
    for role, source, precision in zip(("prefill", "decoder")[-len(sources) :], sources, precisions):
        if has_native_decoder(precision, source):
            written = NativeDialect(graphs[role].spec, source.config, source, data, precision)
            found[NATIVE_ROLES[role]] = _write(written, NATIVE_ROLES[role], precision, source.config.text)
    return found


def _write(dialect: OrtDialect, role: str, precision: Precision, config: TextConfig) -> GraphEntry:
    write_decoder(dialect, config)
    return _saved(dialect, role, precision)


def _saved(written: OrtDialect, role: str, precision: Precision) -> GraphEntry:
    written.builder.save(written.builder.data.path.with_name(f"{role}.onnx"))
    return GraphEntry(f"{role}.onnx", precision.name, written.builder.spec)
