"""The ResNet encoder: an image or a video to the clean latent."""

import math
from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor, nn

from ul_scale.models.layers import (
    Downsample,
    ResBlock,
    check_time_strides,
    conv,
    group_norm,
    space_to_depth,
    strides_of,
)


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Shape of the encoder; height and width halve between levels."""

    patch: int
    channels: list[int]
    blocks: list[int]
    output_gain: float = 1.0
    """Factor on the initial output weights, so on the initial size of the latent."""
    time_strides: list[int] = field(default_factory=list, metadata={"legacy": []})
    """Of videos: what each step between levels divides the frames by, 1 or 2; none: always 1."""

    def __post_init__(self) -> None:
        if self.patch < 1 or min(self.channels, default=0) < 1:
            raise ValueError(
                f"model.encoder: patch is {self.patch}, channels {list(self.channels)}; expected 1 or more"
            )
        if len(self.channels) != len(self.blocks):
            raise ValueError(
                f"model.encoder: {len(self.channels)} channels but {len(self.blocks)} blocks; one per level"
            )
        if min(self.blocks) < 0:
            raise ValueError(f"model.encoder.blocks is {list(self.blocks)}; expected 0 or more per level")
        if not math.isfinite(self.output_gain):
            raise ValueError(f"model.encoder.output_gain is {self.output_gain}; expected a finite number")
        check_time_strides("model.encoder", self.time_strides, len(self.channels))

    @property
    def downsampling(self) -> int:
        return self.patch * 2 ** (len(self.channels) - 1)

    @property
    def time_downsampling(self) -> int:
        return math.prod(self.time_strides)


class Encoder(nn.Module):
    """Map x (b, c, h, w) in [−1, 1] to z_clean (b, latent_channels, h / f, w / f). Deterministic.

    Videos are (b, c, t, h, w), to (b, latent_channels, t / f_t, h / f, w / f): convolutions are 3 × 3 × 3 and
    patches 1 × p × p. Every latent frame sees frames before and after its own.

    Args:
        config: shape.
        in_channels: of x.
        latent_channels: of z_clean.
        video: whether x has time.
    """

    def __init__(self, config: EncoderConfig, in_channels: int, latent_channels: int, *, video: bool = False):
        super().__init__()
        dims, channels = 3 if video else 2, config.channels
        self.patch = (1,) * video + (config.patch, config.patch)
        self.stem = conv(dims, in_channels * config.patch**2, channels[0], 3)
        blocks: list[nn.Module] = []
        strides = strides_of(config.time_strides, len(channels), video=video)
        for level, num_blocks in enumerate(config.blocks):
            if level:
                blocks.append(Downsample(channels[level - 1], channels[level], strides[level - 1]))
            blocks += [ResBlock(channels[level], dims=dims) for _ in range(num_blocks)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = group_norm(channels[-1])
        self.head = conv(dims, channels[-1], latent_channels, 3)
        self.head.weight.data.mul_(config.output_gain)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(space_to_depth(x, self.patch))
        for block in self.blocks:
            h = block(h)
        return self.head(F.silu(self.norm(h))).to(x.dtype)

    def ordered_blocks(self) -> list[nn.Module]:
        """Return the blocks in the order in which they run."""
        return [block for block in self.blocks if isinstance(block, ResBlock)]
