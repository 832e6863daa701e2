import dataclasses
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from buckets import Gate, gcs_bucket  # noqa: F401
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from ul_scale.bench import loader, samples
from ul_scale.bench.loader import Loader, Task
from ul_scale.bench.loader_result import LoaderResult, Outcome, Row, remarks, table
from ul_scale.bench.peers import run
from ul_scale.bench_cli import bench_app
from ul_scale.data.index import FORMAT_VERSION
from ul_scale.data.indexing import build_index
from ul_scale.data.transforms import center_crop

FILES = Loader("files", "files", sys.executable)
IMAGES = Task(name="16", kind="image", size=16, batch_size=4, workers=1, warmup=1, images=8)
BYTES = Task(name="bytes", kind="bytes", batch_size=4, workers=0, warmup=1, images=40)


@pytest.fixture(scope="module")
def work_dir(tmp_path_factory) -> Path:
    """Return a folder that keeps sets and conversions for this module's tests."""
    return tmp_path_factory.mktemp("bench")


def measure(work_dir, tasks, peers, **options) -> LoaderResult:
    options = {"num_images": 24, "num_videos": 2, "rounds": 1, "say": lambda line: None} | options
    return loader.measure(work_dir, tasks, peers, **options)


def test_loaders_deliver(work_dir):
    peers, missing = loader.find_peers(["files", "webdataset"], {}, None)
    result = measure(work_dir, [IMAGES], peers)
    assert [(row.task, row.loader, len(row.runs)) for row in result.rows] == [
        ("16", "ours", 1),
        ("16", "files", 1),
        ("16", "webdataset", 1),
    ]
    for row in result.rows:
        assert all(run.images_per_s > 0 and 0.1 < run.first_batch_s < 100 for run in row.runs)
        assert all(run.peak_bytes > 20e6 for run in row.runs)
    assert [bool(row.version) for row in result.rows] == [False, False, True]
    assert not missing and not result.not_measured


def test_by_turns(work_dir, monkeypatch):
    order = []

    def run_loader(one: Loader, folder: str, task: Task) -> Outcome:
        order.append((one.name, Path(folder).name))
        return Outcome(len(order), 1.0, 1)

    monkeypatch.setattr(loader, "run_loader", run_loader)
    result = measure(work_dir, [BYTES], [FILES], rounds=3)
    ours, files = ("ours", f"ours-{FORMAT_VERSION}"), ("files", "files")
    assert order == [ours, files, files, ours, ours, files]
    assert [run.images_per_s for row in result.rows for run in row.runs] == [1, 4, 5, 2, 3, 6]


def test_what_fails_is_said_and_the_rest_goes_on(work_dir, tmp_path):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho trace >&2\necho 'RuntimeError: out of luck' >&2\nexit 1\n")
    broken.chmod(0o755)
    result = measure(work_dir, [BYTES], [Loader("litdata", "files", str(broken))])
    assert [row.loader for row in result.rows] == ["ours"]
    assert result.not_measured == [("bytes", "litdata", "RuntimeError: out of luck")]
    assert not result.verdicts()


def test_a_missing_peer_is_not_measured(tmp_path):
    without = tmp_path / "litdata/bin/python"
    without.parent.mkdir(parents=True)
    without.write_text("#!/bin/sh\necho \"ModuleNotFoundError: No module named 'litdata'\" >&2\nexit 1\n")
    without.chmod(0o755)
    found, missing = loader.find_peers(["files", "litdata"], {}, tmp_path)
    assert found == [FILES]
    [(task, name, reason)] = missing
    assert (task, name) == ("all", "litdata")
    assert reason == f"{without}: ModuleNotFoundError: No module named 'litdata'"


@pytest.mark.parametrize(
    ("names", "pythons", "message"),
    [
        (["ffcv"], {}, "names 'ffcv'; expected some of webdataset, files"),
        ([], {"webdatset": "x"}, "names 'webdatset'"),
        (["litdata"], {"litdata": "/no/python"}, "--python litdata=/no/python: no such file"),
    ],
)
def test_peers_that_cannot_be_are_named(names, pythons, message):
    with pytest.raises(ValueError, match=message):
        loader.find_peers(names, pythons, None)


def result_of(**rates: list[float]) -> LoaderResult:
    rows = [
        Row("bytes", name, "1.0", [Outcome(rate, 1.0, 10**8) for rate in values])
        for name, values in rates.items()
    ]
    return LoaderResult(rows, [("all", "litdata", "not installed")])


def test_ratios_are_of_rounds_and_promises_of_the_peer_named():
    # The machine becomes 10 times slower: every round has the same ratio.
    result = result_of(
        ours=[5000.0, 500.0, 50.0], webdataset=[1000.0, 100.0, 10.0], files=[4000.0, 400.0, 40.0]
    )
    row = result.row("bytes", "webdataset")
    assert result.ratio(row).median == result.ratio(row).low == pytest.approx(5)
    assert result.verdicts() == {"bytes": (pytest.approx(5), "webdataset", 4.0)}
    assert remarks(result)[0] == "bytes: 5.00 × webdataset; promised: at least 4, kept"
    assert "not kept" in remarks(result_of(ours=[390.0], webdataset=[100.0]))[0]


def test_against_the_fastest():
    result = result_of(ours=[100.0], webdataset=[50.0], files=[120.0])
    for row in result.rows:
        row.task = "256"
    assert result.verdicts() == {"256": (pytest.approx(100 / 120), "files", 1.0)}


def test_shown_and_as_json():
    result = result_of(ours=[100.0, 110.0], files=[50.0, 44.0])
    figures = json.loads(json.dumps(result.as_json()))
    ours, files = figures["rows"]
    assert (ours["loader"], ours["images_per_s"]["median"], ours["ours_over_this"]) == ("ours", 105, None)
    assert files["ours_over_this"] == {"n": 2, "median": 2.25, "low": 2.125, "high": 2.375}
    assert files["runs"][0] == {"images_per_s": 50, "first_batch_s": 1, "peak_bytes": 10**8}
    assert figures["not_measured"] == [{"task": "all", "loader": "litdata", "reason": "not installed"}]
    assert figures["promises"] == {}  # without the peer there is nothing to say
    console = Console(width=120, file=io.StringIO())
    console.print(table(result))
    assert "2.25" in console.file.getvalue()
    assert remarks(result) == ["not measured: all, litdata: not installed"]


def test_peers_deliver_the_pixels_of_our_crop():
    pixels = np.random.default_rng(0).integers(0, 256, (150, 201, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    expected = center_crop(Image.fromarray(pixels), 100)  # no halving at this ratio
    np.testing.assert_array_equal(run.decode_image(stream.getvalue(), 100), expected)


def test_a_wrong_batch_is_not_measured():
    task = {"kind": "image", "batch_size": 2, "size": 8}
    run.check(np.empty((2, 8, 8, 3)), task)
    with pytest.raises(AssertionError, match=r"a batch of shape \(2, 8, 4, 3\)"):
        run.check(np.empty((2, 8, 4, 3)), task)


def test_made_images_are_like_photos_and_always_the_same(tmp_path):
    for name in ("one", "two"):
        samples.make_images(tmp_path / name, 12)
    one, two = (sorted((tmp_path / name).glob("*/*.jpg")) for name in ("one", "two"))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]
    assert 70_000 < statistics.mean(path.stat().st_size for path in one) < 120_000
    assert {Image.open(path).size for path in one} == {(500, 375)}


def test_clips_of_made_videos(tmp_path, monkeypatch):
    pytest.importorskip("av")
    monkeypatch.setattr(samples, "VIDEO_FRAMES", 20)
    samples.make_videos(tmp_path, 1)
    [video] = tmp_path.glob("*/*.mp4")
    clips = [run.decode_clip(video.read_bytes(), 32, 16) for _ in range(8)]
    assert {clip.shape for clip in clips} == {(16, 32, 32, 3)}
    assert len({clip.tobytes() for clip in clips}) > 1  # they start anywhere


def test_samples_of_a_data_set_are_copied(tmp_path):
    contents = {f"{number:02d}": os.urandom(50 + number) for number in range(7)}
    shards = tmp_path / "shards"
    shards.mkdir()
    for shard in (0, 1):
        with tarfile.open(shards / f"{shard}.tar", "w") as tar:
            for key in list(contents)[shard * 4 : shard * 4 + 4]:
                for part, data in (("jpg", contents[key]), ("cls", str(int(key) % 3).encode())):
                    info = tarfile.TarInfo(f"{key}.{part}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    build_index(str(shards))

    def copied(count: int) -> dict[str, bytes]:
        folder = samples.samples_as_files(tmp_path / "work", "image", count, str(shards), lambda line: None)
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob("*/*")}

    assert copied(100) == {f"{int(key) % 3}/{int(key):08d}.jpg": data for key, data in contents.items()}
    assert len(copied(5)) == 5
    assert samples.samples_as_files(tmp_path / "work", "video", 5, str(shards), print) is None


def test_memory_counts_shared_pages_once():
    script = (
        "import os, sys; held = b'x' * 80_000_000; child = os.fork(); print(flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdin and process.stdout
    assert process.stdout.readline() and process.stdout.readline()  # both are there
    assert 80e6 < loader.session_bytes(process.pid) < 140e6
    process.stdin.close()
    process.wait()


@pytest.mark.exhaustive
@pytest.mark.timeout(1200)
def test_a_bucket_20_ms_away_keeps_up_at_256_px(work_dir, gcs_bucket, monkeypatch):  # noqa: F811
    task = dataclasses.replace(loader.TASKS["256"], images=6000)  # more than two epochs
    files = samples.samples_as_files(work_dir, "image", 2500, None, print)
    assert files is not None
    local, remote = str(work_dir / "local"), f"{gcs_bucket}/bench-{os.getpid()}"
    ours = Loader("ours", "ours", sys.executable)
    for folder in (local, remote):
        loader._run(ours, ["write", str(files), folder], ours=True)
    gate = Gate(os.environ["STORAGE_EMULATOR_HOST"].removeprefix("http://"))
    gate.refuse = lambda method, path: time.sleep(0.02)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gate.url)
    rates = []
    try:
        for _ in range(5):
            rates.append([loader.run_loader(ours, folder, task).images_per_s for folder in (local, remote)])
            print(f"local and bucket, images/s: {rates[-1]}")
    finally:
        gate.close()
    ratio = statistics.median(far / near for near, far in rates)
    print(f"median ratio {ratio:.3f}")
    assert ratio >= 0.75  # 0.9 is the aim, but emulator and proxy share the cores with what they serve


def test_command(work_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "loader.json"
    args = ["loader", "--against", "files", "--images", "64", "--task", "64", "--rounds", "1"]
    args += ["--workers", "1", "--work-dir", str(work_dir), "--json", str(out)]
    assert CliRunner().invoke(bench_app, args, catch_exceptions=False).exit_code == 0
    assert {row["loader"] for row in json.loads(out.read_text())["rows"]} == {"ours", "files"}
