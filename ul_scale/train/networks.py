"""The networks that a run trains, and the frozen ones that it needs beside them."""

import torch
import torch.distributed as dist

from ul_scale.checkpoint import store
from ul_scale.checkpoint.average import load_average
from ul_scale.config import AutoencoderRun, BaseRun
from ul_scale.data.stream import iterate
from ul_scale.parallel.engine import Process
from ul_scale.parallel.mesh import broadcast_object
from ul_scale.stages.autoencoder import AutoencoderStage
from ul_scale.stages.base import BaseStage
from ul_scale.stages.fixed import FixedAutoencoder
from ul_scale.train.prepare import Prepared, build_autoencoder, build_stage, read_autoencoder

Z_STD_SAMPLES = 1024


def trained_stage(
    prepared: Prepared, process: Process, group: dist.ProcessGroup | None
) -> AutoencoderStage | BaseStage:
    """Return a run's stage; of a base model on images, with the encoder and its latents' measured std.

    Args:
        prepared: the run.
        process: this process.
        group: for what rank 0 does for long while the others wait.
    """
    config, latents, encoder = prepared.config, prepared.latents, None
    if isinstance(config, BaseRun) and config.autoencoder.on_the_fly:
        ref, root = config.autoencoder, prepared.run_dir.parent
        parent = read_autoencoder(root / ref.run)
        autoencoder = build_autoencoder(parent)
        if isinstance(parent, AutoencoderRun):
            average = str(parent.ema.half_lives_samples[0])
            load_average(autoencoder, average, root / ref.run, ref.step, group)
        autoencoder = autoencoder.eval().to(process.device)
        encoder = autoencoder.encoder
        measured = 1.0  # a checkpoint holds it
        if process.rank == 0 and not store.complete_steps(prepared.run_dir):
            measured = _measure_std(autoencoder, prepared, process.device)
        latents = {**(latents or {}), "std": broadcast_object(measured, process, group)}
    return build_stage(config, latents, encoder)


@torch.no_grad()
def _measure_std(
    autoencoder: AutoencoderStage | FixedAutoencoder, prepared: Prepared, device: torch.device
) -> float:
    """Return the std of the latents of the first samples, over all entries."""
    batches = iterate(
        prepared.index,
        prepared.config.data,
        stop=Z_STD_SAMPLES,
        batch_size=64,
        on_bad=lambda name, reason: None,  # named when training meets it
    )
    return float(torch.cat([autoencoder.encode(batch["x"].to(device)).flatten() for batch in batches]).std())
