import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from ul_scale.checkpoint import saver as saver_module
from ul_scale.checkpoint import state, store
from ul_scale.checkpoint.attempts import Fenced, start_attempt
from ul_scale.checkpoint.saver import Saver
from ul_scale.checkpoint.store import CheckpointConfig
from ul_scale.checkpoint.transfer import SaveFailed
from ul_scale.parallel.engine import Process

ALONE = Process(0, 1, torch.device("cpu"))


@pytest.fixture
def run(tmp_path):
    """Return a run directory, its attempt and a saver that keeps one checkpoint."""
    run_dir = tmp_path / "run"
    with start_attempt(run_dir, log=str) as attempt:
        store.adopt(run_dir, attempt, 0)
        yield run_dir, Saver(run_dir, attempt, 1, CheckpointConfig(every_steps=1, keep_last=1), ALONE)


def some_state(value: float = 1.0):
    return {"model": {"w": torch.full((1000,), value)}, "train": {"step": 1}}


def loaded(run_dir, step):
    values = {"model": {"w": torch.empty(1000)}}
    with state.local_copy(run_dir, step) as directory:
        state.load(values, directory)
    return values["model"]["w"]


@pytest.fixture
def slow(monkeypatch):
    """Hold writes back until the event is set."""
    released, real = threading.Event(), state.write

    def write(*arguments):
        assert released.wait(30)
        real(*arguments)

    monkeypatch.setattr(state, "write", write)
    return released


def test_what_is_saved_is_the_state_at_the_call_and_training_goes_on(run, slow):
    run_dir, saver = run
    values = some_state(1.0)
    began = time.monotonic()
    saver.save(values, 1)
    assert time.monotonic() - began < 5 and store.complete_steps(run_dir) == []
    values["model"]["w"].fill_(2.0)
    slow.set()
    saver.wait()
    assert torch.equal(loaded(run_dir, 1), torch.ones(1000))
    assert saver.last_save_s is not None and not saver.failed


def test_one_save_is_in_flight_and_the_next_waits_for_its_commit(run, slow):
    run_dir, saver = run
    saver.save(some_state(), 1)
    threading.Timer(0.3, slow.set).start()
    saver.save(some_state(), 2)
    assert store.complete_steps(run_dir) == [1]
    saver.close()
    assert store.complete_steps(run_dir) == [2]


def test_a_failed_save_is_told_at_the_next_call_and_leaves_the_one_before(run, monkeypatch):
    run_dir, saver = run
    saver.save(some_state(), 1)
    saver.wait()

    def full(values, directory, group):
        (directory / "half").write_bytes(b"0" * 100)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state, "write", full)
    saver.save(some_state(), 2)
    with pytest.raises(SaveFailed, match=r"step 2 was not saved: .*No space left on device") as caught:
        saver.save(some_state(), 3)
    assert "\n" not in str(caught.value)
    assert store.complete_steps(run_dir) == [1]
    assert not (run_dir / "checkpoints" / "step_00000002" / "a1").exists()


def test_a_full_scratch_disk_is_told_like_any_failed_save(run, monkeypatch):
    _, saver = run
    monkeypatch.setattr(saver_module, "is_local", lambda path: False)

    def full(base, num_bytes):
        raise OSError(f"{num_bytes} bytes do not fit")

    monkeypatch.setattr(saver_module.transfer, "scratch", full)
    saver.save(some_state(), 1)
    with pytest.raises(SaveFailed, match="step 1 was not saved: 4000 bytes do not fit"):
        saver.wait()


def test_what_cannot_be_removed_does_not_undo_a_commit(run, monkeypatch, capsys):
    run_dir, saver = run

    def refuse(*arguments):
        raise PermissionError("no right to delete")

    monkeypatch.setattr(store, "clean", refuse)
    saver.save(some_state(), 1)
    saver.wait()
    assert store.complete_steps(run_dir) == [1]
    assert "old checkpoints were not removed: no right to delete" in capsys.readouterr().err


def test_an_attempt_that_was_taken_over_is_fenced(run, slow):
    run_dir, saver = run
    saver.save(some_state(), 1)
    saver.attempt.close()
    with start_attempt(run_dir, log=str) as successor:
        store.adopt(run_dir, successor, 0)
        slow.set()
        with pytest.raises(Fenced, match="taken over"):
            saver.wait()
    assert store.complete_steps(run_dir) == []


def test_what_fails_on_one_rank_fails_on_all_and_the_next_save_works(tmp_path):
    tests = Path(__file__).parents[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    ended = subprocess.run(
        [*command, str(tests / "checkpoint" / "saver_ranks.py"), str(tmp_path / "run")],
        env=os.environ | {"PYTHONPATH": str(tests.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    for rank in range(2):
        failure = json.loads((tmp_path / f"run-{rank}.json").read_text())
        assert failure.startswith("step 2 was not saved:") and failure.endswith("(rank 1)")
    assert store.complete_steps(tmp_path / "run") == [1, 3]
