"""The training loop."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ul_scale import keyed
from ul_scale.data.plan import LaneSlot
from ul_scale.data.stream import Batch
from ul_scale.parallel.engine import NOT_IDENTITY, Engine, Process
from ul_scale.stages.noise import NoiseSpec, draw_noise
from ul_scale.train.ema import Ema
from ul_scale.train.metrics import MetricsWriter
from ul_scale.train.optim import OptimConfig, learning_rate


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Section ``train``."""

    steps: int
    """The run's length, which its learning-rate schedule is made for."""
    stop_at_step: int | None = field(default=None, metadata=NOT_IDENTITY)
    """Stop earlier, as a complete run; raise it later to go on. null: ``steps``."""
    batch_size: int
    """Global: samples per step over all processes."""
    log_every_steps: int = field(default=50, metadata=NOT_IDENTITY)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} is {getattr(self, name)}; expected 1 or more")
        if self.stop_at_step is not None and not 1 <= self.stop_at_step <= self.steps:
            raise ValueError(
                f"train.stop_at_step is {self.stop_at_step}; expected 1 to train.steps = {self.steps}"
            )

    @property
    def last_step(self) -> int:
        return self.stop_at_step or self.steps


class Diverged(RuntimeError):
    """The loss or the gradient is not a finite number any more."""


def train(
    config: TrainConfig,
    optim: OptimConfig,
    *,
    seed: int,
    engine: Engine,
    ema: Ema,
    batches: Iterator[Batch],
    noise_spec: NoiseSpec,
    slots: list[LaneSlot],
    lane_size: int,
    accumulation_steps: int,
    process: Process,
    start_step: int,
    save_due: Callable[[int], bool],
    save: Callable[[int], None],
    stop_requested: Callable[[], bool],
    metrics: MetricsWriter | None,
) -> bool:
    """Train from ``start_step`` to the last step; return False if asked to stop before it.

    Step s (from 0) consumes batch s. What is computed is a function of (config, seed, s) alone; what is
    saved and logged counts completed steps, s + 1.

    Args:
        config: steps and batch size.
        optim: the learning-rate schedule.
        seed: of noise and dropout.
        engine: the wrapped stage.
        ema: its averages.
        batches: this rank's batches, from ``start_step`` on.
        noise_spec: what the stage draws.
        slots: this rank's lanes and their weights.
        lane_size: samples per lane and step.
        accumulation_steps: micro-batches per step.
        process: this process.
        start_step: completed steps so far.
        save_due: whether to save after so many completed steps.
        save: saves the state after so many completed steps.
        stop_requested: asked once a step, on every rank.
        metrics: on rank 0.

    Raises:
        Diverged: at the first logged or saved step whose loss or gradient is not finite.
    """
    logged_at, data_wait_s, since = start_step, 0.0, time.monotonic()
    started = since
    for step in range(start_step, config.last_step):
        waiting = time.monotonic()
        batch = to_device(next(batches), process.device)
        data_wait_s += time.monotonic() - waiting
        noise = draw_noise(
            noise_spec,
            seed=seed,
            step=step,
            lanes=[slot.lane for slot in slots],
            lane_size=lane_size,
            batch_size=config.batch_size,
            device=process.device,
        )

        sums: dict[str, Tensor] = {}
        for micro, rows in enumerate(micro_batches(len(slots) * lane_size, accumulation_steps)):
            torch.manual_seed(keyed.seed_of(seed, "dropout", step, process.rank, micro) >> 1)
            terms = engine.forward(take(batch, rows), take(noise, rows), step)
            weight = batch["weight"][rows] / config.batch_size
            # Engines average gradients over ranks; the loss is a sum over the global batch.
            loss = process.world_size * (weight * terms["loss"]).sum()
            engine.backward(loss, last=micro == accumulation_steps - 1)
            for name, term in terms.items():
                sums[name] = sums.get(name, 0) + (weight * term.detach()).sum()
        lr = learning_rate(optim, step, config.steps)
        grad_norm = engine.step(lr)
        ema.update(step, config.batch_size)

        completed = step + 1
        log_due = completed % config.log_every_steps == 0 or completed == config.last_step
        if log_due or save_due(completed):
            values = reduce_sums(sums, process) | {"grad_norm": float(grad_norm)}
            check_finite(values, completed)
        if log_due and metrics is not None:
            now = time.monotonic()
            metrics.write(
                {
                    "step": completed,
                    "samples_seen": completed * config.batch_size,
                    "time_s": round(now - started, 3),
                    **values,
                    "lr": lr,
                    "images_per_s": (completed - logged_at) * config.batch_size / (now - since),
                    "data_wait_share": data_wait_s / (now - since),
                }
            )
            logged_at, data_wait_s, since = completed, 0.0, now
        stop = stop_requested()
        if save_due(completed) or stop:
            save(completed)
        if stop and completed < config.last_step:
            return False
    return True


def to_device(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    return {
        name: value.to(device, non_blocking=True)
        for name, value in batch.items()
        if isinstance(value, Tensor)
    }


def micro_batches(num_samples: int, accumulation_steps: int) -> list[slice]:
    """Cut a rank's samples into equal micro-batches; lanes may be cut."""
    size, rest = divmod(num_samples, accumulation_steps)
    if rest:
        raise ValueError(
            f"parallel.accumulation_steps is {accumulation_steps}, but a rank has {num_samples} samples "
            f"per step; expected a divisor of {num_samples}"
        )
    return [slice(i * size, (i + 1) * size) for i in range(accumulation_steps)]


def take(tensors: Mapping[str, Any], rows: slice) -> dict[str, Any]:
    return {name: value[rows] for name, value in tensors.items()}


def reduce_sums(sums: dict[str, Tensor], process: Process) -> dict[str, float]:
    """Return each sum over all ranks."""
    stacked = torch.stack(list(sums.values()))
    if process.world_size > 1:
        dist.all_reduce(stacked)
    return dict(zip(sums, stacked.tolist()))


def check_finite(values: dict[str, float], completed: int) -> None:
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if bad:
        raise Diverged(f"{', '.join(bad)} not finite at step {completed}: try a lower optim.lr")
