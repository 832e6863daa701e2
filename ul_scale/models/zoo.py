"""Named sizes. A size fills in every field of a model section that a config leaves open.

The ladder for scaling laws, ``ladder-1`` to ``ladder-9``, varies one number, the width d of the coarse level,
and keeps the shape of the paper's base model, which is ``ladder-6``: a fine level of width d / 2, heads of
64, d / 64 coarse blocks, 6 fine ones for every 16 coarse (rounded), dropout 0.1. Cost then goes with about
d³: at 32 × 32 × 32 latents from 0.68 to 3,070 forward GFLOPs. Widths are multiples of 128, which heads of
both levels divide; from 256 on they are spaced so that a rung costs 2.3 to 3 times the one before.
``ladder-1``, a sixth of ``ladder-2``, is there for CPUs.

The paper names its base models small, medium and large, and describes one. It is read as medium (161 GFLOPs);
small and large are the rungs beside it (68 and 402). Kinetics-600's are the same: 4 × 16 × 16 latents have as
many tokens in both levels as 32 × 32.

Text-to-image models are named by their forward cost at 32 × 32 × 32 latents with attention to 77 tokens of
width 768 (CLIP ViT-L's text model). The paper gives their costs alone. Widths and depths are ours: wider for
their depth than the ladder, by the same factor at all three, to come within 3 % of the names.
"""

from typing import Any

Fields = dict[str, Any]

LADDER_WIDTHS = (128, 256, 384, 512, 768, 1024, 1408, 2048, 2816)


def _conv(channels: int, blocks: int) -> Fields:
    return {"kind": "conv", "channels": channels, "blocks": blocks}


def _transformer(channels: int, blocks: int, dropout: float = 0.0) -> Fields:
    return {"kind": "transformer", "channels": channels, "blocks": blocks, "dropout": dropout}


def _base(patch: int, fine: Fields, coarse: Fields, head_dim: int = 64) -> Fields:
    return {"net": {"patch": patch, "levels": [fine, coarse], "head_dim": head_dim}}


def two_levels(width: int, fine_blocks: int, coarse_blocks: int) -> Fields:
    """Return the paper's kind of base model: a fine level of half the width, and a coarse one."""
    fine = _transformer(width // 2, fine_blocks, dropout=0.1)
    return _base(1, fine, _transformer(width, coarse_blocks, dropout=0.1))


def rung(width: int) -> Fields:
    """Return the ladder's base model of a width, a multiple of 128."""
    coarse_blocks = width // 64
    return two_levels(width, max(1, round(coarse_blocks * 6 / 16)), coarse_blocks)


AUTOENCODERS: dict[str, Fields] = {
    # 32 px to 8 × 8 × 4: minutes on a CPU core.
    "tiny32": {
        "latent_channels": 4,
        "encoder": {"patch": 2, "channels": [32, 64], "blocks": [1, 2], "output_gain": 3.0},
        "prior": {"patch": 2, "levels": [_transformer(96, 3)], "head_dim": 32},
        "decoder": {
            "patch": 2,
            "levels": [_conv(32, 2), _conv(64, 2), _transformer(64, 2)],
            "head_dim": 32,
            "z_scale": 5.0,
        },
    },
    # The paper's ImageNet-512 autoencoder: 16× down to 32 × 32 × 32. Blocks per convolutional level of
    # the decoder are not stated; 4 are 2 down and 2 up.
    "imagenet512": {
        "latent_channels": 32,
        "encoder": {"patch": 2, "channels": [128, 256, 512, 512], "blocks": [2, 2, 2, 3]},
        "prior": {"patch": 1, "levels": [_transformer(1024, 8)]},
        "decoder": {
            "patch": 2,
            "levels": [_conv(128, 4), _conv(256, 4), _conv(512, 4), _transformer(1024, 8, dropout=0.1)],
        },
    },
    # The paper's Kinetics-600 latents: 16 × 128 × 128 to 4 × 16 × 16. It states no more: the rest is that of
    # imagenet512 with a level less, whose two steps also halve the frames.
    "kinetics600": {
        "latent_channels": 32,
        "encoder": {"patch": 2, "channels": [128, 256, 512], "blocks": [2, 2, 3], "time_strides": [2, 2]},
        "prior": {"patch": 1, "levels": [_transformer(1024, 8)]},
        "decoder": {
            "patch": 2,
            "levels": [_conv(128, 4), _conv(256, 4), _transformer(1024, 8, dropout=0.1)],
            "time_strides": [2, 2],
        },
    },
}

BASES: dict[str, Fields] = {
    "tiny-s": _base(1, _transformer(8, 1), _transformer(32, 2), head_dim=32),
    "tiny-m": _base(1, _transformer(16, 1), _transformer(64, 2), head_dim=32),
    "tiny-l": _base(1, _transformer(32, 1), _transformer(96, 3), head_dim=32),
    "tiny-xl": _base(1, _transformer(32, 1), _transformer(128, 4), head_dim=32),
    # The paper's two-level base model for 32 × 32 latents; 6 and 16 are read as total blocks.
    "imagenet512": two_levels(1024, 6, 16),
    "small": rung(768),
    "medium": rung(1024),
    "large": rung(1408),
    "kinetics600-small": rung(768),
    "kinetics600-medium": rung(1024),
    "t2i-100g": two_levels(896, 4, 11),
    "t2i-300g": two_levels(1280, 6, 17),
    "t2i-970g": two_levels(1920, 9, 25),
}

LADDER = [f"ladder-{number}" for number in range(1, len(LADDER_WIDTHS) + 1)]
BASES |= dict(zip(LADDER, map(rung, LADDER_WIDTHS)))
