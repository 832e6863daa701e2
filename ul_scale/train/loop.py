"""The training loop."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ul_scale import keyed
from ul_scale.data.stream import Batch
from ul_scale.parallel.engine import NOT_IDENTITY, PRECISIONS, Engine, Process
from ul_scale.train.ema import Ema
from ul_scale.train.health import SampleHealth, StepHealth
from ul_scale.train.metrics import MetricsWriter
from ul_scale.train.noise_bins import NoiseBins
from ul_scale.train.optim import OptimConfig, learning_rate
from ul_scale.train.throughput import Throughput
from ul_scale.train.whereabouts import Whereabouts


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Section ``train``."""

    steps: int
    """The run's length, which its learning-rate schedule is made for."""
    stop_at_step: int | None = field(default=None, metadata=NOT_IDENTITY)
    """Stop earlier, as a complete run; raise it later to go on. null: ``steps``."""
    batch_size: int
    """Global: samples per step over all processes."""
    precision: str = field(default="fp32", metadata={"legacy": "fp32"})
    """``bf16``: matrix products and convolutions in bf16; weights, optimizer, averages and losses in fp32."""
    log_every_steps: int = field(default=50, metadata=NOT_IDENTITY)
    max_skipped_in_a_row: int = field(default=10, metadata=NOT_IDENTITY)
    """So many steps in a row whose loss or gradient is not finite, and so without an update, end the run."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every_steps", "max_skipped_in_a_row"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} is {getattr(self, name)}; expected 1 or more")
        if self.stop_at_step is not None and not 1 <= self.stop_at_step <= self.steps:
            raise ValueError(
                f"train.stop_at_step is {self.stop_at_step}; expected 1 to train.steps = {self.steps}"
            )
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"train.precision is {self.precision!r}; expected one of {', '.join(PRECISIONS)}"
            )

    @property
    def last_step(self) -> int:
        return self.stop_at_step or self.steps


@dataclass(frozen=True)
class Instruments:
    """What watches a run and takes no part in it."""

    throughput: Throughput
    bins: NoiseBins
    health: StepHealth
    samples: SampleHealth
    whereabouts: Whereabouts
    metrics: MetricsWriter | None
    """On rank 0."""
    collapse: Callable[[int, Mapping[str, Tensor]], object]
    """Told of a logged step and its mean loss terms; warns of a latent that loses its information."""
    counters: Callable[[], dict[str, float]]
    """What else is to be logged."""
    profile_step: Callable[[], object]


def train(
    config: TrainConfig,
    optim: OptimConfig,
    *,
    seed: int,
    engine: Engine,
    ema: Ema,
    batches: Iterator[Batch],
    noise_at: Callable[[int], dict[str, Tensor]],
    accumulation_steps: int,
    process: Process,
    start_step: int,
    save_if_due: Callable[[int], bool],
    watch: Instruments,
    steer: Callable[[int, Mapping[str, Tensor], Mapping[str, Tensor], Mapping[str, Tensor]], object]
    | None = None,
) -> bool:
    """Train from ``start_step`` to the last step; return False if asked to stop before it.

    Step s (from 0) consumes batch s. What is computed is a function of (config, seed, s) alone; what is
    saved and logged counts completed steps, s + 1.

    Args:
        config: steps and batch size.
        optim: the learning-rate schedule.
        seed: of dropout.
        engine: the wrapped stage.
        ema: its averages.
        batches: this rank's batches, from ``start_step`` on.
        noise_at: this rank's noise of a step.
        accumulation_steps: micro-batches per step.
        process: this process.
        start_step: completed steps so far.
        save_if_due: told after so many completed steps; saves the state if it is time, and returns whether
            all ranks are to stop here.
        watch: what watches.
        steer: told of each step, this rank's share of its mean loss terms, its batch and its noise; sets what
            the stage does in the next step.

    Raises:
        Diverged: after too many steps in a row whose loss or gradient is not finite.
        TooManyBadSamples: if too many could not be used.
    """
    for step in range(start_step, config.last_step):
        completed = step + 1
        log_now = completed % config.log_every_steps == 0 or completed == config.last_step
        watch.whereabouts.at(step, "waiting for data")
        with watch.throughput.waiting_for_data():
            batch = next(batches)
        watch.whereabouts.at(step, "forward and backward")
        inputs, noise = to_device(batch, process.device), noise_at(step)
        sums = accumulate_gradients(
            engine,
            inputs,
            noise,
            (seed, "dropout", step, process.rank),
            step,
            config,
            accumulation_steps,
            watch.bins if log_now else None,
        )
        watch.whereabouts.at(step, "optimizer step")
        lr = learning_rate(optim, step, config.steps)
        grad_norm = engine.step(lr)
        ema.update(step, config.batch_size)
        if steer is not None:
            steer(step, sums, inputs, noise)
        watch.health.watch(step, grad_norm, batch["keys"])
        watch.samples.watch(batch)

        if log_now:
            watch.whereabouts.at(step, "adding up the metrics")
            sums["replaced_samples"] = watch.samples.counted(process.device)
            sums = reduce_sums(sums, process)
            log(completed, sums, {"grad_norm": float(grad_norm), "lr": lr}, watch)
            watch.collapse(completed, sums)
            watch.samples.judge(float(sums["replaced_samples"]), (completed - start_step) * config.batch_size)
        watch.whereabouts.at(step, "saving")
        if save_if_due(completed) and completed < config.last_step:
            return False
        watch.profile_step()
    return True


def accumulate_gradients(
    engine: Engine,
    batch: dict[str, Tensor],
    noise: dict[str, Tensor],
    dropout_key: tuple[keyed.Key, ...],
    step: int,
    config: TrainConfig,
    accumulation_steps: int,
    bins: NoiseBins | None,
) -> dict[str, Tensor]:
    """Run a step's micro-batches forward and backward; return this rank's share of each mean loss term.

    With ``bins``, also of the losses by noise level.
    """
    sums: dict[str, Tensor] = {}
    for micro, rows in enumerate(micro_batches(len(batch["weight"]), accumulation_steps)):
        seed_dropout(batch["weight"].device, keyed.seed_of(*dropout_key, micro) >> 1)
        micro_noise = take(noise, rows)
        terms = engine.forward(take(batch, rows), micro_noise, step)
        weight = batch["weight"][rows] / config.batch_size
        engine.backward((weight * terms["loss"]).sum(), last=micro == accumulation_steps - 1)
        parts = {name: (weight * term.detach()).sum() for name, term in terms.items()}
        if bins is not None:
            parts |= bins.sums(terms, micro_noise, weight)
        sums = {name: sums[name] + part if name in sums else part for name, part in parts.items()}
    return sums


def seed_dropout(device: torch.device, seed: int) -> None:
    """Seed the device's generator alone: torch.manual_seed formats a stack trace for each other kind."""
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def log(completed: int, sums: dict[str, Tensor], more: dict[str, float], watch: Instruments) -> None:
    """Write a step's metrics, on rank 0: means of the loss terms, speed, and whatever else is known."""
    if watch.metrics is None:
        return
    terms = {name: float(value) for name, value in sums.items() if value.ndim == 0}
    speed = watch.throughput.row(completed)
    watch.metrics.write(speed | terms | more | watch.counters() | watch.bins.finish(sums))


def to_device(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    return {
        name: value.to(device, non_blocking=True)
        for name, value in batch.items()
        if isinstance(value, Tensor)
    }


def micro_batches(num_samples: int, accumulation_steps: int) -> list[slice]:
    """Cut a rank's samples into equal micro-batches; lanes may be cut."""
    size = num_samples // accumulation_steps
    return [slice(i * size, (i + 1) * size) for i in range(accumulation_steps)]


def take(tensors: Mapping[str, Any], rows: slice) -> dict[str, Any]:
    return {name: value[rows] for name, value in tensors.items()}


def reduce_sums(sums: dict[str, Tensor], process: Process) -> dict[str, Tensor]:
    """Return each sum over all ranks, on the CPU."""
    flat = torch.cat([value.reshape(-1).float() for value in sums.values()])
    if process.world_size > 1:
        dist.all_reduce(flat)
    parts = flat.cpu().split([value.numel() for value in sums.values()])
    return {name: part.reshape(value.shape) for (name, value), part in zip(sums.items(), parts)}
