"""The same charts as PNGs, for where a page does not go."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ul_scale.sweep.chart_data import (
    BAND,
    BITS,
    COMPUTE,
    GRID,
    INK,
    LINE,
    MUTED,
    Pictures,
    colour_of,
    compute_points,
    distance_title,
    envelope,
    frontier_label,
    known_latents,
    log_ticks,
    marks_of,
    quality_curve,
    starts,
)
from ul_scale.sweep.summary import Point, Summary


def _panels(width: float, height: float, columns: int = 1) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08)
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white", layout=layout)
    panels = list(figure.subplots(1, columns, squeeze=False)[0])
    for panel in panels:
        panel.grid(color=GRID, linewidth=0.8)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.spines[["left", "bottom"]].set_color(LINE)
        panel.tick_params(which="both", color=LINE, labelcolor=MUTED, labelsize=9)
        panel.xaxis.label.set_color(MUTED)
        panel.yaxis.label.set_color(MUTED)
        panel.margins(0.06, 0.1)
    return figure, panels


def _add_key(figure: Any, summary: Summary, best: bool = False) -> None:
    """Put the key over the panel: bitrates left, sizes right."""
    from matplotlib.lines import Line2D

    bitrates = [Line2D([], [], color=colour_of(summary, x), lw=4, label=x.label) for x in summary.latents]
    sizes = []
    for size in summary.sizes:
        marker, line, *_ = marks_of(summary, size)
        sizes.append(Line2D([], [], color=MUTED, marker=marker, ls=line, lw=1.4, ms=6, label=size.label))
    if best:
        sizes.append(Line2D([], [], ls="", marker="o", mfc="none", mec=INK, ms=11, label="best"))
    for entries, side, title in ((bitrates, "left", "bits per pixel"), (sizes, "right", "base model")):
        figure.legend(
            handles=entries,
            loc=f"outside upper {side}",
            ncols=len(entries) if len(entries) < 5 else (len(entries) + 1) // 2,
            frameon=False,
            fontsize=9,
            labelcolor=INK,
            columnspacing=1.3,
            title=title,
            title_fontproperties={"size": 9},
            alignment="left",
        ).get_title().set_color(MUTED)


def _say(panel: Any, text: str, at: Any, offset: tuple[float, float], **how: Any) -> None:
    panel.annotate(text, at, offset, textcoords="offset points", fontsize=10, color=MUTED, **how)


def _label_axes(panel: Any, summary: Summary, x_label: str, points: Sequence[Point]) -> None:
    panel.set(xlabel=x_label, ylabel=f"{distance_title(summary)}\n(lower is better)")
    if ticks := log_ticks(points):
        panel.set_yscale("log")
        limits = panel.get_ylim()
        panel.set_yticks(ticks)
        panel.yaxis.minorticks_off()
        panel.set_ylim(limits)
    panel.yaxis.set_major_formatter("{x:,.10g}")


def compute_png(summary: Summary, path: Path) -> None:
    """Write training compute against distance, with the observed frontier."""
    figure, (panel,) = _panels(9, 5.6)
    if len(summary.frontier) > 1:
        x, y = envelope(summary)
        panel.step(x, y, where="post", color=BAND, lw=7, zorder=1.5, solid_capstyle="round")
        _say(panel, "observed frontier", frontier_label(summary), (-6, -6), ha="right", va="top")
    for latents in summary.latents:
        for size in summary.sizes:
            curve = summary.curve(latents, size)
            marker, line, *_ = marks_of(summary, size)
            look = {"color": colour_of(summary, latents), "marker": marker, "mec": "white"}
            for p in curve:
                panel.plot([p.train_flops] * len(p.values), p.values, ls="", ms=4.5, mew=0, alpha=0.4, **look)
            x, y = [p.train_flops or 0 for p in curve], [p.mean for p in curve]
            panel.plot(x, y, ls=line, lw=1.8, ms=7, mew=0.8, **look)
    for point in starts(summary):
        _say(panel, point.size.name, (point.train_flops, point.mean), (0, 8), ha="center")
    points = compute_points(summary)
    if points:
        panel.set_xscale("log")
    _label_axes(panel, summary, COMPUTE, points)
    _add_key(figure, summary)
    figure.savefig(path)


def quality_png(summary: Summary, path: Path) -> None:
    """Write the final distance against bits per pixel, a line for each size."""
    figure, (panel,) = _panels(9, 5.6)
    points = []
    for size in summary.sizes:
        marker, line, *_ = marks_of(summary, size)
        curve = quality_curve(summary, size)
        points += curve
        panel.plot(
            [p.latents.bits_per_pixel for p in curve], [p.mean for p in curve], ls=line, lw=1.3, c=MUTED
        )
        for point in curve:
            x, y, colour = point.latents.bits_per_pixel, point.mean, colour_of(summary, point.latents)
            low, high = point.spread or (y, y)
            bars = {"fmt": "none", "ecolor": colour, "zorder": 3}
            panel.errorbar(x, y, [[y - low], [high - y]], capsize=3, **bars)
            panel.errorbar(x, y, None, point.latents.ci95, **bars)
            panel.plot(x, y, marker, ms=8, mfc=colour, mec="white", mew=0.8, zorder=3.5)
            if summary.is_best(point):
                panel.plot(x, y, "o", ms=16, mfc="none", mec=INK, mew=1.2, zorder=4)
        if curve:
            _say(panel, size.name, (curve[-1].latents.bits_per_pixel, curve[-1].mean), (6, 7))
    _label_axes(panel, summary, BITS, points)
    _add_key(figure, summary, best=bool(summary.best))
    figure.savefig(path)


def autoencoders_png(summary: Summary, path: Path) -> None:
    """Write PSNR and reconstruction distance against bits per pixel, side by side."""
    figure, panels = _panels(9, 3.8, 2)
    labels = "PSNR (dB)", "reconstruction distance (rFD)"
    for panel, column, label, below in zip(panels, ("psnr", "rfd"), labels, (-13, 6)):
        known = known_latents(summary, column)
        x, y = [latents.bits_per_pixel for latents in known], [getattr(latents, column) for latents in known]
        panel.plot(x, y, color=LINE, lw=2)
        for latents, *at in zip(known, x, y):
            colour = colour_of(summary, latents)
            panel.errorbar(
                *at, xerr=latents.ci95, fmt="o", ms=9, mfc=colour, mec="white", ecolor=colour, zorder=3
            )
            _say(panel, latents.label, at, (7, below))
        panel.set(xlabel=BITS, ylabel=label)
        panel.margins(0.16, 0.18)
    figure.savefig(path)


def pictures_png(summary: Summary, pictures: Pictures, path: Path) -> bool:
    """Write samples, bitrates down and sizes across; or reconstructions, one picture for each bitrate.

    Returns:
        Whether there was any picture to write.
    """
    from matplotlib.figure import Figure
    from PIL import Image

    names = [
        name for name in ("", *(size.name for size in summary.sizes)) if any(name == k[1] for k in pictures)
    ]
    rows = [latents for latents in summary.latents if any(latents.key == k[0] for k in pictures)]
    if not pictures:
        return False
    with Image.open(next(iter(pictures.values()))) as picture:
        height = 10 / len(names) * picture.height / picture.width
    figure = Figure(figsize=(10, len(rows) * (height + 0.06) + 0.25), dpi=150, layout="constrained")
    panels = figure.subplots(len(rows), len(names), squeeze=False)
    for latents, line in zip(rows, panels):
        for name, panel in zip(names, line):
            panel.set(xticks=[], yticks=[])
            panel.spines[:].set_visible(False)
            if (latents.key, name) in pictures:
                with Image.open(pictures[latents.key, name]) as picture:
                    panel.imshow(picture.convert("RGB"), interpolation="antialiased")
        line[0].set_ylabel(latents.text, color=INK, fontsize=10)
    labels = {size.name: size.label for size in summary.sizes}
    for name, panel in zip(names, panels[0]):
        panel.set_title(labels.get(name, ""), color=INK, fontsize=10)
    figure.savefig(path)
    return True
