"""Blocks that the encoder, prior, decoder and base model share. Feature maps are (b, c, h, w) throughout."""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LogSNREmbedding(nn.Module):
    """Embed log-SNR as Fourier features and an MLP: (b,) → (b, width)."""

    num_frequencies = 64

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(2 * self.num_frequencies, width), nn.SiLU(), nn.Linear(width, width)
        )

    def forward(self, log_snr: Tensor) -> Tensor:
        # Periods from about 0.6 to 600 nats around a log-SNR range of some 20 nats.
        frequencies = torch.exp(
            torch.linspace(math.log(10.0), math.log(0.01), self.num_frequencies, device=log_snr.device)
        )
        angles = log_snr.float()[:, None] * frequencies
        features = torch.cat([angles.cos(), angles.sin()], dim=1)
        return self.mlp(features.to(next(self.mlp.parameters()).dtype))


class Downsample(nn.Module):
    """Halve the resolution: space to depth, then a linear map of channels."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.project = nn.Conv2d(4 * in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(F.pixel_unshuffle(x, 2))


class Upsample(nn.Module):
    """Double the resolution: a linear map of channels, then depth to space."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.project = nn.Conv2d(in_channels, 4 * out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.project(x), 2)


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(32, channels), channels)


class ResBlock(nn.Module):
    """Pre-norm residual block of two 3×3 convolutions; scale and shift by ``cond`` where there is one."""

    def __init__(self, channels: int, cond_width: int | None = None, dropout: float = 0.0):
        super().__init__()
        self.norm1, self.norm2 = group_norm(channels), group_norm(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.modulation = nn.Linear(cond_width, 2 * channels) if cond_width else None
        nn.init.zeros_(self.conv2.weight)
        if self.modulation is not None:
            nn.init.zeros_(self.modulation.weight)
            nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        h = self.norm2(self.conv1(F.silu(self.norm1(x))))
        if self.modulation is not None:
            scale, shift = self.modulation(cond)[:, :, None, None].chunk(2, dim=1)
            h = h * (1 + scale) + shift
        return x + self.conv2(self.dropout(F.silu(h)))


@functools.lru_cache(maxsize=16)
def rope_2d(height: int, width: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cos and sin (h·w, head_dim) of axial rotary positions: pairs turn with y or with x."""
    pairs = head_dim // 4
    frequencies = 100.0 ** -(torch.arange(pairs, device=device) / pairs)
    y = torch.arange(height, device=device).repeat_interleave(width)[:, None] * frequencies
    x = torch.arange(width, device=device).repeat(height)[:, None] * frequencies
    angles = torch.cat([y, x], dim=1).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat([-b, a], dim=-1) * sin.to(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention over all positions, with QK-norm and 2-D rotary positions.

    QK-norm keeps the logits bounded in bf16 at the learning rates of small models; rotary positions
    add no parameters and let a trained model run at another grid.
    """

    def __init__(self, width: int, head_dim: int):
        super().__init__()
        self.head_dim = min(head_dim, width)
        if width % self.head_dim or self.head_dim % 4:
            raise ValueError(
                f"attention width {width} must be a multiple of head_dim {self.head_dim}, itself one of 4"
            )
        self.qkv = nn.Linear(width, 3 * width)
        self.qk_gain = nn.Parameter(torch.ones(2, 1, 1, 1, self.head_dim))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).view(b, n, 3, -1, self.head_dim).permute(2, 0, 3, 1, 4)
        # One normalisation and one rotation for q and k together: tiny models are bound by dispatch.
        qk = F.layer_norm(qkv[:2], (self.head_dim,)) * self.qk_gain
        q, k = rotate(qk, *rope_2d(*grid, self.head_dim, x.device))
        v = qkv[2]
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))


class TransformerBlock(nn.Module):
    """Attention and MLP, each normalised, modulated and gated by ``cond`` (adaLN-zero, arXiv 2212.09748)."""

    def __init__(self, width: int, cond_width: int, head_dim: int, dropout: float = 0.0):
        super().__init__()
        self.attention = Attention(width, head_dim)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(dropout)
        self.modulation = nn.Linear(cond_width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, cond: Tensor, grid: tuple[int, int]) -> Tensor:
        scale1, shift1, gate1, scale2, shift2, gate2 = self.modulation(cond)[:, None].chunk(6, dim=-1)
        h = F.layer_norm(x, x.shape[-1:]) * (1 + scale1) + shift1
        x = x + gate1 * self.dropout(self.attention(h, grid))
        h = F.layer_norm(x, x.shape[-1:]) * (1 + scale2) + shift2
        return x + gate2 * self.dropout(self.mlp(h))
