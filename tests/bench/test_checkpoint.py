import json

import pytest
import torch
from typer.testing import CliRunner

from ul_scale.bench import checkpoint
from ul_scale.bench_cli import bench_app

CPU = torch.device("cpu")


def test_excess_counts_every_step_until_the_commit():
    # Steps of 1 s; the save begins at 10, stalls 0.5 s, slows the next two by 0.2 s, commits at 13.4.
    ends = [10.0, 11.7, 12.9, 14.1, 15.1, 16.1]
    busy = checkpoint.steps_until(ends, 13.4)
    assert busy == 3
    assert checkpoint.excess(ends, busy, 1.0) == pytest.approx(0.7 + 0.2 + 0.2)


def test_a_save_within_one_step_counts_that_step():
    ends = [10.0, 11.5, 12.5]
    assert checkpoint.steps_until(ends, 10.4) == 1
    assert checkpoint.excess(ends, 1, 1.0) == pytest.approx(0.5)


def test_ratio_is_per_round():
    rounds = [
        checkpoint.Round(step_s=1, staging_s=1, excess_s=e, core_wait_s=0, commit_s=20, sync_s=s)
        for e, s in ((1, 10), (2, 10), (9, 30))
    ]
    result = checkpoint.CheckpointResult(rounds=rounds)
    assert result.ratio.median == pytest.approx(0.2)
    assert (result.ratio.low, result.ratio.high) == pytest.approx((0.15, 0.25))


def test_waiting_for_a_core_is_noticed():
    def report(core_wait_s: float) -> str:
        one = checkpoint.Round(
            step_s=1, staging_s=0.5, excess_s=2, core_wait_s=core_wait_s, commit_s=20, sync_s=10
        )
        return checkpoint.report(checkpoint.CheckpointResult(rounds=[one]), CPU)

    assert "notice: much of the excess" in report(1.5)
    assert "notice" not in report(0.1)


def test_a_gigabyte_is_a_gigabyte(monkeypatch):
    made = {}
    monkeypatch.setattr(checkpoint, "Workload", lambda config, process, latents: made.update(config=config))
    checkpoint.make_workload(1.0, None)
    level = made["config"].model.net.levels[0]
    # Attention 4 w², MLP 8 w², modulation 6 w²; 4 bytes each.
    assert 4 * 18 * level.channels**2 * level.blocks >= 1e9


def test_too_little_room_is_named(tmp_path):
    with pytest.raises(ValueError, match="--gigabytes is 1e.06, which needs .* GB of memory; .* GB are free"):
        checkpoint.check_room(1e6, tmp_path, CPU)


def test_command(tmp_path):
    out = tmp_path / "checkpoint.json"
    args = ["checkpoint", "--gigabytes", "0.0003", "--root", str(tmp_path / "runs"), "--rounds", "1"]
    result = CliRunner().invoke(
        bench_app, [*args, "--calm-steps", "1", "--json", str(out)], catch_exceptions=False
    )
    assert result.exit_code == 0
    assert "excess/stall" in result.stdout
    figures = json.loads(out.read_text())
    assert figures["num_bytes"] > 4 * figures["parameter_bytes"] > 4 * 0.0003e9
    assert figures["rounds"][0]["sync_s"] > figures["rounds"][0]["staging_s"] > 0
    assert figures["verify_s"] > 0 and figures["load_s"] > 0
    assert not any((tmp_path / "runs").iterdir())  # the run directory is gone


@pytest.mark.parametrize("gigabytes", ["0", "-1"])
def test_bad_size(gigabytes):
    with pytest.raises(ValueError, match="--gigabytes is"):
        CliRunner().invoke(bench_app, ["checkpoint", "--gigabytes", gigabytes], catch_exceptions=False)
