"""What the rows of a sweep say: by latents and size, the observed frontier, the best bitrate of each size.

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
    """Return a large number for people, such as 26.2 MFLOPs; an empty string where it is missing."""
    if value is None:
        return ""
    power = 0
    while float(f"{value:.3g}") >= 1000 and power < 8:
        value, power = value / 1000, power + 1
    return f"{value:.3g} {'kMGTPEZY'[power - 1] if power else ''}{unit}".rstrip()


def distance_text(value: float | None) -> str:
    """Return a distance with as many decimals as its size deserves; an empty string where it is missing."""
    if value is None:
        return ""
    return f"{value:,.{0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2}f}"


def listing(words: Sequence[str]) -> str:
    """Return words as a, b and c."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


@dataclass(frozen=True)
class Latents:
    """An autoencoder of the sweep."""

    key: str
    label: str
    """Its held-out bits per pixel, in as many digits as tell it from the others."""
    loss_factor: float | None
    bits_per_pixel: float | None
    ci95: float | None
    """Half the width of the interval that holds the true bits per pixel with 95 %."""
    psnr: float | None
    rfd: float | None
    flops: float | None
    reconstructions: str | None

    @property
    def text(self) -> str:
        return self.label if self.bits_per_pixel is None else f"{self.label} bits/pixel"


@dataclass(frozen=True)
class Size:
    """A base-model size; ``flops`` is the forward pass of one image."""

    name: str
    parameters: float | None
    flops: float | None

    @property
    def label(self) -> str:
        return f"{self.name} · {si(self.flops, 'FLOPs')}" if self.flops is not None else self.name


@dataclass(frozen=True)
class Point:
    """The evaluations of one (latents, size) after equal training: a row for each seed."""

    latents: Latents
    size: Size
    samples_seen: float | None
    train_flops: float | None
    rows: tuple[Row, ...]
    values: tuple[float, ...]
    """The metric, row by row."""

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)

    @property
    def spread(self) -> tuple[float, float] | None:
        """Return the lowest and the highest seed, or None where there is only one."""
        return (min(self.values), max(self.values)) if len(self.values) > 1 else None

    @property
    def final(self) -> bool:
        return any(row.get("final") for row in self.rows)


def _or_last(value: float | None) -> float:
    return math.inf if value is None else value


def _latents_key(row: Row) -> str:
    columns = ("autoencoder_run", "loss_factor", "bits_per_pixel")
    return next((str(row[column]) for column in columns if row.get(column) is not None), "unknown latents")


def _size_name(row: Row) -> str:
    return str(row.get("size") or "unnamed")


def _groups(rows: Iterable[Row], key) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return groups


def _bits_labels(groups: dict[str, list[Row]]) -> dict[str, str]:
    bits = {
        key: value for key, rows in groups.items() if (value := first(rows, "bits_per_pixel")) is not None
    }
    labels: dict[str, str] = {}
    for digits in (2, 3, 4, 5):
        labels = {key: f"{value:#.{digits}g}" for key, value in bits.items()}
        if len(set(labels.values())) == len(labels):
            break
    for key in groups.keys() - labels.keys():
        factor = first(groups[key], "loss_factor")
        labels[key] = key if factor is None else f"c_lf {factor:g}"
    return labels


def latents_of(rows: Iterable[Row]) -> list[Latents]:
    """Return the autoencoders, lowest bitrate first; those whose bitrate is missing come last."""
    groups = _groups(rows, _latents_key)
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
            reconstructions=next((path for row in group if (path := row.get("reconstructions_png"))), None),
        )
        for key, group in groups.items()
    ]
    return sorted(found, key=lambda x: (_or_last(x.bits_per_pixel), _or_last(x.loss_factor), x.key))


def sizes_of(rows: Iterable[Row]) -> list[Size]:
    """Return the base-model sizes, cheapest forward pass first."""
    found = [
        Size(name, first(group, "parameters"), first(group, "forward_flops"))
        for name, group in _groups(rows, _size_name).items()
    ]
    return sorted(found, key=lambda x: (_or_last(x.flops), _or_last(x.parameters), x.name))


def points_of(rows: Sequence[Row], metric: str = METRIC) -> list[Point]:
    """Return every row that has the metric, as means over seeds, by bitrate, then size, then compute."""
    measured = [row for row in rows if number(row, metric) is not None]
    groups = _groups(
        measured,
        lambda row: (
            _latents_key(row),
            _size_name(row),
            number(row, "samples_seen"),
            number(row, "train_flops"),
        ),
    )
    points = []
    for latents in latents_of(rows):
        for size in sizes_of(rows):
            curve = [
                Point(latents, size, seen, flops, tuple(group), tuple(float(row[metric]) for row in group))
                for (key, name, seen, flops), group in groups.items()
                if (key, name) == (latents.key, size.name)
            ]
            points += sorted(curve, key=lambda p: (_or_last(p.train_flops), _or_last(p.samples_seen)))
    return points


def frontier(points: Iterable[Point]) -> list[Point]:
    """Return the points that no cheaper point equals: the lower envelope of the observations, not a fit."""
    measured = [point for point in points if point.train_flops is not None]
    envelope: list[Point] = []
    for point in sorted(measured, key=lambda p: (_or_last(p.train_flops), p.mean)):
        if not envelope or point.mean < envelope[-1].mean:
            envelope.append(point)
    return envelope


def final_points(points: Iterable[Point]) -> list[Point]:
    """Return the finished evaluation of each (latents, size); of several budgets, the longest."""
    longest: dict[tuple[str, str], Point] = {}
    for point in points:
        place = point.latents.key, point.size.name
        if point.final and (
            place not in longest or (point.samples_seen or 0) > (longest[place].samples_seen or 0)
        ):
            longest[place] = point
    return list(longest.values())


def best_per_size(finals: Iterable[Point]) -> dict[str, Point]:
    """Return the point of lowest distance of each size for which at least two bitrates are measured."""
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

    @cached_property
    def finals(self) -> list[Point]:
        return final_points(self.points)

    @cached_property
    def frontier(self) -> list[Point]:
        return frontier(self.points)

    @cached_property
    def best(self) -> dict[str, Point]:
        return best_per_size(self.finals)

    @property
    def counts(self) -> list[int]:
        """Return every number of images that a distance was measured with."""
        return sorted({int(n) for p in self.points for row in p.rows if (n := number(row, "n")) is not None})

    @property
    def seeds(self) -> list[str]:
        return sorted({str(row["seed"]) for row in self.rows if row.get("seed") is not None})

    def curve(self, latents: Latents, size: Size) -> list[Point]:
        """Return one (latents, size) over compute."""
        place = latents.key, size.name
        curve = [point for point in self.points if (point.latents.key, point.size.name) == place]
        return [point for point in curve if point.train_flops is not None]

    def final(self, latents: Latents, size: Size) -> Point | None:
        place = latents.key, size.name
        return next((p for p in self.finals if (p.latents.key, p.size.name) == place), None)

    def is_best(self, point: Point | None) -> bool:
        return point is not None and self.best.get(point.size.name) is point


def summarise(rows: Sequence[Row], metric: str = METRIC) -> Summary:
    return Summary(list(rows), metric, latents_of(rows), sizes_of(rows), points_of(rows, metric))


def swept(summary: Summary) -> str:
    """Return in one sentence what was swept."""

    def count(amount: int, what: str) -> str:
        return f"{amount:,} {what}{'' if amount == 1 else 's'}"

    def span(lowest: str, highest: str, unit: str) -> str:
        return f" ({lowest if lowest == highest else f'{lowest} to {highest}'}{unit})" if lowest else ""

    if not summary.rows:
        return "Nothing has been evaluated yet."
    bits = [x.label for x in summary.latents if x.bits_per_pixel is not None] or [""]
    flops = [si(x.flops, "FLOPs") for x in summary.sizes if x.flops is not None] or [""]
    runs = len({row.get("run_id") for row in summary.rows})
    parts = (
        count(len(summary.latents), "latent bitrate") + span(bits[0], bits[-1], " bits per pixel"),
        count(len(summary.sizes), "base-model size") + span(flops[0], flops[-1], " per forward pass"),
        count(max(len(summary.seeds), 1), "seed"),
    )
    return f"{' × '.join(parts)}: {count(runs, 'run')}, {count(len(summary.rows), 'evaluation')}."


def _ties(summary: Summary) -> list[str]:
    ties = []
    for point in summary.finals:
        best = summary.best.get(point.size.name)
        if best and best is not point and point.spread and best.spread and point.spread[0] <= best.spread[1]:
            ties.append(f"{point.latents.label} at {point.size.name}")
    return ties


def finding(summary: Summary) -> str:
    """Return which bitrate is best for which size, and how that moves with size, in plain words."""
    if not summary.finals:
        return "No run has a final evaluation yet."
    if not summary.best:
        return "No size has final evaluations at two bitrates yet: there is nothing to compare."
    best = [summary.best[size.name] for size in summary.sizes if size.name in summary.best]
    ranks = [summary.latents.index(point.latents) for point in best]
    names: dict[Latents, list[str]] = defaultdict(list)
    for point in best:
        names[point.latents].append(point.size.name)
    if len(names) == 1:
        alike = " alike" if len(best) > 1 else ""
        text = f"{best[0].latents.text} is best for {listing([p.size.name for p in best])}{alike}."
    else:
        trend = "differs by size, without a trend"
        if ranks in (sorted(ranks), sorted(ranks, reverse=True)):
            trend = "rises with model size" if ranks[0] < ranks[-1] else "falls with model size"
        heads = [best[0].latents.text, *(latents.label for latents in list(names)[1:])]
        parts = [f"{head} for {listing(sizes)}" for head, sizes in zip(heads, names.values())]
        text = f"The best bitrate {trend}: {', '.join(parts)}."
    if ties := _ties(summary):
        text += f" As good within the spread of seeds: {listing(ties)}."
    combinations = len(summary.latents) * len(summary.sizes)
    if missing := combinations - len(summary.finals):
        text += f" {missing} of {combinations} combinations have no final evaluation yet."
    return text


def caveats(summary: Summary) -> list[str]:
    """Return what these rows cannot show, a sentence each."""
    notes = []
    if len(summary.counts) > 1:
        counts = listing([f"{n:,}" for n in summary.counts])
        notes.append(f"Distances were measured with n = {counts} images; those of unequal n do not compare.")
    if summary.finals and not any(point.spread for point in summary.finals):
        notes.append("Every point is a single seed: a small difference may be noise between seeds.")
    for edge, side, entry in (("lowest", "below", 0), ("highest", "above", -1)):
        at_edge = [name for name, p in summary.best.items() if p.latents == summary.latents[entry]]
        if at_edge:
            notes.append(
                f"At {listing(at_edge)} the best bitrate is the {edge} one swept: "
                f"the optimum may lie {side} it."
            )
    if len({point.samples_seen for point in summary.finals}) > 1:
        notes.append("Final evaluations differ in training length: compare them at equal compute.")
    return notes


def with_spread(point: Point | None) -> str:
    if point is None:
        return "–"
    text = distance_text(point.mean)
    if point.spread is None:
        return text
    decimals = len(text.partition(".")[2])
    return f"{text} ± {(point.spread[1] - point.spread[0]) / 2:.{decimals}f}"
