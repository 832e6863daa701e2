"""What every training process runs, however it was started."""

import contextlib
import dataclasses
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from ul_scale.checkpoint import state, store
from ul_scale.checkpoint.attempts import Attempt, Fenced, RunBusy, start_attempt
from ul_scale.checkpoint.saver import Saver
from ul_scale.checkpoint.transfer import SaveFailed
from ul_scale.config import AutoencoderRun, BaseRun, RunConfig
from ul_scale.data.plan import lane_slots
from ul_scale.data.stream import LaneStream
from ul_scale.models.flops import training_flops
from ul_scale.models.text import load_text_encoder
from ul_scale.parallel.build import build_engine, check_process
from ul_scale.parallel.engine import Engine, LocalEngine, Process
from ul_scale.parallel.mesh import PATIENCE_S, broadcast_object, cpu_group, distributed
from ul_scale.stages.autoencoder import AutoencoderStage
from ul_scale.stages.bitrate_control import BitrateControl
from ul_scale.stages.noise import NoiseSpec, draw_noise
from ul_scale.train.collapse import CollapseWatch, warn_of_loss_factor
from ul_scale.train.conditions import with_conditions
from ul_scale.train.ema import Ema
from ul_scale.train.health import Diverged, SampleHealth, StepHealth, TooManyBadSamples
from ul_scale.train.host import PLAIN_PROCESS, Host
from ul_scale.train.loop import Instruments, train
from ul_scale.train.metrics import MetricsWriter, last_row
from ul_scale.train.networks import trained_stage
from ul_scale.train.noise_bins import NoiseBins
from ul_scale.train.notices import find_deadline
from ul_scale.train.optim import build_optimizer
from ul_scale.train.preemption import StopRequest, leaving_on_signals
from ul_scale.train.prepare import Prepared, check_resumable, prepare
from ul_scale.train.profile import profiler
from ul_scale.train.provenance import write_provenance
from ul_scale.train.saves import Saves
from ul_scale.train.target_bitrate import Steer, bitrate_steering, describe_settled
from ul_scale.train.throughput import Throughput, describe_peak
from ul_scale.train.whereabouts import Whereabouts

EXIT_DONE, EXIT_FAILED, EXIT_RUN_AGAIN = 0, 1, 75
"""75 is EX_TEMPFAIL: saved after a stop request, run the same command again."""


def run(config: RunConfig, host: Host = PLAIN_PROCESS, *, profile: bool = False) -> int:
    """Train a run to its end, or go on with it; return the exit code.

    Args:
        config: resolved.
        host: what the launcher provides.
        profile: write a trace of a few steps.

    Raises:
        ValueError: for what a user can mend, in one line.
        RunBusy: another process is training this run.
    """
    deadline = find_deadline(config.preemption.stop_after_s)
    if config.parallel.threads is not None:
        torch.set_num_threads(config.parallel.threads)
    with (
        leaving_on_signals(EXIT_RUN_AGAIN, takes_signals=host.takes_signals),
        distributed(config.parallel.timeout_s) as process,
    ):
        prepared = prepare(config, process.world_size)
        # At the start one rank may download, or wait for a dead attempt's heartbeat, for long.
        patient = cpu_group(PATIENCE_S, process)
        reached = broadcast_object(store.read_success(prepared.run_dir) or 0, process, patient)
        if reached >= config.train.last_step:
            if process.rank == 0:
                print(f"{prepared.run_id} is done: {prepared.run_dir} reached step {reached}")
            return EXIT_DONE
        check_resumable(prepared)
        check_process(config.parallel)
        if config.checkpoint.scratch is not None and not Path(config.checkpoint.scratch).is_dir():
            raise ValueError(
                f"checkpoint.scratch is {config.checkpoint.scratch}; expected an existing folder"
            )
        attempt, number = _begin_attempt(prepared.run_dir, process, patient)
        whereabouts = Whereabouts(process, config.parallel.timeout_s)
        life = Life(prepared, process, patient, host, attempt, number, deadline, profile)
        try:
            code = _train(life, whereabouts)
        except (Diverged, TooManyBadSamples, SaveFailed) as error:
            life.log(f"error: {error}; newest complete checkpoint: {newest_step(life)}")
            code = EXIT_FAILED
        except RuntimeError as error:
            if process.world_size == 1 or isinstance(error, RunBusy | Fenced | store.BrokenCheckpoint):
                raise
            raise RuntimeError(f"{whereabouts}: {error}") from error
        finally:
            whereabouts.close()
            if attempt is not None:
                attempt.close()
        # A launcher may end the other ranks when one has ended: rank 0 has closed its files by now.
        return broadcast_object(code, process)


@dataclass(frozen=True)
class Life:
    """One attempt at a run, on one process."""

    prepared: Prepared
    process: Process
    patient: dist.ProcessGroup | None
    """For what one rank does for long while the others wait."""
    host: Host
    attempt: Attempt | None
    """On rank 0, the run's only writer."""
    number: int
    deadline: float | None
    profile: bool

    def log(self, line: str) -> None:
        if self.process.rank == 0:
            print(line, file=sys.stderr, flush=True)


def newest_step(life: Life) -> str:
    """Return the newest complete checkpoint in words, for an error message; on rank 0."""
    try:
        step = store.latest_step(life.prepared.run_dir) if life.process.rank == 0 else None
    except OSError as error:  # of a bucket that is away: not the error to tell
        return f"unknown ({error})"
    return f"step {step}" if step else "none"


def _begin_attempt(
    run_dir: Path, process: Process, patient: dist.ProcessGroup | None
) -> tuple[Attempt | None, int]:
    """Return rank 0's attempt and, on every rank, its number."""
    attempt, refused = None, None
    if process.rank == 0:
        try:
            attempt = start_attempt(run_dir)
        except RunBusy as busy:
            refused = str(busy)
    refused = broadcast_object(refused, process, patient)
    if refused is not None:
        raise RunBusy(refused)
    return attempt, broadcast_object(attempt.number if attempt else 0, process)


@dataclass(frozen=True)
class Built:
    """A run's networks on this process, and what is known of them from before they were sharded."""

    engine: Engine
    ema: Ema
    noise_spec: NoiseSpec
    bins: NoiseBins
    train_flops: int
    """Of one image."""
    control: BitrateControl | None
    """Of an autoencoder that holds a target bitrate."""
    steer: Steer | None
    """Tells it of a step."""
    collapse: CollapseWatch | None
    """Of an autoencoder with a diffusion prior."""


def _build(life: Life) -> Built:
    prepared, process, config = life.prepared, life.process, life.prepared.config
    stage = trained_stage(prepared, process, life.patient)
    noise_spec, bins, flops = stage.noise_spec, NoiseBins(stage.timed_losses), stage.forward_flops()
    collapse = control = None
    if isinstance(stage, AutoencoderStage):
        if stage.prior is not None:
            latent_dims = math.prod(stage.latent_shape)
            collapse = CollapseWatch(
                latent_dims=latent_dims, num_pixels=stage.num_pixels, steps=config.train.steps
            )
        control = stage.bitrate_control  # before the engine wraps the stage
    engine = build_engine(
        config.parallel,
        stage,
        lambda module: build_optimizer(module, config.optim),
        clip_norm=config.optim.clip_norm,
        precision=config.train.precision,
        process=process,
        samples_per_rank=prepared.samples_per_rank,
    )
    ema, steer = Ema(config.ema, engine.parameters), None
    if control is not None:
        assert isinstance(config, AutoencoderRun) and isinstance(engine, LocalEngine)
        steer = bitrate_steering(control, config, engine, ema, process)
    return Built(engine, ema, noise_spec, bins, training_flops(flops), control, steer, collapse)


def _train(life: Life, whereabouts: Whereabouts) -> int:
    prepared, process = life.prepared, life.process
    config, run_dir, plan = prepared.config, prepared.run_dir, prepared.plan
    if life.attempt is not None:
        write_provenance(prepared, life.number, process.world_size)
    built = _build(life)
    start_step, skipped_steps = resume(built.engine, built.ema, life)
    slots = lane_slots(plan.lanes, process.rank, process.world_size)

    def noise_at(step: int) -> dict[str, Tensor]:
        return draw_noise(
            built.noise_spec,
            seed=config.seed,
            step=step,
            lanes=[slot.lane for slot in slots],
            lane_size=plan.lane_batch_size,
            batch_size=config.train.batch_size,
            device=process.device,
        )

    with contextlib.ExitStack() as stack:
        stream = LaneStream(prepared.index, plan, prepared.data, slots)
        text = config.model.text if isinstance(config, BaseRun) else None
        text_encoder = load_text_encoder(text, process.device)
        read = stream.batches(start_step)
        stack.callback(read.close)
        batches = with_conditions(read, text_encoder, process.device)
        stop = stack.enter_context(_stop_request(life))
        metrics = stack.enter_context(_metrics(life, start_step))
        saves, watch = _instruments(
            life, built, start_step, skipped_steps, stop, metrics, whereabouts, stack, stream
        )
        try:
            finished = train(
                config.train,
                config.optim,
                seed=config.seed,
                engine=built.engine,
                ema=built.ema,
                batches=batches,
                noise_at=noise_at,
                accumulation_steps=config.parallel.accumulation_steps,
                process=process,
                start_step=start_step,
                save_if_due=saves.save_if_due,
                watch=watch,
                steer=built.steer,
            )
        except (Diverged, TooManyBadSamples):
            saves.finish_save()
            raise
        saves.close()
        if finished and built.control is not None and metrics is not None:
            metrics.event(describe_settled(built.control))
    if not finished:
        life.log("saved after a stop request; the same command continues")
        return EXIT_RUN_AGAIN
    if life.attempt is not None:
        store.write_success(run_dir, config.train.last_step, life.attempt)
    return EXIT_DONE


def _instruments(
    life: Life,
    built: Built,
    start_step: int,
    skipped_steps: int,
    stop: StopRequest,
    metrics: MetricsWriter | None,
    whereabouts: Whereabouts,
    stack: contextlib.ExitStack,
    stream: LaneStream,
) -> tuple[Saves, Instruments]:
    """Return what saves a run and what watches it."""
    config, process, run_dir = life.prepared.config, life.process, life.prepared.run_dir

    def log(line: str) -> None:
        if metrics is not None:
            metrics.event(line)

    log(describe_peak(process.device, config.train.precision))
    if (
        isinstance(config, AutoencoderRun)
        and (warning := warn_of_loss_factor(config.loss, config.model)) is not None
    ):
        log(warning)
    earlier = last_row(run_dir) if process.rank == 0 else None
    if save_s := broadcast_object((earlier or {}).get("save_s"), process):
        stop.measured_save(save_s)
    throughput = Throughput(
        start_step,
        config.train.batch_size,
        process=process,
        train_flops=built.train_flops,
        precision=config.train.precision,
    )
    health = StepHealth(config.train.max_skipped_in_a_row, process, skipped_steps, log)
    saver = Saver(run_dir, life.attempt, life.number, config.checkpoint, process)
    saves = Saves(config, built.engine, built.ema, saver, stop, health, life.host, throughput, metrics, log)
    saver.before_commit = saves.settle_before_commit
    profile_step = stack.enter_context(profiler(life.profile, run_dir, life.number, process, start_step, log))

    def counters() -> dict[str, float]:
        loader = {"loader_memory_bytes": stream.memory_bytes()} if config.data.workers else {}
        return saves.counters() | loader

    def judge_collapse(completed: int, terms: Mapping[str, Tensor]) -> None:
        if built.collapse is not None:
            built.collapse.judge(completed, terms, log)

    watch = Instruments(
        throughput=throughput,
        bins=built.bins,
        health=health,
        samples=SampleHealth(config.data.max_bad_fraction, len(life.prepared.index)),
        whereabouts=whereabouts,
        metrics=metrics,
        collapse=judge_collapse,
        counters=counters,
        profile_step=profile_step,
    )
    return saves, watch


@contextlib.contextmanager
def _metrics(life: Life, start_step: int) -> Iterator[MetricsWriter | None]:
    """Give the metrics of rank 0, None elsewhere."""
    if life.attempt is None:
        yield None
        return
    prepared = life.prepared
    writer = MetricsWriter(
        prepared.run_dir,
        life.number,
        start=start_step,
        stop=prepared.config.train.last_step,
        run_id=prepared.run_id,
        log=prepared.config.log,
        config=dataclasses.asdict(prepared.config),
    )
    try:
        yield writer
    finally:
        writer.close()


def _stop_request(life: Life) -> StopRequest:
    config = life.prepared.config
    return StopRequest(
        config.preemption,
        life.process,
        life.host,
        run_dir=life.prepared.run_dir,
        attempt=life.number,
        deadline=life.deadline,
        timeout_s=config.parallel.timeout_s,
        log=life.log,
    )


def resume(engine: Engine, ema: Ema, life: Life) -> tuple[int, int]:
    """Load the newest complete checkpoint that is whole; return its completed and its skipped steps.

    Without a checkpoint, both are 0.

    Raises:
        BrokenCheckpoint: if there are checkpoints and none is whole: better to stop than to start anew.
        ValueError: if the run is past the last step that was asked for.
    """
    run_dir, config = life.prepared.run_dir, life.prepared.config
    steps = broadcast_object(store.complete_steps(run_dir), life.process)
    last = config.train.last_step
    if steps and steps[-1] > last:
        raise ValueError(f"{run_dir} has {steps[-1]} complete steps; train.stop_at_step is {last}, raise it")
    error, skipped_steps = None, 0
    for step in reversed(steps):
        try:
            commit = store.read_commit(run_dir, step)
            if commit.run not in (None, run_dir.name):
                raise store.BrokenCheckpoint(f"it is of another run, {commit.run}, not {run_dir.name}")
            with state.local_copy(run_dir, step, config.checkpoint.scratch, life.patient) as directory:
                skipped_steps = load_training_state(engine, ema, directory, commit.format)
            break
        except store.BrokenCheckpoint as broken:
            error = broken
            life.log(f"step {step} cannot be loaded: {broken}")
    else:
        if error is not None:
            raise store.BrokenCheckpoint(f"{run_dir}: no checkpoint is whole; {error}")
        step = 0
    if life.attempt is not None:
        store.adopt(run_dir, life.attempt, step)
        if step:
            print(f"resuming from step {step}", flush=True)
    return step, skipped_steps


def load_training_state(engine: Engine, ema: Ema, directory: Path, checkpoint_format: str) -> int:
    """Load verified local files of a checkpoint into an engine and its averages; return its skipped steps."""
    loaded = engine.blank_state(checkpoint_format)
    averages = {name: engine.blank(average) for name, average in ema.averages.items()}
    counters = {"skipped_steps": 0} if state.holds(directory, "train.skipped_steps") else {}
    state.load(loaded | {"ema": averages, "train": counters}, directory)
    engine.load_state_dict(loaded)
    if checkpoint_format == engine.checkpoint_format:
        engine.load_files(directory)
    for name, average in averages.items():
        engine.restore(ema.averages[name], average)
    return counters.get("skipped_steps", 0)
