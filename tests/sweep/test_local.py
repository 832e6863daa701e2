"""The whole way on tiny models, from outside: a sweep that is killed, run again, extended and broken."""

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ul_scale.sweep.ledger import read_rows
from ul_scale.sweep.local import this_machine
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
    children = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = stat.read_text().rpartition(")")[2].split()[1]
            children += [stat.parent.name] * (parent == str(pid))
    return children


def wait_for(condition, process):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    "visible,count,expected",
    [(None, 2, ("0", "1")), ("2,5", 2, ("2", "5")), ("0", 0, ()), ("", 0, ())],
)
def test_gpus_are_those_that_are_visible(monkeypatch, visible, count, expected):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    machine = this_machine()
    assert machine.gpus == expected and machine.slots == (count or len(os.sched_getaffinity(0)))
    assert [machine.environment(slot).get("CUDA_VISIBLE_DEVICES") for slot in range(count)] == list(expected)


ONE = ("loss_factors=[4.0]", "sizes=[tiny-s]")


@pytest.fixture(scope="module")
def undisturbed(module_sweep_path):
    """Run the sweep in one go; return its config and what it printed."""
    code, output = finish(start("run", module_sweep_path, *ONE))
    assert code == 0, output
    return module_sweep_path, output


@pytest.mark.timeout(600)
def test_killed_and_interrupted_a_sweep_ends_with_the_undisturbed_table(sweep_path, tmp_path, undisturbed):
    process = start("run", sweep_path, *ONE)
    wait_for(lambda: any((tmp_path / "runs").glob("autoencoder-*/checkpoints/*/COMMIT")), process)
    orphans = children_of(process.pid)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{pid}") for pid in orphans) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert orphans and not any(os.path.exists(f"/proc/{pid}") for pid in orphans)

    process = start("run", sweep_path, *ONE)
    wait_for(lambda: children_of(process.pid), process)
    second = finish(start("run", sweep_path, *ONE))
    assert second[0] == 2 and "another process is running a sweep here" in second[1]
    wait_for(lambda: any_base(tmp_path), process)
    process.send_signal(signal.SIGINT)
    code, output = finish(process)
    assert code == 75 and "the same command continues" in output, output

    code, output = finish(start("run", sweep_path, *ONE))
    assert code == 0, output
    assert measured(sweep_path, *ONE) == measured(undisturbed[0], *ONE)


def test_a_finished_sweep_says_so_and_has_a_report(undisturbed):
    path, output = undisturbed
    expected = measured(path, *ONE)
    assert [row["step"] for row in expected] == [50, 100, 200]
    check_report(path.parent / "runs" / "sweeps" / "tiny", expected)
    assert "tiny-s" in output and "report.html" in output
    code, output = finish(start("run", path, *ONE))
    assert code == 0 and "is done: all 5 parts are there" in output


def test_another_size_runs_only_what_is_new(undisturbed):
    code, output = finish(start("run", undisturbed[0], ONE[0], "sizes=[tiny-s,tiny-m]", "--dry-run"))
    assert code == 0 and "2 of 7 parts to run" in output and "warning" not in output
    code, output = finish(start("run", undisturbed[0], "loss_factors=[0.9]", "--dry-run"))
    assert code == 0 and "warning: loss.loss_factor is 0.9; expected above 1" in output


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


def test_a_failed_run_is_reported_and_what_is_there_stays(undisturbed):
    path, _ = undisturbed
    broken = (
        ONE[0],
        "sizes=[tiny-s,tiny-m]",
        "size_overrides={tiny-m: ['optim.lr=1e30','train.max_skipped_in_a_row=2']}",
    )
    code, output = finish(start("run", path, *broken))
    assert code == 1
    assert (
        "not finite in 2 steps in a row" in output and "not started" in output and "2 parts failed" in output
    )
    assert measured(path, *broken) == measured(path, *ONE)
