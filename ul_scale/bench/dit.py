"""DiT as published (arXiv 2212.09748), for comparison; nothing of ours in it."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD_DIM = 72
"""Of DiT-XL/2: width 1152 in 16 heads."""


class DiTAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale[:, None]) + shift[:, None]


class DiTBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attention = DiTAttention(width, heads)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(cond).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attention(modulate(self.norm1(x), shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class DiT(nn.Module):
    """Map (z_t, t, label) to a prediction of z_t's shape.

    Args:
        heads: of ``HEAD_DIM`` channels each; 16 for XL.
        depth: blocks; 28 for XL.
        channels: of z_t.
        grid: H = W of z_t.
        patch: 2 for XL/2.
        num_classes: of labels.
    """

    def __init__(
        self, *, heads: int, depth: int, channels: int, grid: int, patch: int = 2, num_classes: int = 1000
    ):
        super().__init__()
        width, tokens = HEAD_DIM * heads, (grid // patch) ** 2
        self.patch, self.tokens, self.width = patch, tokens, width
        self.stem = nn.Conv2d(channels, width, patch, patch)
        self.positions = nn.Parameter(torch.randn(1, tokens, width) * 0.02, requires_grad=False)
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(num_classes + 1, width)
        self.blocks = nn.ModuleList(DiTBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.head = nn.Linear(width, patch**2 * channels)

    def forward(self, z_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
        frequencies = torch.exp(-math.log(10_000) * torch.arange(128, device=t.device) / 128)
        angles = 1000 * t.float()[:, None] * frequencies
        cond = self.time(torch.cat([angles.cos(), angles.sin()], dim=1)) + self.label(label)
        x = self.stem(z_t).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x, cond)
        shift, scale = self.modulation(cond).chunk(2, dim=1)
        x = self.head(modulate(self.norm(x), shift, scale))
        side = z_t.shape[-1] // self.patch
        return F.pixel_shuffle(x.transpose(1, 2).unflatten(2, (side, side)), self.patch)
