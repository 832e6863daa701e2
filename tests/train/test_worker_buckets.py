"""A whole run in a bucket, through the command line: killed and taken over; and what it leaves there."""

import json
import os
import subprocess
import time

import torch
from buckets import bucket_root, gate, gcs_bucket, s3_bucket
from templates import AUTOENCODER
from train.test_worker import CLI, THREADS, cli, logged, no_dropout, tensors_of, torchrun

from ul_scale import config as configs
from ul_scale.checkpoint import state, store
from ul_scale.checkpoint.files import list_names, read
from ul_scale.train import worker
from ul_scale.train.metrics import read_metrics
from ul_scale.train.prepare import prepare

__all__ = ["bucket_root", "gate", "gcs_bucket", "s3_bucket"]


def test_a_run_in_a_bucket_is_killed_goes_on_and_ends_as_one_on_disk(bucket_root, write_config, tmp_path):
    template = AUTOENCODER | {
        "train": AUTOENCODER["train"] | {"steps": 40},
        "checkpoint": {"every_steps": 10},
    }
    on_disk = write_config(template, "disk.yaml")
    assert worker.run(configs.load(on_disk)) == 0
    path = write_config(template, root=bucket_root)
    run_dir = prepare(configs.load(path)).run_dir
    environment = os.environ | THREADS
    command = [*CLI, "train", str(path)]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
    deadline = time.monotonic() + 100
    while not store.complete_steps(run_dir):
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()[0]
        time.sleep(0.05)
    first.kill()
    first.wait()
    again = cli("train", path)
    assert again.returncode == 0, again.stderr
    assert "resuming from step" in again.stdout

    local = prepare(configs.load(on_disk)).run_dir
    with state.local_copy(run_dir, 40) as directory:
        mine = tensors_of(directory)
    theirs = tensors_of(store.shard_dir(local, 40))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert logged(run_dir) == logged(local) and len(read_metrics(run_dir)) == 40
    assert set(list_names(run_dir)) >= {"SUCCESS", "attempts", "checkpoints", "config.yaml", "metrics"}
    assert json.loads(read(run_dir / "run.json"))["run_id"] == run_dir.name
    assert store.complete_steps(run_dir) == [30, 40]
    listed = cli("checkpoint", "verify", str(run_dir), "--step", "all")
    assert listed.returncode == 0, listed.stdout + listed.stderr


def test_two_ranks_save_to_a_bucket_and_go_on_from_it(gcs_bucket, write_config, tmp_path):
    template = no_dropout(AUTOENCODER)
    alone = write_config(template, "disk.yaml", root=str(tmp_path / "alone"))
    assert worker.run(configs.load(alone)) == 0
    path = write_config(template, root=f"{gcs_bucket}/two-ranks")
    for stop_at in (7, 12):
        torchrun(2, "train", path, "parallel.engine=fsdp", f"train.stop_at_step={stop_at}")
    run_dir = prepare(configs.load(path)).run_dir
    assert {name for name in store.read_commit(run_dir, 12).files} == {
        ".metadata",
        "__0_0.distcp",
        "__1_0.distcp",
    }
    torch.testing.assert_close(
        torch.tensor(logged(run_dir)),
        torch.tensor(logged(prepare(configs.load(alone)).run_dir)),
        rtol=2e-4,
        atol=2e-5,
    )
