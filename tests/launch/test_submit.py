"""The command line that submits: what it prints, refuses and starts."""

import signal
import subprocess
import sys
import time

import pytest
from templates import AUTOENCODER

from launch import submit as launcher
from ul_scale.checkpoint.store import complete_steps
from ul_scale.config import load
from ul_scale.train.metrics import read_metrics
from ul_scale.train.prepare import prepare


def submit(*arguments):
    command = [sys.executable, "launch/submit.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


def test_dry_run_of_a_sweep_prints_the_plan_and_starts_nothing(tmp_path):
    result = submit("configs/quickstart/sweep.yaml", "--dry-run", f"root={tmp_path}")
    assert result.returncode == 0, result.stderr
    assert "27 of 27 parts to run" in result.stdout
    assert "-m ul_scale.cli sweep run configs/quickstart/sweep.yaml" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_trains_a_run(write_config, tmp_path):
    path = write_config(AUTOENCODER, train={"steps": 2})
    result = submit(path, "--backend", "local")
    assert result.returncode == 0, result.stderr
    assert "step 2/2" in result.stdout
    assert "is done" in submit(path).stdout


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--processes", "2"], "--processes 2 needs parallel.engine=fsdp"),
        (["--processes", "5", "parallel.engine=fsdp"], "5"),
        (["train.stepz=3"], "unknown key train.stepz"),
    ],
)
def test_bad_input_is_one_line_before_anything_starts(write_config, arguments, message):
    result = submit(write_config(AUTOENCODER), *arguments)
    assert result.returncode == 2
    assert message in result.stderr and len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--workers", "2"], "--workers is for --backend ray; the backend is local"),
        (["--max-restarts-without-progress", "2"], "--max-restarts-without-progress is for --backend ray"),
        (["--processes", "0"], "--processes 0"),
        (["--backend", "ray", "--processes", "2"], "--processes is for --backend local"),
        (
            ["--backend", "ray", "--cpus-per-worker", "few"],
            "--cpus-per-worker few: expected a number or auto",
        ),
        (["--backend", "ray", "--workers", "1:5", "parallel.engine=fsdp"], "5 data-parallel ranks"),
    ],
)
def test_options_of_one_backend_are_not_taken_by_another(
    write_config, arguments, message, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["submit.py", str(write_config(AUTOENCODER)), *arguments])
    assert launcher.main() == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1


def test_a_sweep_is_refused_by_ray_and_told_where_it_runs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["submit.py", "configs/quickstart/sweep.yaml", "--backend", "ray"])
    assert launcher.main() == 2
    assert "a sweep, which --backend local runs" in capsys.readouterr().err


def test_dry_run_of_ray_prints_the_plan_and_starts_nothing(write_config, monkeypatch, capsys, tmp_path):
    arguments = ["--backend", "ray", "--workers", "1:4", "--address", "head:6379", "parallel.engine=fsdp"]
    monkeypatch.setattr(sys, "argv", ["submit.py", str(write_config(AUTOENCODER)), *arguments, "--dry-run"])
    assert launcher.main() == 0
    plan = capsys.readouterr().out
    assert "head:6379" in plan and "1 to 4" in plan and "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S=1" in plan
    assert not (tmp_path / "runs").exists()


def test_help_shows_examples():
    assert "examples:" in submit("--help").stdout


def test_a_stop_of_several_processes_saves_and_exits_with_75(write_config):
    path = write_config(AUTOENCODER, train={"steps": 100000}, checkpoint={"every_steps": 100000})
    command = [sys.executable, "launch/submit.py", str(path), "--processes", "2", "parallel.engine=fsdp"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    run_dir = prepare(load(path)).run_dir
    deadline = time.monotonic() + 120
    while not read_metrics(run_dir):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 75, output
    (step,) = complete_steps(run_dir)
    assert f"stopping after step {step}: SIGTERM" in output
