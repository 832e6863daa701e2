"""What was measured of loaders, what of it was promised, and how it is shown."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from ul_scale.bench.workload import Spread

OURS = "ours"
PROMISED = {"bytes": ("webdataset", 4.0), "64": ("fastest", 1.0), "256": ("fastest", 1.0)}
"""Rate of ours, at least so many times that of a peer."""


@dataclass(frozen=True)
class Outcome:
    """Of one run.

    Attributes:
        images_per_s: samples per second after the warm-up.
        first_batch_s: from the start of the process to its first batch, seconds.
        peak_bytes: most memory of all its processes together.
    """

    images_per_s: float
    first_batch_s: float
    peak_bytes: int


@dataclass
class Row:
    """A loader's runs of a task, one per round."""

    task: str
    loader: str
    version: str
    runs: list[Outcome] = field(default_factory=list)

    def spread(self, name: str) -> Spread:
        """Return the spread of one of an outcome's figures."""
        return Spread.of([getattr(run, name) for run in self.runs])


@dataclass
class LoaderResult:
    """Rows, and what was asked for and could not be measured: (task or all, loader, reason)."""

    rows: list[Row] = field(default_factory=list)
    not_measured: list[tuple[str, str, str]] = field(default_factory=list)

    def row(self, task: str, loader: str) -> Row | None:
        return next((row for row in self.rows if (row.task, row.loader) == (task, loader)), None)

    def ratio(self, row: Row) -> Spread | None:
        """Return our rate over another loader's in the same round."""
        ours = self.row(row.task, OURS)
        if ours is None or row is ours:
            return None
        pairs = zip(ours.runs, row.runs)
        return Spread.of([one.images_per_s / other.images_per_s for one, other in pairs])

    def verdicts(self) -> dict[str, tuple[float, str, float]]:
        """Return, by task, our ratio to the peer that a promise is about, that peer, and what is promised."""
        found = {}
        for task, (peer, promised) in PROMISED.items():
            others = [row for row in self.rows if row.task == task and not row.loader.startswith(OURS)]
            if peer != "fastest":
                others = [row for row in others if row.loader == peer]
            if others and self.row(task, OURS):
                best = max(others, key=lambda row: row.spread("images_per_s").median)
                ratio = self.ratio(best)
                assert ratio is not None
                found[task] = (ratio.median, best.loader, promised)
        return found

    def as_json(self) -> dict[str, Any]:
        rows = []
        for row in self.rows:
            ratio = self.ratio(row)
            rows.append(
                dataclasses.asdict(row)
                | {"images_per_s": vars(row.spread("images_per_s"))}
                | {"ours_over_this": vars(ratio) if ratio else None}
            )
        verdicts = {
            task: {"ratio": ratio, "peer": peer, "promised": promised}
            for task, (ratio, peer, promised) in self.verdicts().items()
        }
        missing = [dict(zip(("task", "loader", "reason"), item)) for item in self.not_measured]
        return {"rows": rows, "not_measured": missing, "promises": verdicts}


def table(result: LoaderResult) -> Table:
    """Return the rows for a person, the fastest of each task first."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for title in (
        "task",
        "loader",
        "samples/s",
        "middle half",
        "n",
        "ours is ×",
        "first batch",
        "peak memory",
    ):
        shown.add_column(title, justify="left" if title in ("task", "loader") else "right")
    for task in dict.fromkeys(row.task for row in result.rows):
        rows = [row for row in result.rows if row.task == task and row.runs]
        for row in sorted(rows, key=lambda row: -row.spread("images_per_s").median):
            rate, ratio = row.spread("images_per_s"), result.ratio(row)
            shown.add_row(
                task,
                f"{row.loader} {row.version}".strip(),
                f"{rate.median:,.0f}",
                f"{rate.low:,.0f} to {rate.high:,.0f}",
                str(rate.n),
                f"{ratio.median:.2f}" if ratio else "",
                f"{row.spread('first_batch_s').median:.1f} s",
                f"{row.spread('peak_bytes').median / 1e6:,.0f} MB",
            )
    return shown


def remarks(result: LoaderResult) -> list[str]:
    """Return what was promised beside what came, and what was not measured."""
    lines = []
    for task, (ratio, peer, promised) in result.verdicts().items():
        kept = "kept" if ratio >= promised else "not kept"
        lines.append(f"{task}: {ratio:.2f} × {peer}; promised: at least {promised:g}, {kept}")
    lines += [f"not measured: {task}, {loader}: {reason}" for task, loader, reason in result.not_measured]
    return lines
