"""The training loop."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ul_scale import keyed
from ul_scale.data.stream import Batch
from ul_scale.parallel.engine import NOT_IDENTITY, Engine, Process
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
    noise_at: Callable[[int], dict[str, Tensor]],
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
        seed: of dropout.
        engine: the wrapped stage.
        ema: its averages.
        batches: this rank's batches, from ``start_step`` on.
        noise_at: this rank's noise of a step.
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
    meter = Meter(start_step, config.batch_size)
    for step in range(start_step, config.last_step):
        with meter.waiting_for_data():
            batch = to_device(next(batches), process.device)
        sums = accumulate_gradients(
            engine,
            batch,
            noise_at(step),
            (seed, "dropout", step, process.rank),
            step,
            config,
            accumulation_steps,
        )
        lr = learning_rate(optim, step, config.steps)
        grad_norm = engine.step(lr)
        ema.update(step, config.batch_size)

        completed, stop = step + 1, stop_requested()
        save_now = save_due(completed) or stop
        log_now = completed % config.log_every_steps == 0 or completed == config.last_step
        if save_now or log_now:
            values = reduce_sums(sums, process) | {"grad_norm": float(grad_norm), "lr": lr}
            check_finite(values, completed)
        if log_now and metrics is not None:
            metrics.write(meter.row(completed) | values)
        if save_now:
            save(completed)
        if stop and completed < config.last_step:
            return False
    return True


def accumulate_gradients(
    engine: Engine,
    batch: dict[str, Tensor],
    noise: dict[str, Tensor],
    dropout_key: tuple[keyed.Key, ...],
    step: int,
    config: TrainConfig,
    accumulation_steps: int,
) -> dict[str, Tensor]:
    """Run a step's micro-batches forward and backward; return this rank's share of each mean loss term."""
    sums: dict[str, Tensor] = {}
    for micro, rows in enumerate(micro_batches(len(batch["weight"]), accumulation_steps)):
        torch.manual_seed(keyed.seed_of(*dropout_key, micro) >> 1)
        terms = engine.forward(take(batch, rows), take(noise, rows), step)
        weight = batch["weight"][rows] / config.batch_size
        engine.backward((weight * terms["loss"]).sum(), last=micro == accumulation_steps - 1)
        for name, term in terms.items():
            sums[name] = sums.get(name, 0) + (weight * term.detach()).sum()
    return sums


class Meter:
    """Throughput, and the share of time spent waiting for data, between logged steps."""

    def __init__(self, start_step: int, batch_size: int):
        self._batch_size = batch_size
        self._started = self._since = time.monotonic()
        self._logged_at, self._waited_s = start_step, 0.0

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._waited_s += time.monotonic() - began

    def row(self, completed: int) -> dict[str, float]:
        """Return the counters of a logged step, and begin anew."""
        now = time.monotonic()
        elapsed = now - self._since
        row = {
            "step": completed,
            "samples_seen": completed * self._batch_size,
            "time_s": round(now - self._started, 3),
            "images_per_s": (completed - self._logged_at) * self._batch_size / elapsed,
            "data_wait_share": self._waited_s / elapsed,
        }
        self._since, self._logged_at, self._waited_s = now, completed, 0.0
        return row


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
