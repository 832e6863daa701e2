"""What the benchmarks train: a stage with its engine and averages, on one batch made up in memory."""

import contextlib
import dataclasses
import io
import itertools
import os
import platform
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ul_scale.checkpoint import store
from ul_scale.checkpoint.attempts import start_attempt
from ul_scale.checkpoint.saver import Saver
from ul_scale.checkpoint.store import CheckpointConfig
from ul_scale.config import AutoencoderRef, BaseRun, RunConfig
from ul_scale.data.config import DataConfig
from ul_scale.data.plan import default_lanes
from ul_scale.data.stream import Batch
from ul_scale.models.flops import num_parameters, training_flops
from ul_scale.models.uvit import UViTConfig
from ul_scale.parallel.build import build_engine
from ul_scale.parallel.engine import LocalEngine, ParallelConfig, Process
from ul_scale.stages.autoencoder import AutoencoderStage
from ul_scale.stages.base import BaseLoss, BaseModel
from ul_scale.stages.noise import draw_noise
from ul_scale.train.ema import Ema, EmaConfig
from ul_scale.train.health import SampleHealth, StepHealth
from ul_scale.train.host import Host
from ul_scale.train.loop import Instruments, TrainConfig, to_device, train
from ul_scale.train.metrics import MetricsWriter
from ul_scale.train.noise_bins import NoiseBins
from ul_scale.train.optim import OptimConfig, build_optimizer
from ul_scale.train.preemption import StopRequest
from ul_scale.train.prepare import build_stage
from ul_scale.train.saves import Saves
from ul_scale.train.throughput import Throughput
from ul_scale.train.whereabouts import Whereabouts

NEVER = 10**9
"""Steps; more than any benchmark takes."""
MANY_SAMPLES = 10**6


def base_config(
    net: UViTConfig, *, batch_size: int, precision: str = "fp32", compiled: bool = False
) -> BaseRun:
    """Return the config of a base model that is not trained on anything in particular."""
    return BaseRun(
        name="bench",
        autoencoder=AutoencoderRef(run="none", step=0),
        data=DataConfig(),
        model=BaseModel(net=net, num_classes=1000),
        loss=BaseLoss(),
        train=TrainConfig(steps=NEVER, batch_size=batch_size, precision=precision),
        optim=OptimConfig(),
        ema=EmaConfig(half_lives_samples=[10_000_000]),
        parallel=ParallelConfig(compile=compiled),
        checkpoint=CheckpointConfig(every_steps=NEVER),
    )


def latent_facts(shape: tuple[int, int, int]) -> dict[str, Any]:
    """Return what ``Prepared.latents`` would say of latents of a shape."""
    pixels = (16 * shape[-1]) ** 2
    return {"shape": shape, "num_pixels": pixels, "std": 1.0, "num_classes": 1000, "log_snr_max": 5.0}


class Workload:
    """A run's stage, engine ``none``, averages and optimizer, ready to step; its data are made up.

    Args:
        config: of the run; its engine must be ``none``. Lanes are as a run on many samples would have them.
        process: this process.
        latents: of a base model: as ``Prepared.latents``.

    Raises:
        ValueError: for another engine.
    """

    def __init__(self, config: RunConfig, process: Process, latents: dict[str, Any] | None = None):
        if config.parallel.engine != "none":
            raise ValueError(
                f"parallel.engine is {config.parallel.engine}; a benchmark is one process, expected none"
            )
        never = dataclasses.replace(
            config.checkpoint, every_steps=NEVER, keep_every_steps=None, keep_steps=[]
        )
        self.config: RunConfig = dataclasses.replace(
            config,
            train=dataclasses.replace(config.train, steps=NEVER, stop_at_step=None),
            ema=dataclasses.replace(config.ema, snapshot_every_steps=None),
            checkpoint=dataclasses.replace(never, keep_last=1),
        )
        self.process = process
        stage = build_stage(config, latents)
        self.stage: nn.Module = stage
        self.noise_spec, self.bins = stage.noise_spec, NoiseBins(stage.timed_losses)
        self.num_parameters = num_parameters(stage)
        self.forward_flops = sum(stage.forward_flops().values())
        self.train_flops = training_flops(stage.forward_flops())
        engine = build_engine(
            config.parallel,
            stage,
            lambda module: build_optimizer(module, config.optim),
            clip_norm=config.optim.clip_norm,
            precision=config.train.precision,
            process=process,
            samples_per_rank=config.train.batch_size,
        )
        assert isinstance(engine, LocalEngine)
        self.engine = engine
        self.ema = Ema(config.ema, engine.parameters)
        if isinstance(stage, AutoencoderStage):
            self.batch = made_up_batch("x", stage.image_shape, config.train.batch_size)
        else:  # without the encoder of one that is trained on images
            self.batch = made_up_batch("z_clean", stage.latent_shape, config.train.batch_size)
        lanes = config.data.lanes or default_lanes(config.train.batch_size, MANY_SAMPLES)
        self._lanes, self._lane_size = range(lanes), config.train.batch_size // lanes
        self.completed = 0

    def noise_at(self, step: int) -> dict[str, Tensor]:
        return draw_noise(
            self.noise_spec,
            seed=self.config.seed,
            step=step,
            lanes=self._lanes,
            lane_size=self._lane_size,
            batch_size=self.config.train.batch_size,
            device=self.process.device,
        )

    def train_bare(self, steps: int) -> None:
        """Step the same module, optimizer and averages with nothing else around them.

        Noise and times are the method's: they are drawn here too, with torch.randn and torch.rand.
        """
        engine, device, size = self.engine, self.process.device, self.config.train.batch_size
        engine.optimizer.found_inf = None  # type: ignore[attr-defined]
        parameters = list(engine.parameters().values())
        bf16 = self.config.train.precision == "bf16"
        for step in range(self.completed, self.completed + steps):
            batch = to_device(self.batch, device)
            noise = {f"t/{name}": torch.rand(size, device=device) for name in self.noise_spec.times}
            for name, shape in self.noise_spec.eps.items():
                noise[f"eps/{name}"] = torch.randn(size, *shape, device=device)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss = engine.stage(batch, noise, step)["loss"].mean()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, engine.clip_norm)
            engine.optimizer.step()
            engine.optimizer.zero_grad()
            self.ema.update(step, size)
        self.completed += steps


def made_up_batch(name: str, shape: tuple[int, ...], batch_size: int) -> Batch:
    """Return a batch of noise in memory, with labels 0."""
    generator = torch.Generator().manual_seed(0)
    batch: dict[str, Any] = {
        name: torch.randn(batch_size, *shape, generator=generator),
        "label": torch.zeros(batch_size, dtype=torch.long),
        "uniform": torch.rand(batch_size, generator=generator, dtype=torch.float64),
        "weight": torch.ones(batch_size),
        "replaced": torch.zeros(batch_size),
        "keys": [f"bench/0/{i}" for i in range(batch_size)],
    }
    return batch  # type: ignore[return-value]


@dataclass
class OurLoop:
    """``train.loop.train`` on a workload, with all that a run has around it; see ``our_loop``."""

    work: Workload
    saver: Saver
    _saves: Saves
    _watch: Instruments

    def run(self, steps: int, after_step: Callable[[int], bool] | None = None) -> None:
        """Train for so many steps.

        Args:
            steps: at most.
            after_step: told after so many completed steps; returns whether to stop here.
        """
        work = self.work

        def save_if_due(completed: int) -> bool:
            work.completed = completed
            stopping = self._saves.save_if_due(completed)
            return (after_step is not None and after_step(completed)) or stopping

        with contextlib.redirect_stdout(io.StringIO()):
            train(
                dataclasses.replace(work.config.train, stop_at_step=work.completed + steps),
                work.config.optim,
                seed=work.config.seed,
                engine=work.engine,
                ema=work.ema,
                batches=itertools.repeat(work.batch),
                noise_at=work.noise_at,
                accumulation_steps=work.config.parallel.accumulation_steps,
                process=work.process,
                start_step=work.completed,
                save_if_due=save_if_due,
                watch=self._watch,
            )


@contextlib.contextmanager
def our_loop(work: Workload, run_dir: Path, saved: Callable[[int], None] | None = None) -> Iterator[OurLoop]:
    """Set up what a run has around its loop: attempt, stop requests, metrics as plain lines, health, saver.

    Args:
        work: what to train.
        run_dir: an empty run directory.
        saved: as ``Saver``'s. No save is due by itself.
    """
    config, process = work.config, work.process
    host = Host(takes_signals=False)  # an interrupt ends the benchmark, with nothing to save

    def silent(line: str) -> None:
        pass

    with contextlib.ExitStack() as stack:
        attempt = start_attempt(run_dir)
        stack.callback(attempt.close)
        store.adopt(run_dir, attempt, 0)
        whereabouts = Whereabouts(process, config.parallel.timeout_s)
        stack.callback(whereabouts.close)
        stop = stack.enter_context(
            StopRequest(config.preemption, process, host, run_dir=run_dir, attempt=attempt.number, log=silent)
        )
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            metrics = MetricsWriter(run_dir, attempt.number, start=0, stop=NEVER, run_id="bench")
        stack.callback(metrics.close)
        saver = Saver(run_dir, attempt, attempt.number, config.checkpoint, process, saved)
        stack.callback(saver.close)
        batch_size, precision = config.train.batch_size, config.train.precision
        throughput = Throughput(
            work.completed, batch_size, process=process, train_flops=work.train_flops, precision=precision
        )
        health = StepHealth(config.train.max_skipped_in_a_row, process, 0, silent)
        saves = Saves(config, work.engine, work.ema, saver, stop, health, host, throughput, metrics, silent)
        watch = Instruments(
            throughput=throughput,
            bins=work.bins,
            health=health,
            samples=SampleHealth(config.data.max_bad_fraction, MANY_SAMPLES),
            whereabouts=whereabouts,
            metrics=metrics,
            collapse=lambda completed, terms: None,
            counters=saves.counters,
            profile_step=lambda: None,
        )
        yield OurLoop(work, saver, saves, watch)


# Numbers ------------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Spread:
    """Of several measurements of one thing: n, their median, and the middle half's ends."""

    n: int
    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        quartiles = (
            statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
        )
        return cls(len(values), statistics.median(values), quartiles[0], quartiles[2])

    def show(self, scale: float = 1.0, unit: str = "", digits: int = 1) -> str:
        low, median, high = (f"{scale * value:.{digits}f}" for value in (self.low, self.median, self.high))
        return f"{median}{unit} (middle half {low} to {high}, n = {self.n})"


def hardware(device: torch.device) -> dict[str, Any]:
    """Return what a figure depends on: device, cores, threads, versions, how busy the machine is."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "device": name,
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load_average_1min": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "cpu"
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), "cpu")


def describe_hardware(facts: dict[str, Any]) -> str:
    return (
        f"{facts['device']}, {facts['cores']} cores, torch {facts['torch']} with {facts['torch_threads']} "
        f"threads, load average {facts['load_average_1min']}"
    )
