"""What our loop costs over a bare one: same process, module, optimizer, averages and batch."""

import ctypes
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ul_scale.bench.workload import (
    Spread,
    Workload,
    base_config,
    describe_hardware,
    hardware,
    latent_facts,
    our_loop,
    synchronize,
)
from ul_scale.models import zoo
from ul_scale.models.uvit import LevelConfig, UViTConfig
from ul_scale.parallel.engine import Process

LEAST_STEP_S = 0.05
"""The promise, at most ``PROMISED_OVERHEAD``, is for steps of at least so long."""
PROMISED_OVERHEAD = 0.02
WARMUP_STEPS = 3
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


@dataclass(frozen=True)
class StepResult:
    """Seconds per step of each loop, by round: on the clock, and of this process's threads on all cores."""

    ours_s: list[float] = field(default_factory=list)
    bare_s: list[float] = field(default_factory=list)
    ours_cpu_s: list[float] = field(default_factory=list)
    bare_cpu_s: list[float] = field(default_factory=list)

    @property
    def overhead(self) -> Spread:
        """Of our loop over the bare one in the same round."""
        return _excess(self.ours_s, self.bare_s)

    @property
    def cpu_overhead(self) -> Spread:
        """The same of CPU time, in which other processes count for little."""
        return _excess(self.ours_cpu_s, self.bare_cpu_s)

    def as_json(self) -> dict[str, Any]:
        return {
            **vars(self),
            "overhead": vars(self.overhead),
            "cpu_overhead": vars(self.cpu_overhead),
            "promised_overhead": PROMISED_OVERHEAD,
            "long_enough": Spread.of(self.bare_s).median >= LEAST_STEP_S,
        }


def _excess(ours: list[float], bare: list[float]) -> Spread:
    return Spread.of([a / b - 1 for a, b in zip(ours, bare)])


def compare_loops(
    work: Workload, *, steps: int, rounds: int, say: Callable[[str], object] = print
) -> StepResult:
    """Alternate blocks of our loop and of the bare loop, each first in every other round.

    So whatever else the machine does hits both. Each block of ours logs once, at its end.

    Args:
        work: trained on by both.
        steps: of a block.
        rounds: pairs of blocks.
        say: takes a line per round.
    """
    result = StepResult()
    with (
        tempfile.TemporaryDirectory(prefix="ul-scale-bench-") as folder,
        our_loop(work, Path(folder)) as ours,
    ):
        ours.run(WARMUP_STEPS)
        work.train_bare(WARMUP_STEPS)
        for number in range(rounds):
            pair = [
                (ours.run, result.ours_s, result.ours_cpu_s),
                (work.train_bare, result.bare_s, result.bare_cpu_s),
            ]
            for run, times, cpu_times in pair if number % 2 == 0 else pair[::-1]:
                step_s, cpu_s = seconds_per_step(work, run, steps)
                times.append(step_s)
                cpu_times.append(cpu_s)
            ours_s, bare_s = result.ours_s[-1], result.bare_s[-1]
            say(
                f"round {number + 1}/{rounds}: ours {1e3 * ours_s:.1f} ms/step, bare {1e3 * bare_s:.1f}, "
                f"overhead {100 * (ours_s / bare_s - 1):+.1f} %"
            )
    return result


def keep_freed_memory() -> None:
    """Have glibc's malloc keep what is freed, for the rest of this process.

    Otherwise each loop gives memory back and takes it again, by how its blocks happen to lie: up to 2 % of a
    CPU's step, of either loop, which says nothing about the loops.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_TRIM_THRESHOLD, 2**30)
        libc.mallopt(M_MMAP_MAX, 0)


def seconds_per_step(work: Workload, run: Callable[[int], object], steps: int) -> tuple[float, float]:
    """Return the time on the clock and of the process's CPU, for steps that the device has finished."""
    synchronize(work.process.device)
    began, cpu_began = time.perf_counter(), time.process_time()
    run(steps)
    synchronize(work.process.device)
    return (time.perf_counter() - began) / steps, (time.process_time() - cpu_began) / steps


def default_workload(process: Process, say: Callable[[str], object] = print) -> Workload:
    """Return a base model with the smallest batch, a power of 2, whose bare step is clearly long enough."""
    cuda = process.device.type == "cuda"
    if cuda:
        fields = zoo.BASES["imagenet512"]["net"]
        net = UViTConfig(**{**fields, "levels": [LevelConfig(**level) for level in fields["levels"]]})
        shape = (32, 32, 32)
    else:
        levels = [LevelConfig(kind="transformer", channels=c, blocks=b) for c, b in ((64, 2), (128, 4))]
        net, shape = UViTConfig(patch=1, levels=levels, head_dim=32), (4, 16, 16)
    for batch_size in (2**i for i in range(13)):
        config = base_config(net, batch_size=batch_size, precision="bf16" if cuda else "fp32")
        work = Workload(config, process, latent_facts(shape))
        work.train_bare(WARMUP_STEPS)
        step_s = min(seconds_per_step(work, work.train_bare, 1)[0] for _ in range(8))
        if step_s >= 1.2 * LEAST_STEP_S:
            break
    say(f"base model of {work.num_parameters / 1e6:.1f} M parameters, {batch_size} latents per step")
    return work


def report(result: StepResult, device: torch.device) -> str:
    """Return the result as lines for a person."""
    bare = Spread.of(result.bare_s)
    lines = [
        f"bare loop  {bare.show(1e3, ' ms/step')}",
        f"our loop   {Spread.of(result.ours_s).show(1e3, ' ms/step')}",
        f"overhead   {result.overhead.show(100, ' %', 2)}; promised: at most {100 * PROMISED_OVERHEAD:g} %",
        f"on         {describe_hardware(hardware(device))}",
    ]
    if device.type == "cpu":
        cpu = result.cpu_overhead.show(100, " %", 2)
        lines.insert(3, f"CPU time   {cpu}: the overhead with other processes' share left out")
    if bare.median < LEAST_STEP_S:
        lines.append(
            f"notice: a step takes {1e3 * bare.median:.1f} ms; the promise is for steps of at least "
            f"{1e3 * LEAST_STEP_S:g} ms, so take a larger model or train.batch_size"
        )
    return "\n".join(lines)
