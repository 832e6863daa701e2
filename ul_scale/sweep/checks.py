"""What a sweep refuses before it trains anything, for a later part of it would refuse it after hours."""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ul_scale import config as configs
from ul_scale.checkpoint import store
from ul_scale.config import AutoencoderRun, BaseRun
from ul_scale.data.decode import (
    FLIPPED_GIVEN_PART,
    FLIPPED_LATENT_PART,
    GIVEN_PART,
    LATENT_PART,
    TEXT_PART,
    make_decoder,
)
from ul_scale.data.index import Index, open_index, read_meta
from ul_scale.data.stream import make_plan
from ul_scale.evaluate.encode_jobs import Job
from ul_scale.evaluate.metrics import EvaluationConfig, read_evaluation
from ul_scale.models.text import check_text_encoder
from ul_scale.parallel.build import check_layout
from ul_scale.train.conditions import check_embeddings, reading_text
from ul_scale.train.prepare import check_held_out, read_config

SET_IN_AUTOENCODERS = {
    "root": "root",
    "name": "the bitrate",
    "seed": "autoencoder_seed",
    "loss.target_bits_per_pixel": "targets_bits_per_pixel",
    "checkpoint.keep_steps": "train.steps",
}
SET_IN_BASES = {
    "root": "root",
    "name": "the bitrate and the size",
    "seed": "seeds",
    "model.size": "sizes",
    "autoencoder.run": "its own autoencoders",
    "autoencoder.step": "its own autoencoders",
    "checkpoint.keep_steps": "evaluation_points",
}
"""What a sweep sets in its templates, and from which of its settings."""


def check_overrides(where: str, overrides: list[str], set_from: dict[str, str]) -> None:
    """Raise ``ValueError`` if overrides of a template give what the sweep sets itself."""
    for override in overrides:
        given = OmegaConf.to_container(configs.apply_overrides(OmegaConf.create(), [override]))
        for key, setting in set_from.items():
            if _has(given, key.split(".")):
                raise ValueError(f"{where} sets {key}, which a sweep sets from {setting}; expected it there")


def _has(values: Any, path: list[str]) -> bool:
    if not path:
        return True
    return isinstance(values, dict) and path[0] in values and _has(values[path[0]], path[1:])


def known_classes(images: Index, job: Job) -> dict[str, int]:
    """Return ``num_classes`` of latents; nothing while classes without names are still to be counted."""
    _, encoded = read_meta(str(job.folder))
    if encoded.get("complete") and "num_classes" in encoded["extra"]:
        return {"num_classes": encoded["extra"]["num_classes"]}
    if "cls" not in images.parts:
        return {"num_classes": 0}
    return {"num_classes": len(images.classes)} if images.classes else {}


def check_base(base: BaseRun, images: Index, job: Job) -> None:
    """Check a base model against latents that are not there yet, as its training will check it.

    Args:
        base: its config.
        images: that the autoencoder is trained on.
        job: of the latents.

    Raises:
        ValueError: if the model or how it is trained does not fit.
    """
    base.log.check()
    check_held_out(base, images)
    text, latents = base.model.text, str(job.folder)
    check_embeddings(text, job.further, latents)
    check_text_encoder(text)
    make_decoder(_parts(job), reading_text(base.data, text), latents)
    make_plan(images, base.data, seed=base.seed, batch_size=base.train.batch_size)
    check_layout(base.parallel, 1, base.train.batch_size)  # a sweep trains each run as one process


def _parts(job: Job) -> list[str]:
    """Return which parts the latents will have."""
    config, given = job.config, job.config.given_frames is not None
    stored = {
        LATENT_PART: True,
        FLIPPED_LATENT_PART: config.flipped,
        GIVEN_PART: given,
        FLIPPED_GIVEN_PART: given and config.flipped,
        TEXT_PART: config.text_encoder is not None,
        "txt": job.settings["captions"],
    }
    return [part for part, there in stored.items() if there]


def check_held_out_data(run_dir: Path, run: AutoencoderRun, held_out: Index) -> None:
    """Raise ``ValueError`` if a run that is done has other held-out data, which later parts would read.

    Args:
        run_dir: of the run; need not be there yet.
        run: its config now. A run that is not done takes over its held-out data when it goes on.
        held_out: opened from there.
    """
    if (store.read_success(run_dir) or 0) < run.train.last_step:
        return
    url = read_config(run_dir).data.val
    if url == run.data.val:
        return
    try:
        theirs = open_index(url).identity if url is not None else None
    except (ValueError, OSError):
        return  # The folder was moved. If it is needed, the part that reads it says so.
    if theirs != held_out.identity:
        raise ValueError(
            f"{run_dir} was trained with data.val={url}, and {run.data.val} has other samples; held-out data "
            "of a run that is done stay: expected those, or another root"
        )


def check_points(run_dir: Path, points: list[int], evaluation: EvaluationConfig) -> None:
    """Raise ``ValueError`` if a run is past a compute point whose checkpoint it did not keep."""
    kept = store.complete_steps(run_dir)
    for step in points:
        if (
            step < max(kept, default=0)
            and step not in kept
            and not read_evaluation(run_dir, step, evaluation)
        ):
            raise ValueError(
                f"{run_dir} is past step {step}, which is to be evaluated, and has kept only {kept}; "
                "choose other evaluation_points, or delete the run to train it again"
            )
