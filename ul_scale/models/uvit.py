"""One network class for the prior, the decoder and the base model: a residual U-ViT.

Levels are convolutional or transformers, from fine to coarse. Following SiD2 (arXiv 2410.19324) there
are no skips between single blocks; each level contributes only what it adds to its input:
``h ← up(h − h_after_down) + h_before_down``.

- one transformer level: the single-level ViT of the prior;
- two transformer levels: the base model;
- convolutional levels, then a transformer: the pixel decoder.

For videos convolutions are 3 × 3 × 3, attention spans all frames with positions in t, y and x, and steps
between levels also divide the frames where ``time_strides`` say so.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ul_scale.models.layers import (
    Downsample,
    LogSNREmbedding,
    ResBlock,
    TransformerBlock,
    Upsample,
    check_time_strides,
    conv,
    depth_to_space,
    group_norm,
    rope_pairs,
    space_to_depth,
    strides_of,
)


@dataclass(frozen=True, kw_only=True)
class LevelConfig:
    """One resolution. ``blocks`` counts the way down and the way up together."""

    kind: str
    """``conv`` or ``transformer``."""
    channels: int
    blocks: int
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ("conv", "transformer"):
            raise ValueError(f"level kind is {self.kind!r}; expected 'conv' or 'transformer'")
        if self.channels < 1 or self.blocks < 1 or not 0 <= self.dropout < 1:
            raise ValueError(
                f"level has channels {self.channels}, blocks {self.blocks}, dropout {self.dropout}; "
                "expected positive numbers and a share below 1"
            )


@dataclass(frozen=True, kw_only=True)
class UViTConfig:
    """Shape of a residual U-ViT; height and width halve between levels."""

    patch: int
    levels: list[LevelConfig] = field(default_factory=list)
    head_dim: int = 64
    z_scale: float = 1.0
    """Factor on the injected latent, whose std is well below 1; lets a short run come to use it."""
    time_strides: list[int] = field(default_factory=list, metadata={"legacy": []})
    """Of videos: what each step between levels divides the frames by, 1 or 2; none: always 1."""

    def __post_init__(self) -> None:
        if self.patch < 1 or not self.levels:
            raise ValueError(
                f"patch is {self.patch} and levels are {len(self.levels)}; expected at least 1 of each"
            )
        if self.head_dim < 1:
            raise ValueError(f"a U-ViT's head_dim is {self.head_dim}; expected 1 or more")
        if not math.isfinite(self.z_scale):
            raise ValueError(f"a U-ViT's z_scale is {self.z_scale}; expected a finite number")
        check_time_strides("a U-ViT", self.time_strides, len(self.levels))

    @property
    def downsampling(self) -> int:
        return self.patch * 2 ** (len(self.levels) - 1)

    @property
    def time_downsampling(self) -> int:
        return math.prod(self.time_strides)


@dataclass(frozen=True)
class _Surroundings:
    """What the blocks of all levels of one network have in common."""

    dims: int
    """Of the grid: 2, or 3 for videos."""
    cond_width: int
    head_dim: int
    text_width: int | None


class ConvLevel(nn.Module):
    def __init__(self, config: LevelConfig, num_blocks: int, around: _Surroundings):
        super().__init__()
        self.blocks = nn.ModuleList(
            ResBlock(config.channels, around.cond_width, config.dropout, dims=around.dims)
            for _ in range(num_blocks)
        )

    def forward(self, h: Tensor, cond: Tensor, *text: Tensor) -> Tensor:
        for block in self.blocks:
            h = block(h, cond)
        return h


class TransformerLevel(nn.Module):
    def __init__(self, config: LevelConfig, num_blocks: int, around: _Surroundings):
        super().__init__()
        rope_pairs(min(around.head_dim, config.channels), around.dims)  # refuses heads that cannot be turned
        self.blocks = nn.ModuleList(
            TransformerBlock(
                config.channels,
                around.cond_width,
                around.head_dim,
                config.dropout,
                text_width=around.text_width,
            )
            for _ in range(num_blocks)
        )

    def forward(self, h: Tensor, cond: Tensor, *text: Tensor) -> Tensor:
        grid = tuple(h.shape[2:])
        tokens = h.flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = block(tokens, cond, grid, *text)
        return tokens.transpose(1, 2).unflatten(2, grid)


def _level(config: LevelConfig, num_blocks: int, around: _Surroundings) -> nn.Module:
    kind = ConvLevel if config.kind == "conv" else TransformerLevel
    return kind(config, num_blocks, around)


class TextConditioning(nn.Module):
    """Prepare text for a network: tokens to attend to, and one vector.

    The paper does not say how text enters. As chosen here, every transformer block attends to the tokens of
    a frozen text encoder, and their mean joins the noise level in the vector that modulates all blocks,
    those of convolutions too. Tokens are normalised first, since encoders' scales differ. One learned null
    token is always there to attend to, so that an empty mask is well defined: it means "no text", as label
    dropout and guidance need it.
    """

    def __init__(self, text_width: int, width: int):
        super().__init__()
        self.null_token = nn.Parameter(torch.zeros(text_width))
        self.project_mean = nn.Linear(text_width, width)

    def forward(self, text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the mean's projection (b, width), tokens (b, 1 + n, text_width) and mask (b, 1 + n)."""
        weight = self.project_mean.weight
        # What stands in padding never matters, not even as NaN.
        text = F.layer_norm(text.masked_fill(~mask[..., None], 0).to(weight.dtype), text.shape[-1:])
        mean = text.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        tokens = torch.cat([self.null_token.to(text.dtype).expand(len(text), 1, -1), text], dim=1)
        return self.project_mean(mean.to(weight.dtype)), tokens, F.pad(mask, (1, 0), value=True)


class UViT(nn.Module):
    """Map x_t (b, channels, *grid) to a prediction of its shape, zero at initialisation.

    Args:
        config: shape.
        channels: channels of x_t.
        video: whether grids are (t, h, w) rather than (h, w).
        num_classes: classes of ``label``; class ``num_classes`` is "no label". None: takes no label.
        text_width: width of ``text``'s tokens (see TextConditioning). None: takes no text.
        extra_channels: channels of ``extra``, which stands beside x_t on its grid: given frames, say.
        z_channels: channels of an injected latent z.
        z_downsampling: how much coarser than x_t it is in height and width. It is projected and added at
            the level of its own grid; one coarser than every level is enlarged to the coarsest. (UL does
            not say how.)
        z_time_downsampling: of videos, how many frames of x_t one of z stands for.

    Raises:
        ValueError: if z meets no level, heads cannot be turned by the grid's axes, or images are to be
            strided in time.
    """

    def __init__(
        self,
        config: UViTConfig,
        channels: int,
        *,
        video: bool = False,
        num_classes: int | None = None,
        text_width: int | None = None,
        extra_channels: int = 0,
        z_channels: int | None = None,
        z_downsampling: int = 1,
        z_time_downsampling: int = 1,
    ):
        super().__init__()
        self.config = config
        levels = config.levels
        width = levels[-1].channels
        dims = 3 if video else 2
        self.patch = (1,) * video + (config.patch, config.patch)
        self.log_snr_embedding = LogSNREmbedding(width)
        self.label_embedding = nn.Embedding(num_classes + 1, width) if num_classes is not None else None
        self.text = TextConditioning(text_width, width) if text_width is not None else None
        # Convolutional levels see across patches from the first layer to the last: a linear head leaves
        # the patches' grid in the image.
        kernel = 3 if levels[0].kind == "conv" else 1
        self.stem = conv(dims, (channels + extra_channels) * config.patch**2, levels[0].channels, kernel)
        self.down_levels, self.up_levels = nn.ModuleList(), nn.ModuleList()
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        around = _Surroundings(dims, width, config.head_dim, text_width)
        strides = strides_of(config.time_strides, len(levels), video=video)
        for fine, coarse, stride in zip(levels[:-1], levels[1:], strides):
            num_up = fine.blocks // 2
            self.down_levels.append(_level(fine, fine.blocks - num_up, around))
            self.up_levels.append(_level(fine, num_up, around))
            self.down.append(Downsample(fine.channels, coarse.channels, stride))
            self.up.append(Upsample(coarse.channels, fine.channels, stride))
        self.middle = _level(levels[-1], levels[-1].blocks, around)
        if z_channels is not None:
            self.z_level = _level_of(z_downsampling, z_time_downsampling, config)
            self.z_projection = conv(dims, z_channels, levels[self.z_level].channels, 1)
        self.norm = group_norm(levels[0].channels)
        self.head = conv(dims, levels[0].channels, channels * config.patch**2, kernel)
        nn.init.zeros_(self.head.weight)
        assert self.head.bias is not None
        nn.init.zeros_(self.head.bias)

    def _inject(self, h: Tensor, level: int, z: Tensor | None) -> Tensor:
        if z is None or level != self.z_level:
            return h
        z = self.z_projection(self.config.z_scale * z)
        return h + (z if z.shape == h.shape else F.interpolate(z, h.shape[2:], mode="nearest"))

    def forward(
        self,
        x_t: Tensor,
        log_snr: Tensor,
        label: Tensor | None = None,
        z: Tensor | None = None,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        extra: Tensor | None = None,
    ) -> Tensor:
        """Return the prediction.

        Args:
            x_t: (b, channels, h, w), or (b, channels, t, h, w) of videos.
            log_snr: (b,), nats.
            label: (b,) classes.
            z: (b, z_channels, *its own grid).
            text: (b, n, text_width) tokens.
            text_mask: (b, n), True where there is a token; nowhere: no text.
            extra: (b, extra_channels, *grid of x_t), of about unit variance.
        """
        cond = self.log_snr_embedding(log_snr)
        if self.label_embedding is not None:
            cond = cond + self.label_embedding(label)
        told: tuple[Tensor, ...] = ()
        if self.text is not None:
            mean, *told = self.text(text, text_mask)
            cond = cond + mean
        cond = F.silu(cond)
        seen = x_t if extra is None else torch.cat([x_t, extra], dim=1)
        h = self.stem(space_to_depth(seen, self.patch))
        before_down, after_down = [], []
        for level, (blocks, down) in enumerate(zip(self.down_levels, self.down)):
            h = blocks(self._inject(h, level, z), cond, *told)
            before_down.append(h)
            h = down(h)
            after_down.append(h)
        h = self.middle(self._inject(h, len(self.down), z), cond, *told)
        for up, blocks in zip(reversed(self.up), reversed(self.up_levels)):
            h = blocks(up(h - after_down.pop()) + before_down.pop(), cond, *told)
        # Under autocast the head gives bf16; losses are computed in the precision of x_t.
        return depth_to_space(self.head(F.silu(self.norm(h))), self.patch).to(x_t.dtype)

    def ordered_blocks(self) -> list[nn.Module]:
        """Return the blocks in the order in which they run."""
        levels = [*self.down_levels, self.middle, *reversed(self.up_levels)]
        return [block for level in levels for block in level.blocks]


def _level_of(z_downsampling: int, z_time_downsampling: int, config: UViTConfig) -> int:
    """Return the level at which a latent enters: the one of its own grid, else the coarsest."""
    strides = config.time_strides or [1] * (len(config.levels) - 1)
    grids = [(config.patch * 2**level, math.prod(strides[:level])) for level in range(len(config.levels))]
    if (z_downsampling, z_time_downsampling) in grids:
        return grids.index((z_downsampling, z_time_downsampling))
    if z_downsampling < grids[-1][0] or z_time_downsampling < grids[-1][1]:
        if z_time_downsampling == grids[-1][1] == 1:
            raise ValueError(
                f"a latent downsampled {z_downsampling}× meets none of the levels at "
                f"{[space for space, _ in grids]}×"
            )
        raise ValueError(
            f"a latent downsampled {z_downsampling}× in space and {z_time_downsampling}× in time meets none "
            f"of the levels at {grids}×"
        )
    return len(config.levels) - 1
