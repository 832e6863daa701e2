"""The bitrate of a run's latents under its own prior or base model: a bound, with its confidence interval."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ul_scale.config import AutoencoderRun, BaseRun
from ul_scale.data.index import Index, open_index
from ul_scale.data.progress import progress_bar
from ul_scale.diffusion import losses
from ul_scale.evaluate.metrics import EvaluationConfig, batches, held_out_bits, latent_batches
from ul_scale.evaluate.restore import newest_step, restore_autoencoder, restore_base
from ul_scale.stages.autoencoder import AutoencoderStage
from ul_scale.stages.base import BaseStage
from ul_scale.stages.conditions import Conditions
from ul_scale.train.prepare import images_of, read_config

SPLITS = ("val", "train")


@torch.no_grad()
def measure_bitrate(
    run_dir: Path,
    step: int | None = None,
    *,
    split: str = "val",
    samples: int = 1000,
    times_per_image: int = 8,
    seed: int = 0,
    batch_size: int = 100,
) -> dict[str, Any]:
    """Measure the unweighted ELBO of latents, by the run's first EMA, with noise keyed by sample number.

    Of an autoencoder that is under its prior; of a base model under that model, given what it is conditioned
    on. Held-out data bound the bits; training data lie lower by as much as the prior has overfitted.

    Args:
        run_dir: of an autoencoder or a base model.
        step: of a complete checkpoint; by default the newest.
        split: ``val`` or ``train``; of a base model, its autoencoder's.
        samples: n, the first of the split.
        times_per_image: noise levels per image, stratified.
        seed: of the noise.
        batch_size: images at a time; it changes nothing.

    Returns:
        ``bits_per_pixel``, the mean over images, and ``bits_per_pixel_ci95``, half its 95 % interval over
        images and their noise; ``bits_per_dim``, per latent dimension; ``diffusion`` and ``kl``, the two
        parts of bits_per_pixel, and ``kl_share``; ``n`` and how it was measured; ``loss_factor`` of an
        autoencoder.

    Raises:
        ValueError: if the split is not there or too small, or the autoencoder has no prior of its own.
    """
    if split not in SPLITS:
        raise ValueError(f"--data is {split!r}; expected one of {', '.join(SPLITS)}")
    if samples < 2:
        raise ValueError(f"--samples is {samples}; expected 2 or more, for an interval")
    run_dir = run_dir.resolve()
    step = newest_step(run_dir) if step is None else step
    config = EvaluationConfig(
        samples=samples, times_per_image=times_per_image, batch_size=batch_size, seed=seed
    )
    if isinstance(read_config(run_dir), BaseRun):
        measured: AutoencoderStage | BaseStage
        measured, parts = _of_base(run_dir, step, split, config)
    else:
        measured, parts = _of_autoencoder(run_dir, step, split, config)
    bits, kls = [], []
    with progress_bar(f"bitrate of {split}", samples, "images") as advance:
        for per_image, kl in parts:
            bits.append(per_image.double().cpu())
            kls.append(losses.bits_per_pixel(kl, measured.num_pixels).double().cpu())
            advance(len(kl))
    per_image, mean_kl = torch.cat(bits), torch.cat(kls).mean().item()
    mean = per_image.mean().item()
    dims = torch.Size(measured.latent_shape).numel()
    result = {
        "bits_per_pixel": mean,
        "bits_per_pixel_ci95": 1.96 * per_image.std().item() / samples**0.5,
        "bits_per_dim": mean * measured.num_pixels / dims,
        "diffusion": mean - mean_kl,
        "kl": mean_kl,
        "kl_share": mean_kl / mean,
        "split": split,
        "n": samples,
        "times_per_image": times_per_image,
        "seed": seed,
        "step": step,
    }
    if isinstance(measured, AutoencoderStage):
        result["loss_factor"] = measured.loss_factor_after(step)
    return result


Parts = Iterator[tuple[Tensor, Tensor]]
"""Of each batch: bits per pixel of each image, (b,), and the KL in it, (b,) nats."""


def _of_autoencoder(
    run_dir: Path, step: int, split: str, config: EvaluationConfig
) -> tuple[AutoencoderStage, Parts]:
    run, stage = restore_autoencoder(run_dir, step)
    if not isinstance(run, AutoencoderRun) or not isinstance(stage, AutoencoderStage):
        raise ValueError(f"{run_dir}: was not trained here and has no prior; expected a base model's run")
    index = open_split(run, split, config.samples)

    def parts() -> Parts:
        for start, batch in batches(index, run, config):
            x = batch["x"].to(next(stage.parameters()).device)
            bits = held_out_bits(stage, x, start, config)
            # Of a normal prior the KL is all there is.
            log_snr = stage.loss.log_snr_max if stage.prior is None else stage.loss.log_snr_min
            yield bits, losses.kl_to_normal(stage.encode(x), log_snr)

    return stage, parts()


def _of_base(run_dir: Path, step: int, split: str, config: EvaluationConfig) -> tuple[BaseStage, Parts]:
    run, base = restore_base(run_dir, step)
    parent, autoencoder = restore_autoencoder(run_dir.parent / run.autoencoder.run, run.autoencoder.step)
    index = open_split(images_of(run, run_dir.parent), split, config.samples)

    def parts() -> Parts:
        for start, batch in latent_batches(
            run, base, parent, autoencoder, index, config, run_dir.parent, split
        ):
            z_clean = batch["z_clean"]
            bits = held_out_bits(base, z_clean, start, config, Conditions.of(batch))
            yield bits, losses.kl_to_normal(z_clean, base.loss.log_snr_min)

    return base, parts()


def open_split(run: Any, split: str, samples: int) -> Index:
    """Return the index of a split that has so many samples.

    Raises:
        ValueError: if there is none, or it has fewer.
    """
    url = getattr(run.data, split)
    if url is None:
        raise ValueError(f"data.{split} is not set; expected a folder of shards to measure the bitrate on")
    index = open_index(url)
    if len(index) < samples:
        raise ValueError(f"--samples is {samples}, but {url} has {len(index)} samples")
    return index
