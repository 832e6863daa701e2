"""Named sizes. A size fills in every field of a model section that a config leaves open."""

from typing import Any

Fields = dict[str, Any]


def _conv(channels: int, blocks: int) -> Fields:
    return {"kind": "conv", "channels": channels, "blocks": blocks}


def _transformer(channels: int, blocks: int, dropout: float = 0.0) -> Fields:
    return {"kind": "transformer", "channels": channels, "blocks": blocks, "dropout": dropout}


def _base(patch: int, fine: Fields, coarse: Fields, head_dim: int = 64) -> Fields:
    return {"net": {"patch": patch, "levels": [fine, coarse], "head_dim": head_dim}}


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
}

BASES: dict[str, Fields] = {
    "tiny-s": _base(1, _transformer(8, 1), _transformer(32, 2), head_dim=32),
    "tiny-m": _base(1, _transformer(16, 1), _transformer(64, 2), head_dim=32),
    "tiny-l": _base(1, _transformer(32, 1), _transformer(96, 3), head_dim=32),
    "tiny-xl": _base(1, _transformer(32, 1), _transformer(128, 4), head_dim=32),
    # The paper's two-level base model for 32 × 32 latents; 6 and 16 are read as total blocks.
    "imagenet512": _base(1, _transformer(512, 6, dropout=0.1), _transformer(1024, 16, dropout=0.1)),
}
