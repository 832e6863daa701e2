"""How fast batches arrive: our stream and other loaders on the same images, by turns in fresh processes."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ul_scale.bench.loader_result import OURS, LoaderResult, Outcome, Row
from ul_scale.bench.samples import samples_as_files, whole_folder
from ul_scale.data import storage
from ul_scale.data.index import FORMAT_VERSION

PACKAGES = {
    "webdataset": "webdataset",
    "files": None,
    "mosaicml-streaming": "streaming",
    "litdata": "litdata",
}
"""Peers, and the module by which each is known to be installed; files need torch alone."""
RUN = Path(__file__).parent / "peers/run.py"
TIMEOUT_S = 300
MEMORY_EVERY_S = 0.5


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is delivered to the main process: batches of undecoded images, decoded images, or clips.

    Attributes:
        kind: bytes, image or video.
        size: height and width, pixels.
        frames: of a clip, else 0.
        workers: processes that read and decode.
        warmup: batches before the clock starts.
        images: samples that are timed.
        our_decoder: peers decode with ours, which leaves the difference in reading.
    """

    name: str
    kind: str
    size: int = 64
    frames: int = 0
    batch_size: int = 64
    workers: int = 2
    warmup: int = 8
    images: int
    our_decoder: bool = False


TASKS = {
    task.name: task
    for task in (
        Task(name="bytes", kind="bytes", warmup=40, images=16_000),
        Task(name="64", kind="image", size=64, images=3_200),
        Task(name="256", kind="image", size=256, images=1_920),
        Task(name="video", kind="video", size=128, frames=16, batch_size=8, warmup=4, images=128),
        Task(name="bytes-in-process", kind="bytes", workers=0, warmup=40, images=16_000),
        Task(name="64-our-decoder", kind="image", size=64, images=3_200, our_decoder=True),
        Task(name="256-our-decoder", kind="image", size=256, images=1_920, our_decoder=True),
    )
}
DEFAULT_TASKS = ("bytes", "64", "256", "video")


@dataclass(frozen=True)
class Loader:
    """A loader as it can be run here.

    Attributes:
        name: as it is printed.
        script: of `peers/`, without `with_`.
        python: interpreter that has its package.
        version: of its package.
        folder: URL that it reads instead of its own copy.
    """

    name: str
    script: str
    python: str
    version: str = ""
    folder: str | None = None


class LoaderFailed(RuntimeError):
    """A run of a loader ended with an error."""


def find_peers(
    names: Sequence[str], pythons: Mapping[str, str], venvs: Path | None
) -> tuple[list[Loader], list[tuple[str, str, str]]]:
    """Return the peers that can be run, and (all, name, reason) for those that cannot.

    Args:
        names: of `PACKAGES`.
        pythons: interpreters by name.
        venvs: folder with an environment per name; this interpreter does for a peer that is in neither.

    Raises:
        ValueError: if a name is unknown, or an interpreter that was given does not exist.
    """
    for name in [*names, *pythons]:
        if name not in PACKAGES:
            raise ValueError(f"--against or --python names {name!r}; expected some of {', '.join(PACKAGES)}")
    peers, missing = [], []
    for name in names:
        python, package = pythons.get(name), PACKAGES[name]
        if python is not None and not Path(python).exists():
            raise ValueError(f"--python {name}={python}: no such file; expected an interpreter")
        in_venv = venvs / name / "bin/python" if venvs else None
        if python is None and in_venv is not None and in_venv.exists():
            python = str(in_venv)
        python = python or sys.executable
        if package is None:
            peers.append(Loader(name, name, python))
            continue
        query = f"import {package}, importlib.metadata as m; print(m.version({name!r}))"
        probe = subprocess.run([python, "-c", query], capture_output=True, text=True)
        if probe.returncode:
            missing.append(("all", name, f"{python}: {_last_line(probe.stderr)}"))
        else:
            peers.append(Loader(name, name, python, _last_line(probe.stdout)))
    return peers, missing


def measure(
    work_dir: Path,
    tasks: Sequence[Task],
    peers: Sequence[Loader],
    *,
    data: str | None = None,
    num_images: int = 5000,
    num_videos: int = 64,
    rounds: int = 5,
    say: Callable[[str], object] = print,
) -> LoaderResult:
    """Write the same samples in each loader's format, then let the loaders deliver them, by turns.

    Each round starts with another loader. The page cache is warm.

    Args:
        work_dir: holds what was made and written, for another time.
        tasks: what to deliver.
        peers: to compare with, as found by `find_peers`.
        data: indexed shards whose first samples are taken; by default they are made up. Where they are in
            a bucket, our stream reads them from there, too.
        num_images: that are taken or made.
        num_videos: that are taken or made.
        rounds: runs of each loader.
        say: takes a line per run.

    Raises:
        ValueError: if the data cannot be used.
    """
    result = LoaderResult()
    for kind in ("image", "video"):
        wanted = [task for task in tasks if (task.kind == "video") == (kind == "video")]
        if not wanted:
            continue
        count = num_videos if kind == "video" else num_images
        try:
            files = samples_as_files(work_dir, kind, count, data, say)
        except ImportError as error:
            result.not_measured += [(task.name, "all", str(error)) for task in wanted]
            continue
        if files is None:
            result.not_measured += [(task.name, "all", f"{data} holds no {kind}s") for task in wanted]
            continue
        loaders = [Loader(OURS, "ours", sys.executable)]
        if data is not None and not storage.is_local(storage.open_folder(data)[0]):
            loaders.append(Loader(f"{OURS}, {data.split(':')[0]}", "ours", sys.executable, folder=data))
        for peer in peers:
            if kind == "video" and peer.script != "files":
                result.not_measured += [(t.name, peer.name, "has no video loader here") for t in wanted]
            else:
                loaders.append(peer)
        loaders = [one for one in loaders if _written(one, files, result, wanted, say)]
        for task in wanted:
            _measure_task(task, loaders, files, rounds, result, say)
    return result


def _measure_task(
    task: Task,
    loaders: Sequence[Loader],
    files: Path,
    rounds: int,
    result: LoaderResult,
    say: Callable[[str], object],
) -> None:
    rows = {one.name: Row(task.name, one.name, one.version) for one in loaders}
    for number in range(rounds):
        turn = number % len(loaders)
        for loader in [*loaders[turn:], *loaders[:turn]]:
            if loader.name not in rows:
                continue
            try:
                run = run_loader(loader, folder_of(loader, files), task)
            except LoaderFailed as error:
                del rows[loader.name]
                result.not_measured.append((task.name, loader.name, str(error)))
                say(f"{task.name}, {loader.name}: {error}")
                continue
            rows[loader.name].runs.append(run)
            say(
                f"{task.name}, round {number + 1}/{rounds}, {loader.name}: {run.images_per_s:,.0f}/s, "
                f"first batch after {run.first_batch_s:.1f} s, {run.peak_bytes / 1e6:,.0f} MB"
            )
    result.rows += rows.values()


def folder_of(loader: Loader, files: Path) -> str:
    """Return what a loader reads: a bucket, the files themselves, or a copy of them beside them."""
    if loader.folder is not None:
        return loader.folder
    if loader.script == "files":
        return str(files)
    # What an older version wrote is left alone, and written anew.
    return str(files.with_name(f"ours-{FORMAT_VERSION}" if loader.script == "ours" else loader.script))


def _written(
    loader: Loader,
    files: Path,
    result: LoaderResult,
    tasks: Sequence[Task],
    say: Callable[[str], object],
) -> bool:
    folder = Path(folder_of(loader, files))
    if loader.folder is not None or folder.exists():
        return True
    say(f"writing {folder}")
    try:
        with whole_folder(folder) as partial:
            _run(loader, ["write", str(files), str(partial)], ours=loader.script == "ours")
    except LoaderFailed as error:
        say(f"{loader.name}: {error}")
        result.not_measured += [(task.name, loader.name, str(error)) for task in tasks]
        return False
    return True


def run_loader(loader: Loader, folder: str, task: Task) -> Outcome:
    """Run a loader once.

    Raises:
        LoaderFailed: with the last line that it wrote.
    """
    with tempfile.TemporaryDirectory(prefix="ul-scale-bench-") as scratch:
        out = Path(scratch) / "outcome.json"
        given = json.dumps(dataclasses.asdict(task) | {"began": time.time()})
        ours = loader.script == "ours" or task.our_decoder
        peak = _run(loader, ["read", folder, given, str(out)], ours=ours)
        outcome = json.loads(out.read_text())
    return Outcome(outcome["images"] / outcome["seconds"], outcome["first_batch_s"], peak)


def _run(loader: Loader, args: list[str], *, ours: bool) -> int:
    """Run a loader's script to its end; return the peak memory of all its processes, bytes."""
    env = dict(os.environ)
    if ours:
        paths = [str(Path(__file__).parents[2]), env.get("PYTHONPATH")]
        env["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [loader.python, str(RUN), loader.script, *args]
    peak, deadline = 0, time.monotonic() + TIMEOUT_S
    with tempfile.TemporaryFile("w+") as errors:
        # A session of its own, so that what it leaves behind can be found.
        process = subprocess.Popen(
            command, env=env, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True
        )
        try:
            while process.poll() is None:
                if time.monotonic() > deadline:
                    raise LoaderFailed(f"not done after {TIMEOUT_S} s")
                peak = max(peak, session_bytes(process.pid))
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(MEMORY_EVERY_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if process.returncode:
            errors.seek(0)
            raise LoaderFailed(_last_line(errors.read()) or f"exit code {process.returncode}")
    return peak


def session_bytes(session: int) -> int:
    """Return the memory of a session's processes, shared pages by share (Linux; 0 elsewhere)."""
    total = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[3]) == session:
                lines = (stat.parent / "smaps_rollup").read_text().splitlines()
                total += next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""
