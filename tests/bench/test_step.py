import json
from pathlib import Path

import pytest
import torch
from templates import AUTOENCODER
from typer.testing import CliRunner

from ul_scale.bench import step
from ul_scale.bench.workload import Workload, base_config, latent_facts, our_loop
from ul_scale.bench_cli import bench_app
from ul_scale.models.uvit import LevelConfig, UViTConfig
from ul_scale.parallel.engine import Process
from ul_scale.train.metrics import read_metrics

CPU = Process(rank=0, world_size=1, device=torch.device("cpu"))


def tiny_workload() -> Workload:
    net = UViTConfig(patch=1, levels=[LevelConfig(kind="transformer", channels=8, blocks=1)], head_dim=8)
    return Workload(base_config(net, batch_size=4), CPU, latent_facts((2, 4, 4)))


def test_overhead_is_that_of_pairs():
    # Both loops slow down by 10 over the rounds: each pair still has the same ratio.
    result = step.StepResult([0.102, 0.51, 1.02], [0.1, 0.5, 1.0], [0.11, 0.11, 0.11], [0.1, 0.1, 0.1])
    assert result.overhead.median == pytest.approx(0.02)
    assert result.overhead.high == pytest.approx(0.02)
    assert result.cpu_overhead.median == pytest.approx(0.1)
    assert result.as_json()["long_enough"]


def test_short_steps_are_noticed():
    quick = step.StepResult([0.01], [0.01], [0.01], [0.01])
    assert "notice: a step takes 10.0 ms" in step.report(quick, CPU.device)
    assert "notice" not in step.report(step.StepResult([0.06], [0.06], [0.06], [0.06]), CPU.device)


def test_both_loops_train_the_same_model(tmp_path):
    work = tiny_workload()

    def moved(run) -> float:
        before = {name: p.detach().clone() for name, p in work.engine.parameters().items()}
        run(2)
        return max(
            float((p - before[name]).detach().abs().max()) for name, p in work.engine.parameters().items()
        )

    with our_loop(work, tmp_path) as ours:
        assert moved(ours.run) > 0
        assert work.completed == 2
        assert moved(work.train_bare) > 0
        assert work.completed == 4
        ours.run(3)
    assert [row["step"] for row in read_metrics(tmp_path)] == [2, 7]
    assert not (tmp_path / "checkpoints").exists()


def test_after_step_can_end_a_run(tmp_path):
    with our_loop(tiny_workload(), tmp_path) as ours:
        ours.run(100, after_step=lambda completed: completed == 3)
        assert ours.work.completed == 3


def test_command_on_a_config(write_config, tmp_path):
    config, out = write_config(AUTOENCODER), tmp_path / "step.json"
    args = ["step", "--config", str(config), "--steps", "1", "--rounds", "2", "--json", str(out)]
    result = CliRunner().invoke(bench_app, [*args, "train.batch_size=4"], catch_exceptions=False)
    assert result.exit_code == 0
    assert "overhead" in result.stdout
    figures = json.loads(out.read_text())
    assert len(figures["ours_s"]) == len(figures["bare_s"]) == 2
    assert not list(Path(tmp_path).glob("runs/*"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [(["parallel.engine=fsdp"], "parallel.engine is fsdp"), (["train.batch_sise=4"], "train.batch_size")],
)
def test_what_cannot_be_compared_is_named(write_config, overrides, message):
    args = ["step", "--config", str(write_config(AUTOENCODER)), *overrides]
    with pytest.raises(ValueError, match=message):
        CliRunner().invoke(bench_app, args, catch_exceptions=False)


def test_overrides_need_a_config():
    with pytest.raises(ValueError, match="without --config"):
        CliRunner().invoke(bench_app, ["step", "train.batch_size=4"], catch_exceptions=False)
