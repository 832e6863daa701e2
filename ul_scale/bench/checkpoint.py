"""What a save costs training: asynchronous, beside standing still until it is committed; and a restore."""

import itertools
import math
import os
import shutil
import statistics
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ul_scale.bench.workload import (
    OurLoop,
    Spread,
    Workload,
    base_config,
    describe_hardware,
    hardware,
    latent_facts,
    our_loop,
    synchronize,
)
from ul_scale.checkpoint import state, store
from ul_scale.checkpoint.files import is_local, remove_tree
from ul_scale.models.uvit import LevelConfig, UViTConfig
from ul_scale.parallel.engine import Process
from ul_scale.train.saves import training_state
from ul_scale.train.worker import load_training_state

PROMISED_RATIO = 0.15
"""Excess step time of an asynchronous save, at most this share of a synchronous save's stall."""
STATE_COPIES = 4
"""Parameters, two moments of Adam, one average."""


@dataclass(frozen=True)
class Round:
    """One asynchronous save under way while training goes on, and one that training waits for; seconds."""

    step_s: float
    """Mean step without a save, before and after the asynchronous one."""
    staging_s: float
    """Of the asynchronous save: for how long training stood still."""
    excess_s: float
    """Of the asynchronous save: what all steps from its start to its commit took beyond ``step_s``."""
    core_wait_s: float
    """Of the excess: for how long the training thread was ready and had no core (Linux; 0 elsewhere)."""
    commit_s: float
    """Of the asynchronous save: from its start to its commit."""
    sync_s: float
    """Stall of the synchronous save: staging, writing, hashing and commit."""

    @property
    def ratio(self) -> float:
        return self.excess_s / self.sync_s


@dataclass
class CheckpointResult:
    """Seconds and bytes."""

    num_bytes: int = 0
    parameter_bytes: int = 0
    first_save_s: float = math.nan
    rounds: list[Round] = field(default_factory=list)
    verify_s: float = math.nan
    load_s: float = math.nan

    @property
    def ratio(self) -> Spread:
        return Spread.of([one.ratio for one in self.rounds])

    def spread(self, name: str) -> Spread:
        """Return the spread of one of a round's figures."""
        return Spread.of([getattr(one, name) for one in self.rounds])

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": vars(self.ratio), "promised_ratio": PROMISED_RATIO}


def excess(ends: Sequence[float], steps: int, step_s: float) -> float:
    """Return what the first steps of a save took beyond so many steps without one.

    Args:
        ends: of steps, by one clock; the save began at the first of them.
        steps: that were under way between its start and its commit.
        step_s: without a save.
    """
    return ends[steps] - ends[0] - steps * step_s


def steps_until(ends: Sequence[float], committed: float) -> int:
    """Return how many steps begin before a commit; the one that it falls in counts whole."""
    return sum(end < committed for end in ends)


def make_workload(gigabytes: float, process: Process) -> Workload:
    """Return a transformer with at least so many GB (10⁹ bytes) of fp32 parameters and short steps.

    They are bound by arithmetic, as a GPU's are for the host: with few tokens a step is mostly the optimizer
    going through memory, whose bandwidth a CPU's training would share with the save.
    """
    width = 1024 if gigabytes >= 0.1 else 64
    blocks = math.ceil(gigabytes * 1e9 / 4 / (18 * width**2))
    net = UViTConfig(patch=1, levels=[LevelConfig(kind="transformer", channels=width, blocks=blocks)])
    return Workload(base_config(net, batch_size=1), process, latent_facts((4, 16, 16)))


def check_room(gigabytes: float, root: Path, device: torch.device) -> None:
    """Check memory and disk before anything is made.

    Raises:
        ValueError: in one line, what is needed and what there is.
    """
    # Gradients beside the state, and as much again for activations and what the optimizer needs meanwhile.
    training, staged = (STATE_COPIES + 2) * gigabytes, STATE_COPIES * gigabytes
    needs = {"memory": training + staged}
    free = {"memory": _free_memory() / 1e9}
    if device.type == "cuda":
        needs = {"memory": staged, "GPU memory": training}
        free["GPU memory"] = torch.cuda.mem_get_info(device)[0] / 1e9
    disk = root if is_local(root) else Path(os.environ.get("TMPDIR", "/tmp"))
    while not disk.exists():
        disk = disk.parent
    # One checkpoint stays until the next is complete; a bucket's are on the disk for a while only.
    needs[f"disk space at {disk}"] = (2 if is_local(root) else 1) * staged
    free[f"disk space at {disk}"] = shutil.disk_usage(disk).free / 1e9
    for name, wanted in needs.items():
        if free[name] < wanted:
            raise ValueError(
                f"--gigabytes is {gigabytes:g}, which needs {wanted:.1f} GB of {name}; "
                f"{free[name]:.1f} GB are free, expected a smaller --gigabytes or another --root"
            )


def _free_memory() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def measure(
    work: Workload,
    root: Path,
    *,
    rounds: int,
    calm_steps: int,
    say: Callable[[str], object] = print,
) -> CheckpointResult:
    """Measure saves and a restore of a workload, in a run directory that is removed afterwards.

    Args:
        work: trained on meanwhile.
        root: local folder or bucket that the run directory is made in.
        rounds: of an asynchronous and a synchronous save each.
        calm_steps: steps without a save before and after each asynchronous one.
        say: takes a line now and then.
    """
    result = CheckpointResult(parameter_bytes=4 * work.num_parameters)
    run_dir = root / f"bench-checkpoint-{uuid.uuid4().hex[:10]}"
    commits: list[float] = []
    try:
        with one_thread(work.process.device):
            with our_loop(work, run_dir, lambda completed: commits.append(time.monotonic())) as loop:
                loop.run(1)
                result.first_save_s = sync_save(loop)
                say(f"first save, which also allocates the staging copy: {result.first_save_s:.2f} s")
                for number in range(rounds):
                    one = measure_round(loop, commits, calm_steps)
                    result.rounds.append(one)
                    say(
                        f"round {number + 1}/{rounds}: step {one.step_s:.3f} s; "
                        f"async save {one.commit_s:.2f} s, of which staging {one.staging_s:.2f}; "
                        f"excess {one.excess_s:.2f} s ({one.core_wait_s:.2f} for want of a core) "
                        f"of sync stall {one.sync_s:.2f} s: {100 * one.ratio:.1f} %"
                    )
                result.num_bytes, result.verify_s, result.load_s = restore(work, run_dir)
    finally:
        remove_tree(run_dir)
    return result


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """On a CPU, train with one thread: beside a GPU, too, cores are free for the thread that saves."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def begin_save(loop: OurLoop) -> None:
    work = loop.work
    batch_size = work.config.train.batch_size
    state = training_state(work.engine, work.ema, work.completed, batch_size, skipped_steps=0)
    loop.saver.save(state, work.completed)


def sync_save(loop: OurLoop) -> float:
    """Save and wait for the commit; return the seconds that took."""
    began = time.monotonic()
    begin_save(loop)
    loop.saver.wait()
    return time.monotonic() - began


def measure_round(loop: OurLoop, commits: list[float], calm_steps: int) -> Round:
    """Save asynchronously in the midst of training, then synchronously.

    Args:
        loop: with a saver that is idle.
        commits: where the loop's ``saved`` notes the times of commits.
        calm_steps: steps without a save, before and after.
    """
    ends: list[float] = []
    waits: list[float] = []
    earlier, stalled, calm_left = len(commits), loop.saver.stall_s, calm_steps

    def after_step(completed: int) -> bool:
        nonlocal calm_left
        synchronize(loop.work.process.device)
        ends.append(time.monotonic())
        waits.append(core_wait_s())
        if len(ends) == calm_steps + 1:
            begin_save(loop)
        if loop.saver.failed:
            loop.saver.wait()
        if len(commits) > earlier:
            calm_left -= 1
        return calm_left < 0

    loop.run(10**6, after_step)
    loop.saver.wait()
    committed = commits[-1]
    busy = steps_until(ends[calm_steps:], committed)

    def calm_and_excess(clock: list[float]) -> tuple[float, float]:
        durations = [end - start for start, end in itertools.pairwise(clock)]
        calm = statistics.fmean(durations[:calm_steps] + durations[calm_steps + busy :])
        return calm, excess(clock[calm_steps:], busy, calm)

    step_s, excess_s = calm_and_excess(ends)
    return Round(
        step_s=step_s,
        staging_s=loop.saver.stall_s - stalled,
        excess_s=excess_s,
        core_wait_s=calm_and_excess(waits)[1],
        commit_s=committed - ends[calm_steps],
        sync_s=sync_save(loop),
    )


def core_wait_s() -> float:
    """Return for how long this thread has been ready to run without a core, seconds."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    except OSError:
        return 0.0


def restore(work: Workload, run_dir: Path) -> tuple[int, float, float]:
    """Load the newest checkpoint; return its bytes, and the seconds to verify (or download) and to load it.

    Local files are first dropped from the page cache, as they would be after a restart elsewhere.
    """
    step = store.latest_step(run_dir)
    assert step is not None
    files = store.read_commit(run_dir, step).files
    if is_local(run_dir):
        for name in files:
            with open(store.shard_dir(run_dir, step) / name, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    began = time.monotonic()
    with state.local_copy(run_dir, step) as directory:
        verified = time.monotonic()
        load_training_state(work.engine, work.ema, directory, "dcp")
    loaded = time.monotonic()
    return sum(info["size"] for info in files.values()), verified - began, loaded - verified


def report(result: CheckpointResult, device: torch.device) -> str:
    """Return the result as lines for a person."""
    write_s = result.spread("sync_s").median - result.spread("staging_s").median
    lines = [
        f"state         {result.num_bytes / 1e9:.2f} GB, parameters {result.parameter_bytes / 1e9:.2f} GB",
        f"step          {result.spread('step_s').show(1, ' s', 3)}",
        f"sync stall    {result.spread('sync_s').show(1, ' s', 2)}",
        f"async staging {result.spread('staging_s').show(1, ' s', 2)}",
        f"async excess  {result.spread('excess_s').show(1, ' s', 2)}",
        f"  for want of a core {result.spread('core_wait_s').show(1, ' s', 2)}",
        f"excess/stall  {result.ratio.show(100, ' %')}; promised: at most {100 * PROMISED_RATIO:g} %",
        f"async commit  {result.spread('commit_s').show(1, ' s', 2)} after its start",
        f"first save    {result.first_save_s:.2f} s",
        f"write + hash  {result.num_bytes / 1e9 / write_s:.2f} GB/s without training beside it",
        f"restore       {result.verify_s:.2f} s to verify, {result.load_s:.2f} s to load",
        f"on            {describe_hardware(hardware(device))}",
    ]
    if device.type == "cpu":
        lines.append("training has one thread, so that other cores are free for the save, as on GPU nodes")
    if result.spread("core_wait_s").median > 0.25 * result.spread("excess_s").median:
        lines.append(
            "notice: much of the excess is the training thread's wait for a core; if other programs are "
            "running, the figures are theirs too"
        )
    return "\n".join(lines)
