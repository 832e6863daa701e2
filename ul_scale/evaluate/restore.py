"""Load what a finished or running run has learned, for evaluation: one EMA of one checkpoint."""

from pathlib import Path

import torch

from ul_scale.checkpoint import store
from ul_scale.checkpoint.average import load_average
from ul_scale.config import AnyAutoencoder, AutoencoderRun, BaseRun, FixedRun, RunConfig
from ul_scale.data.index import open_index
from ul_scale.stages.autoencoder import AutoencoderStage
from ul_scale.stages.base import BaseStage
from ul_scale.stages.fixed import FixedAutoencoder
from ul_scale.train.prepare import (
    build_autoencoder,
    build_stage,
    facts_on_the_fly,
    latents_dir,
    read_autoencoder,
    read_base,
    read_config,
)


def newest_step(run_dir: Path) -> int:
    """Return the step of a run's newest complete checkpoint; 0 of an autoencoder that is not trained."""
    if isinstance(read_config(run_dir), FixedRun):
        return 0
    step = store.latest_step(run_dir)
    if step is None:
        raise ValueError(f"{run_dir}: no complete checkpoint")
    return step


def restore_autoencoder(
    run_dir: Path, step: int
) -> tuple[AnyAutoencoder, AutoencoderStage | FixedAutoencoder]:
    """Load the first EMA of an autoencoder at a step, in eval mode, on the GPU if there is one.

    Raises:
        ValueError: if it is not an autoencoder's run or has no complete checkpoint at that step.
        BrokenCheckpoint: if a file of it is not the one that was saved.
    """
    config = read_autoencoder(run_dir)
    stage = build_autoencoder(config)
    if isinstance(config, AutoencoderRun):
        _load_average(stage, config, run_dir, step)
    _freeze(stage)
    return config, stage


def restore_base(run_dir: Path, step: int) -> tuple[BaseRun, BaseStage]:
    """Load the first EMA of a base model; as ``restore_autoencoder``."""
    config = read_base(run_dir)
    parent = config.autoencoder
    if parent.on_the_fly:
        assert config.data.train is not None
        latents = facts_on_the_fly(config, open_index(config.data.train), run_dir.parent)
    else:
        latents = open_index(str(latents_dir(run_dir.parent, parent.run, parent.step))).extra
    stage = build_stage(config, latents)
    assert isinstance(stage, BaseStage)
    _load_average(stage, config, run_dir, step)
    _freeze(stage)
    return config, stage


def _load_average(stage: torch.nn.Module, config: RunConfig, run_dir: Path, step: int) -> None:
    load_average(stage, str(config.ema.half_lives_samples[0]), run_dir, step)


def _freeze(stage: torch.nn.Module) -> None:
    stage.to("cuda" if torch.cuda.is_available() else "cpu").eval().requires_grad_(False)
