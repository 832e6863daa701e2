"""The charts of a sweep, interactive (plotly) and as PNGs (matplotlib), with the same colours and marks.

Colour is the bitrate of the latents, light to dark; marker and dash are the size of the base model. Lines go
through the means over seeds, and single seeds stay visible.
"""

import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ul_scale.sweep.summary import Latents, Point, Size, Summary, distance_text, number, si

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


def _distance_title(summary: Summary) -> str:
    n = f", n = {summary.counts[0]:,}" if len(summary.counts) == 1 else ""
    return f"Fréchet distance {summary.metric}{n}"


def _log_ticks(points: Sequence[Point]) -> list[float]:
    """Return ticks for distances that span so much that their axis has to be logarithmic, else none."""
    values = [value for point in points for value in point.values]
    if not values or min(values) <= 0 or max(values) < 5 * min(values):
        return []
    decades = range(math.floor(math.log10(min(values))), math.ceil(math.log10(max(values))) + 1)
    return [digit * 10.0**decade for decade in decades for digit in (1, 2, 5)]


def _compute_points(summary: Summary) -> list[Point]:
    return [point for point in summary.points if point.train_flops]


def _quality_curve(summary: Summary, size: Size) -> list[Point]:
    finals = [summary.final(latents, size) for latents in summary.latents]
    return [point for point in finals if point and point.latents.bits_per_pixel is not None]


def _known(summary: Summary, column: str) -> list[Latents]:
    found = [latents for latents in summary.latents if getattr(latents, column) is not None]
    return [latents for latents in found if latents.bits_per_pixel is not None]


def _envelope(summary: Summary) -> tuple[list[float], list[float]]:
    """Return the frontier as the corners of a step line, out to the largest compute."""
    x = [point.train_flops or 0 for point in summary.frontier]
    x.append(max(point.train_flops or 0 for point in _compute_points(summary)))
    y = [point.mean for point in summary.frontier]
    return x, [*y, y[-1]]


def _frontier_label(summary: Summary) -> tuple[float, float]:
    """Return the corner of the frontier whose lower left, where by definition nothing is, takes its name."""
    corner = summary.frontier[len(summary.frontier) // 2]
    return corner.train_flops or 0, corner.mean


def _starts(summary: Summary) -> list[Point]:
    """Return the highest first point of each size's curves: its name stands above it."""
    starts = []
    for size in summary.sizes:
        first = [curve[0] for latents in summary.latents if (curve := summary.curve(latents, size))]
        starts += [max(first, key=lambda point: point.mean)] if first else []
    return starts


# ------------------------------------------------------------------------------------------- interactive


def latents_facts(latents: Latents) -> list[str]:
    """Return what is known of an autoencoder, as short texts."""
    facts = (
        latents.text + (f" ± {latents.ci95:.2g}" if latents.ci95 else ""),
        "" if latents.psnr is None else f"PSNR {latents.psnr:.1f} dB",
        "" if latents.rfd is None else f"reconstruction distance {distance_text(latents.rfd)}",
        "" if latents.loss_factor is None else f"loss factor {latents.loss_factor:g}",
        "" if latents.flops is None else f"autoencoder training {si(latents.flops, 'FLOPs')}",
    )
    return [fact for fact in facts if fact]


def _hover(summary: Summary, point: Point) -> str:
    """Return everything about a point, in the few tags that plotly's hover text knows."""
    seeds = f" (mean of {', '.join(distance_text(value) for value in point.values)})" if point.spread else ""
    n, sampling = number(point.rows[0], "n"), number(point.rows[0], "sampling_flops")
    facts = (
        f"{summary.metric} {distance_text(point.mean)}{seeds}",
        "" if n is None else f"n = {n:,.0f}",
        "" if point.train_flops is None else f"training {si(point.train_flops, 'FLOPs')}",
        "" if point.samples_seen is None else f"{point.samples_seen:,.0f} images seen",
        "" if point.size.parameters is None else f"{si(point.size.parameters, '')} parameters",
        "" if sampling is None else f"sampling {si(sampling, 'FLOPs')} per image",
        *latents_facts(point.latents),
        *(str(row["run_id"]) for row in point.rows if row.get("run_id")),
    )
    heading = f"<b>{html.escape(f'{point.latents.text}, size {point.size.label}')}</b>"
    return "<br>".join([heading, *(html.escape(fact) for fact in facts if fact)])


def _figure(height: int, x_axis: dict[str, Any], y_axis: dict[str, Any]) -> Any:
    import plotly.graph_objects as go

    def axis(own: dict[str, Any]) -> dict[str, Any]:
        title = {"text": own["title"], "standoff": 10, "font": {"size": 13}}
        look = {
            "gridcolor": GRID,
            "linecolor": LINE,
            "tickcolor": LINE,
            "ticks": "outside",
            "zeroline": False,
        }
        return look | {"automargin": True} | own | {"title": title}

    hover_font = {"color": INK, "family": FONT, "size": 12}
    return go.Figure(
        layout={
            "template": "none",
            "height": height,
            "margin": {"l": 56, "r": 24, "t": 24, "b": 48},
            "font": {"family": FONT, "size": 12, "color": MUTED},
            "hoverlabel": {"bgcolor": "white", "bordercolor": LINE, "align": "left", "font": hover_font},
            "modebar": {"color": LINE, "activecolor": MUTED, "bgcolor": "rgba(0,0,0,0)"},
            "hovermode": "closest",
            "dragmode": False,
            "showlegend": False,
            "xaxis": axis(x_axis),
            "yaxis": axis(y_axis),
        }
    )


def _distance_axis(summary: Summary, points: Sequence[Point]) -> dict[str, Any]:
    ticks = _log_ticks(points)
    scale = {"type": "log", "tickvals": ticks} if ticks else {"type": "linear"}
    return {"title": _distance_title(summary), "tickformat": ",~r", **scale}


def _write(figure: Any, text: str, x: float | None, y: float, **how: Any) -> None:
    """Write a text at a point; on a logarithmic axis plotly wants the logarithm."""
    places = {
        name: math.log10(value) if value and figure.layout[f"{name}axis"].type == "log" else value
        for name, value in (("x", x), ("y", y))
    }
    figure.add_annotation(text=html.escape(text), showarrow=False, **places, **how)


def _dots(symbol: str, size: int, colour: str, **how: Any) -> dict[str, Any]:
    return {"symbol": symbol, "size": size, "color": colour, "line": {"color": "white", "width": 1}} | how


def compute_figure(summary: Summary) -> Any:
    """Return training compute against distance, with the observed frontier, as a plotly figure."""
    points = _compute_points(summary)
    x_axis = {"title": COMPUTE, "type": "log", "exponentformat": "power", "dtick": 1}
    figure = _figure(430, x_axis, _distance_axis(summary, points))
    if len(summary.frontier) > 1:
        x, y = _envelope(summary)
        band = {"shape": "hv", "width": 8, "color": BAND}
        figure.add_scatter(x=x, y=y, mode="lines", line=band, hoverinfo="skip")
        below_left: dict[str, Any] = {"xanchor": "right", "yanchor": "top", "xshift": -4, "yshift": -5}
        _write(figure, "observed frontier", *_frontier_label(summary), **below_left)
    for latents in summary.latents:
        for size in summary.sizes:
            _add_curve(figure, summary, latents, size)
    for point in _starts(summary):
        _write(figure, point.size.label, point.train_flops, point.mean, yanchor="bottom", yshift=7)
    return figure


def _add_curve(figure: Any, summary: Summary, latents: Latents, size: Size) -> None:
    curve = summary.curve(latents, size)
    _, _, symbol, dash = marks_of(summary, size)
    colour, meta = colour_of(summary, latents), {"latents": latents.key, "size": size.name}
    if seeds := [(p.train_flops, value) for p in curve if p.spread for value in p.values]:
        x, y = zip(*seeds)
        dots = _dots(symbol, 6, colour, opacity=0.4)
        figure.add_scatter(x=x, y=y, mode="markers", marker=dots, hoverinfo="skip", meta=meta)
    figure.add_scatter(
        x=[p.train_flops for p in curve],
        y=[p.mean for p in curve],
        mode="lines+markers",
        line={"color": colour, "dash": dash, "width": 2},
        marker=_dots(symbol, 9, colour),
        hovertext=[_hover(summary, p) for p in curve],
        hoverinfo="text",
        meta=meta,
    )


def quality_figure(summary: Summary) -> Any:
    """Return the final distance against bits per pixel, a line for each size, as a plotly figure."""
    curves = {size.name: _quality_curve(summary, size) for size in summary.sizes}
    points = [point for curve in curves.values() for point in curve]
    figure = _figure(430, {"title": BITS}, _distance_axis(summary, points))
    for size in summary.sizes:
        if not (curve := curves[size.name]):
            continue
        x, y = [p.latents.bits_per_pixel for p in curve], [p.mean for p in curve]
        line = {"color": MUTED, "dash": marks_of(summary, size)[3], "width": 1.5}
        figure.add_scatter(x=x, y=y, mode="lines", line=line, hoverinfo="skip", meta={"size": size.name})
        for point in curve:
            _add_final(figure, summary, point)
        _write(figure, size.name, x[-1], y[-1], xanchor="left", xshift=6, yanchor="bottom", yshift=4)
    return figure


def _add_final(figure: Any, summary: Summary, point: Point) -> None:
    colour = colour_of(summary, point.latents)
    at = {"x": [point.latents.bits_per_pixel], "y": [point.mean], "mode": "markers"}
    meta = {"latents": point.latents.key, "size": point.size.name}
    if summary.is_best(point):
        ring = {"symbol": "circle-open", "size": 21, "color": INK, "line": {"width": 1.5}}
        figure.add_scatter(**at, marker=ring, hoverinfo="skip", meta=meta)
    low, high = point.spread or (point.mean, point.mean)
    bar = {"color": colour, "thickness": 1.5, "width": 4}
    figure.add_scatter(
        **at,
        marker=_dots(marks_of(summary, point.size)[2], 10, colour),
        error_y={
            "array": [high - point.mean],
            "arrayminus": [point.mean - low],
            "visible": high > low,
            **bar,
        },
        error_x={"array": [point.latents.ci95 or 0], "visible": bool(point.latents.ci95), **bar, "width": 0},
        hovertext=[_hover(summary, point)],
        hoverinfo="text",
        meta=meta,
    )


def autoencoder_figure(summary: Summary, column: str, title: str) -> Any:
    """Return one property of the autoencoders, "psnr" or "rfd", against bits per pixel."""
    figure = _figure(310, {"title": BITS, "nticks": 6}, {"title": title})
    known = _known(summary, column)
    x, y = [latents.bits_per_pixel for latents in known], [getattr(latents, column) for latents in known]
    figure.add_scatter(x=x, y=y, mode="lines", line={"color": LINE, "width": 2}, hoverinfo="skip")
    for latents, bits, value in zip(known, x, y):
        colour = colour_of(summary, latents)
        figure.add_scatter(
            x=[bits],
            y=[value],
            mode="markers",
            marker=_dots("circle", 12, colour),
            error_x={
                "array": [latents.ci95 or 0],
                "visible": bool(latents.ci95),
                "color": colour,
                "width": 0,
            },
            hovertext=["<br>".join(html.escape(fact) for fact in (*latents_facts(latents), latents.key))],
            hoverinfo="text",
            meta={"latents": latents.key},
        )
    return figure


# -------------------------------------------------------------------------------------------------- PNGs


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
    panel.set(xlabel=x_label, ylabel=f"{_distance_title(summary)}\n(lower is better)")
    if ticks := _log_ticks(points):
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
        x, y = _envelope(summary)
        panel.step(x, y, where="post", color=BAND, lw=7, zorder=1.5, solid_capstyle="round")
        _say(panel, "observed frontier", _frontier_label(summary), (-6, -6), ha="right", va="top")
    for latents in summary.latents:
        for size in summary.sizes:
            curve = summary.curve(latents, size)
            marker, line, *_ = marks_of(summary, size)
            look = {"color": colour_of(summary, latents), "marker": marker, "mec": "white"}
            for p in curve:
                panel.plot([p.train_flops] * len(p.values), p.values, ls="", ms=4.5, mew=0, alpha=0.4, **look)
            x, y = [p.train_flops or 0 for p in curve], [p.mean for p in curve]
            panel.plot(x, y, ls=line, lw=1.8, ms=7, mew=0.8, **look)
    for point in _starts(summary):
        _say(panel, point.size.name, (point.train_flops, point.mean), (0, 8), ha="center")
    points = _compute_points(summary)
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
        curve = _quality_curve(summary, size)
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
        known = _known(summary, column)
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
