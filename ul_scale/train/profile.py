"""A trace of a few steps, and the operations that took longest."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from ul_scale.checkpoint.files import make_dirs, write_atomic
from ul_scale.parallel.engine import Process

WAIT_STEPS, WARMUP_STEPS, ACTIVE_STEPS = 5, 2, 3
"""Compilation and the first allocations pass, the profiler itself settles, and then it records."""
TOP_OPERATIONS = 10


@contextmanager
def profiler(
    enabled: bool,
    run_dir: Path,
    attempt: int,
    process: Process,
    start_step: int,
    say: Callable[[str], object] = print,
) -> Iterator[Callable[[], None]]:
    """Profile an attempt's steps 8 to 10 on rank 0; give what is to be called after every step.

    Writes ``profile/attempt<n>_rank0.json.gz``, which opens in https://ui.perfetto.dev, and says where it
    is and which operations took longest.

    Args:
        enabled: otherwise, and on other ranks, nothing happens.
        run_dir: of the run.
        attempt: its number.
        process: this process.
        start_step: completed steps so far.
        say: takes lines for the user.
    """
    if not enabled or process.rank != 0:
        yield lambda: None
        return
    activities = [ProfilerActivity.CPU]
    if process.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    path = run_dir / "profile" / f"attempt{attempt}_rank0.json.gz"
    first = start_step + WAIT_STEPS + WARMUP_STEPS + 1
    written = False

    def write(profile: torch.profiler.profile) -> None:
        nonlocal written
        written = True
        try:
            save_trace(profile, path)
        except OSError as error:
            say(f"warning: the profile cannot be written: {error}")
            return
        say(f"profile from step {first} on: {path}\n{top_operations(profile, process.device.type)}")

    schedule = torch.profiler.schedule(wait=WAIT_STEPS, warmup=WARMUP_STEPS, active=ACTIVE_STEPS, repeat=1)
    with torch.profiler.profile(activities=activities, schedule=schedule, on_trace_ready=write) as profile:
        yield profile.step
    if not written:
        say(f"warning: no profile, for the run ended before step {first}")


def save_trace(profile: torch.profiler.profile, path: Path) -> None:
    make_dirs(path.parent)
    with tempfile.TemporaryDirectory(prefix="ul-scale-profile-") as folder:
        local = Path(folder) / path.name
        profile.export_chrome_trace(str(local))
        write_atomic(path, local.read_bytes())


def top_operations(profile: torch.profiler.profile, device_type: str) -> str:
    """Return a table of the operations with the most time of their own, on the device where there is one."""
    attribute = "self_device_time_total" if device_type == "cuda" else "self_cpu_time_total"
    times_us = {
        event.key: (getattr(event, attribute), event.count)
        for event in profile.key_averages()
        if not event.key.startswith("ProfilerStep")
    }
    total_us = sum(time_us for time_us, _ in times_us.values()) or 1.0
    top = sorted(times_us.items(), key=lambda item: -item[1][0])[:TOP_OPERATIONS]
    lines = [f"{'operation':50}  {'ms':>10}  {'share':>6}  {'calls':>7}"]
    for name, (time_us, calls) in top:
        lines.append(f"{name[:50]:50}  {time_us / 1e3:10.2f}  {time_us / total_us:6.1%}  {calls:7}")
    return "\n".join(lines)
