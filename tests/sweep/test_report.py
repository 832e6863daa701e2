import csv
import json
import math
import re
import sys
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image
from rich.console import Console

from ul_scale.evaluate.images import save_grid, save_pairs
from ul_scale.sweep.chart_data import colours
from ul_scale.sweep.report import COLUMNS, summary_table, write_report

BITRATES = {1.7: (0.0359, 16.1, 817), 3: (0.1516, 21.3, 606), 6: (0.2772, 23.2, 518)}
SIZES = {"S": 0.85e6, "M": 4.96e6, "L": 26.2e6}
FINALS = {1.7: (972, 943, 939), 3: (1204, 1019, 923), 6: (1313, 1046, 938)}
PNGS = ("compute_vs_quality", "quality_vs_bitrate", "autoencoders", "samples", "reconstructions")


def read_report(out_dir):
    content = json.loads((out_dir / "report.json").read_text())
    return content["rows"], content["meta"]


def discs(n, radius):
    y, x = torch.meshgrid(torch.linspace(-1, 1, 16), torch.linspace(-1, 1, 16), indexing="ij")
    return torch.stack([torch.tanh(9 * (radius * (1 + i) / n - torch.hypot(x, y)))[None] for i in range(n)])


def sweep_rows(folder, seeds=(0,), steps=(200, 400, 800)):
    """Return what a small sweep of three bitrates and three sizes gives, with its pictures."""
    rows = []
    for factor, (bits, psnr, rfd) in BITRATES.items():
        pairs = folder / f"autoencoder-{factor}" / "reconstructions.png"
        save_pairs(discs(4, 0.9), discs(4, 0.9) * bits, pairs, columns=4)
        for (size, forward), distance in zip(SIZES.items(), FINALS[factor]):
            samples = folder / f"base-{factor}-{size}" / "samples.png"
            save_grid(discs(8, forward**0.01), samples, columns=4)
            rows += [
                {
                    "run_id": f"base-{factor}-{size}-{seed}",
                    "name": "base",
                    "autoencoder_run": f"autoencoder-{factor}",
                    "loss_factor": factor,
                    "bits_per_pixel": bits,
                    "bits_per_pixel_ci95": 0.01 * bits,
                    "psnr": psnr,
                    "rfd": rfd,
                    "size": size,
                    "parameters": forward / 3,
                    "forward_flops": forward,
                    "train_flops": 3 * forward * 64 * step,
                    "autoencoder_flops": 7.3e12,
                    "sampling_flops": 32 * forward,
                    "step": step,
                    "samples_seen": 64 * step,
                    "seed": seed,
                    "final": step == steps[-1],
                    "fd_effnet_lite0": distance * (steps[-1] / step) ** 0.5 + 4 * seed,
                    "n": 1000,
                    "base_bits_per_pixel": bits * 1.05,
                    "samples_png": str(samples),
                    "reconstructions_png": str(pairs),
                }
                for seed in seeds
                for step in steps
            ]
    return rows


class Page(HTMLParser):
    """What a test needs to know of a page: its links, tags, texts outside of scripts, and balance."""

    def __init__(self, text):
        super().__init__()
        self.sources, self.tags, self.open, self.text = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in ("meta", "img", "input", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "script" not in self.open and "style" not in self.open:
            self.text += data + " "


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    rows = sweep_rows(folder / "runs", seeds=(0, 1))
    path = write_report(rows, folder / "report", title="A <small> sweep", meta={"data": "discs & more"})
    return rows, path.parent, path.read_text()


def test_the_page_is_self_contained_and_well_formed(sweep):
    _, out, text = sweep
    page = Page(text)
    assert page.open == [] and page.tags.count("html") == 1
    assert page.tags.count("img") == 9 + 3 + 1 and "link" not in page.tags and "iframe" not in page.tags
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    own = text[: text.index("<script>")] + text[text.rindex("<script>") :]
    assert "http" not in own and "url(" not in own and "@import" not in own
    assert {path.name for path in out.iterdir()} == {
        "report.html",
        "report.json",
        "report.csv",
        *(f"{name}.png" for name in PNGS),
    }


def test_the_page_says_what_was_swept_found_and_measured(sweep):
    text = Page(sweep[2]).text
    for expected in (
        "A <small> sweep",
        "3 latent bitrates (0.036 to 0.28 bits per pixel) × 3 base-model sizes (850 kFLOPs to 26.2 MFLOPs",
        "The best bitrate rises with model size: 0.036 bits/pixel for S and M, 0.15 for L.",
        "fd_effnet_lite0, n = 1,000",
        "not an FID",
        "A multiply-accumulate counts as 2 FLOPs; a training step is 3 × forward.",
        "autoencoder's cost is excluded",
        "not comparable across bitrates",
        "discs & more",
        "974 ± 2",
    ):
        assert expected in text
    assert "A &lt;small&gt; sweep" in sweep[2]


def test_the_figures_hold_every_curve_and_the_frontier(sweep):
    figures = json.loads(re.search(r"<script>const figures = (\{.*?\});\n", sweep[2], re.DOTALL)[1])
    assert set(figures) == {"compute", "quality", "psnr", "rfd"}
    compute = figures["compute"]
    curves = [trace for trace in compute["data"] if trace["mode"] == "lines+markers"]
    assert len(curves) == 9 and all(len(curve["x"]) == 3 for curve in curves)
    assert (
        len({curve["line"]["color"] for curve in curves}) == len({c["marker"]["symbol"] for c in curves}) == 3
    )
    band = next(trace for trace in compute["data"] if trace["line"].get("shape") == "hv")
    assert band["y"] == sorted(band["y"], reverse=True) and band["x"] == sorted(band["x"])
    assert [note["text"] for note in compute["layout"]["annotations"]].count("observed frontier") == 1
    assert compute["layout"]["xaxis"]["type"] == "log"
    assert "base-3-M-0" in curves[4]["hovertext"][2] and "PSNR 21.3 dB" in curves[4]["hovertext"][2]
    rings = [t for t in figures["quality"]["data"] if t.get("marker", {}).get("symbol") == "circle-open"]
    assert [(t["meta"]["size"], t["x"]) for t in rings] == [("S", [0.0359]), ("M", [0.0359]), ("L", [0.1516])]


def test_the_table_has_every_evaluation_and_sorts_by_value(sweep):
    rows, _, text = sweep
    body = re.search(r"<tbody>(.*?)</tbody>", text)[1]
    assert body.count("<tr") == len(rows) == 54 and body.count("class=final") == 18
    assert 'data-value="26200000.0">26.2 M<' in body and 'data-value="0.0">0<' in body  # seed 0 is a value


def test_pngs_are_readable_and_white(sweep):
    for name in PNGS:
        with Image.open(sweep[1] / f"{name}.png") as image:
            assert image.width >= 1000 and image.info["dpi"][0] == pytest.approx(150, abs=1)
            assert image.convert("RGB").getpixel((1, image.height - 2)) == (255, 255, 255)


def test_rows_come_back_as_they_went_in(sweep):
    rows, out, _ = sweep
    read, meta = read_report(out)
    assert (
        meta["title"] == "A <small> sweep" and meta["data"] == "discs & more" and "rises" in meta["finding"]
    )
    assert read[0]["samples_png"] == "../runs/base-1.7-S/samples.png"
    pictures = ("samples_png", "reconstructions_png")
    keep = [{key: value for key, value in row.items() if key not in pictures} for row in rows]
    assert [{key: row[key] for key in keep[0]} for row in read] == keep
    with (out / "report.csv").open() as file:
        table = list(csv.DictReader(file))
    assert tuple(table[0]) == COLUMNS and len(table) == len(rows)
    assert [float(line["fd_effnet_lite0"]) for line in table] == [row["fd_effnet_lite0"] for row in rows]


def test_a_report_can_be_written_again_from_itself(sweep, tmp_path):
    text = write_report(sweep[0][:2], tmp_path, title="again", meta={"data": "discs"}).read_text()
    rows, meta = read_report(tmp_path)
    assert write_report(rows, tmp_path, title="again", meta=meta | {"finding": "stale"}).read_text() == text
    assert read_report(tmp_path) == (rows, meta)


def test_pictures_are_found_from_the_working_directory_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_grid(discs(2, 0.5), tmp_path / "runs" / "a.png", columns=2)
    row = {"run_id": "a", "size": "S", "final": True, "fd_effnet_lite0": 1.0, "samples_png": "runs/a.png"}
    write_report([row], tmp_path / "sweeps" / "a", title="a", meta={})
    assert read_report(tmp_path / "sweeps" / "a")[0][0]["samples_png"] == "../../runs/a.png"
    assert (tmp_path / "sweeps" / "a" / "samples.png").is_file()


def test_missing_values_stay_missing(tmp_path):
    rows = sweep_rows(tmp_path / "runs", steps=(100,))[:4]
    rows[0] |= {"psnr": math.nan, "samples_png": "gone.png", "autoencoder_flops": None}
    for column in ("rfd", "sampling_flops", "base_bits_per_pixel", "reconstructions_png"):
        for row in rows:
            row.pop(column)
    rows[3]["fd_effnet_lite0"] = None
    rows[3]["note"] = "extra"
    text = write_report(rows, tmp_path / "report", title="partial", meta={}).read_text()
    read, _ = read_report(tmp_path / "report")
    assert read[0]["samples_png"] == "gone.png"
    assert read[0]["psnr"] is None and "rfd" not in read[0] and read[3]["fd_effnet_lite0"] is None
    with (tmp_path / "report" / "report.csv").open() as file:
        table = list(csv.DictReader(file))
    assert (
        table[0]["psnr"] == table[0]["rfd"] == table[3]["fd_effnet_lite0"] == ""
        and table[3]["note"] == "extra"
    )
    assert 'id="psnr"' in text and 'id="rfd"' not in text
    assert not (tmp_path / "report" / "reconstructions.png").exists()
    assert Page(text).tags.count("img") == 2 + 1


@pytest.mark.parametrize(
    "change", [{}, {"fd_effnet_lite0": None}, {"train_flops": None, "bits_per_pixel": None}]
)
def test_one_row_is_enough(tmp_path, change):
    row = {"run_id": "r", "size": "S", "bits_per_pixel": 0.1, "train_flops": 1e9, "final": True}
    row |= {"fd_effnet_lite0": 12.5} | change
    assert Page(write_report([row], tmp_path, title="one", meta={}).read_text()).open == []


def test_an_empty_sweep_says_so(tmp_path):
    assert "Nothing has been evaluated yet." in write_report([], tmp_path, title="none", meta={}).read_text()


def test_another_metric_is_drawn_under_its_own_name(tmp_path):
    rows = [
        {"run_id": f"r{b}", "size": "S", "bits_per_pixel": b, "final": True, "fvd": 9 * b} for b in (0.1, 0.2)
    ]
    text = write_report(rows, tmp_path, title="video", meta={"metric": "fvd"}).read_text()
    assert "0.10 bits/pixel is best for S." in text and "<button>fvd</button>" in text


def test_the_terminal_table_marks_the_best_of_each_size(tmp_path):
    rows = sweep_rows(tmp_path, seeds=(0, 1), steps=(100,))
    console = Console(width=100, record=True, force_terminal=True, file=open("/dev/null", "w"))
    console.print(summary_table(rows[:-2]))
    text = console.export_text(styles=True)
    bold = re.findall(r"\x1b\[1;32m([^\x1b]*)", text)
    assert [cell.strip() for cell in bold] == ["974 ± 2", "945 ± 2", "925 ± 2"]
    assert "0.036" in text and "16.1" in text and "817" in text and "–" in text


@pytest.mark.parametrize("package", ["plotly", "matplotlib"])
def test_a_missing_package_is_named_with_its_extra(monkeypatch, tmp_path, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{package}: pip install 'ul-scale\[report\]'"):
        write_report([], tmp_path / "report", title="", meta={})
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_colours_fall_in_lightness(count):
    picked = colours(count)
    light = [0.30 * int(c[1:3], 16) + 0.59 * int(c[3:5], 16) + 0.11 * int(c[5:], 16) for c in picked]
    assert len(picked) == count and all(a - b > 8 for a, b in zip(light, light[1:]))
