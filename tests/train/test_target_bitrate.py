"""A bitrate that is held: resumed bit for bit, alike on all ranks, and, at length, on real data."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from templates import AUTOENCODER
from train.test_worker import (
    CLI,
    ENVIRONMENT,
    final_state,
    logged,
    no_dropout,
    run_dir_of,
)

from ul_scale import config as configs
from ul_scale.checkpoint import store
from ul_scale.train import worker
from ul_scale.train.metrics import read_metrics

HELD = AUTOENCODER | {
    "loss": AUTOENCODER["loss"] | {"target_bits_per_pixel": 0.3},
    "train": AUTOENCODER["train"] | {"steps": 60},
    "checkpoint": {"every_steps": 10, "keep_last": 2},
}
CONTROL = "model.bitrate_control."


def factors(run_dir):
    return [row["loss_factor"] for row in read_metrics(run_dir)]


def control_state(run_dir):
    state = final_state(run_dir)
    return {name: float(value) for name, value in state.items() if name.startswith(CONTROL)}


def test_killed_and_resumed_it_ends_bit_for_bit_the_same(write_config, tmp_path, capsys):
    whole = write_config(HELD, root=str(tmp_path / "whole"))
    assert worker.run(configs.load(whole)) == 0
    settled = [line for line in capsys.readouterr().out.splitlines() if "c_lf settled at" in line]
    path = write_config(HELD)
    run_dir = run_dir_of(path)
    process = subprocess.Popen([*CLI, "train", str(path)], stdout=subprocess.PIPE, env=ENVIRONMENT)
    while not store.complete_steps(run_dir) or read_metrics(run_dir)[-1]["step"] < 25:
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert worker.run(configs.load(path)) == 0
    assert "resuming from step" in capsys.readouterr().out
    assert logged(run_dir) == logged(run_dir_of(whole)) and factors(run_dir) == factors(run_dir_of(whole))
    mine, theirs = final_state(run_dir), final_state(run_dir_of(whole))
    assert [name for name in theirs if not torch.equal(mine[name], theirs[name])] == []

    # As its steps say: at c_lf as set, then steered, then settled.
    seen = factors(run_dir)
    assert seen[:6] == [3.0] * 6 and len(set(seen[6:57])) > 40 and len(set(seen[57:])) == 1
    assert control_state(run_dir)[CONTROL + "loss_factor"] == pytest.approx(seen[-1], rel=1e-6)
    assert settled and f"c_lf settled at {seen[-1]:.4f}" in settled[0]


RANKS = """
import json, sys
from ul_scale import config as configs
from ul_scale.train import worker

controls = []
original = worker.bitrate_steering

def remembering(control, config, engine, ema, process):
    controls.append((process.rank, control))
    return original(control, config, engine, ema, process)

worker.bitrate_steering = remembering
assert worker.run(configs.load(sys.argv[1], sys.argv[3:])) == 0
(rank, control), = controls
values = {name: value.item().hex() for name, value in control.state_dict().items()}
open(f"{sys.argv[2]}/{rank}.json", "w").write(json.dumps(values))
"""


def test_two_ranks_hold_the_same_values_and_agree_with_one_process(write_config, tmp_path):
    template = no_dropout(HELD | {"train": HELD["train"] | {"steps": 20}})
    alone = write_config(template, root=str(tmp_path / "alone"))
    assert worker.run(configs.load(alone)) == 0
    path, script = write_config(template), tmp_path / "ranks.py"
    script.write_text(RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(script), str(path), str(tmp_path), "parallel.engine=fsdp"]
    root = str(Path(__file__).parents[2])
    result = subprocess.run(
        command, env=ENVIRONMENT | {"PYTHONPATH": root}, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    sharded, whole = control_state(run_dir_of(path)), control_state(run_dir_of(alone))
    assert sharded == {CONTROL + name: float.fromhex(value) for name, value in first.items()}
    assert sharded == pytest.approx(whole, rel=1e-4)
    assert factors(run_dir_of(path)) == pytest.approx(factors(run_dir_of(alone)), rel=1e-4)


def test_deepspeed_is_refused_before_anything_starts(write_config):
    with pytest.raises(ValueError, match="target_bits_per_pixel is set and parallel.engine is deepspeed"):
        worker.prepare(configs.load(write_config(HELD), ["parallel.engine=deepspeed"]))


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("target", [0.05, 0.12, 0.25])
def test_held_out_bits_of_the_quickstart_are_within_5_percent(target, seed, tmp_path, monkeypatch):
    from ul_scale.evaluate.bitrate import measure_bitrate

    monkeypatch.chdir(Path(__file__).parents[2])
    overrides = [f"loss.target_bits_per_pixel={target}", f"seed={seed}", f"root={tmp_path}"]
    config = configs.load("configs/quickstart/autoencoder.yaml", overrides)
    assert worker.run(config) == 0
    result = measure_bitrate(worker.prepare(config).run_dir, samples=1000)
    print(target, seed, json.dumps(result))
    assert math.log(result["bits_per_pixel"] / target) == pytest.approx(0, abs=0.05)
