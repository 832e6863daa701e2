"""Load exported weights: needs torch, safetensors and the model code, and nothing that trains.

An export is a folder with ``model.safetensors`` and ``config.json``. The latter holds all that builds the
stage (``kind``, ``model``, ``loss``, ``data``) and where the weights are from (``provenance``).
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch

from ul_scale.stages.autoencoder import AutoencoderLoss, AutoencoderModel, AutoencoderStage
from ul_scale.stages.base import BaseLoss, BaseModel, BaseStage
from ul_scale.stages.fixed import FixedAutoencoder, FixedLoss, FixedModel

FORMAT = 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"


def load_exported(folder: str | Path, device: torch.device | str = "cpu") -> AutoencoderStage | BaseStage:
    """Return an exported stage in eval mode, its parameters frozen and in fp32, whatever they are stored in.

    Args:
        folder: what ``ul-scale checkpoint export`` wrote.
        device: where to put it.

    Raises:
        ValueError: if the folder is not an export, or of another version of this code.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder}: not an export (no {CONFIG}); expected what checkpoint export wrote")
    stage = build_stage(json.loads((folder / CONFIG).read_text()), str(folder / CONFIG))
    assert not isinstance(stage, FixedAutoencoder)  # which is never exported
    missing, unexpected = stage.load_state_dict(load_file(folder / WEIGHTS), strict=False)
    missing = [name for name in missing if name not in dict(stage.named_buffers())]
    if missing or unexpected:
        raise ValueError(
            f"{folder / WEIGHTS} is not of the model in {CONFIG}: {len(missing)} tensors are missing and "
            f"{len(unexpected)} are unknown, such as {(missing + unexpected)[0]}"
        )
    return stage.to(device).eval().requires_grad_(False)


def build_stage(config: dict[str, Any], source: str) -> AutoencoderStage | BaseStage | FixedAutoencoder:
    """Return the stage that ``config.json`` describes, with initial weights; errors name ``source``."""
    if config.get("format") != FORMAT:
        raise ValueError(f"{source}: format is {config.get('format')}; expected {FORMAT}")
    try:
        data = config["data"]
        if config["kind"] == "fixed_autoencoder":
            fixed, noise = _section(FixedModel, config["model"]), _section(FixedLoss, config["loss"])
            return FixedAutoencoder(fixed, noise, image_size=data["image_size"], channels=data["channels"])
        if config["kind"] == "autoencoder":
            model = _section(AutoencoderModel, config["model"])
            loss = _section(AutoencoderLoss, config["loss"])
            return AutoencoderStage(
                model,
                loss,
                image_size=data["image_size"],
                channels=data["channels"],
                frames=data.get("frames"),
            )
        model, loss = _section(BaseModel, config["model"]), _section(BaseLoss, config["loss"])
        latent_shape = tuple(data["latent_shape"])
        return BaseStage(
            model, loss, latent_shape=latent_shape, num_pixels=data["num_pixels"], z_std=data["z_std"]
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{source} does not fit this version of ul_scale: {error}") from None


def _section(hint: Any, value: Any) -> Any:
    """Return plain values as the section dataclass of a type hint."""
    if isinstance(value, dict):
        schema: Any = next(each for each in (hint, *get_args(hint)) if dataclasses.is_dataclass(each))
        hints = get_type_hints(schema)
        return schema(**{name: _section(hints.get(name), each) for name, each in value.items()})
    if isinstance(value, list):
        item = next(iter(get_args(hint)), None)
        return [_section(item, each) for each in value]
    return value
