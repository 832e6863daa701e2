"""A run before it takes a device: its data, its plan, its stage; and all that can be checked so far."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ul_scale import config as configs
from ul_scale import keyed
from ul_scale.checkpoint import store
from ul_scale.checkpoint.files import decode, read, require_bucket, run_path
from ul_scale.config import AnyAutoencoder, AutoencoderRef, AutoencoderRun, BaseRun, FixedRun, RunConfig
from ul_scale.data.config import DataConfig
from ul_scale.data.index import Index, open_index
from ul_scale.data.latents import is_complete
from ul_scale.data.plan import LanePlan, lane_slots
from ul_scale.data.stream import LaneStream, make_plan
from ul_scale.models.flops import num_parameters
from ul_scale.models.text import TextConfig, check_text_encoder, text_identity
from ul_scale.parallel.build import check_layout
from ul_scale.stages.autoencoder import AutoencoderStage
from ul_scale.stages.base import BaseStage
from ul_scale.stages.fixed import FixedAutoencoder
from ul_scale.train.conditions import check_embeddings, reading_text
from ul_scale.train.metrics import last_row
from ul_scale.train.preemption import fits_notice, notice_in_force


@dataclass(frozen=True)
class Prepared:
    """A run whose config, data and batch arithmetic have been checked, before any device is taken."""

    config: RunConfig
    data: DataConfig
    """As the config has it, and with whatever ``model.text`` takes."""
    run_id: str
    run_dir: Path
    index: Index
    plan: LanePlan
    latents: dict[str, Any] | None
    """Of a base model: what is known of its latents (shape, num_pixels, std, num_classes, log_snr_max).
    Where images are encoded on the fly, std is still to be measured."""
    world_size: int

    @property
    def samples_per_rank(self) -> int:
        return len(lane_slots(self.plan.lanes, 0, self.world_size)) * self.plan.lane_batch_size


def latents_dir(root: str | Path, run_id: str, step: int, split: str = "train") -> Path:
    return run_path(str(root)) / run_id / "latents" / f"step_{step:08d}" / split


def prepare(config: RunConfig, world_size: int = 1) -> Prepared:
    """Open the data and check everything that needs no device.

    Raises:
        ValueError: in one line, what was given, what was expected, where.
    """
    config.log.check()
    _check_target(config)
    on_the_fly = isinstance(config, BaseRun) and config.autoencoder.on_the_fly
    index = open_index(training_url(config))
    check_held_out(config, index)
    latents, text = None, None
    if isinstance(config, BaseRun):
        latents = facts_on_the_fly(config, index, run_path(config.root)) if on_the_fly else index.extra
        text = config.model.text
        check_embeddings(text, latents, index.url)
        check_text_encoder(text)
    images = on_the_fly or isinstance(config, AutoencoderRun)
    if images and "autoencoder" in index.extra:
        raise ValueError(f"data.train is {index.url}, which holds latents; expected images or videos")
    facts = latents or {}
    encoder = embeddings_identity(text, facts)
    run_id = configs.run_id(config, index.identity if images else None, encoder, facts.get("stored"))
    data = reading_text(config.data, text)
    plan = make_plan(index, data, seed=config.seed, batch_size=config.train.batch_size)
    # The last rank has the most lanes. Nothing is read yet.
    LaneStream(index, plan, data, lane_slots(plan.lanes, world_size - 1, world_size))
    run_dir = run_path(config.root) / run_id
    require_bucket(run_dir)
    prepared = Prepared(config, data, run_id, run_dir, index, plan, latents, world_size)
    check_layout(config.parallel, world_size, prepared.samples_per_rank)
    return prepared


def embeddings_identity(text: TextConfig | None, facts: dict[str, Any]) -> str | None:
    """Return which encoder makes a run's embeddings, or made those of the set that ``facts`` are of."""
    if text is not None and text.encoder is None:
        return configs.hash10(facts["text"])
    return text_identity(text) if text is not None else None


def _check_target(config: RunConfig) -> None:
    if isinstance(config, AutoencoderRun) and config.loss.target_bits_per_pixel is not None:
        if config.model.prior_kind != "diffusion":
            raise ValueError(
                f"loss.target_bits_per_pixel is set and model.prior_kind is {config.model.prior_kind}; "
                "expected a diffusion prior, whose bits are held"
            )
        if config.model.decoder_kind != "diffusion":
            raise ValueError(
                f"loss.target_bits_per_pixel is set and model.decoder_kind is {config.model.decoder_kind}; "
                "expected a diffusion decoder, whose bits vanish at c_lf = 1"
            )
        if config.parallel.engine == "deepspeed":
            raise ValueError(
                "loss.target_bits_per_pixel is set and parallel.engine is deepspeed; expected none or fsdp, "
                "which can measure averaged weights during training"
            )


def training_url(config: RunConfig) -> str:
    """Return the URL of the shards that a run trains on: latents of a base model, else images.

    Raises:
        ValueError: if there is no such autoencoder, if its latents are not encoded yet, or if the data are
            not set.
    """
    if isinstance(config, BaseRun) and not config.autoencoder.on_the_fly:
        if config.data.train is not None:
            raise ValueError(
                f"data.train is {config.data.train} and autoencoder.on_the_fly is false, which trains on the "
                "autoencoder's latents; expected autoencoder.on_the_fly=true, or no data.train"
            )
        return stored_latents(run_path(config.root), config.autoencoder)
    if config.data.train is None or config.data.image_size is None:
        raise ValueError(
            "data.train and data.image_size are not both set; expected a folder of shards, and pixels"
        )
    return config.data.train


def stored_latents(root: Path, parent: AutoencoderRef, split: str = "train") -> str:
    """Return the URL of an autoencoder's latents.

    Raises:
        ValueError: if there is no such autoencoder, or its latents are not encoded yet.
    """
    url = str(latents_dir(root, parent.run, parent.step, split))
    if not is_complete(url):
        read_autoencoder(root / parent.run)
        raise ValueError(
            f"{url}: no latents of autoencoder {parent.run} at step {parent.step}; first run: "
            f"ul-scale encode {root / parent.run} --step {parent.step}"
        )
    return url


def check_held_out(config: RunConfig | FixedRun, index: Index) -> None:
    """Raise ``ValueError`` if a run's held-out data are those that it trains on, or have other classes."""
    if config.data.val is None:
        return
    val = open_index(config.data.val)
    if val.classes and index.classes and val.classes != index.classes:
        raise ValueError(f"{config.data.val}: its classes are not those of {index.url}; ids would not agree")
    if val.fingerprint == index.fingerprint:
        raise ValueError(f"{config.data.val}: is the training set {index.url}; expected held-out samples")


def read_config(run_dir: Path) -> RunConfig | FixedRun:
    """Return the config of a run directory.

    Raises:
        ValueError: if it is none.
    """
    data = read(run_dir / "config.yaml")
    if data is None:
        raise ValueError(f"{run_dir}: not a run directory (no config.yaml); expected <root>/<run_id>")
    return configs.loads(data, f"{run_dir}/config.yaml")


def read_autoencoder(run_dir: Path) -> AnyAutoencoder:
    """Return the config of an autoencoder's run directory.

    Raises:
        ValueError: if it is none, or a base model's.
    """
    config = read_config(run_dir)
    if isinstance(config, BaseRun):
        raise ValueError(f"{run_dir}: is a base model's run; expected an autoencoder's")
    return config


def read_base(run_dir: Path) -> BaseRun:
    """Return the config of a base model's run directory; as ``read_autoencoder``."""
    config = read_config(run_dir)
    if not isinstance(config, BaseRun):
        raise ValueError(f"{run_dir}: is an autoencoder's run; expected a base model's")
    return config


def images_of(run: RunConfig | FixedRun, root: Path) -> RunConfig | FixedRun:
    """Return the run whose ``data`` a run is about: its own, or of stored latents its autoencoder's."""
    if isinstance(run, BaseRun) and not run.autoencoder.on_the_fly:
        return read_autoencoder(root / run.autoencoder.run)
    return run


def facts_on_the_fly(config: BaseRun, index: Index, root: Path) -> dict[str, Any]:
    """Return what is known of latents that are encoded during training; all but their std.

    Raises:
        ValueError: if the images are not as the autoencoder expects them.
    """
    ref = config.autoencoder
    parent = read_autoencoder(root / ref.run)
    for name in ("image_size", "channels", "clip_frames"):
        ours, theirs = getattr(config.data, name), getattr(parent.data, name)
        if ours != theirs:
            raise ValueError(f"data.{name} is {ours}, but the autoencoder {ref.run} has {theirs}")
    steps = [0] if isinstance(parent, FixedRun) else store.complete_steps(root / ref.run)
    if ref.step not in steps:
        raise ValueError(
            f"autoencoder.step is {ref.step}; {ref.run} has complete checkpoints at {steps or 'no step'}"
        )
    given, frames = config.model.given_frames, config.data.clip_frames
    if given is not None and given >= (frames or 1):
        what = f"clips have {frames} frames" if frames else "data are images"
        raise ValueError(f"model.given_frames is {given}, but the {what}; expected fewer")
    with torch.device("meta"):
        stage = build_autoencoder(parent)
    return {
        **latent_facts(stage),
        "std": 1.0,
        "num_classes": None if index.classes is None and "cls" in index.parts else len(index.classes or ()),
        "given_frames": config.model.given_frames,
    }


def latent_facts(stage: AutoencoderStage | FixedAutoencoder) -> dict[str, Any]:
    """Return what a base model has to know of an autoencoder, as ``encode`` writes it beside latents."""
    return {
        "shape": list(stage.latent_shape),
        "num_pixels": stage.num_pixels,
        "log_snr_max": stage.loss.log_snr_max,
    }


def check_resumable(prepared: Prepared) -> None:
    """Check that the newest checkpoint, if there is one, can be continued as this run is set up.

    Raises:
        ValueError: if DeepSpeed saved it, and the engine, the number of processes or the stage is another.
    """
    run_dir, config = prepared.run_dir, prepared.config.parallel
    step = store.latest_step(run_dir)
    commit = store.read_commit(run_dir, step) if step is not None else None
    if commit is None or commit.format != "deepspeed":
        return
    made = decode(read(run_dir / "run.json")).get("attempts", {}).get(str(commit.attempt), {})
    ours = {"engine": config.engine, "world_size": prepared.world_size, "zero_stage": config.zero_stage}
    theirs = {
        "engine": "deepspeed",
        **{key: made[key] for key in ("world_size", "zero_stage") if key in made},
    }
    other = [f"{key} {value} (here {ours[key]})" for key, value in theirs.items() if ours[key] != value]
    if other:
        raise ValueError(
            f"{run_dir}: step {step} was saved by DeepSpeed with {', '.join(other)}; expected the same, or "
            f"first run: ul-scale checkpoint convert {run_dir}"
        )


def describe(prepared: Prepared) -> str:
    """Return what a run would do, for a dry run."""
    config, plan, run_dir = prepared.config, prepared.plan, prepared.run_dir
    done = (store.read_success(run_dir) or 0) >= config.train.last_step
    newest = (store.complete_steps(run_dir) or [0])[-1]
    epochs = config.train.last_step * config.train.batch_size / len(prepared.index)
    with torch.device("meta"):
        stage = build_stage(config, prepared.latents)
    row = last_row(run_dir) or {}
    step_s = config.train.batch_size / row["images_per_s"] if row.get("images_per_s") else None
    notice = notice_in_force(config.preemption)
    surplus = prepared.samples_per_rank * prepared.world_size - config.train.batch_size
    return "\n".join(
        [
            f"run        {prepared.run_id}",
            f"directory  {run_dir}",
            f"state      {'done' if done else f'{newest} steps complete'}",
            f"data       {len(prepared.index)} samples, fingerprint {prepared.index.fingerprint}",
            f"steps      {config.train.last_step} of {config.train.batch_size} samples, {epochs:.2f} epochs",
            f"processes  {prepared.world_size}, engine {config.parallel.engine}, {prepared.samples_per_rank} "
            f"samples each in {config.parallel.accumulation_steps} micro-batches; {surplus} computed in vain",
            f"lanes      {plan.lanes} of {plan.lane_batch_size} samples; world sizes that waste nothing: "
            + ", ".join(str(n) for n in range(1, plan.lanes + 1) if plan.lanes % n == 0),
            f"parameters {num_parameters(stage):,}",
            f"preemption {fits_notice(notice, row.get('save_s'), config.checkpoint.every_steps, step_s)}",
        ]
    )


def build_autoencoder(config: AnyAutoencoder) -> AutoencoderStage | FixedAutoencoder:
    """Return an autoencoder's stage, with initial weights keyed by its seed, or its own if it is fixed."""
    assert config.data.image_size is not None
    size, channels, frames = config.data.image_size, config.data.channels, config.data.clip_frames
    if isinstance(config, FixedRun):
        if frames is not None:
            raise ValueError(f"data.frames is {frames}; autoencoders that are not trained here take images")
        return FixedAutoencoder(config.model, config.loss, image_size=size, channels=channels)
    torch.manual_seed(keyed.seed_of(config.seed, "init") >> 1)
    return AutoencoderStage(config.model, config.loss, image_size=size, channels=channels, frames=frames)


def build_stage(
    config: RunConfig, latents: dict[str, Any] | None = None, encoder: nn.Module | None = None
) -> AutoencoderStage | BaseStage:
    """Return the stage of a run that is trained, with initial weights keyed by its seed.

    Args:
        config: resolved.
        latents: of a base model: what is known of them, as ``Prepared.latents``.
        encoder: of a base model that is trained on images: the frozen encoder.

    Raises:
        ValueError: if the latents are not those that the model expects.
    """
    if isinstance(config, AutoencoderRun):
        stage = build_autoencoder(config)
        assert isinstance(stage, AutoencoderStage)
        return stage
    if latents is None or "log_snr_max" not in latents:
        raise ValueError("these shards do not say what latents they hold; expected those of ul-scale encode")
    check_latents(config, latents)
    torch.manual_seed(keyed.seed_of(config.seed, "init") >> 1)
    return BaseStage(
        config.model,
        config.loss,
        latent_shape=tuple(latents["shape"]),
        num_pixels=latents["num_pixels"],
        z_std=latents["std"],
        encoder=encoder,
    )


def check_latents(config: BaseRun, latents: dict[str, Any]) -> None:
    """Raise ``ValueError`` if a base model is not for such latents: their classes, their noise."""
    model, found = config.model, latents["num_classes"]
    if found is not None and (model.num_classes or found) < found:
        raise ValueError(f"model.num_classes is {model.num_classes}, but the latents have {found}")
    if found == 0 and model.num_classes:
        raise ValueError(
            f"model.num_classes is {model.num_classes}, but the data have no classes; expected null"
        )
    if latents["log_snr_max"] != config.loss.log_snr_max:
        raise ValueError(
            f"loss.log_snr_max is {config.loss.log_snr_max}, "
            f"but the autoencoder's is {latents['log_snr_max']}"
        )
    given = latents.get("given_frames")
    if model.given_frames is not None and given != model.given_frames:
        raise ValueError(
            f"model.given_frames is {model.given_frames}, but the latents were encoded with "
            f"{given or 'none'}; expected those of ul-scale encode RUN --given-frames {model.given_frames}"
        )
