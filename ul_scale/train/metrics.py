"""Metrics of a run: one JSON line per logged step, one file per attempt, and a line for whoever watches."""

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LOSS = "loss"
BITS_PER_PIXEL = "bits_per_pixel"


class MetricsWriter:
    """Appends to ``metrics/<attempt>.jsonl`` and shows progress: a bar on a terminal, else plain lines."""

    def __init__(self, run_dir: Path, attempt: int, *, start: int, stop: int, label: str):
        path = run_dir / "metrics" / f"{attempt}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a")
        self._stop = stop
        self._bar = None
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn(label),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[metrics]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(label, total=stop, completed=start, metrics="")

    def write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        text = (
            f"loss {row[LOSS]:.4f}  {row[BITS_PER_PIXEL]:.4f} bits/pixel  {row['images_per_s']:.0f} images/s"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=row["step"], metrics=text)
        else:
            print(f"step {row['step']}/{self._stop}  {text}", flush=True)

    def close(self) -> None:
        self._file.close()
        if self._bar is not None:
            self._bar.stop()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return a run's rows by step, the newest attempt's where several logged the same step.

    A last line that a kill has cut short is left out.
    """
    rows: dict[int, dict[str, Any]] = {}
    for path in sorted((run_dir / "metrics").glob("*.jsonl"), key=lambda path: int(path.stem)):
        for line in path.read_text().splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)]


def last_row(run_dir: Path) -> dict[str, Any] | None:
    """Return the newest row that a run has logged; reads the end of one file only."""
    paths = sorted((run_dir / "metrics").glob("*.jsonl"), key=lambda path: int(path.stem))
    for path in reversed(paths):
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            for line in reversed(file.read().splitlines()):
                try:
                    return json.loads(line)
                except json.JSONDecodeError:
                    continue
    return None
