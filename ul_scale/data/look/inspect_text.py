"""A report of `inspect_set` as text for a terminal of 100 columns."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from ul_scale.data.index import open_index
from ul_scale.data.look.contact_sheet import contact_sheet
from ul_scale.data.look.inspect import inspect_set
from ul_scale.data.look.survey import Report
from ul_scale.data.progress import progress_bar

_EIGHTHS = " ▏▎▍▌▋▊▉"
_ENDS = ("largest", "smallest")
_MODES = {
    "1": "1 (black and white)",
    "L": "L (grey)",
    "LA": "LA (grey, alpha)",
    "P": "P (palette)",
    "CMYK": "CMYK",
    "RGBA": "RGBA (alpha)",
    "I;16": "I;16 (grey, 16 bits)",
}


def show(url: str, *, samples: int | None = 1000, out: Path | None = None, as_json: bool = False) -> None:
    """Print what is in a set, and draw some of its samples.

    Args:
        url: folder of the shards.
        samples: how many are read for what the index does not know; None reads all.
        out: file of the picture, a PNG; None draws none.
        as_json: print JSON instead of text.

    Raises:
        OSError: if a read fails.
        ValueError: if the set has no index that fits, `samples` is less than 1 or `out` not a PNG.
    """
    if out is not None and out.suffix.lower() != ".png":
        raise ValueError(f"{out}: the contact sheet is a PNG; expected a name that ends in .png")
    if out is not None and not out.parent.is_dir():
        raise ValueError(f"{out}: there is no folder {out.parent}")
    index = open_index(url)
    total = len(index) if samples is None else min(samples, len(index))
    with progress_bar(f"Reading {index.dataset}", total) as advance:
        report = inspect_set(index, samples=samples, advance=advance)
    if as_json:
        print(json.dumps(report, indent=1, ensure_ascii=False))
    else:
        print_report(report, Console(width=100, highlight=False))
    if out is not None:
        contact_sheet(index).save(out)
        print(f"{out}: contact sheet", file=sys.stderr)


def print_report(report: Report, console: Console) -> None:
    """Print a report; what is an estimate says of how many samples."""
    console.print(Rule(f"[bold]{escape(report['dataset'])}[/]  {escape(report['url'])}"))
    console.print(_overview(report))
    examined = report["examined"]["samples"]
    scope = "all samples" if report["examined"]["exact"] else f"estimated from {examined:,} samples"
    sections = {
        "classes": _classes,
        "captions": _captions,
        "images": _images,
        "videos": _videos,
        "latents": _latents,
    }
    for name, section in sections.items():
        if report[name]:
            console.print(Rule(f"[bold]{name}[/] ({scope})", align="left"))
            console.print(section(report[name]))
    console.print(Rule(f"[bold]unreadable[/] ({scope})", align="left"))
    console.print(_unreadable(report["unreadable"], examined))


def _overview(report: Report) -> RenderableType:
    shards, sizes = report["shards"], report["bytes_per_sample"]
    facts = _facts(
        {
            "samples": f"{report['samples']:,}",
            "shards": f"{shards['count']:,}, {_bytes(shards['bytes']['total'])} together, "
            f"{_bytes(shards['bytes']['min'])} to {_bytes(shards['bytes']['max'])} each",
            "a sample": f"mean {_bytes(sizes['mean'])}, median {_bytes(sizes['median'])}, "
            f"largest {_bytes(sizes['max'])}, with tar headers",
            "fingerprint": report["fingerprint"],
        }
    )
    parts = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("part", "samples", "share", "mean bytes"):
        parts.add_column(title, justify="left" if title == "part" else "right", header_style="dim")
    for part, row in report["parts"].items():
        count = row["samples"]
        mean = _bytes(row["bytes"] / max(count, 1))
        parts.add_row(escape(part), f"{count:,}", _share(count, report["samples"]), mean)
    return Group(facts, "", parts, "")


def _classes(classes: Report) -> RenderableType:
    per_class = classes["samples_per_class"]
    facts = {"labelled": f"{classes['labelled']:,} samples of {classes['distinct']:,} classes"}
    if classes["named"]:
        facts["labelled"] += f"; the index names {classes['named']:,}"
    if per_class:
        facts["samples of each"] = (
            f"{per_class['min']:,} to {per_class['max']:,}, median {per_class['median']:,.6g}"
        )
    if classes["out_of_range"]:
        facts["out of range"] = f"[red]{classes['out_of_range']:,} samples[/]"
    charts = [_bars(f"{title} classes", [_class(row) for row in classes[title]]) for title in _ENDS]
    if classes["distinct"] <= len(classes["largest"]):
        return Group(_facts(facts), _bars("samples", [_class(row) for row in classes["largest"]]), "")
    return Group(_facts(facts), _beside(*charts), _histogram("samples of a class", classes["histogram"]), "")


def _class(row: Report) -> tuple[str, int]:
    return f"{row['class']} {row['name'] or ''}".strip()[:28], row["samples"]


def _captions(captions: Report) -> RenderableType:
    total = captions["present"] + captions["empty"] + captions["missing"]
    facts = {
        "present": f"{captions['present']:,} ({_share(captions['present'], total)}), "
        f"{captions['empty']:,} empty, {captions['missing']:,} missing; "
        f"{captions['distinct']:,} distinct"
    }
    for unit in ("words", "characters"):
        if captions[unit]:
            facts[unit] = _range(captions[unit])
    lines = [
        Text(f"{row['samples']:>8,} ×  {_one_line(row['text'])}", overflow="ellipsis", no_wrap=True)
        for row in captions["repeated"]
    ]
    examples = [
        Text(f"  “{_one_line(text)}”", overflow="ellipsis", no_wrap=True) for text in captions["examples"]
    ]
    return Group(
        _facts(facts),
        _histogram("words", captions["histogram"]),
        *([Text("most frequent", style="dim"), *lines] if lines else []),
        *([Text("examples", style="dim"), *examples] if examples else []),
        "",
    )


def _images(images: Report) -> RenderableType:
    modes = {_MODES.get(mode, mode): count for mode, count in images["modes"].items()}
    facts = {
        "width": _range(images["width"]),
        "height": _range(images["height"]),
        "formats": _counts(images["formats"], images["samples"]),
        "modes": _counts(modes, images["samples"]),
    }
    if images["rotated_by_exif"]:
        facts["EXIF-rotated"] = f"{images['rotated_by_exif']:,}"
    sides = _histogram("shorter side, px", images["shorter_side"])
    return Group(_facts(facts), _beside(sides, _histogram("width / height", images["aspect"])), "")


def _videos(videos: Report) -> RenderableType:
    facts = {
        "width": _range(videos["width"]),
        "height": _range(videos["height"]),
        "seconds": _range(videos["duration_s"]),
        "frames": _range(videos["frames"]),
        "frames/s": _counts(videos["frame_rates"], videos["samples"]),
        "codecs": _counts(videos["codecs"], videos["samples"]),
    }
    seconds = _histogram("seconds", videos["duration_s"]["histogram"])
    frames = _histogram("frames", videos["frames"]["histogram"])
    return Group(
        _facts(facts), _beside(seconds, frames), _histogram("shorter side, px", videos["shorter_side"]), ""
    )


def _latents(latents: Report) -> RenderableType:
    facts = {}
    for part, row in latents.items():
        facts[part] = _counts(row["shapes"], row["samples"])
        facts[f"{part} values"] = f"mean {row['mean']:.4g}, standard deviation {row['std']:.4g}" + (
            f", [red]not finite in {row['not_finite']:,} samples[/]" if row["not_finite"] else ""
        )
        if len(row["channel_std"]) > 1:
            facts[f"{part} channels"] = (
                f"{len(row['channel_std'])}, means {min(row['channel_mean']):.3g} to "
                f"{max(row['channel_mean']):.3g}, standard deviations {min(row['channel_std']):.3g} to "
                f"{max(row['channel_std']):.3g}"
            )
    return Group(_facts(facts), "")


def _unreadable(unreadable: Report, examined: int) -> RenderableType:
    if not unreadable["samples"]:
        return "none seen; `ul-scale data verify` decodes every sample in full"
    facts = {f"{row['sample']}.{row['part']}": escape(row["reason"]) for row in unreadable["first"]}
    count = f"[red]{unreadable['samples']:,} of {examined:,} samples[/], among them:"
    return Group(count, _facts(facts))


def _facts(facts: dict[str, str]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, text in facts.items():
        table.add_row(escape(name), text)
    return table


def _histogram(title: str, bins: list[Report]) -> Table:
    rows = []
    for row in bins:
        start, end = row["from"], row["to"]
        rows.append((f"≥ {start:g}" if end is None else f"{start:g} – {end:g}", row["samples"]))
    return _bars(title, rows)


def _bars(title: str, rows: Sequence[tuple[str, int]], width: int = 16) -> Table:
    """Return a chart of horizontal bars; shares are of the rows' sum."""
    table = Table(box=None, padding=(0, 1, 0, 0), title=title, title_style="dim", title_justify="left")
    table.show_header = False
    for justify in ("right", "left", "right"):
        table.add_column(justify=justify, no_wrap=True)
    top = max((count for _, count in rows), default=1)
    for label, count in rows:
        eighths = max(round(8 * width * count / top), 1 if count else 0)
        bar = "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
        table.add_row(escape(label), f"[cyan]{bar:<{width}}[/]", f"{count:,}")
    return table


def _beside(*tables: Table) -> Table:
    grid = Table.grid(padding=(0, 4))
    grid.add_row(*tables)
    return grid


def _range(stats: dict[str, Any]) -> str:
    low, high, median = (f"{stats[name]:,.6g}" for name in ("min", "max", "median"))
    return f"{low} to {high}, mean {stats['mean']:,.4g}, median {median}"


def _counts(counts: dict[str, int], total: int) -> str:
    return escape(", ".join(f"{name}: {count:,} ({_share(count, total)})" for name, count in counts.items()))


def _share(count: int, total: int) -> str:
    share = 100 * count / max(total, 1)
    return f"{share:.3g} %" if count in (0, total) or 0.05 <= share <= 99.9 else f"{share:.2g} %"


def _one_line(text: str) -> str:
    text = " ".join(text.split())
    return "".join(letter if letter.isprintable() else "�" for letter in text)  # no escapes for terminals


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.4g} TB"
