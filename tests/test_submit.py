import subprocess
import sys

import pytest
from templates import AUTOENCODER


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


def test_help_shows_examples():
    assert "examples:" in submit("--help").stdout
