"""What the rows of a sweep say: grouped by latents and size, the observed frontier, the best bitrate per size.

A row is one evaluation of a base model. A value that is absent, null or not finite is missing, and stays so.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

Row = dict[str, Any]
METRIC = "fd_effnet_lite0"


def number(row: Row, column: str) -> float | None:
    """Return a row's value as a finite number, or None where it is missing."""
    value = row.get(column)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def first(rows: Iterable[Row], column: str) -> float | None:
    """Return the first value of a column that is not missing."""
    return next((value for row in rows if (value := number(row, column)) is not None), None)


def si(value: float | None, unit: str) -> str:
    """Return a large number for people, 26.2 MFLOPs; an empty string where it is missing."""
    if value is None:
        return ""
    power = min(max(int(math.log10(value) // 3), 0), 8) if value >= 1 else 0
    scaled = value / 1000**power
    return f"{scaled:.3g}".replace("e+03", "000") + f" {' kMGTPEZY'[power].strip()}{unit}"


def distance_text(value: float | None) -> str:
    """Return a distance in three figures, or in all of those before the point."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


@dataclass(frozen=True)
class Latents:
    """An autoencoder of the sweep. Bits per pixel are held-out; ``ci95`` is the half-width of their interval."""

    key: str
    label: str
    loss_factor: float | None
    bits_per_pixel: float | None
    ci95: float | None
    psnr: float | None
    rfd: float | None
    flops: float | None
    reconstructions: str | None


@dataclass(frozen=True)
class Size:
    """A base-model size; ``flops`` is one image's forward pass."""

    name: str
    parameters: float | None
    flops: float | None

    @property
    def label(self) -> str:
        return f"{self.name} · {si(self.flops, 'FLOPs')}" if self.flops is not None else self.name


@dataclass(frozen=True)
class Point:
    """The evaluations of one (latents, size) after equal training, one row for each seed."""

    latents: Latents
    size: Size
    samples_seen: float | None
    train_flops: float | None
    rows: tuple[Row, ...]
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)

    @property
    def spread(self) -> tuple[float, float] | None:
        """Return the lowest and highest seed, or None where there is only one."""
        return (min(self.values), max(self.values)) if len(self.values) > 1 else None


def _latents_key(row: Row) -> str:
    for column in ("autoencoder_run", "loss_factor", "bits_per_pixel"):
        if row.get(column) is not None:
            return str(row[column])
    return "unknown latents"


def _size_name(row: Row) -> str:
    return str(row.get("size") or "unnamed")


def _bits_labels(groups: dict[str, list[Row]]) -> dict[str, str]:
    """Return a short name for each autoencoder: its bits per pixel, in as many digits as tell them apart."""
    bits = {key: first(rows, "bits_per_pixel") for key, rows in groups.items()}
    for digits in (2, 3, 4):
        labels = {key: f"{value:#.{digits}g}" for key, value in bits.items() if value is not None}
        if len(set(labels.values())) == len(labels):
            break
    else:
        labels = {key: f"{label} ({key})" for key, label in labels.items()}
    for key, rows in groups.items():
        if key not in labels:
            factor = first(rows, "loss_factor")
            labels[key] = f"c_lf {factor:g}" if factor is not None else key
    return labels


def latents_of(rows: Sequence[Row]) -> list[Latents]:
    """Return the autoencoders, lowest bitrate first; those whose bitrate is missing come last."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[_latents_key(row)].append(row)
    labels = _bits_labels(groups)
    found = [
        Latents(
            key=key,
            label=labels[key],
            loss_factor=first(group, "loss_factor"),
            bits_per_pixel=first(group, "bits_per_pixel"),
            ci95=first(group, "bits_per_pixel_ci95"),
            psnr=first(group, "psnr"),
            rfd=first(group, "rfd"),
            flops=first(group, "autoencoder_flops"),
            reconstructions=next(
                (r["reconstructions_png"] for r in group if r.get("reconstructions_png")), None
            ),
        )
        for key, group in groups.items()
    ]
    order = lambda x: (_or_last(x.bits_per_pixel), _or_last(x.loss_factor), x.key)
    return sorted(found, key=order)


def sizes_of(rows: Sequence[Row]) -> list[Size]:
    """Return the base-model sizes, cheapest forward pass first."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[_size_name(row)].append(row)
    found = [
        Size(name, first(group, "parameters"), first(group, "forward_flops"))
        for name, group in groups.items()
    ]
    return sorted(found, key=lambda size: (_or_last(size.flops), _or_last(size.parameters), size.name))


def _or_last(value: float | None) -> float:
    return math.inf if value is None else value


def points_of(rows: Sequence[Row], metric: str = METRIC) -> list[Point]:
    """Return the means over seeds of every row that has the metric, by latents, size and compute."""
    latents = {entry.key: entry for entry in latents_of(rows)}
    sizes = {entry.name: entry for entry in sizes_of(rows)}
    groups: dict[tuple, list[Row]] = defaultdict(list)
    for row in rows:
        if number(row, metric) is not None:
            place = (_latents_key(row), _size_name(row))
            groups[*place, number(row, "samples_seen"), number(row, "train_flops")].append(row)
    points = [
        Point(
            latents=latents[key],
            size=sizes[size],
            samples_seen=seen,
            train_flops=flops,
            rows=tuple(group),
            values=tuple(float(row[metric]) for row in group),
        )
        for (key, size, seen, flops), group in groups.items()
    ]
    ranks = {key: rank for rank, key in enumerate(latents)}, {name: rank for rank, name in enumerate(sizes)}
    return sorted(
        points,
        key=lambda p: (
            ranks[0][p.latents.key],
            ranks[1][p.size.name],
            _or_last(p.train_flops),
            _or_last(p.samples_seen),
        ),
    )


def frontier(points: Iterable[Point]) -> list[Point]:
    """Return the points that no cheaper point equals: the lower envelope of what was observed, not a fit."""
    best, envelope = math.inf, []
    measured = [point for point in points if point.train_flops is not None]
    for point in sorted(measured, key=lambda p: (_or_last(p.train_flops), p.mean)):
        if point.mean < best:
            best = point.mean
            envelope.append(point)
    return envelope


def final_points(rows: Sequence[Row], metric: str = METRIC) -> list[Point]:
    """Return the finished evaluation of each (latents, size); of several budgets, the longest."""
    longest: dict[tuple[str, str], Point] = {}
    for point in points_of([row for row in rows if row.get("final")], metric):
        place = point.latents.key, point.size.name
        if place not in longest or (point.samples_seen or 0) > (longest[place].samples_seen or 0):
            longest[place] = point
    return list(longest.values())


def best_per_size(finals: Iterable[Point]) -> dict[str, Point]:
    """Return the point of lowest distance for each size of which at least two bitrates are measured."""
    by_size: dict[str, list[Point]] = defaultdict(list)
    for point in finals:
        by_size[point.size.name].append(point)
    return {name: min(group, key=lambda p: p.mean) for name, group in by_size.items() if len(group) > 1}


@dataclass(frozen=True)
class Summary:
    """A sweep as its charts and tables need it."""

    rows: list[Row]
    metric: str
    latents: list[Latents]
    sizes: list[Size]
    points: list[Point]
    finals: list[Point]

    @cached_property
    def frontier(self) -> list[Point]:
        return frontier(self.points)

    @cached_property
    def best(self) -> dict[str, Point]:
        return best_per_size(self.finals)

    @property
    def counts(self) -> list[int]:
        """Return every number of images that a distance was measured with."""
        measured = [row for point in self.points for row in point.rows]
        return sorted({int(n) for row in measured if (n := number(row, "n")) is not None})

    @property
    def seeds(self) -> list[str]:
        return sorted({str(row["seed"]) for row in self.rows if row.get("seed") is not None})

    def final(self, latents: Latents, size: Size) -> Point | None:
        for point in self.finals:
            if point.latents.key == latents.key and point.size.name == size.name:
                return point
        return None

    def curve(self, latents: Latents, size: Size) -> list[Point]:
        """Return one (latents, size) over compute."""
        return [
            p
            for p in self.points
            if (p.latents.key, p.size.name) == (latents.key, size.name) and p.train_flops is not None
        ]

    def is_best(self, point: Point) -> bool:
        return self.best.get(point.size.name) is point


def summarise(rows: Sequence[Row], metric: str = METRIC) -> Summary:
    """Return rows as charts need them."""
    # The finals' latents and sizes must be those of all rows, or labels could differ between charts.
    everything = latents_of(rows), sizes_of(rows)
    return Summary(list(rows), metric, *everything, points_of(rows, metric), final_points(rows, metric))


def _listing(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 2 else words)


def swept(summary: Summary) -> str:
    """Return in one sentence what was swept."""

    def span(values: list[float | None], form) -> str:
        known = sorted(value for value in values if value is not None)
        if not known:
            return ""
        return f" ({form(known[0])})" if len(known) == 1 else f" ({form(known[0])} to {form(known[-1])})"

    def count(amount: int, what: str) -> str:
        return f"{amount:,} {what}{'' if amount == 1 else 's'}"

    if not summary.rows:
        return "Nothing has been evaluated yet."
    bits = span([x.bits_per_pixel for x in summary.latents], lambda v: f"{v:.2g}")
    bits = bits.replace(")", " bits per pixel)")
    flops = span([x.flops for x in summary.sizes], lambda v: si(v, "FLOPs"))
    flops = flops.replace(")", " per forward pass)")
    runs = len({row.get("run_id") for row in summary.rows})
    return (
        f"{count(len(summary.latents), 'latent bitrate')}{bits} × "
        f"{count(len(summary.sizes), 'base-model size')}{flops} × {count(max(len(summary.seeds), 1), 'seed')}: "
        f"{count(runs, 'run')}, {count(len(summary.rows), 'evaluation')}."
    )


def _ties(summary: Summary) -> list[str]:
    """Return the (size, bitrate) pairs whose seeds overlap with those of the best of that size."""
    found = []
    for name, best in summary.best.items():
        for point in summary.finals:
            if point.size.name == name and point is not best and point.spread and best.spread:
                if point.spread[0] <= best.spread[1]:
                    found.append(f"{point.latents.label} at {name}")
    return found


def finding(summary: Summary) -> str:
    """Return what the sweep shows about the best bitrate of each size, in one or two sentences."""
    if not summary.finals:
        return "No run has a final evaluation yet."
    sizes = [size for size in summary.sizes if size.name in summary.best]
    if not sizes:
        return "Only one bitrate per size has a final evaluation: there is nothing to compare yet."
    ranks = [[x.key for x in summary.latents].index(summary.best[size.name].latents.key) for size in sizes]
    groups: dict[str, list[str]] = defaultdict(list)
    for size in sizes:
        groups[summary.best[size.name].latents.label].append(size.name)
    if len(groups) == 1:
        label, names = next(iter(groups.items()))
        where = f"at size {names[0]}" if len(names) == 1 else f"at every size ({', '.join(names)})"
        text = f"{label} bits/pixel is best {where}."
    else:
        rising, falling = ranks == sorted(ranks), ranks == sorted(ranks, reverse=True)
        trend = (
            "rises with model size" if rising else "falls with model size" if falling else "differs by size"
        )
        parts = [f"{label} bits/pixel for {_listing(names)}" for label, names in groups.items()]
        text = f"The best bitrate {trend}: {', '.join(parts)}."
    if ties := _ties(summary):
        text += f" Within the spread of seeds of the best: {_listing(ties)}."
    missing = len(summary.latents) * len(summary.sizes) - len(summary.finals)
    if missing:
        total = len(summary.latents) * len(summary.sizes)
        text += f" {missing} of {total} combinations have no final evaluation yet."
    return text


def caveats(summary: Summary) -> list[str]:
    """Return what these rows do not show, each as one sentence."""
    notes = []
    if len(summary.counts) > 1:
        listed = _listing([f"{n:,}" for n in summary.counts])
        notes.append(f"Distances were measured with n = {listed} images: those of unequal n do not compare.")
    if summary.finals and not any(point.spread for point in summary.finals):
        notes.append("There is one seed per point: small differences may be noise between seeds.")
    if len(summary.latents) > 1:
        edges = {summary.latents[0].key: "lowest", summary.latents[-1].key: "highest"}
        for key, edge in edges.items():
            names = [name for name, point in summary.best.items() if point.latents.key == key]
            if names:
                where = "below" if edge == "lowest" else "above"
                notes.append(
                    f"For {_listing(names)} the best bitrate is the {edge} that was swept: "
                    f"the optimum may lie {where} it."
                )
    budgets = {point.samples_seen for point in summary.finals}
    if len(budgets) > 1:
        notes.append("Final evaluations differ in training length: compare them at equal compute.")
    return notes
