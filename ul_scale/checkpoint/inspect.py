"""What a run directory holds: its checkpoints, why each is kept, and whether their files are whole."""

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from ul_scale.checkpoint import store
from ul_scale.checkpoint.ema_snapshots import ema_name, snapshot_steps
from ul_scale.checkpoint.files import decode, read
from ul_scale.checkpoint.transfer import WORKERS, FileInfo, wrong_hash
from ul_scale.checkpoint.transfer import describe as describe_file


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """One complete checkpoint."""

    step: int
    samples_seen: int
    attempt: int
    """The attempt that wrote it."""
    world_size: int | None
    """Of that attempt, where run.json says it."""
    size_bytes: int
    saved_at: float | None
    """Unix time, s, by the clock of the disk or bucket."""
    kept: list[str]
    """Why retention leaves it: ``last``, ``every``, ``named``; empty: until the next save."""
    format: str
    """``dcp``, which loads at any world size, or ``deepspeed``."""
    newest: bool


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """The checkpoints of a run, ascending by step."""

    run_id: str
    run_dir: str
    done_at_step: int | None
    """The step that SUCCESS names."""
    ema_names: list[str]
    """Averages in every checkpoint; the first is the one that is evaluated."""
    ema_snapshots: list[int]
    """Steps whose power-function EMAs were kept, from which any width can be rebuilt."""
    checkpoints: list[CheckpointInfo]


def read_config(run_dir: Path) -> dict[str, Any]:
    """Return a run's config.yaml as plain values.

    Raises:
        ValueError: if it is not a run directory.
    """
    data = read(run_dir / "config.yaml")
    if data is None:
        raise ValueError(f"{run_dir}: not a run directory (no config.yaml); expected <root>/<run_id>")
    return yaml.safe_load(data)


def check_steps(run_dir: Path, steps: Iterable[int]) -> None:
    """Raise ``ValueError`` unless a run has a complete checkpoint at each of these steps.

    An autoencoder that is not trained here has step 0.
    """
    fixed = read_config(run_dir)["kind"] == "fixed_autoencoder"
    for step in steps:
        if not fixed:
            store.check_step(run_dir, step)
        elif step != 0:
            raise ValueError(f"{run_dir}: is not trained here; step is {step}, expected 0")


def ema_names(config: dict[str, Any]) -> list[str]:
    """Return the names of the averages in a run's checkpoints; the first is the one that is evaluated."""
    ema = config["ema"]
    names = [str(half_life) for half_life in ema["half_lives_samples"]]
    return names + [ema_name(width) for width in ema.get("power_widths", [])]


def describe(run_dir: Path) -> RunInfo:
    """Return what ``ul-scale checkpoint list`` shows.

    Raises:
        ValueError: if it is not a run directory, or that of an autoencoder that is not trained here.
    """
    config = read_config(run_dir)
    if config["kind"] == "fixed_autoencoder":
        raise ValueError(f"{run_dir}: is not trained here; there are no checkpoints")
    attempts = decode(read(run_dir / "run.json")).get("attempts", {})
    steps = store.complete_steps(run_dir)
    checkpoints = []
    for step in steps:
        commit = store.read_commit(run_dir, step)
        shards = store.checkpoint_dir(run_dir, step, commit.attempt, create=False)
        saved_at = (shards.parent / "COMMIT").stat().st_mtime
        checkpoints.append(
            CheckpointInfo(
                step=step,
                samples_seen=step * config["train"]["batch_size"],
                attempt=commit.attempt,
                world_size=attempts.get(str(commit.attempt), {}).get("world_size"),
                size_bytes=sum(info["size"] for info in commit.files.values()),
                saved_at=saved_at or None,
                kept=_kept(step, steps, config["checkpoint"]),
                format=commit.format,
                newest=step == steps[-1],
            )
        )
    return RunInfo(
        run_id=run_dir.name,
        run_dir=str(run_dir),
        done_at_step=store.read_success(run_dir),
        ema_names=ema_names(config),
        ema_snapshots=snapshot_steps(run_dir),
        checkpoints=checkpoints,
    )


def _kept(step: int, steps: list[int], config: dict[str, Any]) -> list[str]:
    reasons = {
        "last": step in steps[-config["keep_last"] :],
        "every": bool(config.get("keep_every_steps")) and step % config["keep_every_steps"] == 0,
        "named": step in config["keep_steps"],
    }
    return [reason for reason, holds in reasons.items() if holds]


COLUMNS = ("step", "samples", "attempt", "world size", "size", "age", "kept", "format")


def rows(info: RunInfo, now_s: float | None = None) -> list[tuple[str, ...]]:
    """Return the checkpoints as the cells of a table with ``COLUMNS``, newest last."""
    now_s = time.time() if now_s is None else now_s
    return [
        (
            f"{each.step}{' (newest)' if each.newest else ''}",
            str(each.samples_seen),
            str(each.attempt),
            "?" if each.world_size is None else str(each.world_size),
            human_bytes(each.size_bytes),
            "?" if each.saved_at is None else human_age(now_s - each.saved_at),
            ", ".join(each.kept) or "until the next save",
            each.format,
        )
        for each in info.checkpoints
    ]


def human_bytes(count: float) -> str:
    """Return 1536 as 1.5 KiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def human_age(seconds: float) -> str:
    """Return 7300 s as 2 h."""
    for unit, length_s in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length_s:
            return f"{seconds / length_s:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def as_json(info: RunInfo) -> dict[str, Any]:
    """Return everything as plain values."""
    return asdict(info)


def verify_files(run_dir: Path, step: int) -> Iterator[tuple[int, str | None]]:
    """Compare every file of a complete checkpoint with COMMIT, yielding as they are read.

    Yields:
        the file's size in bytes, and a line about what is wrong with it, or None.
    """
    commit = store.read_commit(run_dir, step)
    directory = store.checkpoint_dir(run_dir, step, commit.attempt, create=False)

    def check(item: tuple[str, FileInfo]) -> tuple[int, str | None]:
        name, info = item
        return info["size"], file_fault(directory / name, info)

    with ThreadPoolExecutor(WORKERS) as pool:
        yield from pool.map(check, commit.files.items())


def file_fault(path: Path, expected: FileInfo) -> str | None:
    """Return a line about a file that is missing or not the one that was saved, None if it is whole."""
    try:
        found = describe_file(path)
    except FileNotFoundError:
        return f"{path} is missing, expected {expected['size']} bytes"
    if found["size"] != expected["size"]:
        return f"{path} has {found['size']} bytes, expected {expected['size']} bytes"
    return wrong_hash(path, found, expected)
