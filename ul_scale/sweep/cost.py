"""What a run costs in FLOPs: the abscissa of every chart. A multiply-accumulate counts as 2."""

from dataclasses import dataclass
from typing import Any

import torch

from ul_scale.config import AutoencoderRun, BaseRun
from ul_scale.models.flops import TRAINING_FACTOR, num_parameters
from ul_scale.stages.autoencoder import AutoencoderStage
from ul_scale.train.prepare import build_stage, latent_facts


@dataclass(frozen=True)
class Cost:
    """FLOPs of one run's networks, per image."""

    parameters: int
    forward_flops: int
    """Of what one training example takes forward: all three networks of an autoencoder, or the base model."""
    batch_size: int
    encode_flops: int = 0
    decode_flops: int = 0
    """Of one decoder step."""

    def train_flops(self, steps: int) -> int:
        return TRAINING_FACTOR * self.forward_flops * self.batch_size * steps


def _autoencoder_stage(config: AutoencoderRun) -> AutoencoderStage:
    with torch.device("meta"):
        stage = build_stage(config)
    assert isinstance(stage, AutoencoderStage)
    return stage


def autoencoder_cost(config: AutoencoderRun) -> Cost:
    stage = _autoencoder_stage(config)
    flops = stage.forward_flops()
    total = sum(flops.values())
    return Cost(num_parameters(stage), total, config.train.batch_size, flops["encoder"], flops["decoder"])


def base_cost(config: BaseRun, autoencoder: AutoencoderRun, facts: dict[str, Any]) -> Cost:
    """Return a base model's cost.

    Args:
        config: of the base model.
        autoencoder: whose latents it is trained on.
        facts: what there is beside the latents, as ``encode_jobs.Job.further``, and ``num_classes``, where it
            is known before they are there.

    Raises:
        ValueError: if the latents are not those that the model expects.
    """
    shape = latent_facts(_autoencoder_stage(autoencoder))
    latents = {**shape, "std": 1.0, "num_classes": config.model.num_classes or 0, **facts}
    with torch.device("meta"):
        stage = build_stage(config, latents)
    return Cost(num_parameters(stage), sum(stage.forward_flops().values()), config.train.batch_size)
