"""The report of a sweep: rows to report.json, report.csv, PNGs and one self-contained report.html."""

import csv
import io
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from ul_scale.checkpoint.files import write_atomic
from ul_scale.sweep import pngs
from ul_scale.sweep.chart_data import Pictures
from ul_scale.sweep.page import write_page
from ul_scale.sweep.summary import METRIC, Row, Summary, distance_text, finding, si, summarise, with_spread

PICTURES = ("samples_png", "reconstructions_png")
COLUMNS = (
    *("run_id", "name", "autoencoder_run", "loss_factor", "bits_per_pixel", "bits_per_pixel_ci95"),
    *("psnr", "rfd", "size", "parameters", "forward_flops", "train_flops", "autoencoder_flops"),
    *("sampling_flops", "step", "samples_seen", "seed", "final", METRIC, "n", "base_bits_per_pixel"),
    *PICTURES,
)
"""Of report.csv, in this order; whatever else a row has comes after."""


def write_report(rows: Sequence[Row], out_dir: Path, *, title: str, meta: dict[str, Any]) -> Path:
    """Write a sweep's report into a directory and return the path of report.html.

    It may be called again with more rows. Paths of pictures may be absolute, or relative to ``out_dir`` or
    the working directory; report.json has them relative to ``out_dir``. A picture that is not there is left
    out, and so is a chart of what no row has.

    Args:
        rows: one for each evaluation of a base model; a missing value is None, NaN or absent.
        out_dir: is created.
        title: the sweep's name.
        meta: printed at the foot of the report; ``metric`` is the column of the distance to draw.

    Raises:
        ImportError: if plotly or matplotlib is not installed; the message says which extra to install.
    """
    _require("plotly", "matplotlib")
    out_dir.mkdir(parents=True, exist_ok=True)
    rows = [_clean(row, out_dir) for row in rows]
    summary = summarise(rows, str(meta.get("metric", METRIC)))
    meta = meta | {"title": title, "metric": summary.metric, "finding": finding(summary)}
    content = json.dumps({"rows": rows, "meta": meta}, indent=1, default=str) + "\n"
    write_atomic(out_dir / "report.json", content.encode())
    write_atomic(out_dir / "report.csv", _csv(rows).encode())
    pictures = {column: _pictures(summary, column, out_dir) for column in PICTURES}
    pngs.compute_png(summary, out_dir / "compute_vs_quality.png")
    pngs.quality_png(summary, out_dir / "quality_vs_bitrate.png")
    pngs.autoencoders_png(summary, out_dir / "autoencoders.png")
    for column, name in zip(PICTURES, ("samples.png", "reconstructions.png")):
        if not pngs.pictures_png(summary, pictures[column], out_dir / name):
            (out_dir / name).unlink(missing_ok=True)
    write_atomic(out_dir / "report.html", write_page(summary, pictures, title, meta).encode())
    return out_dir / "report.html"


def summary_table(rows: Sequence[Row], metric: str = METRIC) -> Table:
    """Return the final distances as a table for a terminal, bitrates down and sizes across, the best bold."""
    summary = summarise(rows, metric)
    table = Table(box=box.SIMPLE_HEAD, title=f"{metric}, lower is better", title_style="dim")
    for heading in ("c_lf", "bits/pixel", "PSNR", "rFD"):
        table.add_column(heading, justify="right")
    for size in summary.sizes:
        table.add_column(f"{size.name}\n[dim]{si(size.flops, 'FLOPs')}[/]", justify="right")
    for latents in summary.latents:
        cells = [
            "" if latents.loss_factor is None else f"{latents.loss_factor:g}",
            latents.label if latents.bits_per_pixel is not None else "",
            "" if latents.psnr is None else f"{latents.psnr:.1f}",
            distance_text(latents.rfd),
        ]
        for size in summary.sizes:
            point = summary.final(latents, size)
            text = with_spread(point)
            cells.append(f"[bold green]{text}[/]" if summary.is_best(point) else text)
        table.add_row(*cells)
    return table


def _require(*packages: str) -> None:
    for package in packages:
        try:
            __import__(package)
        except ImportError:
            raise ImportError(
                f"a report needs the package {package}: pip install 'ul-scale[report]'"
            ) from None


def _clean(row: Row, out_dir: Path) -> Row:
    """Return a row with None for what is not finite, and pictures relative to ``out_dir``."""
    cleaned = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }
    for column in PICTURES:
        if name := cleaned.get(column):
            found = next((path for path in (out_dir / name, Path(name)) if path.is_file()), None)
            cleaned[column] = Path(os.path.relpath(found, out_dir)).as_posix() if found else name
    return cleaned


def _csv(rows: Sequence[Row]) -> str:
    extra = sorted({key for row in rows for key in row} - set(COLUMNS))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, [*COLUMNS, *extra], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def _pictures(summary: Summary, column: str, out_dir: Path) -> Pictures:
    """Return the pictures that exist: final samples by (latents, size), or reconstructions by latents."""
    if column == "samples_png":
        named = {(p.latents.key, p.size.name): p.rows[0].get(column) for p in summary.finals}
    else:
        named = {(latents.key, ""): latents.reconstructions for latents in summary.latents}
    paths = {place: out_dir / name for place, name in named.items() if name}
    return {place: path for place, path in paths.items() if path.is_file()}
