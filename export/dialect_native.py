"""The native dialect: the ONNX Runtime decoder with edgevl's own products (runtime/native) in place of MatMulNBits.

The bytes of the weights are the same, so the graph is a second small file beside the decoder's, which stays for devices
without the kernels: they are built where a C compiler is found.
"""

from __future__ import annotations

from edgevl.export.dialect_ort import OrtDialect
from edgevl.export.graph import EDGEVL
from edgevl.export.precision import Precision
from edgevl.runtime.checkpoint import DECODER_LAYERS, Checkpoint

__all__ = ["NativeDialect", "has_native_decoder"]

_LEAST_BLOCK = 32


def has_native_decoder(precision: Precision, checkpoint: Checkpoint) -> bool:
    """Whether a decoder has products with weights in blocks that the kernels take, over a graph of float32."""
    layers = [q for name, q in checkpoint.layers.items() if name.startswith(DECODER_LAYERS)]
    taken = all(q.kind == "int8" or q.block_size >= _LEAST_BLOCK for q in layers)
    return taken and precision.dtype == "float32" and precision.table.kind == "blocks"


class NativeDialect(OrtDialect):
    """Implements edgevl.export.dialect.Dialect for a decoder."""

    nbits_domain = EDGEVL
