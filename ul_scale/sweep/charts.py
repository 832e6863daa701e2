"""The interactive charts of a sweep, as plotly figures."""

import html
import math
from collections.abc import Sequence
from typing import Any

from ul_scale.sweep.chart_data import (
    BAND,
    BITS,
    COMPUTE,
    FONT,
    GRID,
    INK,
    LINE,
    MUTED,
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
from ul_scale.sweep.summary import Latents, Point, Size, Summary, distance_text, number, si


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
    ticks = log_ticks(points)
    scale = {"type": "log", "tickvals": ticks} if ticks else {"type": "linear"}
    return {"title": distance_title(summary), "tickformat": ",~r", **scale}


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
    points = compute_points(summary)
    x_axis = {"title": COMPUTE, "type": "log", "exponentformat": "power", "dtick": 1}
    figure = _figure(430, x_axis, _distance_axis(summary, points))
    if len(summary.frontier) > 1:
        x, y = envelope(summary)
        band = {"shape": "hv", "width": 8, "color": BAND}
        figure.add_scatter(x=x, y=y, mode="lines", line=band, hoverinfo="skip")
        below_left: dict[str, Any] = {"xanchor": "right", "yanchor": "top", "xshift": -4, "yshift": -5}
        _write(figure, "observed frontier", *frontier_label(summary), **below_left)
    for latents in summary.latents:
        for size in summary.sizes:
            _add_curve(figure, summary, latents, size)
    for point in starts(summary):
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
    curves = {size.name: quality_curve(summary, size) for size in summary.sizes}
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
    known = known_latents(summary, column)
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
