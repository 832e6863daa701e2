"""Evaluations of a run at a step: ``evals/step_N/metrics.json`` and the pictures beside it.

Measured in another way, a step has a ``metrics-<id>.json`` more; ``metrics.json`` is the newest.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ul_scale import keyed
from ul_scale.checkpoint.files import write_atomic
from ul_scale.config import AutoencoderRun, hash10
from ul_scale.data.index import Index, open_index
from ul_scale.data.stream import iterate
from ul_scale.diffusion import losses
from ul_scale.evaluate import images
from ul_scale.evaluate.features import extract_features, load_network
from ul_scale.evaluate.frechet import cached_features, frechet_distance, reference_path
from ul_scale.evaluate.restore import restore_autoencoder, restore_base
from ul_scale.stages.autoencoder import AutoencoderStage
from ul_scale.train.prepare import latents_dir, read_config


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How runs are evaluated; part of an evaluation's identity."""

    samples: int = 1000
    """n: images generated or reconstructed, and held-out images that they are compared with."""
    base_steps: int = 32
    """Ancestral steps of the base model."""
    decoder_steps: int = 8
    """Ancestral steps of the decoder."""
    times_per_image: int = 8
    """Noise levels per image in the held-out bitrate."""
    features: str = "fd_effnet_lite0"
    """Feature network of the Fréchet distances, which carry its name."""
    batch_size: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("samples", "base_steps", "decoder_steps", "times_per_image", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"evaluation.{name} is {getattr(self, name)}; expected 1 or more")


def evaluation_dir(run_dir: Path, step: int) -> Path:
    return run_dir / "evals" / f"step_{step:08d}"


def evaluation_id(config: EvaluationConfig) -> str:
    return hash10(asdict(config))


def read_evaluation(run_dir: Path, step: int, config: EvaluationConfig) -> dict[str, Any] | None:
    """Return metrics.json if the step was evaluated in this way, else None."""
    path = evaluation_dir(run_dir, step) / f"metrics-{evaluation_id(config)}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def evaluate(run_dir: Path, step: int, config: EvaluationConfig) -> dict[str, Any]:
    """Evaluate a run at a step, or return what is there already.

    Raises:
        ValueError: if the run has no held-out data, or fewer held-out images than asked for.
    """
    run_dir = run_dir.resolve()
    run = read_config(run_dir)
    done = read_evaluation(run_dir, step, config)
    if done is not None:
        return done
    started = time.monotonic()
    out_dir = evaluation_dir(run_dir, step)
    out_dir.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        if isinstance(run, AutoencoderRun):
            values = _evaluate_autoencoder(run_dir, step, config, out_dir)
        else:
            values = _evaluate_base(run_dir, step, config, out_dir)
    values |= {
        "step": step,
        "n": config.samples,
        "evaluation_id": evaluation_id(config),
        "evaluation": asdict(config),
        "seconds": time.monotonic() - started,
    }
    text = json.dumps(values, indent=1).encode()
    write_atomic(out_dir / "metrics.json", text)
    write_atomic(out_dir / f"metrics-{evaluation_id(config)}.json", text)
    return values


def _evaluate_autoencoder(
    run_dir: Path, step: int, config: EvaluationConfig, out_dir: Path
) -> dict[str, Any]:
    run, stage = restore_autoencoder(run_dir, step)
    index = held_out(run, config.samples)
    device = next(stage.parameters()).device
    network = load_network(config.features, device)
    reconstructed, psnr, bits = [], 0.0, []
    for start, batch in batches(index, run, config):
        x = batch["x"].to(device)
        bits.append(held_out_bits(stage, x, start, config))
        generators = sample_generators("reconstruct", start, len(x), config, device)
        eps = torch.stack([torch.randn(stage.latent_shape, generator=g, device=device) for g in generators])
        z_0 = stage.add_encoder_noise(stage.encode(x), eps)
        x_hat = stage.decode(z_0, num_steps=config.decoder_steps, generators=generators).clamp(-1, 1)
        psnr += images.psnr(x, x_hat) * len(x) / config.samples
        reconstructed.append(extract_features(network, x_hat))
        if start == 0:
            images.save_pairs(x[:16].cpu(), x_hat[:16].cpu(), out_dir / "reconstructions.png")
    per_image = torch.cat(bits)
    reference = reference_features(run_dir.parent, index, run, config, network)
    return {
        "bits_per_pixel": per_image.mean().item(),
        "bits_per_pixel_ci95": 1.96 * per_image.std().item() / len(per_image) ** 0.5,
        "psnr": psnr,
        f"r{config.features}": frechet_distance(torch.cat(reconstructed), reference),
    }


def _evaluate_base(run_dir: Path, step: int, config: EvaluationConfig, out_dir: Path) -> dict[str, Any]:
    run, base = restore_base(run_dir, step)
    parent_ref = run.autoencoder
    parent, autoencoder = restore_autoencoder(run_dir.parent / parent_ref.run, parent_ref.step)
    index = held_out(parent, config.samples)
    device = base.z_std.device
    network = load_network(config.features, device)
    generated = []
    for start in range(0, config.samples, config.batch_size):
        count = min(config.batch_size, config.samples - start)
        generators = sample_generators("generate", start, count, config, device)
        label = None
        if base.num_classes is not None:
            label = torch.arange(start, start + count, device=device) % base.num_classes
        z_0 = base.sample(label, num_steps=config.base_steps, generators=generators)
        x = autoencoder.decode(z_0, num_steps=config.decoder_steps, generators=generators).clamp(-1, 1)
        generated.append(extract_features(network, x))
        if start == 0:
            images.save_grid(x[:40].cpu(), out_dir / "samples.png", columns=10)
    reference = reference_features(run_dir.parent, index, parent, config, network)
    latents: Iterator[tuple[int, Any]]
    if parent_ref.on_the_fly:
        latents = (
            (start, batch | {"z_clean": autoencoder.encode(batch["x"].to(device))})
            for start, batch in batches(index, parent, config)
        )
    else:
        encoded = open_index(str(latents_dir(run_dir.parent, parent_ref.run, parent_ref.step, "val")))
        if encoded.extra["source"] != index.identity:
            raise ValueError(
                f"{encoded.url}: was encoded from {encoded.extra['source']}, data.val is {index.identity}"
            )
        latents = batches(encoded, run, config)
    bits = [
        held_out_bits(base, batch["z_clean"].to(device), start, config, batch["label"].to(device))
        for start, batch in latents
    ]
    return {
        config.features: frechet_distance(torch.cat(generated), reference),
        "base_bits_per_pixel": torch.cat(bits).mean().item(),
    }


def held_out(run: AutoencoderRun, samples: int) -> Index:
    if run.data.val is None:
        raise ValueError("data.val is not set: evaluation needs held-out shards")
    index = open_index(run.data.val)
    if len(index) < samples:
        raise ValueError(
            f"evaluation.samples is {samples}, but {run.data.val} has {len(index)} held-out samples"
        )
    return index


def batches(index: Index, run: Any, config: EvaluationConfig) -> Iterator[tuple[int, Any]]:
    """Yield (number of the first sample, batch) over the first n samples."""
    start = 0
    for batch in iterate(index, run.data, stop=config.samples, batch_size=config.batch_size):
        yield start, batch
        start += len(batch["keys"])


def sample_generators(
    purpose: str, start: int, count: int, config: EvaluationConfig, device: torch.device
) -> list[torch.Generator]:
    """Return a generator per sample, keyed by its number: the same noise for every run that is compared."""
    return [
        keyed.generator(device, config.seed, "evaluate", purpose, number)
        for number in range(start, start + count)
    ]


def held_out_bits(
    stage: Any, x: Tensor, start: int, config: EvaluationConfig, label: Tensor | None = None
) -> Tensor:
    """Return the bits per pixel of each image's latent, (b,): the mean over stratified noise levels.

    Args:
        stage: an autoencoder, with x images, or a base model, with x latents.
        x: (b, ...).
        start: number of the first one, which keys the noise.
        config: noise levels per image.
        label: of a base model.
    """
    z_clean = stage.encode(x) if isinstance(stage, AutoencoderStage) else x
    generators = sample_generators("bits", start, len(x), config, x.device)
    total = torch.zeros(len(x), device=x.device)
    offset = torch.stack([torch.rand((), generator=g, device=x.device) for g in generators])
    for stratum in range(config.times_per_image):
        t = (stratum + offset) / config.times_per_image
        eps = torch.stack([torch.randn(stage.latent_shape, generator=g, device=x.device) for g in generators])
        total += stage.latent_nats(z_clean, t, eps, label) / config.times_per_image
    return losses.bits_per_pixel(total, stage.num_pixels)


def reference_features(
    root: Path, index: Index, run: AutoencoderRun, config: EvaluationConfig, network: nn.Module
) -> Tensor:
    """Return the features of the first n held-out images, computed once per root."""
    fingerprint = f"{index.fingerprint[:16]}-{run.data.image_size}x{run.data.channels}"
    path = reference_path(
        root / "features", network=config.features, fingerprint=fingerprint, n=config.samples
    )

    def compute() -> Tensor:
        return torch.cat([extract_features(network, batch["x"]) for _, batch in batches(index, run, config)])

    return cached_features(path, compute)
