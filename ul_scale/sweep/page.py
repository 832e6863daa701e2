"""report.html: one self-contained page, charts and pictures inlined."""

import base64
import html
from pathlib import Path
from string import Template
from typing import Any

from ul_scale.evaluate.features import DEFINITIONS
from ul_scale.sweep import charts
from ul_scale.sweep.chart_data import Pictures
from ul_scale.sweep.summary import (
    METRIC,
    Row,
    Summary,
    caveats,
    distance_text,
    finding,
    number,
    si,
    swept,
    with_spread,
)


def write_page(summary: Summary, pictures: dict[str, Pictures], title: str, meta: dict[str, Any]) -> str:
    from plotly.offline import get_plotlyjs

    figures = {
        "compute": charts.compute_figure(summary),
        "quality": charts.quality_figure(summary),
        "psnr": charts.autoencoder_figure(summary, "psnr", "PSNR (dB)"),
        "rfd": charts.autoencoder_figure(summary, "rfd", "reconstruction distance (rFD)"),
    }
    shown = {name: figure.to_json() for name, figure in figures.items() if any(t.x for t in figure.data)}
    chart = {name: f'<div class=chart id="{name}"></div>' if name in shown else "" for name in figures}
    sections = (
        (
            "Compute against quality",
            "Each line is one base model while it trains; lower is better. The pale band is the best that "
            "was observed with at most that compute: it joins measurements and is not a fit.",
            chart["compute"],
        ),
        (
            "Quality against bitrate",
            "The final distance of each model over the bitrate of its latents. A ring marks the best bitrate "
            "of a size. More bits reconstruct better but are harder to model.",
            chart["quality"],
        ),
        (
            "Autoencoders",
            "What the bits buy. No base model on these latents can show more than the decoder gives back.",
            f"<div class=pair>{chart['psnr']}{chart['rfd']}</div>" if chart["psnr"] or chart["rfd"] else "",
        ),
        (
            "Samples",
            "At the end of training: bitrate rises downwards, size to the right. Select one to enlarge it.",
            _sample_matrix(summary, pictures["samples_png"]),
        ),
        (
            "Reconstructions",
            "Held-out images through each autoencoder.",
            _reconstructions(summary, pictures["reconstructions_png"]),
        ),
        ("Runs", "Select a heading to sort. report.csv has every column.", _run_table(summary)),
        ("How to read this", "", _reading_guide(summary)),
    )
    data = ",".join(f'"{name}":{figure}' for name, figure in shown.items()).replace("<", "\\u003c")
    return PAGE.substitute(
        title=html.escape(title),
        style=STYLE,
        swept=html.escape(swept(summary)),
        finding=html.escape(finding(summary)),
        key=_key(summary),
        body="".join(_section(*section) for section in sections),
        meta=_meta(meta),
        plotly=get_plotlyjs(),
        figures=f"{{{data}}}",
        script=SCRIPT,
    )


def _section(heading: str, text: str, content: str) -> str:
    lead = f"<p class=lead>{html.escape(text)}</p>" if text else ""
    return f"<section><h2>{html.escape(heading)}</h2>{lead}{content}</section>" if content else ""


def _key(summary: Summary) -> str:
    """Return the key, whose entries are switches: a swatch for each bitrate, a mark for each size."""

    def switch(kind: str, value: str, mark: str, label: str) -> str:
        data = f'data-{kind}="{html.escape(value)}"'
        return f"<button aria-pressed=true {data}>{mark}{html.escape(label)}</button>"

    bitrates = [
        switch("latents", x.key, f'<i style="background:{charts.colour_of(summary, x)}"></i>', x.label)
        for x in summary.latents
    ]
    sizes = [
        switch("size", x.name, f"<b>{SYMBOLS[charts.marks_of(summary, x)[2]]}</b>", x.label)
        for x in summary.sizes
    ]
    groups = (("bits per pixel", bitrates), ("base model", sizes))
    return "".join(f"<div><span>{name}</span>{''.join(switches)}</div>" for name, switches in groups)


def _picture(path: Path, label: str, caption: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{html.escape(label)}" loading=lazy>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _sample_matrix(summary: Summary, pictures: Pictures) -> str:
    if not pictures:
        return ""
    lines = ["<th></th>" + "".join(f"<th>{html.escape(size.label)}</th>" for size in summary.sizes)]
    for latents in summary.latents:
        cells = [f"<th>{html.escape(latents.text)}</th>"]
        for size in summary.sizes:
            point, path = summary.final(latents, size), pictures.get((latents.key, size.name))
            label = f"samples at {latents.text}, size {size.name}"
            best = " <b>best of its size</b>" if summary.is_best(point) else ""
            cells.append(f"<td>{_picture(path, label, with_spread(point) + best) if path else '–'}</td>")
        lines.append("".join(cells))
    return (
        f"<div class=wide><table class=samples>{''.join(f'<tr>{line}</tr>' for line in lines)}</table></div>"
    )


def _reconstructions(summary: Summary, pictures: Pictures) -> str:
    parts = [
        _picture(
            pictures[latents.key, ""],
            f"reconstructions at {latents.text}",
            html.escape(" · ".join(charts.latents_facts(latents))),
        )
        for latents in summary.latents
        if (latents.key, "") in pictures
    ]
    return f"<div class=stack>{''.join(parts)}</div>" if parts else ""


def _run_table(summary: Summary) -> str:
    """Return the evaluations, a row each; a number carries the value that it is sorted by."""
    headings = HEADINGS | {summary.metric: summary.metric}
    shown = [c for c in headings if any(row.get(c) is not None for row in summary.rows)]
    head = "".join(f"<th><button>{html.escape(headings[column])}</button></th>" for column in shown)
    lines = []
    for row in summary.rows:
        cells = "".join(_cell(row, column) for column in shown)
        lines.append(f"<tr{' class=final' if row.get('final') else ''}>{cells}</tr>")
    some_final = any(row.get("final") for row in summary.rows)
    switch = (
        "<label><input type=checkbox id=all> show evaluations during training</label>" if some_final else ""
    )
    return (
        f"{switch}<div class=wide><table id=runs{' class=finals' if some_final else ''}>"
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _cell(row: Row, column: str) -> str:
    value = number(row, column)
    if value is None:
        text = row.get(column)
        return f"<td class=text>{'' if text is None else html.escape(str(text))}</td>"
    if column.endswith("flops") or column in ("parameters", "samples_seen"):
        text = si(value, "")
    elif "bits_per_pixel" in column:
        text = f"{value:.4f}"
    else:
        text = f"{value:.4g}" if column in ("psnr", "loss_factor", "seed") else distance_text(value)
    return f'<td data-value="{value!r}">{text}</td>'


def _reading_guide(summary: Summary) -> str:
    n = f", n = {summary.counts[0]:,}" if len(summary.counts) == 1 else ""
    definition = DEFINITIONS.get(summary.metric, "a distance between features of samples and of real images.")
    facts = [
        f"{summary.metric}{n}: {definition} Lower is better.",
        "Bits per pixel are held-out: the autoencoder's prior loss on images that it was not trained on, "
        "over their pixels. Intervals are 95 %.",
        "A multiply-accumulate counts as 2 FLOPs; a training step is 3 × forward. The autoencoder's cost is "
        "excluded from the compute axis and listed beside it.",
        "Losses of base models are not comparable across bitrates, because their targets differ. Compare "
        "losses within one bitrate, and quality across bitrates.",
    ]
    if any(point.spread for point in summary.points):
        facts.append("A point is the mean of its seeds; bars span them, and pale marks are single seeds.")
    return "<ul>" + "".join(f"<li>{html.escape(fact)}</li>" for fact in [*facts, *caveats(summary)]) + "</ul>"


def _meta(meta: dict[str, Any]) -> str:
    shown = {
        key: value for key, value in meta.items() if key not in ("title", "finding") and value is not None
    }
    return "".join(
        f"<dt>{html.escape(key)}</dt><dd>{html.escape(str(value))}</dd>" for key, value in shown.items()
    )


HEADINGS = {
    "run_id": "run",
    "bits_per_pixel": "bits/pixel",
    "loss_factor": "c_lf",
    "size": "size",
    "seed": "seed",
    METRIC: METRIC,
    "train_flops": "training FLOPs",
    "forward_flops": "forward FLOPs",
    "parameters": "parameters",
    "samples_seen": "images seen",
    "psnr": "PSNR",
    "rfd": "rFD",
    "sampling_flops": "sampling FLOPs",
    "autoencoder_flops": "autoencoder FLOPs",
    "base_bits_per_pixel": "base bits/pixel",
}
SYMBOLS = {
    "circle": "●",
    "square": "■",
    "triangle-up": "▲",
    "diamond": "◆",
    "triangle-down": "▼",
    "cross": "✚",
}

STYLE = """
:root { color-scheme: light; --ink: #24292f; --muted: #6e7781; --line: #e9ecef; --accent: #2f7fa3; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 44px 24px 64px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 8px; font-weight: 650; letter-spacing: -.01em; }
h2 { font-size: 19px; margin: 0 0 4px; font-weight: 600; }
p { margin: 0; text-wrap: pretty; }
.swept, .lead, li, label { color: var(--muted); }
.lead { max-width: 78ch; font-size: 14px; }
.finding { font-size: 20px; line-height: 1.45; margin: 28px 0 0; padding-left: 16px; max-width: 62ch;
  border-left: 3px solid var(--accent); text-wrap: balance; }
section { margin-top: 52px; }
.chart { width: 100%; min-width: 0; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(320px, 100%), 1fr)); gap: 16px; }
nav { position: sticky; top: 0; z-index: 2; margin-top: 32px; padding: 8px 0; background: #fffffff2;
  border-bottom: 1px solid var(--line); display: flex; flex-wrap: wrap; gap: 2px 28px; font-size: 13px; }
nav div { display: flex; flex-wrap: wrap; align-items: center; }
nav span { color: var(--muted); margin-right: 4px; }
nav button { all: unset; cursor: pointer; padding: 3px 8px; border-radius: 6px; display: flex;
  align-items: center; white-space: nowrap; }
nav button:hover { background: var(--line); }
nav button[aria-pressed=false] { opacity: .35; text-decoration: line-through; }
button:focus-visible { outline: 2px solid var(--accent); }
nav i { width: 18px; height: 5px; border-radius: 3px; margin-right: 7px; }
nav b { color: var(--muted); font-size: 11px; margin-right: 6px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; margin-top: 12px; }
th { font-weight: 600; text-align: left; }
.samples { width: 100%; table-layout: fixed; min-width: 560px; }
.samples th:first-child { width: 84px; }
.samples td, .samples th { padding: 4px; vertical-align: top; color: var(--muted); }
.samples th { color: var(--ink); }
figure { margin: 0; }
figure img { width: 100%; display: block; cursor: zoom-in; border-radius: 3px; }
figcaption { font-size: 13px; color: var(--muted); padding: 4px 0 8px; }
figcaption b { color: var(--ink); font-weight: 600; margin-left: 6px; }
.stack { display: grid; gap: 16px; margin-top: 12px; }
#runs { width: 100%; white-space: nowrap; font-size: 12.5px; }
#runs td, #runs th { padding: 5px 0 5px 14px; text-align: right; }
#runs td { border-top: 1px solid var(--line); }
#runs td.text, #runs th:first-child { text-align: left; }
#runs td:first-child, #runs th:first-child { padding-left: 0; }
#runs th button { all: unset; cursor: pointer; color: var(--muted); font-weight: 500; white-space: normal; }
#runs th { vertical-align: bottom; line-height: 1.3; }
#runs th[aria-sort=ascending] button::after { content: " ↑"; }
#runs th[aria-sort=descending] button::after { content: " ↓"; }
#runs.finals tbody tr:not(.final) { display: none; }
label { font-size: 13px; }
ul { padding-left: 18px; margin: 8px 0 0; max-width: 84ch; font-size: 14px; }
li { margin: 4px 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; margin: 52px 0 0; font-size: 12px;
  color: var(--muted); border-top: 1px solid var(--line); padding-top: 16px; }
dd { margin: 0; overflow-wrap: anywhere; }
dialog { border: 0; padding: 0; max-width: 96vw; max-height: 96vh; background: none; }
dialog::backdrop { background: #000c; }
dialog img { display: block; width: min(96vw, 1200px); max-height: 96vh; object-fit: contain; }
@media (max-width: 600px) {
  main { padding: 24px 16px 48px; }
  nav { position: static; }
  h1 { font-size: 23px; }
  .finding { font-size: 17px; }
}
"""

SCRIPT = """
const config = { displaylogo: false, responsive: true,
  modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]] };
for (const [id, { data, layout }] of Object.entries(figures)) Plotly.newPlot(id, data, layout, config);

const off = { latents: new Set(), size: new Set() };
document.querySelectorAll("nav button").forEach(button => button.onclick = () => {
  const kind = "latents" in button.dataset ? "latents" : "size", value = button.dataset[kind];
  const hide = button.getAttribute("aria-pressed") === "true";
  button.setAttribute("aria-pressed", !hide);
  off[kind][hide ? "add" : "delete"](value);
  const shown = ({ meta = {} }) => !off.latents.has(meta.latents) && !off.size.has(meta.size);
  for (const [id, { data }] of Object.entries(figures)) Plotly.restyle(id, { visible: data.map(shown) });
});

const dialog = document.querySelector("dialog");
document.querySelectorAll("figure img").forEach(image => image.onclick = () => {
  dialog.firstElementChild.src = image.src;
  dialog.showModal();
});
dialog.onclick = () => dialog.close();

const runs = document.getElementById("runs"), all = document.getElementById("all");
if (all) all.onchange = () => runs.classList.toggle("finals", !all.checked);
runs.querySelectorAll("th").forEach((heading, column) => heading.onclick = () => {
  const up = heading.getAttribute("aria-sort") !== "ascending";
  runs.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
  heading.setAttribute("aria-sort", up ? "ascending" : "descending");
  const value = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
  const compare = (a, b) => isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b;
  const order = (a, b) => (a === "") - (b === "") || (up ? compare(a, b) : compare(b, a));
  runs.tBodies[0].append(...[...runs.tBodies[0].rows].sort((r, s) => order(value(r), value(s))));
});
"""

PAGE = Template("""<!doctype html>
<html lang=en><head><meta charset=utf-8><meta name=viewport content="width=device-width, initial-scale=1">
<title>$title</title><style>$style</style></head><body><main>
<header><h1>$title</h1><p class=swept>$swept</p><p class=finding>$finding</p></header>
<nav aria-label="what the charts show">$key</nav>
$body
<dl>$meta</dl></main><dialog><img alt="enlarged"></dialog>
<script>$plotly</script>
<script>const figures = $figures;$script</script>
</body></html>
""")
