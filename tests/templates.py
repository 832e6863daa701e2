"""Configs of runs that train in seconds: dropout on, several lanes, two EMAs."""

from pathlib import Path

import yaml

TINY_VIT = {"kind": "transformer", "channels": 16, "blocks": 1, "dropout": 0.1}
TINY_CONV = {"kind": "conv", "channels": 8, "blocks": 2}
AUTOENCODER = {
    "kind": "autoencoder",
    "name": "tiny",
    "data": {"image_size": 16, "channels": 1, "lanes": 4, "workers": 0},
    "model": {
        "latent_channels": 2,
        "encoder": {"patch": 2, "channels": [8, 8], "blocks": [1, 1]},
        "prior": {"patch": 1, "levels": [TINY_VIT], "head_dim": 8},
        "decoder": {"patch": 2, "levels": [TINY_CONV, TINY_VIT], "head_dim": 8},
    },
    "loss": {"loss_factor": 3.0, "loss_bias": 3.0},
    "train": {"steps": 12, "batch_size": 8, "log_every_steps": 1},
    "optim": {"lr": 1e-3, "warmup_steps": 2},
    "ema": {"half_lives_samples": [40, 400]},
    "checkpoint": {"every_steps": 4, "keep_last": 2},
}
BASE = {
    "kind": "base",
    "name": "tiny-base",
    "data": {"lanes": 4, "workers": 0},
    "model": {
        "num_classes": 2,
        "net": {"patch": 1, "levels": [TINY_VIT, TINY_VIT], "head_dim": 8},
    },
    "loss": {},
    "train": {"steps": 8, "batch_size": 8, "log_every_steps": 1},
    "optim": {"lr": 1e-3, "warmup_steps": 2},
    "ema": {"half_lives_samples": [40]},
    "checkpoint": {"every_steps": 4},
}


def write_template(folder: Path, shards: dict[str, str], template: dict, name: str, **sections) -> Path:
    """Write a config over one of the templates above into a folder; return its path."""
    values = {key: dict(value) if isinstance(value, dict) else value for key, value in template.items()}
    values["root"] = str(folder / "runs")
    if template["kind"] == "autoencoder":
        values["data"] |= shards
    for section, changes in sections.items():
        values[section] = values[section] | changes if isinstance(changes, dict) else changes
    path = folder / name
    path.write_text(yaml.safe_dump(values))
    return path
