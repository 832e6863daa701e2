"""The whole way on tiny models, from outside: a sweep that is killed, run again, extended and broken."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from ul_scale.sweep.ledger import read_rows
from ul_scale.sweep.plan import load_sweep, plan_sweep

CLI = [sys.executable, "-m", "ul_scale.cli", "sweep"]


def start(*arguments):
    return subprocess.Popen(
        [*CLI, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"COLUMNS": "200"},
    )


def finish(process):
    output, _ = process.communicate(timeout=280)
    return process.returncode, output


def measured(path, *overrides):
    """Return the ledger's rows without what depends on the place and the hour."""
    return [
        {key: value for key, value in row.items() if not key.endswith("_png")}
        for row in read_rows(plan_sweep(*load_sweep(path, list(overrides))))
    ]


def children_of(pid):
    return subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()


def wait_for(condition, process):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.timeout(600)
def test_killed_and_interrupted_a_sweep_ends_with_the_undisturbed_table(sweep_path, tmp_path):
    one = ("loss_factors=[4.0]",)
    code, output = finish(start("run", sweep_path, *one, f"root={tmp_path / 'undisturbed'}"))
    assert code == 0, output
    expected = measured(sweep_path, *one, f"root={tmp_path / 'undisturbed'}")
    assert len(expected) == 2 * 3

    process = start("run", sweep_path, *one)
    wait_for(lambda: any((tmp_path / "runs").glob("tiny*/**/COMMIT")) or any_base(tmp_path), process)
    orphans = children_of(process.pid)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{pid}") for pid in orphans) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert orphans and not any(os.path.exists(f"/proc/{pid}") for pid in orphans)

    process = start("run", sweep_path, *one)
    wait_for(lambda: any_base(tmp_path), process)
    second = finish(start("run", sweep_path, *one))
    assert second[0] == 2 and "another process is running this sweep" in second[1]
    process.send_signal(signal.SIGINT)
    code, output = finish(process)
    assert code == 75 and "the same command continues" in output, output

    code, output = finish(start("run", sweep_path, *one))
    assert code == 0, output
    assert measured(sweep_path, *one) == expected
    check_report(tmp_path / "runs" / "sweeps" / "tiny", expected)

    code, output = finish(start("run", sweep_path, *one))
    assert code == 0 and "is done: all 7 parts are there" in output

    code, output = finish(start("run", sweep_path, *one, "sizes=[tiny-s,tiny-m,tiny-l]", "--dry-run"))
    assert code == 0 and "2 of 9 parts to run" in output


def any_base(tmp_path):
    return any((tmp_path / "runs").glob("base-*/attempts/*.json"))


def check_report(folder, expected):
    rows = json.loads((folder / "report.json").read_text())["rows"]
    assert len(rows) == len(expected)
    for row, truth in zip(rows, expected):
        assert truth.items() <= row.items()
        assert 0 < row["bits_per_pixel"] < 10 and row["fd_effnet_lite0"] > 0 and row["n"] == 8
    with (folder / "report.csv").open() as file:
        assert [row["run_id"] for row in csv.DictReader(file)] == [row["run_id"] for row in rows]
    page = (folder / "report.html").read_text()
    assert "fd_effnet_lite0" in page
    for picture in ("compute_vs_quality.png", "quality_vs_bitrate.png", "samples.png", "reconstructions.png"):
        assert (folder / picture).stat().st_size > 1000


@pytest.mark.timeout(600)
def test_a_failed_run_is_reported_and_the_others_go_on(sweep_path):
    one = ("loss_factors=[4.0]", "size_overrides={tiny-m: ['optim.lr=1e30']}")
    code, output = finish(start("run", sweep_path, *one))
    assert code == 1
    assert "not finite at step" in output and "1 parts failed" not in output
    rows = measured(sweep_path, *one)
    assert {row["size"] for row in rows} == {"tiny-s"} and len(rows) == 3
