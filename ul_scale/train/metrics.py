"""Metrics of a run: one JSON line per logged step, one file per attempt, and a line for whoever watches.

Training outlives its log: what fails to be written or sent is warned of once, and training goes on.
"""

import json
import math
import os
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column

from ul_scale.checkpoint.files import is_local, list_names, make_dirs, read, write_atomic
from ul_scale.parallel.engine import NOT_IDENTITY

LOSS = "loss"
BITS_PER_PIXEL = "bits_per_pixel"

UPLOAD_EVERY_S = 30.0
LAST_ROWS_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Section ``log``: where metrics go besides ``metrics/<attempt>.jsonl``."""

    tensorboard: bool = field(default=False, metadata=NOT_IDENTITY)
    """Write ``<run>/tensorboard``: one continuous curve over all attempts."""
    wandb_project: str | None = field(default=None, metadata=NOT_IDENTITY)
    """Send metrics to this Weights & Biases project, as the run's id; wandb's own variables (WANDB_MODE,
    WANDB_ENTITY, WANDB_API_KEY, …) say how."""

    def check(self) -> None:
        """Raise ValueError, naming the extra to install, if a package that is asked for is missing."""
        asked = {"tensorboard": self.tensorboard, "wandb": self.wandb_project is not None}
        for package in (name for name, wanted in asked.items() if wanted):
            spec = find_spec(package)
            # A folder "wandb" in the working directory, such as wandb leaves, is found without an origin.
            if spec is None or spec.origin is None:
                raise ValueError(
                    f"section log asks for {package}, which is not installed; "
                    f"expected: pip install 'ul-scale[{package}]'"
                )


class MetricsWriter:
    """Appends to ``metrics/<attempt>.jsonl`` and shows progress: a bar on a terminal, else plain lines.

    In a bucket, where objects cannot be appended to, files are written to a local folder and copied whole
    now and then, at ``flush`` and at the end.

    Args:
        run_dir: of the run.
        attempt: its number.
        start: completed steps so far.
        stop: completed steps at the end.
        run_id: the run's name for people, and its id at wandb.
        log: where else to.
        config: the run's resolved config, for wandb.

    Raises:
        ValueError: if wandb is asked for but not set up.
    """

    def __init__(
        self,
        run_dir: Path,
        attempt: int,
        *,
        start: int,
        stop: int,
        run_id: str,
        log: LogConfig | None = None,
        config: Mapping[str, Any] | None = None,
    ):
        log = log or LogConfig()
        self._attempt, self._stop = attempt, stop
        self._warned: set[str] = set()
        self._bar = _progress_bar() if sys.stderr.isatty() else None
        self._wandb = self._tensorboard = None
        if log.wandb_project is not None:
            self._wandb = self._start_wandb(log.wandb_project, run_id, run_dir, config)
        self._mirror = None if is_local(run_dir) else Mirror(run_dir, self._surviving)
        folder = run_dir if self._mirror is None else self._mirror.folder
        make_dirs(folder / "metrics")
        self._file = (folder / "metrics" / f"{attempt}.jsonl").open("ab")
        if log.tensorboard:
            self._tensorboard = _open_tensorboard(folder / "tensorboard", attempt, start)
        self.event(f"training {run_id} in {run_dir}")
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("", total=stop, completed=start, metrics="", left="")

    def write(self, row: Mapping[str, Any]) -> None:
        """Log one step. A value that is not finite is kept as null."""
        row = {**row, "attempt": self._attempt}
        with self._surviving("metrics"):
            self._file.write(json.dumps(_finite(row), allow_nan=False).encode() + b"\n")
            self._file.flush()
        if self._tensorboard is not None:
            with self._surviving("TensorBoard"):
                for name, value in row.items():
                    self._tensorboard.add_scalar(name, value, row["step"])
                self._tensorboard.flush()
        if self._wandb is not None:
            with self._surviving("wandb"):
                self._wandb.log(row)
        self._show(row)

    def event(self, text: str) -> None:
        """Print a line, without tearing the bar."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def flush(self) -> None:
        """Bring what a bucket has up to date; call it before a COMMIT, from any thread.

        A resumed run logs the steps after its checkpoint again, and none before.
        """
        if self._mirror is not None:
            self._mirror.flush()

    def close(self) -> None:
        with self._surviving("metrics"):
            self._file.close()
        if self._tensorboard is not None:
            with self._surviving("TensorBoard"):
                self._tensorboard.close()
        if self._mirror is not None:
            self._mirror.close()
        if self._wandb is not None:
            with self._surviving("wandb"):
                self._wandb.finish()
        if self._bar is not None:
            self._bar.stop()

    def _show(self, row: Mapping[str, Any]) -> None:
        left = time_left(row, self._stop)
        if self._bar is not None:
            self._bar.update(self._task, completed=row["step"], metrics=summary(row), left=left)
        else:
            self.event(f"step {row['step']}/{self._stop}  {summary(row)}  {left}".rstrip())

    @contextmanager
    def _surviving(self, what: str) -> Iterator[None]:
        # Whatever it is: no error of a log is worth a run, and these are network clients' own classes.
        try:
            yield
        except Exception as error:
            self._warn(what, error)

    def _warn(self, what: str, error: Exception) -> None:
        if what not in self._warned:
            self._warned.add(what)
            self.event(f"warning: {what} cannot be written, training goes on: {_one_line(error)}")

    def _start_wandb(
        self, project: str, run_id: str, run_dir: Path, config: Mapping[str, Any] | None
    ) -> Any | None:
        import wandb

        try:
            run = wandb.init(
                project=project,
                id=run_id,
                name=run_id,
                resume="allow",
                config=without_secrets(dict(config or {})),
                dir=run_dir if is_local(run_dir) else None,
                settings=wandb.Settings(console="off"),  # or it would get between the bar and the terminal
            )
            # Its own step may only rise, but a resumed run logs steps again.
            run.define_metric("step")
            run.define_metric("*", step_metric="step")
        except wandb.errors.UsageError as error:
            raise ValueError(f"log.wandb_project is {project}: {_one_line(error)}") from None
        except Exception as error:  # as in _surviving
            self._warn("wandb", error)
            return None
        return run


class Mirror:
    """A local folder of files that only grow, and the copies of them in a bucket.

    Args:
        remote: the bucket's folder.
        surviving: context that takes an upload's errors; what could not be sent is sent with the next.
    """

    def __init__(self, remote: Path, surviving: Callable[[str], AbstractContextManager[None]]):
        self._remote, self._surviving = remote, surviving
        self._scratch = tempfile.TemporaryDirectory(prefix="ul-scale-metrics-")
        self.folder = Path(self._scratch.name)
        self._sent_bytes: dict[Path, int] = {}
        self._lock, self._closing = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics upload", daemon=True)
        self._thread.start()

    def flush(self) -> None:
        with self._lock, self._surviving("metrics"):
            for path in sorted(self.folder.rglob("*")):
                if path.is_file() and path.stat().st_size != self._sent_bytes.get(path, 0):
                    data = path.read_bytes()
                    write_atomic(self._remote / path.relative_to(self.folder).as_posix(), data)
                    self._sent_bytes[path] = len(data)

    def close(self) -> None:
        self._closing.set()
        self._thread.join()
        self.flush()
        self._scratch.cleanup()

    def _run(self) -> None:
        while not self._closing.wait(UPLOAD_EVERY_S):
            self.flush()


def summary(row: Mapping[str, Any]) -> str:
    """Return a row's main numbers in one line, the most important first; what it has not is left out."""
    parts = [
        (LOSS, "loss {:.4f}", 1),
        (BITS_PER_PIXEL, "{:.4f} bits/pixel", 1),
        ("images_per_s", "{:.0f} images/s", 1),
        ("mfu", "{:.1f} % MFU", 100) if "mfu" in row else ("tflops_per_s_per_device", "{:.3g} TFLOP/s", 1),
        ("data_wait_share", "data wait {:.0f} %", 100),
    ]
    return "  ".join(text.format(row[name] * factor) for name, text, factor in parts if name in row)


def time_left(row: Mapping[str, Any], stop: int) -> str:
    """Return such as ``left 1:02:03``, at the pace of the row; empty if that is not known."""
    if not row.get("images_per_s"):
        return ""
    images = (stop - row["step"]) * row["samples_seen"] / row["step"]
    return f"left {timedelta(seconds=round(images / row['images_per_s']))}"


def without_secrets(value: Any) -> Any:
    """Return a config without what URLs may carry: a user and password, or a signed query."""
    if isinstance(value, Mapping):
        return {key: without_secrets(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(item) for item in value]
    if isinstance(value, str) and "://" in value:
        return re.sub(r"(?<=://)[^/]*@", "", value.partition("?")[0])
    return value


def _finite(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _progress_bar() -> Progress:
    return Progress(
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TextColumn("{task.fields[left]}"),
        TextColumn("{task.fields[metrics]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
        console=Console(stderr=True),
        expand=True,
    )


def _open_tensorboard(folder: Path, attempt: int, start: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    # All attempts in one folder: a reader takes the files in order, and drops from an earlier attempt what
    # this one, resumed, logs again.
    return SummaryWriter(str(folder), purge_step=start + 1, filename_suffix=f".{attempt}")


def _attempt_files(run_dir: Path) -> list[Path]:
    names = [name for name in list_names(run_dir / "metrics") if re.fullmatch(r"\d+\.jsonl", name)]
    return [run_dir / "metrics" / name for name in sorted(names, key=lambda name: int(name.split(".")[0]))]


def _parse(line: bytes) -> dict[str, Any] | None:
    """Return a line's row, or None of one that a kill has cut short."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return a run's rows by step, the newest attempt's where several logged the same step."""
    rows: dict[int, dict[str, Any]] = {}
    for path in _attempt_files(run_dir):
        parsed = map(_parse, (read(path) or b"").splitlines())
        rows |= {row["step"]: row for row in parsed if row is not None}
    return [rows[step] for step in sorted(rows)]


def last_row(run_dir: Path) -> dict[str, Any] | None:
    """Return the newest row that a run has logged; reads the end of one file only."""
    for path in reversed(_attempt_files(run_dir)):
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - LAST_ROWS_BYTES))
            for line in reversed(file.read().splitlines()):
                if (row := _parse(line)) is not None:
                    return row
    return None
