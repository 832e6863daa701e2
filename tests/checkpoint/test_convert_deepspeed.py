"""A DeepSpeed checkpoint is converted in its place, and goes on elsewhere as if nothing had been."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from templates import AUTOENCODER, write_template
from torch.distributed.checkpoint import FileSystemReader

from ul_scale.checkpoint import state, store
from ul_scale.checkpoint.attempts import RunBusy, start_attempt
from ul_scale.checkpoint.convert import convert, export
from ul_scale.exported import load_exported
from ul_scale.parallel import deepspeed_convert
from ul_scale.train.metrics import read_metrics


def tensors_of(run_dir, step):
    """Return every tensor of a checkpoint by name, and its step."""
    with state.local_copy(run_dir, step) as directory:
        entries = FileSystemReader(directory).read_metadata().state_dict_metadata
        tensors = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in entries.items()
            if hasattr(entry, "size")
        }
        loaded = tensors | {"train": {"step": 0}}
        state.load(loaded, directory)
    return tensors, loaded["train"]["step"]


@pytest.fixture
def foreign(trained, tmp_path, monkeypatch):
    """Return a run whose newest checkpoint says it is DeepSpeed's, of which a stand-in reads ``model``."""
    run_dir = shutil.copytree(trained, tmp_path / trained.name)
    path = store.shard_dir(run_dir, 12).parent / "COMMIT"
    path.write_text(path.read_text().replace('"attempt": 1', '"format": "deepspeed", "attempt": 1'))
    tensors, _ = tensors_of(run_dir, 12)
    model = {name.removeprefix("model."): value for name, value in tensors.items() if name[:6] == "model."}
    monkeypatch.setattr(deepspeed_convert, "to_universal", lambda source, target: None)
    monkeypatch.setattr(deepspeed_convert, "universal_to_dcp_state", lambda _: {"model": model, "optim": {}})
    return run_dir


def test_a_checkpoint_is_converted_in_its_place(foreign, trained):
    assert store.read_commit(foreign, 12).format == "deepspeed"
    assert convert(foreign) == 12
    store.verify(foreign, 12)
    commit = store.read_commit(foreign, 12)
    assert commit.format == "dcp" and commit.attempt == 2
    assert store.complete_steps(foreign) == store.complete_steps(trained)
    before, after = tensors_of(trained, 12), tensors_of(foreign, 12)
    kept = {name: value for name, value in before[0].items() if not name.startswith("optim.")}
    assert kept.keys() == after[0].keys() and before[1] == after[1] == 12
    assert all(torch.equal(value, after[0][name]) for name, value in kept.items())
    assert convert(foreign) is None  # and takes no attempt for it
    assert store.read_success(foreign) == 12


def test_the_old_files_stay_until_the_run_is_cleaned(foreign):
    convert(foreign)
    folder = store.shard_dir(foreign, 12).parent
    assert sorted(path.name for path in folder.iterdir()) == ["COMMIT", "a1", "a2"]
    with start_attempt(foreign) as attempt:
        store.adopt(foreign, attempt, 12)
        store.clean(foreign, attempt, keep_last=2)
    assert sorted(path.name for path in folder.iterdir()) == ["COMMIT", "a2"]
    store.verify(foreign, 12)


def test_a_failed_conversion_leaves_what_was_there(foreign, monkeypatch):
    def fail(_):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(deepspeed_convert, "universal_to_dcp_state", fail)
        with pytest.raises(OSError, match="no space left"):
            convert(foreign)
    store.verify(foreign, 12)
    assert store.read_commit(foreign, 12).format == "deepspeed"
    assert convert(foreign) == 12


def test_a_run_that_is_being_trained_is_left_alone(foreign):
    with start_attempt(foreign), pytest.raises(RunBusy):
        convert(foreign)
    assert store.read_commit(foreign, 12).format == "deepspeed"


@pytest.mark.exhaustive
def test_deepspeeds_own_files_continue_with_another_engine_and_size(shards, tmp_path):
    pytest.importorskip("deepspeed")
    from ul_scale import config as configs
    from ul_scale.train import worker

    plain = {"kind": "transformer", "channels": 16, "blocks": 1}
    nets = {"prior": {"patch": 1, "levels": [plain], "head_dim": 8}}
    nets["decoder"] = {"patch": 4, "levels": [plain], "head_dim": 8}
    changes = {"model": AUTOENCODER["model"] | nets, "checkpoint": {"every_steps": 4, "keep_last": 2}}
    paths, rows = {}, {}
    for name in ("alone", "converted"):
        (tmp_path / name).mkdir()
        paths[name] = write_template(tmp_path / name, shards, AUTOENCODER, "config.yaml", **changes)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "ul_scale.cli", "train", str(paths["converted"])]
    command += ["parallel.engine=deepspeed", "train.stop_at_step=8"]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=250)
    run_dir = next((tmp_path / "converted" / "runs").iterdir())
    for weights in ("model", "40", "400"):
        export(run_dir, tmp_path / "before" / weights, weights=weights)
    assert convert(run_dir) == 8
    for weights in ("model", "40", "400"):
        export(run_dir, tmp_path / "after" / weights, weights=weights)
        before, after = (load_exported(tmp_path / when / weights) for when in ("before", "after"))
        after_values = dict(after.named_parameters())
        assert all(torch.equal(after_values[key], value) for key, value in before.named_parameters())
    for name, path in paths.items():
        assert worker.run(configs.load(path)) == 0
        folder = next((tmp_path / name / "runs").iterdir())
        rows[name] = [(row["step"], row["loss"], row["grad_norm"]) for row in read_metrics(folder)]
    assert store.read_commit(run_dir, 12).format == "dcp"
    # Engines sum in another order; wrong moments would show in the steps after 8 at once.
    torch.testing.assert_close(
        torch.tensor(rows["converted"]), torch.tensor(rows["alone"]), rtol=2e-4, atol=2e-5
    )
