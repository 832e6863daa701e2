"""What the index of a large set costs a training process: time and memory, until its first batch is known.

The set is made up: its index is written as a real one is, its shards are empty files of the right length.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ul_scale.data.config import DataConfig
from ul_scale.data.index import FORMAT_VERSION, INDEX_FOLDER, Index, Shard, open_index
from ul_scale.data.index_writer import IndexWriter
from ul_scale.data.tar import ShardScan

PROMISED_OPEN_S = 1.0
STEP, LANES, BATCH_SIZE = 10**6, 64, 2048
# Of an index: 32 bytes for each sample's arrays, and its key.
_BYTES_PER_SAMPLE = 45
_SAMPLE_BLOCKS = (40, 400)  # of 512 bytes: 20 to 200 KB


@dataclass(frozen=True)
class Figures:
    """Of one fresh process. Seconds; bytes are those since its imports.

    `anonymous` is memory of its own, `mapped` are pages of the index's files that it has touched, which all
    processes share and the system can drop.
    """

    open_s: float
    open_cpu_s: float
    """Opening the index and checking it against the list of shards: on the clock, and of the processor."""
    reopen_s: float
    """Mapping it again, as a worker process does."""
    plan_s: float
    """Cutting all samples into chunks."""
    find_s: float
    """Which samples a global batch at step 10^6 has: permute an epoch, find each lane's window."""
    names_s: float
    """The names of that batch's samples."""
    opened_anonymous: int
    opened_mapped: int
    anonymous: int
    mapped: int
    peak_anonymous: int


def write_set(folder: Path, num_samples: int, samples_per_shard: int = 1000) -> None:
    """Write a made-up index, and sparse files for its shards.

    Args:
        folder: an empty folder.
        num_samples: of the set.
        samples_per_shard: of each shard but the last.

    Raises:
        ValueError: if the disk has too little room.
    """
    room, needed = shutil.disk_usage(folder).free, num_samples * _BYTES_PER_SAMPLE
    if room < needed:
        raise ValueError(f"{folder} has {room / 1e9:.1f} GB free; such an index takes {needed / 1e9:.1f}")
    (folder / INDEX_FOLDER).mkdir()
    writer, rng = IndexWriter(folder / INDEX_FOLDER), np.random.default_rng(0)
    for number, first in enumerate(range(0, num_samples, samples_per_shard)):
        count = min(samples_per_shard, num_samples - first)
        size = 512 * rng.integers(*_SAMPLE_BLOCKS, count, dtype=np.uint32)
        stop = np.cumsum(size, dtype=np.uint64)
        members = np.empty((count, 2, 2), np.uint32)
        members[:, 0] = np.stack([size - 512, np.full(count, 3)], 1)
        members[:, 1] = np.stack([np.full(count, 512), size - 1536], 1)
        keys = [f"{number:06d}{sample:04d}" for sample in range(count)]
        shard = Shard(f"{number:06d}.tar", int(stop[-1]) + 1024, 0)
        writer.add(shard, ShardScan(keys, stop - size, size, ["cls", "jpg"], members))
        with open(folder / shard.name, "wb") as file:
            file.truncate(shard.size)
    notes = {"format_version": FORMAT_VERSION, "complete": True, "dataset": "bench", "classes": None}
    meta = {**notes, "extra": {}, **writer.finish()}
    (folder / INDEX_FOLDER / "meta.json").write_text(json.dumps(meta))


def measure(folder: Path, *, cold: bool) -> Figures:
    """Measure in a fresh process.

    Args:
        folder: as filled by `write_set`.
        cold: drop the index's files from the system's page cache first.
    """
    for path in (folder / INDEX_FOLDER).iterdir() if cold else ():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command = [sys.executable, "-m", "ul_scale.bench.index", str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return Figures(**json.loads(done.stdout))


def run(
    num_samples: int, rounds: int, folder: str | None = None, say: Callable[[str], object] = print
) -> dict[str, list[Figures]]:
    """Write a set, measure it `rounds` times with and without its files in the page cache, and delete it.

    Args:
        num_samples: of the set.
        rounds: fresh processes of each kind, by turns.
        folder: to make a temporary folder in.
        say: takes a line per phase.

    Returns:
        Figures of the `cold` and the `warm` processes.
    """
    figures: dict[str, list[Figures]] = {"cold": [], "warm": []}
    with tempfile.TemporaryDirectory(prefix="ul-scale-bench-", dir=folder) as made:
        began = time.perf_counter()
        write_set(Path(made), num_samples)
        size = sum(path.stat().st_size for path in (Path(made) / INDEX_FOLDER).iterdir())
        say(f"index of {num_samples:,} samples, {size / 1e9:.2f} GB, in {time.perf_counter() - began:.0f} s")
        for number in range(rounds):
            for kind, of_kind in figures.items():
                of_kind.append(measure(Path(made), cold=kind == "cold"))
                one = of_kind[-1]
                say(
                    f"round {number + 1}/{rounds}, {kind}: open {one.open_s:.2f} s, plan {one.plan_s:.2f} s, "
                    f"find {one.find_s:.2f} s"
                )
    return figures


def report(figures: dict[str, list[Figures]]) -> str:
    """Return the figures as lines for a person."""
    from ul_scale.bench.workload import Spread

    lines = []
    for kind, of_kind in figures.items():
        lines.append(f"{kind} page cache")
        columns = {name: [asdict(one)[name] for one in of_kind] for name in asdict(of_kind[0])}
        for name, title in {
            "open_s": f"open (promised: under {PROMISED_OPEN_S:g} s)",
            "open_cpu_s": "open: processor time",
            "reopen_s": "open again, in a worker",
            "plan_s": "cut into chunks",
            "find_s": f"find step {STEP:,} of {LANES} lanes",
            "names_s": f"names of its {BATCH_SIZE:,} samples",
        }.items():
            lines.append(f"  {title:<36}{Spread.of(columns[name]).show(1, ' s', 3)}")
        for name, title in {
            "opened_anonymous": "memory once open: own",
            "opened_mapped": "memory once open: mapped files",
            "anonymous": "memory at the end: own",
            "mapped": "memory at the end: mapped files",
            "peak_anonymous": "peak of own memory",
        }.items():
            lines.append(f"  {title:<36}{Spread.of(columns[name]).show(1e-6, ' MB', 0)}")
    return "\n".join(lines)


def _measure_here(url: str) -> Figures:
    from ul_scale.data.stream import make_plan

    times: dict[str, float] = {}

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        times[name] = time.perf_counter() - began

    done = threading.Event()
    own, mapped = _memory()
    peaks = [own]

    def watch() -> None:
        while not done.wait(0.005):
            peaks.append(_memory()[0])

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    cpu = time.process_time()
    with timed("open_s"):
        index = open_index(url)
    times["open_cpu_s"] = time.process_time() - cpu
    own_open, mapped_open = _memory()
    with timed("reopen_s"):
        Index.at(index.location)
    config = DataConfig(lanes=min(LANES, len(index)))
    with timed("plan_s"):
        plan = make_plan(index, config, seed=0, batch_size=BATCH_SIZE)
    with timed("find_s"):
        samples = [plan.lane_batch(STEP, lane)[1] for lane in range(plan.lanes)]
    with timed("names_s"):
        for sample in np.sort(np.concatenate(samples)).tolist():
            index.names(sample, sample + 1)
    own_end, mapped_end = _memory()
    peaks.append(own_end)
    done.set()
    watching.join()
    return Figures(
        **times,
        opened_anonymous=own_open - own,
        opened_mapped=mapped_open - mapped,
        anonymous=own_end - own,
        mapped=mapped_end - mapped,
        peak_anonymous=max(peaks) - own,
    )


def _memory() -> tuple[int, int]:
    """Return this process's resident memory: its own, and that of mapped files, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    own, mapped = (1024 * int(fields[name].split()[0]) for name in ("RssAnon", "RssFile"))
    return own, mapped


if __name__ == "__main__":
    print(json.dumps(asdict(_measure_here(sys.argv[1]))))
