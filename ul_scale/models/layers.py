"""Blocks that the encoder, prior, decoder and base model share.

Feature maps are (b, c, *grid) throughout; a grid is (h, w) for images and (t, h, w) for videos.
"""

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


def conv(dims: int, in_channels: int, out_channels: int, kernel: int) -> nn.Conv2d | nn.Conv3d:
    """Return a convolution over grids of 2 or 3 dimensions that keeps their size."""
    kind = nn.Conv3d if dims == 3 else nn.Conv2d
    return kind(in_channels, out_channels, kernel, padding=kernel // 2)


def space_to_depth(x: Tensor, stride: tuple[int, ...]) -> Tensor:
    """Return (b, c · ∏ stride, *grid / stride) of (b, c, *grid); channels as ``F.pixel_unshuffle``'s."""
    if len(stride) == 2:
        return F.pixel_unshuffle(x, stride[0])
    b, c, t, h, w = x.shape
    (st, sh, sw) = stride
    x = x.reshape(b, c, t // st, st, h // sh, sh, w // sw, sw)
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)


def depth_to_space(x: Tensor, stride: tuple[int, ...]) -> Tensor:
    """Undo ``space_to_depth``."""
    if len(stride) == 2:
        return F.pixel_shuffle(x, stride[0])
    b, _, t, h, w = x.shape
    (st, sh, sw) = stride
    x = x.reshape(b, -1, st, sh, sw, t, h, w)
    return x.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(b, -1, t * st, h * sh, w * sw)


def check_time_strides(name: str, strides: list[int], num_levels: int) -> None:
    """Check the time strides of a config.

    Raises:
        ValueError: if they are not 1 or 2, one for each step between levels.
    """
    if not {*strides} <= {1, 2} or (strides and len(strides) != num_levels - 1):
        raise ValueError(
            f"{name}: time_strides are {list(strides)}; expected 1 or 2, once for each of the "
            f"{num_levels - 1} steps between {num_levels} levels, or none"
        )


def strides_of(time_strides: list[int], num_levels: int, *, video: bool) -> list[tuple[int, ...]]:
    """Return the stride, (h, w) or (t, h, w), of each step between levels.

    Raises:
        ValueError: if images are to be strided in time.
    """
    if not video:
        if max(time_strides, default=1) > 1:
            raise ValueError(f"time_strides are {list(time_strides)}, but these are images; expected none")
        return [(2, 2)] * (num_levels - 1)
    return [(stride, 2, 2) for stride in time_strides or [1] * (num_levels - 1)]


class Downsample(nn.Module):
    """Divide the grid by ``stride``: space (and time) to depth, then a linear map of channels."""

    def __init__(self, in_channels: int, out_channels: int, stride: tuple[int, ...] = (2, 2)):
        super().__init__()
        self.stride = stride
        self.project = conv(len(stride), math.prod(stride) * in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(space_to_depth(x, self.stride))


class Upsample(nn.Module):
    """Multiply the grid by ``stride``: a linear map of channels, then depth to space (and time)."""

    def __init__(self, in_channels: int, out_channels: int, stride: tuple[int, ...] = (2, 2)):
        super().__init__()
        self.stride = stride
        self.project = conv(len(stride), in_channels, math.prod(stride) * out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return depth_to_space(self.project(x), self.stride)


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(32, channels), channels)


class ResBlock(nn.Module):
    """Pre-norm residual block of two convolutions of 3; scaled and shifted by ``cond`` where there is one."""

    def __init__(self, channels: int, cond_width: int | None = None, dropout: float = 0.0, *, dims: int = 2):
        super().__init__()
        self.norm1, self.norm2 = group_norm(channels), group_norm(channels)
        self.conv1 = conv(dims, channels, channels, 3)
        self.conv2 = conv(dims, channels, channels, 3)
        self.dropout = nn.Dropout(dropout)
        self.modulation = nn.Linear(cond_width, 2 * channels) if cond_width else None
        nn.init.zeros_(self.conv2.weight)
        if self.modulation is not None:
            nn.init.zeros_(self.modulation.weight)
            nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        h = self.norm2(self.conv1(F.silu(self.norm1(x))))
        if self.modulation is not None:
            modulation = self.modulation(cond)
            scale, shift = modulation[(..., *(x.ndim - 2) * (None,))].chunk(2, dim=1)
            h = h * (1 + scale) + shift
        return x + self.conv2(self.dropout(F.silu(h)))


def rope_pairs(head_dim: int, dims: int) -> tuple[int, ...]:
    """Return how many pairs of a head turn with each axis: half and half, or (t, y, x) about 2 : 3 : 3.

    Raises:
        ValueError: if the head cannot be divided so.
    """
    step = 4 if dims == 2 else 8
    if head_dim % step:
        raise ValueError(f"head_dim is {head_dim}; expected a multiple of {step} for a {dims}-D grid")
    if dims == 2:
        return head_dim // 4, head_dim // 4
    space = 3 * (head_dim // 2) // 8
    return head_dim // 2 - 2 * space, space, space


@functools.lru_cache(maxsize=16)
def rope(grid: tuple[int, ...], head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cos and sin (∏ grid, head_dim) of axial rotary positions: each pair turns with one axis."""
    angles = []
    for axis, pairs in enumerate(rope_pairs(head_dim, len(grid))):
        frequencies = 100.0 ** -(torch.arange(pairs, device=device) / pairs)
        inner, outer = math.prod(grid[axis + 1 :]), math.prod(grid[:axis])
        position = torch.arange(grid[axis], device=device).repeat_interleave(inner).repeat(outer)
        angles.append(position[:, None] * frequencies)
    turned = torch.cat(angles, dim=1).repeat(1, 2)
    return turned.cos(), turned.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat([-b, a], dim=-1) * sin.to(x.dtype)


def heads_of(width: int, head_dim: int) -> int:
    """Return the size of a head: ``head_dim``, or the whole of a narrower width."""
    head_dim = min(head_dim, width)
    if width % head_dim or head_dim % 4:
        raise ValueError(
            f"attention width {width} must be a multiple of head_dim {head_dim}, itself one of 4"
        )
    return head_dim


class Attention(nn.Module):
    """Multi-head self-attention over all positions, with QK-norm and axial rotary positions.

    QK-norm keeps the logits bounded in bf16 at the learning rates of small models; rotary positions
    add no parameters and let a trained model run at another grid.
    """

    def __init__(self, width: int, head_dim: int):
        super().__init__()
        self.head_dim = heads_of(width, head_dim)
        self.qkv = nn.Linear(width, 3 * width)
        self.qk_gain = nn.Parameter(torch.ones(2, 1, 1, 1, self.head_dim))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).view(b, n, 3, -1, self.head_dim).permute(2, 0, 3, 1, 4)
        # One normalisation and one rotation for q and k together: tiny models are bound by dispatch.
        qk = F.layer_norm(qkv[:2], (self.head_dim,)) * self.qk_gain
        q, k = rotate(qk, *rope(grid, self.head_dim, x.device))
        v = qkv[2]
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))


class CrossAttention(nn.Module):
    """Multi-head attention from all positions to text, with QK-norm; adds nothing at initialisation."""

    def __init__(self, width: int, text_width: int, head_dim: int):
        super().__init__()
        self.head_dim = heads_of(width, head_dim)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(text_width, 2 * width)
        self.q_gain = nn.Parameter(torch.ones(self.head_dim))
        self.k_gain = nn.Parameter(torch.ones(self.head_dim))
        self.out = nn.Linear(width, width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        q = self.q(x).unflatten(2, (-1, self.head_dim)).transpose(1, 2)
        k, v = self.kv(text).unflatten(2, (2, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        q = F.layer_norm(q, (self.head_dim,)) * self.q_gain
        k = F.layer_norm(k, (self.head_dim,)) * self.k_gain
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        return self.out(mixed.transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """Attention and MLP, each normalised, modulated and gated by ``cond`` (adaLN-zero, arXiv 2212.09748).

    With ``text_width``, attention to text stands between them, normalised but not modulated: what it reads
    depends on the noise level through x alone, and its zero output replaces the gate.
    """

    def __init__(
        self,
        width: int,
        cond_width: int,
        head_dim: int,
        dropout: float = 0.0,
        *,
        text_width: int | None = None,
    ):
        super().__init__()
        self.attention = Attention(width, head_dim)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(dropout)
        self.modulation = nn.Linear(cond_width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        self.cross_attention = CrossAttention(width, text_width, head_dim) if text_width else None

    def forward(
        self,
        x: Tensor,
        cond: Tensor,
        grid: tuple[int, ...],
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
    ) -> Tensor:
        scale1, shift1, gate1, scale2, shift2, gate2 = self.modulation(cond)[:, None].chunk(6, dim=-1)
        h = F.layer_norm(x, x.shape[-1:]) * (1 + scale1) + shift1
        x = x + gate1 * self.dropout(self.attention(h, grid))
        if self.cross_attention is not None:
            h = F.layer_norm(x, x.shape[-1:])
            x = x + self.dropout(self.cross_attention(h, text, text_mask))
        h = F.layer_norm(x, x.shape[-1:]) * (1 + scale2) + shift2
        return x + gate2 * self.dropout(self.mlp(h))
