"""Evaluations of a run at a step: ``evals/step_N/metrics.json`` and the pictures beside it.

Each way of measuring a step has files of its own, named by its id; those without one are the newest's.
"""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ul_scale import keyed
from ul_scale.checkpoint.files import write_atomic
from ul_scale.config import AnyAutoencoder, BaseRun, FixedRun, RunConfig, hash10, identity
from ul_scale.data.index import Index, open_index
from ul_scale.data.stream import iterate
from ul_scale.diffusion import losses
from ul_scale.diffusion.samplers import SAMPLERS
from ul_scale.evaluate import images
from ul_scale.evaluate.features import extract_features, load_network
from ul_scale.evaluate.frechet import cached_features, frechet_distance, reference_path
from ul_scale.evaluate.restore import restore_autoencoder, restore_base
from ul_scale.models.text import load_text_encoder
from ul_scale.stages.autoencoder import AutoencoderStage
from ul_scale.stages.base import BaseStage, Sampling
from ul_scale.stages.conditions import UNTOLD, Conditions
from ul_scale.stages.fixed import FixedAutoencoder
from ul_scale.train.conditions import reading_text, with_conditions
from ul_scale.train.loop import to_device
from ul_scale.train.prepare import images_of, read_config, stored_latents


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How runs are evaluated; part of an evaluation's identity."""

    samples: int = 1000
    """n: images generated or reconstructed, and held-out images that they are compared with."""
    base_steps: int = 32
    """Steps of the base model's sampler."""
    decoder_steps: int = 8
    """Steps of the decoder's."""
    times_per_image: int = 8
    """Noise levels per image in the held-out bitrate."""
    features: str = "fd_effnet_lite0"
    """Feature network of the Fréchet distances, which carry its name."""
    batch_size: int = 100
    seed: int = 0
    base_sampler: str = field(default="ancestral", metadata={"legacy": "ancestral"})
    """ancestral, ddim or dpmpp_2m, of ``base_steps``."""
    decoder_sampler: str = field(default="ancestral", metadata={"legacy": "ancestral"})
    """Likewise of the decoder."""
    guidance: float = field(default=1.0, metadata={"legacy": 1.0})
    """Scale of the base model's classifier-free guidance; 1: none."""
    guidance_interval: list[float] | None = field(default=None, metadata={"legacy": None})
    """log-SNR from and to which there is guidance, nats, such as [-5, 1]; null: everywhere."""

    @property
    def base_calls(self) -> int:
        """Forward passes of the base model for a sample; with guidance at most so many."""
        return self.base_steps * (1 if self.guidance == 1 else 2)

    def __post_init__(self) -> None:
        for name in ("base_sampler", "decoder_sampler"):
            if getattr(self, name) not in SAMPLERS:
                raise ValueError(
                    f"evaluation.{name} is {getattr(self, name)!r}; expected one of {', '.join(SAMPLERS)}"
                )
        interval = self.guidance_interval
        if interval is not None and not (len(interval) == 2 and interval[0] < interval[1]):
            raise ValueError(
                f"evaluation.guidance_interval is {list(interval)}; expected two log-SNRs, lower first"
            )
        if not 0 <= self.guidance < math.inf:
            raise ValueError(f"evaluation.guidance is {self.guidance}; expected a number from 0")
        if interval is not None and self.guidance == 1:
            raise ValueError(
                "evaluation.guidance_interval is set and evaluation.guidance is 1: there is none"
            )
        if self.samples < 2:
            raise ValueError(f"evaluation.samples is {self.samples}; expected 2 or more, which have a spread")
        for name in ("base_steps", "decoder_steps", "times_per_image", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"evaluation.{name} is {getattr(self, name)}; expected 1 or more")


def evaluation_dir(run_dir: Path, step: int) -> Path:
    return run_dir / "evals" / f"step_{step:08d}"


def evaluation_id(config: EvaluationConfig) -> str:
    return hash10(identity(config))


def picture_path(run_dir: Path, step: int, config: EvaluationConfig, name: str) -> Path:
    """Return where an evaluation keeps its ``samples`` or ``reconstructions``."""
    return evaluation_dir(run_dir, step) / f"{name}-{evaluation_id(config)}.png"


def read_evaluation(run_dir: Path, step: int, config: EvaluationConfig) -> dict[str, Any] | None:
    """Return metrics.json if the step was evaluated in this way, else None."""
    path = evaluation_dir(run_dir, step) / f"metrics-{evaluation_id(config)}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def evaluate(run_dir: Path, step: int, config: EvaluationConfig) -> dict[str, Any]:
    """Evaluate a run at a step, or return what is there already of these held-out samples.

    Raises:
        ValueError: if the run has no held-out data, or fewer held-out images than asked for, or no such step.
    """
    run_dir = run_dir.resolve()
    run = read_config(run_dir)
    index = held_out(images_of(run, run_dir.parent), config.samples)
    done = read_evaluation(run_dir, step, config)
    if done is not None and done.get("held_out", index.identity) == index.identity:
        return done
    started = time.monotonic()
    with torch.no_grad():
        evaluate_kind = _evaluate_base if isinstance(run, BaseRun) else _evaluate_autoencoder
        values = evaluate_kind(run_dir, step, config, index)
    values |= {
        "held_out": index.identity,
        "step": step,
        "n": config.samples,
        "evaluation_id": evaluation_id(config),
        "evaluation": asdict(config),
        "seconds": time.monotonic() - started,
    }
    out_dir, suffix = evaluation_dir(run_dir, step), f"-{evaluation_id(config)}"
    for picture in out_dir.glob(f"*{suffix}.*"):
        write_atomic(out_dir / picture.name.replace(suffix, ""), picture.read_bytes())
    text = json.dumps(values, indent=1).encode()
    write_atomic(out_dir / "metrics.json", text)
    write_atomic(out_dir / f"metrics{suffix}.json", text)
    return values


def _evaluate_autoencoder(run_dir: Path, step: int, config: EvaluationConfig, index: Index) -> dict[str, Any]:
    run, stage = restore_autoencoder(run_dir, step)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = load_network(config.features, device)
    reconstructed, psnr, bits = [], 0.0, []
    for start, batch in batches(index, run, config):
        x = batch["x"].to(device)
        if isinstance(stage, AutoencoderStage):
            bits.append(held_out_bits(stage, x, start, config))
        generators = sample_generators("reconstruct", start, len(x), config, device)
        eps = torch.stack([torch.randn(stage.latent_shape, generator=g, device=device) for g in generators])
        z_0 = stage.add_encoder_noise(stage.encode(x), eps)
        x_hat = stage.decode(
            z_0, num_steps=config.decoder_steps, generators=generators, sampler=config.decoder_sampler
        ).clamp(-1, 1)
        psnr += images.psnr(x, x_hat) * len(x) / config.samples
        reconstructed.append(extract_features(network, frames_of(x_hat)))
        if start == 0:
            shown = 16 if x.ndim == 4 else 4
            path = picture_path(run_dir, step, config, "reconstructions")
            path.parent.mkdir(parents=True, exist_ok=True)
            images.save_pairs(x[:shown].cpu(), x_hat[:shown].cpu(), path)
    reference = reference_features(run_dir.parent, index, run, config, network)
    metric = metric_name(config, video=run.data.clip_frames is not None)
    values = {}
    if isinstance(stage, AutoencoderStage):  # one that is not trained here has no prior
        per_image = torch.cat(bits)
        values["bits_per_pixel"] = per_image.mean().item()
        values["bits_per_pixel_ci95"] = 1.96 * per_image.std().item() / len(per_image) ** 0.5
        values["loss_factor"] = stage.loss_factor_after(step)
    return values | {
        "psnr": psnr,
        f"r{metric}": frechet_distance(torch.cat(reconstructed), reference),
    }


def _evaluate_base(run_dir: Path, step: int, config: EvaluationConfig, index: Index) -> dict[str, Any]:
    run, base = restore_base(run_dir, step)
    _check_guidance(run_dir, run, config)
    parent, autoencoder = restore_autoencoder(run_dir.parent / run.autoencoder.run, run.autoencoder.step)
    device = base.z_std.device
    network = load_network(config.features, device)
    low, high = config.guidance_interval or (-math.inf, math.inf)
    sampling = Sampling(
        sampler=config.base_sampler,
        num_steps=config.base_steps,
        guidance=config.guidance,
        guidance_interval=(low, high),
    )
    generated, bits = [], []
    for start, batch in latent_batches(run, base, parent, autoencoder, index, config, run_dir.parent):
        conditions, count = Conditions.of(batch), len(batch["z_clean"])
        bits.append(held_out_bits(base, batch["z_clean"], start, config, conditions))
        generators = sample_generators("generate", start, count, config, device)
        z_0 = base.sample(_asked(base, conditions, start), sampling, generators)
        x = autoencoder.decode(
            z_0, num_steps=config.decoder_steps, generators=generators, sampler=config.decoder_sampler
        ).clamp(-1, 1)
        generated.append(extract_features(network, frames_of(x)))
        if start == 0:
            path = picture_path(run_dir, step, config, "samples")
            _save_samples(x.cpu(), batch.get("text"), base.given_frames, path)
    reference = reference_features(run_dir.parent, index, parent, config, network)
    metric = metric_name(config, video=parent.data.clip_frames is not None)
    return {
        metric: frechet_distance(torch.cat(generated), reference),
        "base_bits_per_pixel": torch.cat(bits).mean().item(),
    }


def _check_guidance(run_dir: Path, run: BaseRun, config: EvaluationConfig) -> None:
    model = run.model
    told = model.num_classes or model.text is not None or model.given_frames
    if config.guidance != 1 and not (told and run.loss.label_dropout):
        why = "was trained with loss.label_dropout=0" if told else "is told nothing"
        raise ValueError(f"evaluation.guidance is {config.guidance}, but {run_dir} {why}; expected 1")


def latent_batches(
    run: BaseRun,
    base: BaseStage,
    parent: AnyAutoencoder,
    autoencoder: AutoencoderStage | FixedAutoencoder,
    index: Index,
    config: EvaluationConfig,
    root: Path,
    split: str = "val",
) -> Iterator[tuple[int, Any]]:
    """Yield (number of the first sample, batch with z_clean and all conditions, on the device).

    Args:
        run: of the base model.
        base: its stage.
        parent: its autoencoder's run.
        autoencoder: its autoencoder.
        index: of the images, as ``images_of`` the run has them.
        config: how many samples, and how many at a time.
        root: of both runs.
        split: ``val`` or ``train``, whose index it is.

    Raises:
        ValueError: if there are no latents, or they are not of these images.
    """
    device, ref, start = base.z_std.device, run.autoencoder, 0
    if ref.on_the_fly:
        data, source = replace(parent.data, captions=run.data.captions), index
    else:
        data, source = run.data, open_index(stored_latents(root, ref, split))
        if source.extra["source"] != index.identity:
            raise ValueError(
                f"{source.url}: was encoded from {source.extra['source']}, data.{split} is {index.identity}"
            )
    data = reading_text(data, run.model.text)
    found = iterate(source, data, stop=config.samples, batch_size=config.batch_size)
    for batch in with_conditions(found, load_text_encoder(run.model.text, device), device):
        whole = {**batch, **to_device(batch, device)}
        yield start, base.encode(whole, autoencoder.encoder) if ref.on_the_fly else whole
        start += len(batch["keys"])


def _asked(base: BaseStage, conditions: Conditions, start: int) -> Conditions:
    """Return what is asked for: each class in turn, or what the held-out samples tell."""
    if base.num_classes is None or base.text is not None or base.given_frames is not None:
        return conditions
    assert conditions.label is not None
    numbers = torch.arange(start, start + len(conditions.label), device=conditions.label.device)
    return Conditions(label=numbers % base.num_classes)


def frames_of(x: Tensor) -> Tensor:
    """Return images as they are, and every frame of videos (b, c, T, H, W) as an image."""
    return x.transpose(1, 2).flatten(0, 1) if x.ndim == 5 else x


def metric_name(config: EvaluationConfig, *, video: bool) -> str:
    """Return the name of the Fréchet distance; of videos it is that of their single frames."""
    return f"frames_{config.features}" if video else config.features


def _save_samples(x: Tensor, texts: list[str] | None, given_frames: int | None, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if x.ndim == 5:
        images.save_clips(x[:8], path, given_frames=given_frames or 0)
    else:
        images.save_grid(x[:40], path, columns=10, captions=(texts or ())[:40])


def held_out(run: RunConfig | FixedRun, samples: int) -> Index:
    """Return the index of a run's held-out data; raise ``ValueError`` if there are fewer than asked for."""
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
    stage: Any, x: Tensor, start: int, config: EvaluationConfig, conditions: Conditions = UNTOLD
) -> Tensor:
    """Return the bits per pixel of each image's latent, (b,): the mean over stratified noise levels.

    Args:
        stage: an autoencoder, with x images, or a base model, with x latents.
        x: (b, ...).
        start: number of the first one, which keys the noise.
        config: noise levels per image.
        conditions: of a base model.
    """
    told: tuple[Conditions, ...] = (conditions,)
    z_clean: Tensor = x
    gain: Tensor | float = 0.0
    generators = sample_generators("bits", start, len(x), config, x.device)
    if isinstance(stage, AutoencoderStage):
        told, eps = (), None
        if stage.model.learned_variance:
            eps = torch.stack(
                [torch.randn(stage.latent_shape, generator=g, device=x.device) for g in generators]
            )
        z_clean, gain = stage.draw(x, eps)
    total = torch.zeros(len(x), device=x.device)
    offset = torch.stack([torch.rand((), generator=g, device=x.device) for g in generators])
    for stratum in range(config.times_per_image):
        t = (stratum + offset) / config.times_per_image
        eps = torch.stack([torch.randn(stage.latent_shape, generator=g, device=x.device) for g in generators])
        total += stage.latent_nats(z_clean, t, eps, *told) / config.times_per_image
    return losses.bits_per_pixel(total - gain, stage.num_pixels)


def reference_features(
    root: Path, index: Index, run: AnyAutoencoder, config: EvaluationConfig, network: nn.Module
) -> Tensor:
    """Return the features of the first n held-out images, computed once per root."""
    fingerprint = f"{index.fingerprint[:16]}-{run.data.image_size}x{run.data.channels}"
    if not run.data.fast_jpeg:
        fingerprint += "-exact"
    if run.data.clip_frames is not None:
        fingerprint += "-clips-" + hash10(asdict(run.data))
    path = reference_path(
        root / "features", network=config.features, fingerprint=fingerprint, n=config.samples
    )

    def compute() -> Tensor:
        return torch.cat(
            [extract_features(network, frames_of(batch["x"])) for _, batch in batches(index, run, config)]
        )

    return cached_features(path, compute)
