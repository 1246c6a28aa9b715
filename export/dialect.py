"""The vocabulary in which the model files write Qwen2-VL; each dialect says how a word becomes nodes.

A word takes and gives graph values; weights are named by their canonical checkpoint name without the suffix
(`model.layers.0.mlp.up_proj`), and the dialect decides from the precision how they are stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import onnx_ir as ir

__all__ = ["Dialect"]


class Dialect(Protocol):
    narrows_last_layer: bool  # whether the wanted rows leave the others before the last layer's MLP, or behind it

    def input(self, name: str) -> ir.Value: ...

    def output(self, name: str, value: ir.Value) -> None: ...

    def embedding(self, ids: ir.Value, table: str) -> ir.Value:
        """ids [B, S] -> [B, S, hidden]."""
        ...

    def place_images(self, x: ir.Value) -> ir.Value:
        """x [B, S, H] with the graph's image_embeds at the places that another input of its spec names."""
        ...

    def take_rows(self, x: ir.Value, rows: ir.Value) -> ir.Value:
        """x [B, S, H] -> [rows, H] at flat positions."""
        ...

    def linear(self, x: ir.Value, name: str, bias: bool = False) -> ir.Value:
        """x [..., K] -> [..., N]."""
        ...

    def linears(self, x: ir.Value, names: Sequence[str], bias: bool = False) -> tuple[ir.Value, ...]:
        """Several layers over one input, which a dialect may merge or whose quantized input they may share."""
        ...

    def rms_norm(self, x: ir.Value, name: str, epsilon: float) -> ir.Value: ...

    def layer_norm(self, x: ir.Value, name: str, epsilon: float) -> ir.Value: ...

    def add(self, a: ir.Value, b: ir.Value) -> ir.Value: ...

    def gated_mlp(self, x: ir.Value, gate: str, up: str, down: str) -> ir.Value:
        """down(silu(gate(x)) * up(x))."""
        ...

    def quick_gelu(self, x: ir.Value) -> ir.Value:
        """x * sigmoid(1.702 x)."""
        ...

    def gelu(self, x: ir.Value) -> ir.Value:
        """The exact one, with erf."""
        ...

    def causal_attention(self, q: ir.Value, k: ir.Value, v: ir.Value, layer: int) -> ir.Value | None:
        """Rotary embedding of q and k, in-place cache update of `layer`, grouped-query attention; [B, S, heads × d].
        None in the last layer of a graph that fills the cache and has no logits."""
        ...

    def frame_attention(self, x: ir.Value, qkv: str) -> ir.Value:
        """x [frames, patches, E] -> attention of every frame over its own patches, rotary included; [F, P, E]."""
        ...

    def merge_rows(self, x: ir.Value, width: int) -> ir.Value:
        """[frames, patches, E] -> [frames × patches × E / width, width]."""
        ...

    def patch_embedding(self, patches: ir.Value, name: str) -> ir.Value:
        """patches [F, P, C × T × p × p] -> [F, P, E]: the reference's Conv3d (stride = kernel) as a product."""
        ...

    def lm_head(self, x: ir.Value, table: str) -> ir.Value:
        """[rows, hidden] -> float32 [rows, vocab]."""
        ...
