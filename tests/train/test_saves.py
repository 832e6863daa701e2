"""Saves within a run: what fails, what is skipped, and what stands afterwards."""

import time

import pytest
from templates import AUTOENCODER
from train.test_worker import logged, run_dir_of

from ul_scale import config as configs
from ul_scale.checkpoint import state, store
from ul_scale.checkpoint.ema_snapshots import snapshot_steps
from ul_scale.train import saves, worker
from ul_scale.train.metrics import read_metrics


def test_a_run_that_diverges_still_commits_the_save_in_flight(write_config, monkeypatch, capsys):
    real = state.write

    def slow(*arguments):
        time.sleep(1.0)
        real(*arguments)

    monkeypatch.setattr(state, "write", slow)
    path = write_config(AUTOENCODER, checkpoint={"every_steps": 1})
    settings = ["optim.lr=1e30", "optim.warmup_steps=0", "train.max_skipped_in_a_row=1"]
    assert worker.run(configs.load(path, settings)) == worker.EXIT_FAILED
    run_dir = worker.prepare(configs.load(path, settings)).run_dir
    newest = store.latest_step(run_dir)
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and "not finite in 1 steps in a row" in error[0]
    assert newest is not None and error[0].endswith(f"newest complete checkpoint: step {newest}")


def test_a_snapshot_that_fails_stops_the_run_and_keeps_its_checkpoints(write_config, monkeypatch, capsys):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    path = write_config(
        AUTOENCODER,
        ema={"power_widths": [0.1], "snapshot_every_steps": 6},
        train={"steps": 1000},
        checkpoint={"every_steps": 4, "keep_last": 1000},
    )
    with monkeypatch.context() as patched:
        patched.setattr(saves, "save_snapshot", full)
        assert worker.run(configs.load(path)) == worker.EXIT_FAILED
    assert "No space left on device" in capsys.readouterr().err
    run_dir = run_dir_of(path)
    # The step after the snapshot is not complete without it: a resume would not write it again.
    assert store.complete_steps(run_dir) == [4]
    assert worker.run(configs.load(path, ["train.stop_at_step=12"])) == 0
    assert snapshot_steps(run_dir) == [6, 12]


@pytest.mark.parametrize("bad_step", [2, 3, 4])
def test_skipped_steps_are_counted_the_same_with_and_without_a_restart(
    write_config, monkeypatch, tmp_path, bad_step
):
    real = worker.draw_noise

    def poisoned(spec, *, step, **options):
        noise = real(spec, step=step, **options)
        if step == bad_step:
            noise["eps/z_0"][0] = float("nan")
        return noise

    monkeypatch.setattr(worker, "draw_noise", poisoned)
    straight = write_config(AUTOENCODER, "straight.yaml", root=str(tmp_path / "straight"))
    assert worker.run(configs.load(straight, ["train.stop_at_step=8"])) == 0
    path = write_config(AUTOENCODER)
    for stop_at in (4, 8):
        assert worker.run(configs.load(path, [f"train.stop_at_step={stop_at}"])) == 0
    counts = [row["skipped_steps"] for row in read_metrics(run_dir_of(path))]
    assert counts == [row["skipped_steps"] for row in read_metrics(run_dir_of(straight))]
    assert counts[0] == 0 and counts[-1] == 1
    assert repr(logged(run_dir_of(path))) == repr(logged(run_dir_of(straight)))
