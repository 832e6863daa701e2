"""One network class for the prior, the decoder and the base model: a residual U-ViT.

Levels are convolutional or transformers, from fine to coarse. Following SiD2 (arXiv 2410.19324) there
are no skips between single blocks; each level contributes only what it adds to its input:
``h ← up(h − h_after_down) + h_before_down``.

- one transformer level: the single-level ViT of the prior;
- two transformer levels: the base model;
- convolutional levels, then a transformer: the pixel decoder.
"""

from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor, nn

from ul_scale.models.layers import (
    Downsample,
    LogSNREmbedding,
    ResBlock,
    TransformerBlock,
    Upsample,
    group_norm,
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
    """Shape of a residual U-ViT; the resolution halves between levels."""

    patch: int
    levels: list[LevelConfig] = field(default_factory=list)
    head_dim: int = 64
    z_scale: float = 1.0
    """Factor on the injected latent, whose std is well below 1; lets a short run come to use it."""

    def __post_init__(self) -> None:
        if self.patch < 1 or not self.levels:
            raise ValueError(
                f"patch is {self.patch} and levels are {len(self.levels)}; expected at least 1 of each"
            )

    @property
    def downsampling(self) -> int:
        return self.patch * 2 ** (len(self.levels) - 1)


class ConvLevel(nn.Module):
    def __init__(self, config: LevelConfig, num_blocks: int, cond_width: int):
        super().__init__()
        self.blocks = nn.ModuleList(
            ResBlock(config.channels, cond_width, config.dropout) for _ in range(num_blocks)
        )

    def forward(self, h: Tensor, cond: Tensor) -> Tensor:
        for block in self.blocks:
            h = block(h, cond)
        return h


class TransformerLevel(nn.Module):
    def __init__(self, config: LevelConfig, num_blocks: int, cond_width: int, head_dim: int):
        super().__init__()
        self.blocks = nn.ModuleList(
            TransformerBlock(config.channels, cond_width, head_dim, config.dropout) for _ in range(num_blocks)
        )

    def forward(self, h: Tensor, cond: Tensor) -> Tensor:
        grid = h.shape[2], h.shape[3]
        tokens = h.flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = block(tokens, cond, grid)
        return tokens.transpose(1, 2).unflatten(2, grid)


def _level(config: LevelConfig, num_blocks: int, cond_width: int, head_dim: int) -> nn.Module:
    if config.kind == "conv":
        return ConvLevel(config, num_blocks, cond_width)
    return TransformerLevel(config, num_blocks, cond_width, head_dim)


class UViT(nn.Module):
    """Map (x_t, log_snr, label, z) to a prediction of x_t's shape, zero at initialisation.

    Args:
        config: shape.
        channels: channels of x_t.
        num_classes: classes of ``label``; class ``num_classes`` is "no label". None: unconditional.
        z_channels: channels of an injected latent z.
        z_downsampling: how much coarser than x_t it is. It is projected and added at the level of its
            own grid; one coarser than every level is enlarged to the coarsest. (UL does not say how.)
    """

    def __init__(
        self,
        config: UViTConfig,
        channels: int,
        *,
        num_classes: int | None = None,
        z_channels: int | None = None,
        z_downsampling: int = 1,
    ):
        super().__init__()
        self.config = config
        levels = config.levels
        width = levels[-1].channels
        self.log_snr_embedding = LogSNREmbedding(width)
        self.label_embedding = nn.Embedding(num_classes + 1, width) if num_classes is not None else None
        # Convolutional levels see across patches from the first layer to the last: a linear head leaves
        # the patches' grid in the image.
        kernel = 3 if levels[0].kind == "conv" else 1
        pixels = channels * config.patch**2
        self.stem = nn.Conv2d(pixels, levels[0].channels, kernel, padding=kernel // 2)
        self.down_levels, self.up_levels = nn.ModuleList(), nn.ModuleList()
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for fine, coarse in zip(levels[:-1], levels[1:]):
            num_up = fine.blocks // 2
            self.down_levels.append(_level(fine, fine.blocks - num_up, width, config.head_dim))
            self.up_levels.append(_level(fine, num_up, width, config.head_dim))
            self.down.append(Downsample(fine.channels, coarse.channels))
            self.up.append(Upsample(coarse.channels, fine.channels))
        self.middle = _level(levels[-1], levels[-1].blocks, width, config.head_dim)
        if z_channels is not None:
            grids = [config.patch * 2**level for level in range(len(levels))]
            if z_downsampling not in grids and z_downsampling < grids[-1]:
                raise ValueError(
                    f"a latent downsampled {z_downsampling}× meets none of the levels at {grids}×"
                )
            self.z_level = grids.index(z_downsampling) if z_downsampling in grids else len(levels) - 1
            self.z_projection = nn.Conv2d(z_channels, levels[self.z_level].channels, 1)
        self.norm = group_norm(levels[0].channels)
        self.head = nn.Conv2d(levels[0].channels, pixels, kernel, padding=kernel // 2)
        nn.init.zeros_(self.head.weight)
        assert self.head.bias is not None
        nn.init.zeros_(self.head.bias)

    def _inject(self, h: Tensor, level: int, z: Tensor | None) -> Tensor:
        if z is None or level != self.z_level:
            return h
        z = self.z_projection(self.config.z_scale * z)
        return h + (z if z.shape == h.shape else F.interpolate(z, h.shape[2:], mode="nearest"))

    def forward(
        self, x_t: Tensor, log_snr: Tensor, label: Tensor | None = None, z: Tensor | None = None
    ) -> Tensor:
        cond = self.log_snr_embedding(log_snr)
        if self.label_embedding is not None:
            cond = cond + self.label_embedding(label)
        cond = F.silu(cond)
        h = self.stem(F.pixel_unshuffle(x_t, self.config.patch))
        before_down, after_down = [], []
        for level, (blocks, down) in enumerate(zip(self.down_levels, self.down)):
            h = blocks(self._inject(h, level, z), cond)
            before_down.append(h)
            h = down(h)
            after_down.append(h)
        h = self.middle(self._inject(h, len(self.down), z), cond)
        for up, blocks in zip(reversed(self.up), reversed(self.up_levels)):
            h = blocks(up(h - after_down.pop()) + before_down.pop(), cond)
        # Under autocast the head gives bf16; losses are computed in the precision of x_t.
        return F.pixel_shuffle(self.head(F.silu(self.norm(h))), self.config.patch).to(x_t.dtype)

    def ordered_blocks(self) -> list[nn.Module]:
        """Return the blocks in the order in which they run."""
        levels = [*self.down_levels, self.middle, *reversed(self.up_levels)]
        return [block for level in levels for block in level.blocks]
