"""Several processes: two agents as two nodes, a rank that hangs, and stop requests that reach all."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from templates import AUTOENCODER
from train.test_worker import ENVIRONMENT, final_state, logged, no_dropout, run_dir_of

from ul_scale import config as configs
from ul_scale.checkpoint import store
from ul_scale.train import worker
from ul_scale.train.metrics import read_metrics

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(arguments, path, *overrides):
    command = [*TORCHRUN, *arguments, "-m", "ul_scale.cli", "train", str(path), "parallel.engine=fsdp"]
    return subprocess.Popen(
        [*command, *overrides], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT
    )


def wait_for_step(run_dir, step, process):
    deadline = time.monotonic() + 120
    while not any(row["step"] >= step for row in read_metrics(run_dir)):
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_two_agents_are_two_nodes_and_give_what_one_process_does(write_config, tmp_path):
    template = no_dropout(AUTOENCODER)
    alone = write_config(template, root=str(tmp_path / "alone"))
    assert worker.run(configs.load(alone)) == 0
    path = write_config(template)
    rendezvous = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=test"]
    rendezvous.append(f"--rdzv-endpoint=127.0.0.1:{free_port()}")
    agents = [start(rendezvous, path) for _ in range(2)]
    for agent in agents:
        output, _ = agent.communicate(timeout=150)
        assert agent.returncode == 0, output[-3000:]
    torch.testing.assert_close(
        torch.tensor(logged(run_dir_of(path))), torch.tensor(logged(run_dir_of(alone))), rtol=2e-4, atol=2e-5
    )
    mine, theirs = final_state(run_dir_of(path)), final_state(run_dir_of(alone))
    assert mine.keys() == theirs.keys()


def children_of(pid: int) -> list[int]:
    children = open(f"/proc/{pid}/task/{pid}/children").read().split()
    return [int(child) for child in children]


def is_running(pid: int) -> bool:
    try:
        return open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_rank_that_hangs_ends_the_others_with_rank_step_and_phase(write_config):
    path = write_config(AUTOENCODER, train={"steps": 100000})
    run_dir = run_dir_of(path)
    agent = start(["--standalone", "--nproc-per-node=2"], path, "parallel.timeout_s=4")
    wait_for_step(run_dir, 3, agent)
    waiting, hung = children_of(agent.pid)
    os.kill(hung, signal.SIGSTOP)
    try:
        deadline = time.monotonic() + 60
        while is_running(waiting) and time.monotonic() < deadline:
            time.sleep(0.05)
        # A process that is stopped does not hear the agent's SIGTERM, which waits long before it kills.
        os.kill(hung, signal.SIGKILL)
        output, _ = agent.communicate(timeout=60)
    finally:
        if agent.poll() is None:
            agent.kill()
    assert agent.returncode == 1
    assert re.search(r"rank 0 of 2, step \d+, .*(timeout|timed out)", output, re.IGNORECASE), output[-3000:]
    assert "no progress for" in output and "parallel.timeout_s" in output


def test_stop_reaches_all_ranks_which_save_the_same_step(write_config):
    path = write_config(AUTOENCODER, train={"steps": 100000}, checkpoint={"every_steps": 100000})
    run_dir = run_dir_of(path)
    agent = start(["--standalone", "--nproc-per-node=2"], path, "preemption.poll_s=0.1")
    wait_for_step(run_dir, 2, agent)
    stop = [sys.executable, "-m", "ul_scale.cli", "stop", str(run_dir), "--reason", "maintenance"]
    told = subprocess.run(stop, capture_output=True, text=True, env=ENVIRONMENT)
    assert told.returncode == 0 and "asked attempt 1" in told.stdout
    output, _ = agent.communicate(timeout=60)
    assert "ul-scale stop" in output and "maintenance" in output
    (step,) = store.complete_steps(run_dir)
    assert f"stopping after step {step}" in output
    assert store.read_success(run_dir) is None
    refused = subprocess.run(stop, capture_output=True, text=True, env=ENVIRONMENT)
    assert refused.returncode == 2 and "is not running" in refused.stderr


@pytest.mark.parametrize("engine", ["zero2"])
def test_deepspeed_goes_on_bit_for_bit_and_converts(write_config, tmp_path, engine):
    template = no_dropout(AUTOENCODER)
    path = write_config(template)
    settings = ["parallel.engine=deepspeed", f"parallel.zero_stage={engine[-1]}"]
    ranks = ["--standalone", "--nproc-per-node=2"]
    for stop_at in (4, 8):
        process = start(ranks, path, *settings, f"train.stop_at_step={stop_at}")
        output, _ = process.communicate(timeout=150)
        assert process.returncode == 0, output[-3000:]
    run_dir = run_dir_of(path)
    assert store.read_commit(run_dir, 8).format == "deepspeed"
    with pytest.raises(ValueError, match=r"saved by DeepSpeed with engine deepspeed \(here none\)"):
        worker.run(configs.load(path))
    convert = [sys.executable, "-m", "ul_scale.cli", "checkpoint", "convert", str(run_dir)]
    converted = subprocess.run(convert, capture_output=True, text=True, env=ENVIRONMENT, timeout=100)
    assert converted.returncode == 0, converted.stderr
    assert worker.run(configs.load(path)) == 0
    alone = write_config(template, root=str(tmp_path / "alone"))
    assert worker.run(configs.load(alone)) == 0
    torch.testing.assert_close(
        torch.tensor(logged(run_dir)), torch.tensor(logged(run_dir_of(alone))), rtol=2e-4, atol=2e-5
    )
