"""The ResNet encoder: an image to the clean latent."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from ul_scale.models.layers import Downsample, ResBlock, group_norm


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Shape of the encoder; the resolution halves between levels."""

    patch: int
    channels: list[int]
    blocks: list[int]
    output_gain: float = 1.0
    """Factor on the initial output weights, so on the initial size of the latent."""

    def __post_init__(self) -> None:
        if self.patch < 1 or min(self.channels, default=0) < 1:
            raise ValueError(
                f"model.encoder: patch is {self.patch}, channels {list(self.channels)}; expected 1 or more"
            )
        if len(self.channels) != len(self.blocks):
            raise ValueError(
                f"model.encoder: {len(self.channels)} channels but {len(self.blocks)} blocks; one per level"
            )

    @property
    def downsampling(self) -> int:
        return self.patch * 2 ** (len(self.channels) - 1)


class Encoder(nn.Module):
    """Map x (b, c, h, w) in [−1, 1] to z_clean (b, latent_channels, h / f, w / f). Deterministic."""

    def __init__(self, config: EncoderConfig, in_channels: int, latent_channels: int):
        super().__init__()
        self.patch = config.patch
        self.stem = nn.Conv2d(in_channels * config.patch**2, config.channels[0], 3, padding=1)
        blocks: list[nn.Module] = []
        for level, (channels, num_blocks) in enumerate(zip(config.channels, config.blocks)):
            if level:
                blocks.append(Downsample(config.channels[level - 1], channels))
            blocks += [ResBlock(channels) for _ in range(num_blocks)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = group_norm(config.channels[-1])
        self.head = nn.Conv2d(config.channels[-1], latent_channels, 3, padding=1)
        self.head.weight.data.mul_(config.output_gain)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(F.pixel_unshuffle(x, self.patch))
        for block in self.blocks:
            h = block(h)
        return self.head(F.silu(self.norm(h))).to(x.dtype)

    def ordered_blocks(self) -> list[nn.Module]:
        """Return the blocks in the order in which they run."""
        return [block for block in self.blocks if isinstance(block, ResBlock)]
