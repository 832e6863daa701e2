"""What the charts of a sweep share, interactive or not: colours, marks, and which points they show.

Colour is the bitrate of the latents, light to dark; marker and dash are the size of the base model. Lines go
through the means over seeds, and single seeds stay visible.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ul_scale.sweep.summary import Latents, Point, Size, Summary

RAMP = ("#e0a33a", "#5fae8b", "#2f7fa3", "#27407f", "#241b47")
"""Falls in lightness from yellow to blue: its order is visible to any colour vision, and in grey."""
INK, MUTED, LINE, BAND, GRID = "#24292f", "#6e7781", "#d0d7de", "#dfe4ea", "#eceff2"
# matplotlib's marker and line, plotly's marker and dash: of the smallest size, the next, …
MARKS = (
    ("o", "-", "circle", "solid"),
    ("s", (0, (5, 2)), "square", "dash"),
    ("^", (0, (1.5, 1.5)), "triangle-up", "dot"),
    ("D", (0, (6, 2, 1.5, 2)), "diamond", "dashdot"),
    ("v", (0, (9, 3)), "triangle-down", "longdash"),
    ("P", (0, (9, 2, 1.5, 2)), "cross", "longdashdot"),
)
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
COMPUTE = "training compute of the base model (FLOPs)"
BITS = "bits per pixel of the latents (held-out)"
Pictures = dict[tuple[str, str], Path]
"""(latents, size) to a PNG of samples; (latents, "") to one of reconstructions."""


def colours(count: int) -> list[str]:
    """Return so many colours along `RAMP`; a count below the ramp's takes its light end."""
    stops = [[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in RAMP]
    steps = max(count - 1, 1)
    length = min(steps, len(stops) - 1)
    picked = []
    for index in range(count):
        place = index * length / steps
        low = min(int(place), len(stops) - 2)
        mix = [a + (b - a) * (place - low) for a, b in zip(stops[low], stops[low + 1])]
        picked.append("#" + "".join(f"{round(value):02x}" for value in mix))
    return picked


def colour_of(summary: Summary, latents: Latents) -> str:
    return colours(len(summary.latents))[summary.latents.index(latents)]


def marks_of(summary: Summary, size: Size) -> tuple[Any, Any, str, str]:
    return MARKS[summary.sizes.index(size) % len(MARKS)]


def distance_title(summary: Summary) -> str:
    n = f", n = {summary.counts[0]:,}" if len(summary.counts) == 1 else ""
    return f"Fréchet distance {summary.metric}{n}"


def log_ticks(points: Sequence[Point]) -> list[float]:
    """Return ticks for distances that span so much that their axis has to be logarithmic, else none."""
    values = [value for point in points for value in point.values]
    if not values or min(values) <= 0 or max(values) < 5 * min(values):
        return []
    decades = range(math.floor(math.log10(min(values))), math.ceil(math.log10(max(values))) + 1)
    return [digit * 10.0**decade for decade in decades for digit in (1, 2, 5)]


def compute_points(summary: Summary) -> list[Point]:
    return [point for point in summary.points if point.train_flops]


def quality_curve(summary: Summary, size: Size) -> list[Point]:
    finals = [summary.final(latents, size) for latents in summary.latents]
    return [point for point in finals if point and point.latents.bits_per_pixel is not None]


def known_latents(summary: Summary, column: str) -> list[Latents]:
    found = [latents for latents in summary.latents if getattr(latents, column) is not None]
    return [latents for latents in found if latents.bits_per_pixel is not None]


def envelope(summary: Summary) -> tuple[list[float], list[float]]:
    """Return the frontier as the corners of a step line, out to the largest compute."""
    x = [point.train_flops or 0 for point in summary.frontier]
    x.append(max(point.train_flops or 0 for point in compute_points(summary)))
    y = [point.mean for point in summary.frontier]
    return x, [*y, y[-1]]


def frontier_label(summary: Summary) -> tuple[float, float]:
    """Return the corner of the frontier whose lower left, where by definition nothing is, takes its name."""
    corner = summary.frontier[len(summary.frontier) // 2]
    return corner.train_flops or 0, corner.mean


def starts(summary: Summary) -> list[Point]:
    """Return the highest first point of each size's curves: its name stands above it."""
    starts = []
    for size in summary.sizes:
        first = [curve[0] for latents in summary.latents if (curve := summary.curve(latents, size))]
        starts += [max(first, key=lambda point: point.mean)] if first else []
    return starts
