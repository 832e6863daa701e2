"""Runs under Ray: what is refused, when restarts end, and real clusters on this machine, whole and broken."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from templates import AUTOENCODER, write_template

from launch.backends import ray_train
from ul_scale import config as configs
from ul_scale.checkpoint import store
from ul_scale.train import worker
from ul_scale.train.metrics import read_metrics
from ul_scale.train.prepare import prepare

FSDP = ["parallel.engine=fsdp"]


# What is refused before anything starts -----------------------------------------------------------


@pytest.mark.parametrize("text,expected", [("4", (4, 4)), ("1:8", (1, 8)), ("2:2", (2, 2))])
def test_workers_are_a_number_or_a_range(text, expected):
    assert ray_train.parse_workers(text) == expected


@pytest.mark.parametrize("text", ["", "x", "1:", ":4", "-1", "1:2:3", "1.5"])
def test_other_texts_are_not_workers(text):
    with pytest.raises(ValueError, match=re.escape(f"--workers {text}: expected N or MIN:MAX")):
        ray_train.parse_workers(text)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"workers": (0, 2)}, "--workers 0:2"),
        ({"workers": (3, 2)}, "--workers 3:2"),
        ({"cpus_per_worker": 0}, "--cpus-per-worker 0"),
        ({"gpus_per_worker": 2}, "--gpus-per-worker 2"),
        ({"max_restarts": -1}, "--max-restarts-without-progress -1"),
        ({"address": "ray://head:10001"}, "--address ray://head:10001"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}: "):
        ray_train.Options(**options)


@pytest.mark.parametrize(
    "workers,overrides,message",
    [
        ((2, 2), [], "parallel.engine is none, which is one process, but there are 2"),
        ((1, 4), ["parallel.engine=deepspeed"], "--workers 1:4 is elastic, but DeepSpeed"),
        ((1, 5), FSDP, "5 data-parallel ranks for 4 lanes"),
        ((1, 4), [*FSDP, "parallel.accumulation_steps=8"], "accumulation_steps is 8"),
        # 2 workers have 4 samples each, 3 have 2 lanes in 2 slots: also 4; 1 has all 8.
        ((2, 4), [*FSDP, "parallel.accumulation_steps=4"], "accumulation_steps is 4"),
        (
            (1, 4),
            [*FSDP, "parallel.dp_replicate=2"],
            "--workers 1:4 allows 1, which does not work: parallel.dp_replicate is 2",
        ),
    ],
)
def test_a_size_that_does_not_work_is_refused_at_submission(write_config, workers, overrides, message):
    config = configs.load(write_config(AUTOENCODER), overrides)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        ray_train.check(config, ray_train.Options(workers=workers))
    assert "\n" not in str(caught.value)


def test_the_plan_shows_what_each_size_wastes(write_config):
    config = configs.load(write_config(AUTOENCODER), FSDP)
    options = ray_train.Options(workers=(1, 4), max_restarts=7)
    plan = ray_train.describe(ray_train.check(config, options), options)
    rows = [line.split() for line in plan.splitlines()]
    # workers, lane slots each, slots without a lane of their own, samples each: 4 lanes of 2 samples
    for row in (["1", "4", "0", "8"], ["2", "2", "0", "4"], ["3", "2", "2", "4"], ["4", "1", "0", "2"]):
        assert row in rows
    assert "7 in a row" in plan and "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S" in plan


# Real clusters ------------------------------------------------------------------------------------

QUICK = os.environ | {"OMP_NUM_THREADS": "1", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}


def submit(*arguments, script="launch/submit.py", **environment):
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=QUICK | environment
    )


def ended(process, timeout_s=280):
    """Return exit code and output of a process."""
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(process.communicate()[0]) from None
    return process.returncode, output


def events(output):
    return "\n".join(line for line in output.splitlines() if not line.startswith("step "))


def no_dropout(template):
    def plain(value):
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items() if key != "dropout"}
        return [plain(item) for item in value] if isinstance(value, list) else value

    return plain(template)


def losses(run_dir):
    rows = read_metrics(run_dir)
    return torch.tensor([[row["step"], row["loss"], row["bits_per_pixel"], row["grad_norm"]] for row in rows])


def assert_as_undisturbed(path, folder, shards, template):
    """Compare the losses of every step with those of one process, trained in one go."""
    alone = write_template(folder, shards, template, "alone.yaml", root=str(folder / "alone"))
    assert worker.run(configs.load(alone)) == 0
    prepared, other = prepare(configs.load(path)), prepare(configs.load(alone))
    assert prepared.run_id == other.run_id
    assert store.read_success(prepared.run_dir) == template["train"]["steps"]
    torch.testing.assert_close(losses(prepared.run_dir), losses(other.run_dir), rtol=1e-3, atol=1e-4)


def wait_for_step(run_dir, step, process, timeout_s=150):
    deadline = time.monotonic() + timeout_s
    while not any(row["step"] >= step for row in read_metrics(run_dir)):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(process.communicate()[0])
        time.sleep(0.05)


def test_two_workers_of_an_own_cluster_train_what_one_process_does(write_config, tmp_path, shards):
    template = no_dropout(AUTOENCODER)
    path = write_config(template)
    code, output = ended(submit(path, "--backend", "ray", "--workers", "2", *FSDP))
    assert code == 0, output
    assert "step 12/12" in output and "Traceback" not in output
    assert_as_undisturbed(path, tmp_path, shards, template)
    code, output = ended(submit(path, "--backend", "ray", "--address", "127.0.0.1:9", *FSDP))
    assert code == 0 and "is done" in output  # without a cluster


def test_an_address_without_a_cluster_is_named_at_once(write_config):
    code, output = ended(submit(write_config(AUTOENCODER), "--backend", "ray", "--address", "127.0.0.1:9"))
    assert code == 2
    assert output.startswith("error: --address 127.0.0.1:9: no Ray cluster") and output.count("\n") == 1


LONG = no_dropout(AUTOENCODER) | {
    "train": AUTOENCODER["train"] | {"steps": 400},
    "checkpoint": {"every_steps": 100, "keep_last": 100},
}


@pytest.fixture
def two_nodes(monkeypatch):
    """Return a cluster of two raylets with room for one worker each, and its second node."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    node = cluster.add_node(num_cpus=1)
    yield cluster, node
    cluster.shutdown()


@pytest.mark.exhaustive
def test_a_node_killed_mid_step_the_run_goes_on_by_itself_on_what_is_left(
    write_config, tmp_path, shards, two_nodes
):
    cluster, node = two_nodes
    path = write_config(LONG)
    run_dir = prepare(configs.load(path)).run_dir
    process = submit(
        path, "--backend", "ray", "--workers", "1:2", "--address", cluster.address, *FSDP,
        RAY_AUTH_MODE="disabled", RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="5",
    )  # fmt: skip
    wait_for_step(run_dir, 150, process)
    saved = store.latest_step(run_dir)
    cluster.remove_node(node, allow_graceful=False)
    killed = time.monotonic()
    code, output = ended(process)
    assert code == 0, output
    print(f"{time.monotonic() - killed:.0f} s from the kill to the end\n{events(output)}")
    resumed = [int(step) for step in re.findall(r"resuming from step (\d+)", output)]
    assert resumed and resumed[0] >= saved >= 100
    assert_as_undisturbed(path, tmp_path, shards, LONG)


CRASHING = """
import os, sys
sys.path.insert(0, os.getcwd())
from launch import submit
from launch.backends import ray_train

build = ray_train.build_trainer


def crashing_loop(job):
    from ul_scale.train import loop, ray_worker

    def learning_rate(optim, step, steps):
        if step == 6 and os.environ["RANK"] == "1":
            raise LookupError(f"no step {step} for me")
        return 1e-3

    loop.learning_rate = learning_rate
    return ray_worker.train_loop(job)


def build_crashing(*arguments):
    trainer = build(*arguments)
    trainer.train_loop_per_worker = crashing_loop
    return trainer


ray_train.build_trainer = build_crashing
sys.exit(submit.main())
"""


@pytest.mark.exhaustive
def test_a_worker_that_always_crashes_at_a_step_ends_the_run_with_its_own_traceback(write_config, tmp_path):
    path = write_config(AUTOENCODER)
    (tmp_path / "crashing.py").write_text(CRASHING)
    limit = ("--max-restarts-without-progress", "2")
    code, output = ended(
        submit(path, "--backend", "ray", "--workers", "2", *limit, *FSDP, script=tmp_path / "crashing.py")
    )
    assert code == 1, output
    assert output.count("resuming from step 4") == 3  # the first restart follows progress
    error = output[output.index("error: ") :]
    assert "2 restarts in a row without a newer checkpoint than step 4" in error
    assert "LookupError: no step 6 for me" in error and "Traceback" in error
    assert store.latest_step(prepare(configs.load(path)).run_dir) == 4


@pytest.mark.exhaustive
def test_sigterm_to_the_driver_saves_and_the_same_command_continues(write_config, tmp_path, shards):
    template = LONG | {"checkpoint": {"every_steps": 100000}}
    path = write_config(template)
    run_dir = prepare(configs.load(path)).run_dir
    arguments = (path, "--backend", "ray", "--workers", "2", *FSDP)
    process = submit(*arguments)
    wait_for_step(run_dir, 20, process)
    process.send_signal(signal.SIGTERM)
    code, output = ended(process, 60)
    assert code == 75, output
    saved = store.latest_step(run_dir)
    assert saved and 20 <= saved < 400 and store.read_success(run_dir) is None
    code, output = ended(submit(*arguments))
    assert code == 0 and f"resuming from step {saved}" in output, output
    assert_as_undisturbed(path, tmp_path, shards, template)


@pytest.mark.exhaustive
def test_ray_s_notice_of_a_node_saves_before_it_goes(write_config, tmp_path, shards, two_nodes):
    cluster, node = two_nodes
    template = LONG | {"checkpoint": {"every_steps": 100000}}
    path = write_config(template)
    run_dir = prepare(configs.load(path)).run_dir
    process = submit(
        path, "--backend", "ray", "--workers", "1:2", "--address", cluster.address, *FSDP,
        RAY_AUTH_MODE="disabled", RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="5",
    )  # fmt: skip
    wait_for_step(run_dir, 20, process)
    drain = [Path(sys.executable).parent / "ray", "drain-node", "--address", cluster.address]
    drain += ["--node-id", node.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    drain += ["--reason-message", "spot", "--deadline-remaining-seconds", "8"]
    subprocess.run(list(map(str, drain)), check=True, env=QUICK | {"RAY_AUTH_MODE": "disabled"})
    code, output = ended(process)
    assert code == 0, output
    assert "goes away" in output and re.search(r"resuming from step \d+", output), output
    assert_as_undisturbed(path, tmp_path, shards, template)
