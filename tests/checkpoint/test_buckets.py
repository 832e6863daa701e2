"""A run's whole life in emulated buckets: what is promised on a disk holds there, at few requests."""

import hashlib
import socket
import time
from pathlib import Path

import pytest
from buckets import Gate, bucket_root, gate, gcs_bucket, s3_bucket

from ul_scale.checkpoint import attempts, files, store, transfer
from ul_scale.checkpoint.attempts import Attempt, Fenced, RunBusy, start_attempt
from ul_scale.checkpoint.files import run_path
from ul_scale.checkpoint.store import BrokenCheckpoint

__all__ = ["bucket_root", "gate", "gcs_bucket", "s3_bucket"]

NAMES = ("__0_0.distcp", "__1_0.distcp", ".metadata")


@pytest.fixture
def run_dir(bucket_root: str) -> Path:
    return run_path(bucket_root) / "run"


@pytest.fixture
def dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every attempt of this test belong to a process that is gone."""
    identity = attempts._identity() | {"pid": 2**22 + 1, "process_start": 1}
    monkeypatch.setattr(attempts, "_identity", lambda: identity)


def begin(run_dir: Path, resumes_from: int = 0) -> Attempt:
    attempt = start_attempt(run_dir, log=str)
    attempt._closed.set()
    store.adopt(run_dir, attempt, resumes_from)
    return attempt


def write_shards(folder: Path, step: int) -> None:
    for name in NAMES:
        (folder / name).write_bytes(f"{name} at step {step}\n".encode() * 50)


def save(run_dir: Path, attempt: Attempt, step: int) -> None:
    directory = store.checkpoint_dir(run_dir, step, attempt.number)
    with transfer.scratch() as folder:
        write_shards(folder, step)
        infos = transfer.upload(folder, directory)
    store.commit(run_dir, step, attempt, infos)


def check(run_dir: Path, step: int, folder: Path) -> None:
    store.verify(run_dir, step)
    folder.mkdir()
    transfer.download(store.shard_dir(run_dir, step), folder, store.read_commit(run_dir, step).files)
    assert {path.name for path in folder.iterdir()} == set(NAMES)
    assert (folder / NAMES[0]).read_bytes() == f"{NAMES[0]} at step {step}\n".encode() * 50


def objects(run_dir: Path) -> list[str]:
    return [name for name in files.sizes(run_dir) if not name.startswith("attempts/")]


def test_life_of_a_run(run_dir: Path, dead: None, tmp_path: Path):
    assert store.latest_step(run_dir) is None
    first = begin(run_dir)
    for step in (10, 20, 30, 40):
        save(run_dir, first, step)
        store.clean(run_dir, first, keep_last=1, keep_steps=[10])
    assert store.complete_steps(run_dir) == [10, 40]
    with pytest.raises(FileExistsError, match="step_00000040 is complete already"):
        store.checkpoint_dir(run_dir, 40, 1)
    left = store.checkpoint_dir(run_dir, 50, 1)
    files.write_atomic(left / NAMES[0], b"half")
    second = begin(run_dir, 40)
    assert (second.number, files.list_names(left.parent)) == (2, [])
    save(run_dir, second, 50)
    store.clean(run_dir, second, keep_last=1)
    steps = [f"checkpoints/step_00000050/{name}" for name in ("COMMIT", *(f"a2/{n}" for n in sorted(NAMES)))]
    assert objects(run_dir) == steps
    store.write_success(run_dir, 50, second)
    assert store.read_success(run_dir) == 50
    check(run_dir, 50, tmp_path / "copy")
    store.discard(run_dir, 50, second)
    assert objects(run_dir) == ["SUCCESS"]


def test_a_run_is_taken_over_from_an_attempt_that_is_silent(run_dir: Path):
    path = attempts.attempt_path(run_dir, 1)
    far = {
        "attempt": 1,
        "token": "x",
        "host": "far-away",
        "boot_id": "other",
        "resumes_from": 0,
        "heartbeat": 0,
    }
    files.write_atomic(path, files.encode(far | {"pid": 1, "pid_namespace": "pid:[1]", "ended": False}))
    with start_attempt(run_dir, timeout_s=0.4, heartbeat_s=0.1, log=str) as second:
        assert second.number == 2
        while files.decode(files.read(second.path))["heartbeat"] < 2:
            time.sleep(0.02)
        with pytest.raises(RunBusy, match=f"in use by attempt 2, process .* on {socket.gethostname()}"):
            start_attempt(run_dir, log=str)
    assert files.decode(files.read(second.path))["ended"] is True


def test_a_dead_attempt_is_fenced_and_its_late_commit_void(
    run_dir: Path, dead: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    first = begin(run_dir)
    save(run_dir, first, 10)
    second = begin(run_dir, 10)
    with pytest.raises(Fenced, match=r"attempt 1 may not commit step 20: the run was taken over"):
        save(run_dir, first, 20)
    # It had asked whether it is newest just before it was taken over.
    monkeypatch.setattr(first, "require_newest", lambda action: None)
    for step in (20, 30):
        files.remove_tree(run_dir / f"checkpoints/step_{step:08d}")
        save(run_dir, first, step)
    assert files.read(run_dir / "checkpoints/step_00000020/COMMIT") and store.complete_steps(run_dir) == [10]
    save(run_dir, second, 20)
    assert store.complete_steps(run_dir) == [10, 20] and store.read_commit(run_dir, 20).attempt == 2
    store.clean(run_dir, second, keep_last=2)
    assert {name.split("/")[1] for name in objects(run_dir)} == {"step_00000010", "step_00000020"}
    check(run_dir, 20, tmp_path / "copy")


@pytest.mark.parametrize("damage", ["truncated", "corrupted", "gone"])
def test_damage_is_found_and_named(run_dir: Path, dead: None, damage: str, tmp_path: Path):
    attempt = begin(run_dir)
    save(run_dir, attempt, 10)
    save(run_dir, attempt, 20)
    path = store.shard_dir(run_dir, 20) / NAMES[1]
    data = files.read(path)
    assert data is not None
    if damage == "gone":
        files.remove_tree(path)
    else:
        files.write_atomic(path, data[:-1] if damage == "truncated" else b"X" + data[1:])
    said = {
        "truncated": f"{path} has {len(data) - 1} bytes, expected {len(data)} bytes",
        "corrupted": f"{path} has sha256 {hashlib.sha256(b'X' + data[1:]).hexdigest()}, expected ",
        "gone": f"{path} is missing, expected {len(data)} bytes",
    }[damage]
    with pytest.raises(BrokenCheckpoint, match=said):
        store.verify(run_dir, 20)
    with pytest.raises(BrokenCheckpoint, match=said):
        transfer.download(store.shard_dir(run_dir, 20), tmp_path, store.read_commit(run_dir, 20).files)
    if damage != "corrupted":  # What has the right size is believed until it is loaded.
        store.clean(run_dir, attempt, keep_last=1)
    assert store.complete_steps(run_dir) == [10, 20]
    store.verify(run_dir, 10)


def test_a_bucket_that_turns_read_only_keeps_the_earlier_checkpoint(gate: Gate, run_dir: Path, dead: None):
    attempt = begin(run_dir)
    save(run_dir, attempt, 10)
    gate.refuse = lambda method, url: None if method in ("GET", "HEAD") else 403
    with pytest.raises(PermissionError, match="cannot upload: permission denied") as denied:
        save(run_dir, attempt, 20)
    assert "\n" not in str(denied.value)
    assert store.complete_steps(run_dir) == [10]
    gate.refuse = lambda method, url: None
    store.verify(run_dir, 10)
    save(run_dir, attempt, 20)
    assert store.complete_steps(run_dir) == [10, 20]


def test_a_read_only_bucket_takes_no_attempt(gate: Gate, run_dir: Path):
    gate.refuse = lambda method, url: None if method in ("GET", "HEAD") else 403
    with pytest.raises(PermissionError, match=r"attempts/1.json: cannot write: permission denied"):
        start_attempt(run_dir, log=str)


def test_a_store_that_ignores_conditions_is_refused(run_dir: Path, monkeypatch: pytest.MonkeyPatch):
    fs = run_dir.fs
    pipe_file = fs.pipe_file
    monkeypatch.setattr(fs, "pipe_file", lambda key, data, mode="": pipe_file(key, data))
    with pytest.raises(
        OSError, match=r"1.json could be created twice: this store ignores conditional writes"
    ):
        start_attempt(run_dir, log=str)


def test_heartbeat_goes_on_after_an_outage(gate: Gate, run_dir: Path):
    lines: list[str] = []
    with start_attempt(run_dir, heartbeat_s=0.05, log=lines.append) as attempt:
        gate.refuse = lambda method, url: 503
        while not lines:
            time.sleep(0.02)
        gate.refuse = lambda method, url: None
        before = files.decode(files.read(attempt.path))["heartbeat"]
        while files.decode(files.read(attempt.path))["heartbeat"] <= before:
            time.sleep(0.02)
    assert lines[0].startswith(f"heartbeat of attempt 1 failed: {attempt.path}: cannot ")


def test_what_does_not_change_is_not_read_again(gate: Gate, run_dir: Path, dead: None):
    """A run that was preempted often, with several checkpoints that stay."""
    for n in range(1, 13):
        record = {"attempt": n, "token": str(n), "resumes_from": 0, "ended": True}
        files.write_atomic(attempts.attempt_path(run_dir, n), files.encode(record))
    attempt = begin(run_dir)
    for step in (10, 20, 30):
        save(run_dir, attempt, step)
    assert store.complete_steps(run_dir) == [10, 20, 30]
    gate.seen.clear()
    assert store.complete_steps(run_dir) == [10, 20, 30]
    # Two listings and three COMMITs, each of which s3fs asks for twice, but not 13 attempts.
    assert len(gate.seen) <= 8
    gate.seen.clear()
    store.clean(run_dir, attempt, keep_last=2, keep_every_steps=10)
    assert len(gate.seen) <= 24 and all(method in ("GET", "HEAD") for method, _ in gate.seen)
    attempt.set_resumes_from(20)
    assert store._resume_points(run_dir) == dict.fromkeys(range(1, 13), 0) | {13: 20}
