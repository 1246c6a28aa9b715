"""Qwen2-VL in plain PyTorch for training batches of equal-sized pictures. Parameter names are the hub's.

All rows of a batch share picture sizes and place of the pictures, so rotary tables, masks and the leading
"system ... user <|vision_start|>" tokens (the prefix) are computed once, not per row. Matrix products run in the
model's `compute` dtype; weights and residual streams stay float32. With compute = float32 the logits are those of
transformers' Qwen2VLForConditionalGeneration (tests/test_training_model.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONFIG = dict(
    vit_dim=192,
    vit_layers=6,
    vit_heads=6,
    patch=14,
    dim=256,
    layers=4,
    heads=8,
    kv_heads=2,
    head_dim=32,
    inter=512,
    vocab=512,
    theta=10.0,
    mrope=[4, 6, 6],
    eps=1e-6,
)
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, compute: torch.dtype) -> Tensor:
    """x @ weight.T + bias in the compute dtype."""
    return F.linear(x.to(compute), weight.to(compute), None if bias is None else bias.to(compute))


class Linear(nn.Linear):
    """float32 weights, product in `compute` (set by Model.set_compute)."""

    compute = torch.float32

    def forward(self, input: Tensor, scale: float = 1.0, bias_scale: float | None = None) -> Tensor:
        """scale multiplies the weight, bias_scale (default: the same) the bias."""
        w, b = self.weight, self.bias
        if scale != 1.0:
            w = w * scale
            b = None if b is None else b * (scale if bias_scale is None else bias_scale)
        return linear(input, w, b, self.compute)


class RMSNorm(nn.Module):
    """float32 in and out."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., n, d], tables [n, d]."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


class VisionAttention(nn.Module):
    """Weights only."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.qkv, self.proj = Linear(d, 3 * d), Linear(d, d)


class VisionMLP(nn.Module):
    """quick-gelu: y * sigmoid(1.702 y) = silu(1.702 y) / 1.702; both factors go into the small weights."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = Linear(d, 4 * d), Linear(4 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(x, 1.702)), 1 / 1.702, 1.0)


class VisionBlock(nn.Module):
    def __init__(self, c: dict) -> None:
        super().__init__()
        d = c["vit_dim"]
        self.heads = c["vit_heads"]
        self.norm1, self.norm2 = nn.LayerNorm(d, 1e-6), nn.LayerNorm(d, 1e-6)
        self.attn, self.mlp = VisionAttention(d), VisionMLP(d)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [B, n, d]"""
        B, n, d = x.shape
        q, k, v = self.attn.qkv(self.norm1(x)).view(B, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        p = (q @ k.transpose(-1, -2) * (d // self.heads) ** -0.5).softmax(-1)
        x = x + self.attn.proj((p @ v).transpose(1, 2).reshape(B, n, d))
        return x + self.mlp(self.norm2(x))


class DecoderAttention(nn.Module):
    """Weights only."""

    def __init__(self, d: int, heads: int, kv: int, hd: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = Linear(d, heads * hd), Linear(d, kv * hd), Linear(d, kv * hd)
        self.o_proj = Linear(heads * hd, d, bias=False)


class DecoderMLP(nn.Module):
    def __init__(self, d: int, inter: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = Linear(d, inter, bias=False), Linear(d, inter, bias=False)
        self.down_proj = Linear(inter, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, c: dict) -> None:
        super().__init__()
        d, hd = c["dim"], c["head_dim"]
        self.kv, self.hd = c["kv_heads"], hd
        self.first_head = torch.empty(0)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(d, c["eps"]), RMSNorm(d, c["eps"])
        self.self_attn = DecoderAttention(d, c["heads"], self.kv, hd)
        self.mlp = DecoderMLP(d, c["inter"])

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        """q [B, T, heads*hd]; k, v [B, S, kv, hd]; bias [T, S]"""
        B, T, S = q.shape[0], q.shape[1], k.shape[1]
        g = q.shape[2] // (self.kv * self.hd)
        q = q.view(B, T, self.kv, g, self.hd).permute(0, 2, 3, 1, 4).reshape(B, self.kv, g * T, self.hd)
        s = q @ k.permute(0, 2, 3, 1) * self.hd**-0.5
        s = (s.view(B, self.kv, g, T, S) + bias).softmax(-1)
        self.first_head = s[:, 0, 0]  # taught by losses.py to look at what is asked for
        s = s.view(B, self.kv, g * T, S)
        o = (s @ v.transpose(1, 2)).view(B, self.kv, g, T, self.hd)
        return o.permute(0, 3, 1, 2, 4).reshape(B, T, -1)

    def forward(self, x: Tensor, P: int, B: int, cos: Tensor, sin: Tensor, bias: Tensor) -> Tensor:
        """x [P + B*T, d]: the shared prefix, then the rows"""
        a, n = self.self_attn, x.shape[0]
        y = self.input_layernorm(x)
        q, k, v = a.q_proj(y), a.k_proj(y), a.v_proj(y)
        q = rotate(q.view(n, -1, self.hd), cos, sin).view(n, -1)
        k = rotate(k.view(n, self.kv, self.hd), cos, sin)
        v = v.view(n, self.kv, self.hd)

        def rows(t: Tensor) -> Tensor:
            return t[P:].view(B, -1, *t.shape[1:])

        def whole(t: Tensor) -> Tensor:
            return torch.cat((t[None, :P].expand(B, *[-1] * t.dim()), rows(t)), 1)

        prefix = self.attend(q[None, :P], k[None, :P], v[None, :P], bias[:P, :P])[0]
        o = torch.cat((prefix, self.attend(rows(q), whole(k), whole(v), bias[P:]).reshape(n - P, -1)))
        x = x + a.o_proj(o)
        return x + self.mlp(self.post_attention_layernorm(x))


class PatchEmbed(nn.Module):
    """A convolution used as a matrix."""

    def __init__(self, d: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(3, d, (2, patch, patch), bias=False)


class Merger(nn.Module):
    """Four patches to one token."""

    def __init__(self, d: int, out: int) -> None:
        super().__init__()
        self.ln_q = nn.LayerNorm(d, 1e-6)
        self.mlp = nn.Sequential(Linear(4 * d, 4 * d), nn.GELU(), Linear(4 * d, out))


class VisionTower(nn.Module):
    """Weights only; see Model.vision."""

    def __init__(self, c: dict) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(c["vit_dim"], c["patch"])
        self.blocks = nn.ModuleList(VisionBlock(c) for _ in range(c["vit_layers"]))
        self.merger = Merger(c["vit_dim"], c["dim"])


class Decoder(nn.Module):
    """Weights only; see Model.decode."""

    def __init__(self, c: dict) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c["vocab"], c["dim"])
        self.layers = nn.ModuleList(DecoderLayer(c) for _ in range(c["layers"]))
        self.norm = RMSNorm(c["dim"], c["eps"])

    def first_head(self, layer: int) -> Tensor:
        """The attention map [B, T, S] of a layer's first head in the last pass."""
        found = self.layers[layer]
        if not isinstance(found, DecoderLayer):
            raise TypeError(f"layer {layer} is a {type(found).__name__}")
        return found.first_head


class Model(nn.Module):
    """visual.* and model.*, as in the released checkpoints; the embedding is also the output layer."""

    def __init__(self, c: dict = CONFIG) -> None:
        super().__init__()
        self.c = c
        self.compute = torch.float32
        self.visual, self.model = VisionTower(c), Decoder(c)
        self._start()

    def _start(self) -> None:
        for n, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=p.shape[1] ** -0.5)
            if n.endswith("bias"):
                nn.init.zeros_(p)
            if n.endswith(("attn.proj.weight", "fc2.weight", "o_proj.weight", "down_proj.weight")):
                p.data *= 0.3
        nn.init.normal_(self.model.embed_tokens.weight, std=0.02)

    def set_compute(self, dtype: torch.dtype) -> Model:
        """The dtype of matrix products (bfloat16 to train fast, float32 to compare)."""
        self.compute = dtype
        for m in self.modules():
            if isinstance(m, Linear):
                m.compute = dtype
        return self

    def patches(self, pictures: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] or clips [B, F, H, W, 3] -> float32 [B, t, patches, values], in the merger's order. A
        still keeps one frame of values (588): both halves of the patch embedding see the same."""
        p, dev = self.c["patch"], pictures.device
        if pictures.dim() == 4:
            pictures = pictures[:, None]
        B, f, H, W, _ = pictures.shape
        x = (pictures.float() / 255 - torch.tensor(MEAN, device=dev)) / torch.tensor(STD, device=dev)
        t = max(1, f // 2)
        x = x.view(B, t, f // t, H // p // 2, 2, p, W // p // 2, 2, p, 3)
        x = x.permute(0, 1, 3, 6, 4, 7, 9, 2, 5, 8)  # B t rows columns 2 2 channel frame p p
        return x.reshape(B, t, (H // p) * (W // p), -1)

    def vision(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """-> merger output [B, t*cells, d] and its normalised input [B*t, patches, D]"""
        c, v, dev = self.c, self.visual, pictures.device
        x = self.patches(pictures)
        B, t, n, k = x.shape
        w = v.patch_embed.proj.weight
        w = w.sum(2).flatten(1) if k == w[0].numel() // 2 else w.flatten(1)
        x = linear(x.view(B * t, n, k), w, None, self.compute).float()
        rows, columns = pictures.shape[-3] // c["patch"], pictures.shape[-2] // c["patch"]
        r, q = torch.meshgrid(torch.arange(rows, device=dev), torch.arange(columns, device=dev), indexing="ij")
        r, q = (a.view(rows // 2, 2, columns // 2, 2).transpose(1, 2).reshape(-1, 1) for a in (r, q))
        hd = c["vit_dim"] // c["vit_heads"]
        inv = 1 / 10000 ** (torch.arange(0, hd // 2, 2, device=dev).float() / (hd // 2))
        f = torch.cat((r * inv, q * inv), 1).repeat(1, 2)
        cos, sin = f.cos().to(self.compute), f.sin().to(self.compute)
        for b in v.blocks:
            x = b(x, cos, sin)
        x = v.merger.ln_q(x)
        y = v.merger.mlp(x.reshape(B, t * n // 4, -1))
        return y.float(), x

    def decode(
        self,
        ids: Tensor,
        pos: Tensor,
        P: int,
        vis: Tensor,
        cols: Tensor,
        want: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """ids [B, L]; pos [3, L], shared; P leading tokens are the same in all rows; vis [B, n, d] goes to columns
        cols. want: (rows, columns) whose logits are asked, all of them if None -> float32 [..., vocab]"""
        c, m, dev = self.c, self.model, ids.device
        B, L = ids.shape
        x = m.embed_tokens(ids).index_copy(1, cols, vis)
        x = torch.cat((x[0, :P], x[:, P:].reshape(-1, x.shape[-1])))
        inv = 1 / c["theta"] ** (torch.arange(0, c["head_dim"], 2, device=dev).float() / c["head_dim"])
        f = pos[:, :, None].float() * inv
        f = torch.cat([s[i % 3] for i, s in enumerate(f.split(c["mrope"], -1))], -1).repeat(1, 2)
        f = torch.cat((f[:P], f[P:].repeat(B, 1)))[:, None]
        cos, sin = f.cos().to(self.compute), f.sin().to(self.compute)
        bias = torch.full((L, L), -3e4, device=dev).triu(1).to(self.compute)
        for layer in m.layers:
            x = layer(x, P, B, cos, sin, bias)
        if want is None:
            x = torch.cat((x[:P].expand(B, -1, -1), x[P:].view(B, L - P, -1)), 1)
        else:
            x = x[P:].view(B, L - P, -1)[want[0], want[1] - P]
        return linear(m.norm(x), m.embed_tokens.weight, None, self.compute).float()
