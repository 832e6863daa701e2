"""Load what a finished or running run has learned, for evaluation: one EMA of one checkpoint."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ul_scale import config as configs
from ul_scale.checkpoint import state, store
from ul_scale.config import AutoencoderRun, RunConfig
from ul_scale.data.index import open_index
from ul_scale.stages.autoencoder import AutoencoderStage
from ul_scale.stages.base import BaseStage
from ul_scale.train.worker import build_stage, latents_dir


@dataclass(frozen=True)
class Restored:
    """A run's config and its stage at one step, weights replaced by the first EMA, in eval mode."""

    config: RunConfig
    run_id: str
    run_dir: Path
    step: int
    stage: Any


def read_run(run_dir: Path) -> tuple[RunConfig, str]:
    """Return the config and the id of a run directory."""
    if not (run_dir / "run.json").is_file():
        raise ValueError(f"{run_dir}: not a run directory (no run.json); expected <root>/<run_id>")
    record = json.loads((run_dir / "run.json").read_text())
    return configs.load(run_dir / "config.yaml"), record["run_id"]


def restore(run_dir: Path, step: int | None = None) -> Restored:
    """Load a checkpoint; the newest complete one where no step is given.

    Raises:
        ValueError: if there is no such run or no complete checkpoint at that step.
    """
    config, run_id = read_run(run_dir)
    steps = store.complete_steps(run_dir)
    step = (steps[-1] if steps else None) if step is None else step
    if step is None or step not in steps:
        raise ValueError(f"{run_dir}: no complete checkpoint at step {step}; complete: {steps or 'none'}")
    store.verify(run_dir, step)
    latents = None
    if not isinstance(config, AutoencoderRun):
        parent = config.autoencoder
        latents = open_index(str(latents_dir(str(run_dir.parent), parent.run, parent.step))).extra
    stage = build_stage(config, latents)
    half_life = str(config.ema.half_lives_samples[0])
    average = {name: torch.empty_like(p) for name, p in stage.named_parameters()}
    state.load({"ema": {half_life: average}}, run_dir, step)
    stage.load_state_dict(average, strict=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Restored(config, run_id, run_dir, step, stage.to(device).eval().requires_grad_(False))


def restore_autoencoder(run_dir: Path, step: int | None = None) -> tuple[Restored, AutoencoderStage]:
    restored = restore(run_dir, step)
    if not isinstance(restored.stage, AutoencoderStage):
        raise ValueError(f"{run_dir}: is a base model's run; expected an autoencoder's")
    return restored, restored.stage


def restore_base(run_dir: Path, step: int | None = None) -> tuple[Restored, BaseStage]:
    restored = restore(run_dir, step)
    if not isinstance(restored.stage, BaseStage):
        raise ValueError(f"{run_dir}: is an autoencoder's run; expected a base model's")
    return restored, restored.stage
