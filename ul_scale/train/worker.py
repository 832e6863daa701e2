"""What every training process runs, however it was started."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ul_scale import config as configs
from ul_scale import keyed
from ul_scale.checkpoint import state, store
from ul_scale.checkpoint.attempts import Attempt, RunBusy, start_attempt
from ul_scale.checkpoint.files import write_atomic
from ul_scale.config import AutoencoderRun, BaseRun, RunConfig
from ul_scale.data.index import Index, open_index
from ul_scale.data.latents import LatentWriter
from ul_scale.data.plan import LanePlan, lane_slots
from ul_scale.data.stream import LaneStream, make_plan
from ul_scale.models.flops import num_parameters
from ul_scale.parallel.engine import Process, build_engine
from ul_scale.parallel.mesh import broadcast_object, distributed
from ul_scale.stages.autoencoder import AutoencoderStage
from ul_scale.stages.base import BaseStage
from ul_scale.stages.noise import draw_noise
from ul_scale.train.ema import Ema
from ul_scale.train.loop import Diverged, micro_batches, train
from ul_scale.train.metrics import MetricsWriter
from ul_scale.train.optim import build_optimizer
from ul_scale.train.preemption import StopRequest, leaving_on_signals

EXIT_DONE, EXIT_FAILED, EXIT_RUN_AGAIN = 0, 1, 75
"""75 is EX_TEMPFAIL: saved after a stop request, run the same command again."""


@dataclass(frozen=True)
class Prepared:
    """A run whose config, data and batch arithmetic have been checked, before any device is taken."""

    config: RunConfig
    run_id: str
    run_dir: Path
    index: Index
    plan: LanePlan


def latents_dir(root: str, run_id: str, step: int, split: str = "train") -> Path:
    return Path(root) / run_id / "latents" / f"step_{step:08d}" / split


def prepare(config: RunConfig, world_size: int = 1) -> Prepared:
    """Open the data and check everything that needs no device.

    Raises:
        ValueError: in one line, what was given, what was expected, where.
    """
    if "://" in config.root:
        raise ValueError(f"root is {config.root}; expected a local directory")
    if isinstance(config, BaseRun):
        parent = config.autoencoder
        url = str(latents_dir(config.root, parent.run, parent.step))
        if not LatentWriter.is_complete(url):
            raise ValueError(
                f"{url}: no latents of autoencoder {parent.run} at step {parent.step}; first run: "
                f"ul-scale encode {Path(config.root) / parent.run} --step {parent.step}"
            )
    elif config.data.train is None or config.data.image_size is None:
        raise ValueError(
            "data.train and data.image_size are not both set; expected a folder of shards, and pixels"
        )
    else:
        url = config.data.train
    index = open_index(url)
    if config.data.val is not None:
        val = open_index(config.data.val)
        if val.classes and index.classes and val.classes != index.classes:
            raise ValueError(f"{config.data.val}: its classes are not those of {url}; ids would not agree")
        if val.fingerprint == index.fingerprint:
            raise ValueError(f"{config.data.val}: is the training set {url}; expected held-out samples")
    run_id = configs.run_id(config, index.identity if isinstance(config, AutoencoderRun) else None)
    plan = make_plan(index, config.data, seed=config.seed, batch_size=config.train.batch_size)
    slots = lane_slots(plan.lanes, 0, world_size)
    micro_batches(len(slots) * plan.lane_batch_size, config.parallel.accumulation_steps)
    return Prepared(config, run_id, Path(config.root) / run_id, index, plan)


def describe(prepared: Prepared) -> str:
    """Return what a run would do, for a dry run."""
    config, plan = prepared.config, prepared.plan
    done = (store.read_success(prepared.run_dir) or 0) >= config.train.last_step
    newest = (store.complete_steps(prepared.run_dir) or [0])[-1]
    epochs = config.train.last_step * config.train.batch_size / len(prepared.index)
    return "\n".join(
        [
            f"run        {prepared.run_id}",
            f"directory  {prepared.run_dir}",
            f"state      {'done' if done else f'{newest} steps complete'}",
            f"data       {len(prepared.index)} samples, fingerprint {prepared.index.fingerprint}",
            f"steps      {config.train.last_step} of {config.train.batch_size} samples, {epochs:.2f} epochs",
            f"lanes      {plan.lanes} of {plan.lane_batch_size} samples; world sizes that waste nothing: "
            + ", ".join(str(n) for n in range(1, plan.lanes + 1) if plan.lanes % n == 0),
            f"parameters {num_parameters(build_stage(config, prepared.index.extra)):,}",
        ]
    )


def build_stage(config: RunConfig, latents: dict[str, Any] | None = None) -> AutoencoderStage | BaseStage:
    """Return the stage of a config, with initial weights keyed by its seed.

    Args:
        config: resolved.
        latents: of a base model: what the latents' index says of them (shape, std, num_pixels).
    """
    torch.manual_seed(keyed.seed_of(config.seed, "init") >> 1)
    if isinstance(config, AutoencoderRun):
        assert config.data.image_size is not None
        return AutoencoderStage(
            config.model, config.loss, image_size=config.data.image_size, channels=config.data.channels
        )
    if latents is None or "log_snr_max" not in latents:
        raise ValueError("these shards do not say what latents they hold; expected those of ul-scale encode")
    if (config.model.num_classes or latents["num_classes"]) < latents["num_classes"]:
        raise ValueError(
            f"model.num_classes is {config.model.num_classes}, but the latents have {latents['num_classes']}"
        )
    if latents["log_snr_max"] != config.loss.log_snr_max:
        raise ValueError(
            f"loss.log_snr_max is {config.loss.log_snr_max}, "
            f"but the autoencoder's is {latents['log_snr_max']}"
        )
    return BaseStage(
        config.model,
        config.loss,
        latent_shape=tuple(latents["shape"]),
        num_pixels=latents["num_pixels"],
        z_std=latents["std"],
    )


def run(config: RunConfig) -> int:
    """Train a run to its end, or go on with it; return the exit code."""
    if config.parallel.threads is not None:
        torch.set_num_threads(config.parallel.threads)
    with leaving_on_signals(EXIT_RUN_AGAIN), distributed() as process:
        prepared = prepare(config, process.world_size)
        target = config.train.last_step
        reached = broadcast_object(store.read_success(prepared.run_dir) or 0, process)
        if reached >= target:
            if process.rank == 0:
                print(f"{prepared.run_id} is done: {prepared.run_dir} reached step {target}")
            return EXIT_DONE
        attempt, refused = None, None
        if process.rank == 0:
            try:
                attempt = start_attempt(prepared.run_dir)
            except RunBusy as busy:
                refused = str(busy)
        refused = broadcast_object(refused, process)
        if refused is not None:
            raise RunBusy(refused)
        number = broadcast_object(attempt.number if attempt else 0, process)
        try:
            return _train(prepared, process, attempt, number)
        except Diverged as error:
            newest = store.latest_step(prepared.run_dir)
            print(f"error: {error}; newest good checkpoint: step {newest}", file=sys.stderr)
            return EXIT_FAILED
        finally:
            if attempt is not None:
                attempt.close()


def _train(prepared: Prepared, process: Process, attempt: Attempt | None, number: int) -> int:
    config, run_dir, plan = prepared.config, prepared.run_dir, prepared.plan
    if attempt is not None:
        write_provenance(prepared, number)
    stage = build_stage(config, prepared.index.extra)
    noise_spec = stage.noise_spec
    engine = build_engine(
        config.parallel,
        stage,
        lambda module: build_optimizer(module, config.optim),
        config.optim.clip_norm,
        process,
    )
    ema = Ema(config.ema, engine.stage)

    def training_state(completed: int) -> dict[str, Any]:
        samples_seen = completed * config.train.batch_size
        return engine.state_dict() | {
            "ema": ema.state_dict(),
            "train": {"step": completed, "samples_seen": samples_seen},
        }

    newest, last = store.latest_step(run_dir) or 0, config.train.last_step
    if newest > last:
        raise ValueError(f"{run_dir} has {newest} complete steps; train.stop_at_step is {last}, raise it")
    start_step = resume(training_state, engine.load_state_dict, run_dir, attempt, process)
    keep_steps = set(config.checkpoint.keep_steps)

    def save_due(completed: int) -> bool:
        every = completed % config.checkpoint.every_steps == 0
        return every or completed in keep_steps or completed == config.train.last_step

    def save(completed: int) -> None:
        state.save(training_state(completed), run_dir, completed, attempt, number)
        if attempt is not None:
            store.clean(run_dir, attempt, config.checkpoint.keep_last, keep_steps)

    slots = lane_slots(plan.lanes, process.rank, process.world_size)
    batches = LaneStream(prepared.index, plan, config.data, slots).batches(start_step)

    def noise_at(step: int) -> dict[str, Tensor]:
        return draw_noise(
            noise_spec,
            seed=config.seed,
            step=step,
            lanes=[slot.lane for slot in slots],
            lane_size=plan.lane_batch_size,
            batch_size=config.train.batch_size,
            device=process.device,
        )

    metrics = None
    if attempt is not None:
        metrics = MetricsWriter(
            run_dir, number, start=start_step, stop=config.train.last_step, label=prepared.run_id
        )
    try:
        finished = train(
            config.train,
            config.optim,
            seed=config.seed,
            engine=engine,
            ema=ema,
            batches=batches,
            noise_at=noise_at,
            accumulation_steps=config.parallel.accumulation_steps,
            process=process,
            start_step=start_step,
            save_due=save_due,
            save=save,
            stop_requested=StopRequest(process.world_size).agreed,
            metrics=metrics,
        )
    finally:
        batches.close()
        if metrics is not None:
            metrics.close()
    if not finished:
        print("saved after a stop request; the same command continues", file=sys.stderr)
        return EXIT_RUN_AGAIN
    if attempt is not None:
        store.write_success(run_dir, config.train.last_step, attempt)
    return EXIT_DONE


def resume(
    training_state: Callable[[int], dict[str, Any]],
    load_state_dict: Callable[[dict[str, Any]], None],
    run_dir: Path,
    attempt: Attempt | None,
    process: Process,
) -> int:
    """Load the newest complete checkpoint that is whole; return its completed steps, 0 for a fresh start.

    Raises:
        BrokenCheckpoint: if there are checkpoints and none is whole: better to stop than to start anew.
    """
    steps = broadcast_object(store.complete_steps(run_dir), process)
    error = None
    for step in reversed(steps):
        error = None
        if attempt is not None:
            try:
                store.verify(run_dir, step)
            except store.BrokenCheckpoint as broken:
                error = str(broken)
                print(f"step {step} cannot be loaded: {error}", file=sys.stderr)
        error = broadcast_object(error, process)
        if error is None:
            try:
                loaded = training_state(step)
                state.load(loaded, run_dir, step)
            except store.BrokenCheckpoint as broken:
                error = str(broken)
                continue
            load_state_dict(loaded)
            break
    else:
        step = 0
    if error is not None:
        raise store.BrokenCheckpoint(f"{run_dir}: no checkpoint is whole; {error}")
    if attempt is not None:
        store.adopt(run_dir, attempt, step)
        if step:
            print(f"resuming from step {step}", flush=True)
    return step


def write_provenance(prepared: Prepared, attempt: int) -> None:
    """Write config.yaml and run.json: enough to say what was run, on what data, by which code.

    Raises:
        ValueError: if the run was begun on other data; for latents, on another encoding.
    """
    config, path = prepared.config, prepared.run_dir / "run.json"
    earlier = json.loads(path.read_text()) if path.is_file() else {}
    identity = prepared.index.identity
    if earlier.get("data_identity", identity) != identity:
        raise ValueError(
            f"{prepared.run_dir}: was begun on data {earlier['data_identity']}, which are now {identity}"
        )
    code = {
        "git": git_revision(),
        "versions": {name: metadata.version(name) for name in ("torch", "numpy", "ul-scale")}
        | {"python": sys.version.split()[0]},
    }
    record = {
        "run_id": prepared.run_id,
        "kind": config.kind,
        "data_identity": identity,
        "parents": [vars(config.autoencoder)] if isinstance(config, BaseRun) else [],
        "attempts": earlier.get("attempts", {}) | {str(attempt): code},
    }
    write_atomic(prepared.run_dir / "config.yaml", configs.to_yaml(config).encode())
    write_atomic(path, json.dumps(record, indent=1).encode())


def git_revision() -> dict[str, Any] | None:
    """Return the commit of the code that runs and whether it was changed, or None outside a checkout."""
    here = Path(__file__)

    def git(*args: str | Path) -> str:
        command = ["git", "-C", here.parent, *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    try:
        git("ls-files", "--error-unmatch", here.name)  # or it is somebody else's checkout around us
        return {
            "sha": git("rev-parse", "HEAD").strip(),
            "dirty": bool(git("status", "--porcelain", "--", ".")),
        }
    except (OSError, subprocess.CalledProcessError):
        return None
