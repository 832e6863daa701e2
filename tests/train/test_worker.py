"""Runs through the command line: resume after kills and signals, at other world sizes, and bad input."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from templates import AUTOENCODER, BASE, write_template

from ul_scale import config as configs
from ul_scale.checkpoint import state, store
from ul_scale.train import worker
from ul_scale.train.metrics import read_metrics
from ul_scale.train.prepare import prepare

CLI = [sys.executable, "-m", "ul_scale.cli"]
THREADS = {"OMP_NUM_THREADS": "1"}
ENVIRONMENT = os.environ | THREADS


def cli(*arguments, **options):
    command = [*CLI, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, env=os.environ | THREADS, timeout=200, **options
    )


def torchrun(processes, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["-m", "ul_scale.cli", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | THREADS, timeout=200)
    assert result.returncode == 0, result.stderr[-3000:]
    return result


def final_state(run_dir):
    """Return every tensor of the newest checkpoint, whole, by name."""
    return tensors_of(store.shard_dir(run_dir, store.latest_step(run_dir)))


def tensors_of(directory):
    """Return every tensor in a local directory of shards, whole, by name."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    metadata = FileSystemReader(directory).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    state.load(tensors, directory)
    return tensors


def logged(run_dir):
    names = ("loss", "loss/prior", "loss/decoder", "bits_per_pixel", "grad_norm", "lr")
    return [[row["step"], *(row.get(name) for name in names)] for row in read_metrics(run_dir)]


def run_dir_of(path):
    return prepare(configs.load(path)).run_dir


LONG = AUTOENCODER | {
    "train": AUTOENCODER["train"] | {"steps": 150},
    "checkpoint": {"every_steps": 40, "keep_last": 2},
}
"""Long enough that a process is still at it when a poller has seen a step and acts."""


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory):
    """Train the long template in one go; return its run directory."""
    path = write_template(tmp_path_factory.mktemp("undisturbed"), shards, LONG, "config.yaml")
    assert worker.run(configs.load(path)) == 0
    return run_dir_of(path)


def assert_same(run_dir, other):
    assert logged(run_dir) == logged(other)
    mine, theirs = final_state(run_dir), final_state(other)
    assert mine.keys() == theirs.keys() and len(mine) > 100
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


def test_killed_at_any_moment_the_run_ends_bit_for_bit_the_same(write_config, undisturbed):
    path = write_config(LONG | {"data": LONG["data"] | {"workers": 2}})  # the other run read in threads
    run_dir = run_dir_of(path)
    for target in (5, 45, 85):  # before the first save, and between saves
        process = subprocess.Popen([*CLI, "train", str(path)], stdout=subprocess.PIPE, env=ENVIRONMENT)
        deadline = time.monotonic() + 120
        while not any(row["step"] >= target for row in read_metrics(run_dir)):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        process.kill()
        process.wait()
    result = cli("train", path)
    assert result.returncode == 0, result.stderr
    assert "resuming from step" in result.stdout
    assert_same(run_dir, undisturbed)

    again = cli("train", path)
    assert again.returncode == 0 and "is done" in again.stdout


def test_sigterm_saves_and_asks_to_be_run_again(write_config, undisturbed):
    path = write_config(LONG, checkpoint={"every_steps": 1000})
    run_dir = run_dir_of(path)
    process = subprocess.Popen([*CLI, "train", str(path)], stdout=subprocess.PIPE, env=ENVIRONMENT)
    while not read_metrics(run_dir):
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    code = process.wait(timeout=60)
    assert code == worker.EXIT_RUN_AGAIN
    assert store.complete_steps(run_dir) and store.read_success(run_dir) is None
    assert worker.run(configs.load(path)) == 0
    assert_same(run_dir, undisturbed)


def test_a_run_is_extended_by_raising_stop_at_step(write_config, undisturbed):
    assert worker.run(configs.load(write_config(LONG, train={"stop_at_step": 55}))) == 0
    path = write_config(LONG)
    assert store.read_success(run_dir_of(path)) == 55
    assert worker.run(configs.load(path)) == 0
    assert_same(run_dir_of(path), undisturbed)


def test_a_truncated_newest_checkpoint_is_passed_over(write_config, undisturbed, capsys):
    worker.run(configs.load(write_config(LONG, train={"stop_at_step": 80})))
    path = write_config(LONG)
    run_dir = run_dir_of(path)
    shard = next(store.shard_dir(run_dir, 80).glob("*.distcp"))
    os.truncate(shard, shard.stat().st_size // 2)
    assert worker.run(configs.load(path)) == 0
    captured = capsys.readouterr()
    assert "resuming from step 40" in captured.out
    assert shard.name in captured.err and "step 80 cannot be loaded" in captured.err
    assert_same(run_dir, undisturbed)


def test_without_one_whole_checkpoint_the_run_stops_rather_than_starting_anew(write_config):
    worker.run(configs.load(write_config(AUTOENCODER, train={"stop_at_step": 4})))
    path = write_config(AUTOENCODER)
    next(store.shard_dir(run_dir_of(path), 4).glob("*.distcp")).unlink()
    result = cli("train", path)
    assert result.returncode == 1
    assert "no checkpoint is whole" in result.stderr and len(result.stderr.strip().splitlines()) == 2


def test_a_second_process_in_the_same_directory_is_refused(write_config):
    path = write_config(AUTOENCODER, train={"steps": 100000})
    first = subprocess.Popen([*CLI, "train", str(path)], stdout=subprocess.PIPE, env=ENVIRONMENT)
    while not read_metrics(run_dir_of(path)):
        assert first.poll() is None
        time.sleep(0.01)
    second = cli("train", path)
    first.kill()
    assert second.returncode == 1
    assert f"process {first.pid}" in second.stderr and "Traceback" not in second.stderr


def no_dropout(template):
    def plain(value):
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items() if key != "dropout"}
        return [plain(item) for item in value] if isinstance(value, list) else value

    return plain(template)


def test_sharded_over_two_processes_and_back_the_losses_are_those_of_one(write_config, tmp_path):
    """Also 2 → 1 and with accumulation: every checkpoint loads everywhere, tolerance for summation order."""
    template = no_dropout(AUTOENCODER)
    alone = write_config(template, root=str(tmp_path / "alone"))
    assert worker.run(configs.load(alone)) == 0
    path = write_config(template)
    torchrun(2, "train", path, "parallel.engine=fsdp", "train.stop_at_step=7")
    assert store.read_success(run_dir_of(path)) == 7
    assert worker.run(configs.load(path, ["parallel.accumulation_steps=2", "train.stop_at_step=9"])) == 0
    torchrun(3, "train", path, "parallel.engine=fsdp")  # 3 ranks hold 4 lanes in 6 slots
    torch.testing.assert_close(
        torch.tensor(logged(run_dir_of(path))), torch.tensor(logged(run_dir_of(alone))), rtol=2e-4, atol=2e-5
    )
    mine, theirs = final_state(run_dir_of(path)), final_state(run_dir_of(alone))
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-2, atol=2e-4, msg=name)


def test_a_base_model_trains_on_latents_and_needs_them_first(write_config):
    autoencoder = write_config(AUTOENCODER)
    assert worker.run(configs.load(autoencoder)) == 0
    parent = run_dir_of(autoencoder)
    values = BASE | {"autoencoder": {"run": parent.name, "step": 12}}
    base = write_config(values, "base.yaml")
    with pytest.raises(ValueError, match=f"no latents of autoencoder {parent.name} at step 12"):
        prepare(configs.load(base))

    from ul_scale.evaluate.encode import encode

    folders = encode(parent, 12)
    assert [folder.name for folder in folders] == ["train", "val"] and encode(parent, 12) == folders
    assert worker.run(configs.load(base)) == 0
    rows = read_metrics(run_dir_of(base))
    assert [row["step"] for row in rows] == list(range(1, 9))
    record = json.loads((run_dir_of(base) / "run.json").read_text())
    assert record["parents"] == [{"run": parent.name, "step": 12}]
    with pytest.raises(ValueError, match=r"data.train is images and autoencoder.on_the_fly is false"):
        prepare(configs.load(base, ["data.train=images"]))
    with pytest.raises(ValueError, match=r"latents.*train, which holds latents; expected images or videos"):
        prepare(configs.load(autoencoder, [f"data.train={folders[0]}", "data.val=null"]))
    with pytest.raises(ValueError, match="log_snr_max is 6.0, but the autoencoder's is 5.0"):
        worker.run(configs.load(base, ["loss.log_snr_max=6"]))


@pytest.mark.parametrize(
    "override,message",
    [
        ("data.train=missing/folder", "missing/folder"),
        ("data.lanes=3", "3"),
        ("data.lanes=64", "64"),
        ("parallel.accumulation_steps=3", "accumulation_steps is 3"),
        ("model.encoder.patch=3", "data.image_size is 16"),
        ("data.image_size=null", "data.image_size"),
        ("parallel.engine=fsdp", "needs torchrun"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(write_config, override, message, tmp_path):
    path = write_config(AUTOENCODER)
    with pytest.raises(ValueError, match=message.replace(".", r"\.")) as caught:
        worker.run(configs.load(path, [override]))
    assert "\n" not in str(caught.value)


def test_the_command_line_reports_bad_input_without_a_traceback(write_config):
    result = cli("train", write_config(AUTOENCODER), "train.stepz=1")
    assert result.returncode == 2
    assert result.stderr.strip().splitlines() == [result.stderr.strip()]
    assert "unknown key train.stepz; did you mean train.steps?" in result.stderr


def test_dry_run_starts_nothing(write_config):
    path = write_config(AUTOENCODER)
    result = cli("train", path, "--dry-run")
    assert result.returncode == 0
    assert "lanes      4 of 2 samples" in result.stdout and "48 samples" in result.stdout
    assert not Path(run_dir_of(path)).exists()


def test_provenance(undisturbed):
    record = json.loads((undisturbed / "run.json").read_text())
    assert record["run_id"] == undisturbed.name
    assert record["attempts"]["1"]["versions"]["torch"] == torch.__version__
    config = configs.load(undisturbed / "config.yaml")
    assert configs.run_id(config, record["data_identity"]) == undisturbed.name


def test_a_run_that_is_past_the_asked_step_says_so(write_config):
    path = write_config(AUTOENCODER)
    assert worker.run(configs.load(path, ["train.stop_at_step=8"])) == 0
    (run_dir_of(path) / "SUCCESS").unlink()
    with pytest.raises(ValueError, match="has 8 complete steps; train.stop_at_step is 5, raise it"):
        worker.run(configs.load(path, ["train.stop_at_step=5"]))


def test_data_that_changed_under_a_run_is_named(write_config):
    path = write_config(AUTOENCODER)
    assert worker.run(configs.load(path, ["train.stop_at_step=4"])) == 0
    record = run_dir_of(path) / "run.json"
    record.write_text(record.read_text().replace("train/", "other/"))
    with pytest.raises(ValueError, match="was begun on data other/"):
        worker.run(configs.load(path))


def test_held_out_data_must_be_others(write_config, shards):
    path = write_config(AUTOENCODER, data={"val": shards["train"]})
    with pytest.raises(ValueError, match="expected held-out samples"):
        prepare(configs.load(path))


def test_a_checkpoint_of_another_network_is_named(write_config):
    path = write_config(AUTOENCODER)
    assert worker.run(configs.load(path, ["train.stop_at_step=4"])) == 0
    with pytest.raises(store.BrokenCheckpoint, match="does not fit this code or config") as caught:
        state.load({"model": {"no.such.weight": torch.zeros(2)}}, store.shard_dir(run_dir_of(path), 4))
    assert "no.such.weight" in str(caught.value) and "\n" not in str(caught.value)


def test_a_base_model_trains_on_images_that_are_encoded_on_the_fly(write_config, shards):
    autoencoder = write_config(AUTOENCODER)
    assert worker.run(configs.load(autoencoder)) == 0
    parent = run_dir_of(autoencoder)
    values = BASE | {"autoencoder": {"run": parent.name, "step": 12, "on_the_fly": True}}
    images = shards | {"image_size": 16, "channels": 1}
    base = write_config(values, "base.yaml", data=images)
    assert worker.run(configs.load(base)) == 0
    run_dir = run_dir_of(base)
    rows = read_metrics(run_dir)
    assert len(rows) == 8 and all(0 < row["loss"] < 100 for row in rows)

    saved = final_state(run_dir)
    assert not any("encoder" in name for name in saved)
    from ul_scale.data.index import open_index
    from ul_scale.data.stream import iterate
    from ul_scale.evaluate.restore import restore_autoencoder, restore_base

    config, stage = restore_autoencoder(parent, 12)
    batches = iterate(open_index(shards["train"]), config.data, batch_size=48)
    z_clean = torch.cat([stage.encode(batch["x"]) for batch in batches])
    assert saved["model.z_std"].item() == pytest.approx(z_clean.std().item(), rel=1e-5)
    assert restore_base(run_dir, 8)[1].z_std == saved["model.z_std"]

    with pytest.raises(ValueError, match=r"data.image_size is 32, but the autoencoder .* has 16"):
        prepare(configs.load(base, ["data.image_size=32"]))
    with pytest.raises(ValueError, match="autoencoder.step is 11; .* has complete checkpoints at "):
        prepare(configs.load(base, ["autoencoder.step=11"]))


def test_a_profile_is_written_on_request(write_config):
    path = write_config(AUTOENCODER)
    result = cli("train", path, "--profile")
    assert result.returncode == 0, result.stderr
    (trace,) = (run_dir_of(path) / "profile").iterdir()
    assert str(trace) in result.stdout and trace.stat().st_size > 1000


def test_training_imports_without_what_it_does_not_need():
    optional = (
        "ray",
        "deepspeed",
        "gcsfs",
        "s3fs",
        "wandb",
        "tensorboard",
        "transformers",
        "diffusers",
        "av",
    )
    blocked = f"import sys; sys.modules.update(dict.fromkeys({optional!r}))"
    modules = "ul_scale.cli, ul_scale.train.worker, ul_scale.evaluate.metrics, launch.submit"
    command = [sys.executable, "-c", f"{blocked}; import {modules}"]
    result = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert result.returncode == 0, result.stderr
