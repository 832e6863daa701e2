"""The commit protocol under attack: kills, errors, sleeps and power loss at every single file operation."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from ul_scale.checkpoint import attempts, store
from ul_scale.checkpoint.attempts import Attempt, Fenced, start_attempt
from ul_scale.checkpoint.store import BrokenCheckpoint, CheckpointConfig

SHARDS = ("__0_0.distcp", "extra/rng.bin")
OPERATIONS = ("open", "write", "fsync", "link", "replace", "rename", "unlink", "rmdir", "mkdir", "listdir")


# One life of a run, in small ----------------------------------------------------------------------


def content(step: int, name: str) -> bytes:
    return f"{name} at step {step}\n".encode() * 20


def write_shards(directory: Path, step: int) -> None:
    for name in SHARDS:
        attempts.make_dirs((directory / name).parent)
        fd = os.open(directory / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            data = content(step, name)
            while data:
                data = data[os.write(fd, data) :]
        finally:
            os.close(fd)


def save(run_dir: Path, attempt: Attempt, step: int) -> None:
    directory = store.checkpoint_dir(run_dir, step, attempt.number)
    write_shards(directory, step)
    store.commit(run_dir, step, attempt, store.hash_files(directory))


def resume(run_dir: Path, attempt: Attempt) -> int:
    """Go on from the newest checkpoint that loads."""
    for step in [*reversed(store.complete_steps(run_dir)), 0]:
        with contextlib.suppress(BrokenCheckpoint):
            if step:
                store.verify(run_dir, step)
            break
    store.adopt(run_dir, attempt, step)
    return step


class Life:
    """A process that resumes, saves a few times, keeping one checkpoint, and dies, if not before."""

    def __init__(self, run_dir: Path, saves: int = 2):
        self.run_dir, self.saves = run_dir, saves
        self.number = 0
        self.resumed_from: int | None = None
        self.committed: list[int] = []

    def live(self) -> None:
        # Patience is needed only with an attempt file that is torn.
        attempt = start_attempt(self.run_dir, timeout_s=0.2, heartbeat_s=0.09, log=str)
        # The heartbeat thread dies with its process.
        attempt._closed.set()
        self.number = attempt.number
        self.resumed_from = resume(self.run_dir, attempt)
        for step in range(self.resumed_from + 10, self.resumed_from + 10 * self.saves + 1, 10):
            save(self.run_dir, attempt, step)
            self.committed.append(step)
            store.clean(self.run_dir, attempt, keep_last=1)


def check_reader(run_dir: Path, at_least: int) -> None:
    """Whatever happened: the newest checkpoint is there, and all that are shown are whole."""
    steps = store.complete_steps(run_dir)
    assert steps and steps[-1] >= at_least
    for step in steps:
        store.verify(run_dir, step)
        found = {name: (store.shard_dir(run_dir, step) / name).read_bytes() for name in SHARDS}
        assert found == {name: content(step, name) for name in SHARDS}


def check_recovery(run_dir: Path, at_least: int) -> None:
    """The next life goes on from there and leaves nothing but what belongs."""
    life = Life(run_dir)
    life.live()
    assert life.resumed_from is not None and life.resumed_from >= at_least
    (step,) = store.complete_steps(run_dir)
    assert step == life.committed[-1]
    check_reader(run_dir, step)
    assert os.listdir(run_dir / "checkpoints") == [f"step_{step:08d}"]
    newest = max(attempts.attempt_numbers(run_dir))
    assert set(os.listdir(store.shard_dir(run_dir, step).parent)) == {f"a{newest}", "COMMIT"}
    # Of a rival that died while creating the same attempt, a file may stay until the next one.
    assert all(re.match(rf"\d+\.json$|\.{newest}\.", name) for name in os.listdir(run_dir / "attempts"))


# What may befall it -------------------------------------------------------------------------------


class Killed(BaseException):
    pass


class Faults:
    """Counts this thread's file operations and calls ``strike`` before or after the chosen one.

    A chosen write gets half of its bytes out first.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.trace: list[tuple[str, tuple]] = []
        self.thread: int | None = None
        self.chosen, self.when = -1, "before"
        self.strike: Callable[[], None] = lambda: None
        for name in OPERATIONS:
            monkeypatch.setattr(os, name, self._wrap(name, getattr(os, name)))

    def _wrap(self, name: str, real: Callable):
        def call(*args, **kwargs):
            if threading.get_ident() != self.thread:
                return real(*args, **kwargs) if name != "fsync" else None
            self.trace.append((name, args))
            chosen = len(self.trace) - 1 == self.chosen
            if chosen and name == "write" and len(args[1]) > 1:
                written = real(args[0], args[1][: len(args[1]) // 2])
                self.strike()
                return written
            if chosen and self.when == "before":
                self.strike()
            # The power stays on here, and a real flush takes long.
            result = real(*args, **kwargs) if name != "fsync" else None
            if chosen and self.when == "after":
                self.strike()
            return result

        return call

    @contextlib.contextmanager
    def at(self, chosen: int, when: str, strike: Callable[[], None]) -> Iterator[None]:
        self.trace, self.chosen, self.when, self.strike = [], chosen, when, strike
        self.thread = threading.get_ident()
        try:
            yield
        finally:
            self.thread = None

    def kill(self) -> None:
        """End the process: not even its clean-up code gets to do anything any more."""
        self.chosen += 1
        self.when = "before"
        raise Killed


@pytest.fixture
def dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every attempt of this test belong to a process that is gone."""
    identity = attempts._identity() | {"pid": 2**22 + 1, "process_start": 1}
    monkeypatch.setattr(attempts, "_identity", lambda: identity)


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch, dead: None) -> Faults:
    # Starting thousands of threads would take most of the time here.
    pool = contextlib.nullcontext(SimpleNamespace(map=map))
    monkeypatch.setattr(store, "ThreadPoolExecutor", lambda workers: pool)
    return Faults(monkeypatch)


@pytest.fixture
def history(faults: Faults) -> Iterator[Path]:
    """A run at step 20, with all that may lie about: damage, late commits, torn and half-saved steps."""
    # In memory if possible: this copies and removes many small files.
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as directory:
        yield make_history(Path(directory) / "history")


def make_history(run_dir: Path) -> Path:
    first = start_attempt(run_dir, log=str)
    store.adopt(run_dir, first, 0)
    for step in (10, 20, 30):
        save(run_dir, first, step)
    (store.shard_dir(run_dir, 30) / SHARDS[0]).write_bytes(b"")
    write_shards(store.checkpoint_dir(run_dir, 40, 1), 40)
    attempts.make_dirs(run_dir / "checkpoints/step_00000005/a1")
    attempts.make_dirs(run_dir / "checkpoints/step_00000050/a1")
    (run_dir / "checkpoints/step_00000050/COMMIT").write_bytes(b'{"attempt": 1, "st')
    (run_dir / "checkpoints/step_00000020/.COMMIT.0.tmp").touch()
    (run_dir / "attempts/.1.json.0.tmp").touch()
    first._closed.set()
    return run_dir


def fresh(history: Path) -> Path:
    run_dir = history.with_name("run")
    shutil.rmtree(run_dir, ignore_errors=True)
    shutil.copytree(history, run_dir)
    return run_dir


def no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(os, "link", link)


def operations(history: Path, faults: Faults) -> list[int]:
    """Return the places in an undisturbed life at which something may befall it, all but the listings."""
    life = Life(fresh(history))
    with faults.at(-1, "before", lambda: None):
        life.live()
    assert (life.resumed_from, life.committed) == (20, [30, 40])
    places = [k for k, (name, _) in enumerate(faults.trace) if name != "listdir"]
    assert len(places) > 100
    return places


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_killed_at_every_operation(history: Path, faults: Faults, monkeypatch, links: bool):
    if not links:
        no_links(monkeypatch)
    for k in operations(history, faults)[:: 1 if links else 4]:
        life = Life(fresh(history))
        with faults.at(k, "before", faults.kill), contextlib.suppress(Killed):
            life.live()
        # The damaged step 30 is shown until it has been found out.
        if life.resumed_from is not None:
            check_reader(life.run_dir, max([20, *life.committed]))
        check_recovery(life.run_dir, max([20, *life.committed]))


def test_killed_again_while_recovering(history: Path, faults: Faults):
    places = operations(history, faults)
    for k in places[::13]:
        for again in places[k % 31 :: 31]:
            first, second = Life(fresh(history)), Life(history.with_name("run"))
            with faults.at(k, "before", faults.kill), contextlib.suppress(Killed):
                first.live()
            with faults.at(again, "before", faults.kill), contextlib.suppress(Killed):
                second.live()
            check_recovery(first.run_dir, max([20, *first.committed, *second.committed]))


@pytest.mark.parametrize("when, code", [("before", errno.ENOSPC), ("after", errno.EIO)])
def test_error_at_every_operation(history: Path, faults: Faults, code: int, when: str):
    """The process lives on after the error and may well clean up; the run loses nothing by either."""

    def fail() -> None:
        raise OSError(code, os.strerror(code))

    for k in operations(history, faults)[::3]:
        life = Life(fresh(history))
        with faults.at(k, when, fail), contextlib.suppress(OSError):
            life.live()
        if life.resumed_from is not None:
            check_reader(life.run_dir, max([20, *life.committed]))
        check_recovery(life.run_dir, max([20, *life.committed]))


@pytest.mark.parametrize("saves", [0, 2])
def test_sleeping_at_every_operation(history: Path, faults: Faults, saves: int):
    """A process stops at operation k, is thought dead and taken over, and then wakes up and goes on."""
    fates = set()
    # Each case takes every other place.
    for k in operations(history, faults)[saves // 2 :: 2]:
        sleeper, successor = Life(fresh(history)), Life(history.with_name("run"), saves)
        asleep, wake, end = threading.Event(), threading.Event(), []

        def sleep(asleep=asleep, wake=wake) -> None:
            asleep.set()
            assert wake.wait(20)

        def run(life=sleeper, k=k, sleep=sleep, end=end) -> None:
            try:
                with faults.at(k, "before", sleep):
                    life.live()
                end.append("done")
            except BaseException as error:
                end.append(type(error).__name__)

        thread = threading.Thread(target=run)
        thread.start()
        assert asleep.wait(20)
        before = list(sleeper.committed)
        successor.live()
        wake.set()
        thread.join()
        fates |= set(end)
        assert successor.resumed_from >= max([20, *before])
        at_least = max([successor.resumed_from, *successor.committed])
        if sleeper.number > successor.number:
            # It had not become an attempt yet, and now succeeds the successor.
            assert sleeper.resumed_from == at_least
            at_least = sleeper.committed[-1]
        else:
            # A step may be called committed only if whoever comes later sees it.
            assert all(step <= successor.resumed_from for step in sleeper.committed)
        check_reader(sleeper.run_dir, at_least)
        check_recovery(sleeper.run_dir, at_least)
    # FileNotFoundError: it was writing shards when the successor removed them.
    assert fates == {"Fenced", "done", "FileNotFoundError"}


# The promises, one by one -------------------------------------------------------------------------


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


def begin(run_dir: Path, resumes_from: int = 0) -> Attempt:
    attempt = start_attempt(run_dir, log=str)
    attempt._closed.set()
    store.adopt(run_dir, attempt, resumes_from)
    return attempt


def commit_file(run_dir: Path, step: int) -> Path:
    return run_dir / f"checkpoints/step_{step:08d}/COMMIT"


def test_layout(run_dir: Path, dead: None):
    attempt = begin(run_dir)
    assert store.latest_step(run_dir) is None and store.complete_steps(run_dir) == []
    save(run_dir, attempt, 12000)
    said = json.loads(commit_file(run_dir, 12000).read_text())
    assert commit_file(run_dir, 12000).parent.name == "step_00012000"
    assert said == {"run": run_dir.name, "attempt": 1, "step": 12000, "files": said["files"]}
    data = content(12000, SHARDS[0])
    assert said["files"][SHARDS[0]] == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert set(said["files"]) == set(SHARDS)
    assert store.shard_dir(run_dir, 12000) == commit_file(run_dir, 12000).parent / "a1"
    assert store.read_commit(run_dir, 12000) == store.Commit(**said)
    store.verify(run_dir, 12000)
    with pytest.raises(FileNotFoundError, match=r"no complete checkpoint at step 7; complete: \[12000\]"):
        store.verify(run_dir, 7)


def test_hashes_are_shared_out_by_prefix(tmp_path: Path):
    write_shards(tmp_path, 1)
    (tmp_path / ".metadata").write_bytes(b"m")
    assert set(store.hash_files(tmp_path)) == {*SHARDS, ".metadata"}
    assert set(store.hash_files(tmp_path, prefixes=("__0_", ".meta"))) == {SHARDS[0], ".metadata"}


def test_uncommitted_and_torn_steps_are_invisible(run_dir: Path, dead: None):
    attempt = begin(run_dir)
    save(run_dir, attempt, 10)
    write_shards(store.checkpoint_dir(run_dir, 20, 1), 20)
    assert store.complete_steps(run_dir) == [10]
    for torn in (b"", commit_file(run_dir, 10).read_bytes()[:-9], b'{"attempt": 1, "step": 20}', b"[1]"):
        commit_file(run_dir, 20).write_bytes(torn)
        assert store.complete_steps(run_dir) == [10]
    save(run_dir, attempt, 20)
    check_reader(run_dir, 20)


def test_verify_names_file_expected_and_found(run_dir: Path, dead: None):
    attempt = begin(run_dir)
    save(run_dir, attempt, 10)
    path = store.shard_dir(run_dir, 10) / SHARDS[0]
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(
        BrokenCheckpoint, match=f"{path} has {len(data) - 1} bytes, expected {len(data)} bytes"
    ):
        store.verify(run_dir, 10)
    path.write_bytes(b"X" + data[1:])
    was, now = (hashlib.sha256(x).hexdigest() for x in (data, b"X" + data[1:]))
    with pytest.raises(BrokenCheckpoint, match=f"{path} has sha256 {now}, expected {was}"):
        store.verify(run_dir, 10)
    path.unlink()
    with pytest.raises(BrokenCheckpoint, match=f"{path} is missing"):
        store.verify(run_dir, 10)


def test_incomplete_shards_are_not_committed(run_dir: Path, dead: None):
    attempt = begin(run_dir)
    directory = store.checkpoint_dir(run_dir, 10, 1)
    with pytest.raises(BrokenCheckpoint, match="no files"):
        store.commit(run_dir, 10, attempt, {})
    write_shards(directory, 10)
    files = store.hash_files(directory)
    (directory / SHARDS[1]).write_bytes(b"")
    with pytest.raises(BrokenCheckpoint, match="has 0 bytes"):
        store.commit(run_dir, 10, attempt, files)
    assert store.latest_step(run_dir) is None


def test_a_step_is_saved_once(run_dir: Path, dead: None):
    attempt = begin(run_dir)
    save(run_dir, attempt, 10)
    with pytest.raises(FileExistsError, match="step_00000010 is complete already"):
        store.checkpoint_dir(run_dir, 10, 1)
    assert store.checkpoint_dir(run_dir, 10, 1, create=False).is_dir()
    (store.shard_dir(run_dir, 10) / "more").write_bytes(b"more")
    with pytest.raises(FileExistsError, match="step_00000010 is complete already"):
        store.commit(run_dir, 10, attempt, store.hash_files(store.shard_dir(run_dir, 10)))
    check_reader(run_dir, 10)


def test_adoption_comes_before_saving(run_dir: Path, dead: None):
    attempt = start_attempt(run_dir, log=str)
    with pytest.raises(ValueError, match="attempt 1 must adopt"):
        store.checkpoint_dir(run_dir, 10, 1)
    with pytest.raises(ValueError, match="adopted"):
        store.clean(run_dir, attempt, keep_last=1)


def test_adoption_cannot_throw_everything_away(run_dir: Path, dead: None):
    first = begin(run_dir)
    save(run_dir, first, 10)
    second = start_attempt(run_dir, log=str)
    for wrong in (0, 5, 20):
        with pytest.raises(ValueError, match=rf"cannot continue from step {wrong}; complete: \[10\]"):
            store.adopt(run_dir, second, wrong)
    store.discard(run_dir, 10, second)
    store.adopt(run_dir, second, 0)
    assert os.listdir(run_dir / "checkpoints") == []


def test_a_dead_attempt_is_refused(run_dir: Path, dead: None):
    first = begin(run_dir)
    save(run_dir, first, 10)
    directory = store.checkpoint_dir(run_dir, 20, 1)
    write_shards(directory, 20)
    files = store.hash_files(directory)
    start_attempt(run_dir, log=str)
    for act in (
        lambda: store.commit(run_dir, 20, first, files),
        lambda: store.clean(run_dir, first, keep_last=1),
        lambda: store.discard(run_dir, 10, first),
        lambda: store.adopt(run_dir, first, 10),
        lambda: store.write_success(run_dir, 10, first),
    ):
        with pytest.raises(Fenced, match=r"attempt 1 may not .*taken over"):
            act()
    assert store.complete_steps(run_dir) == [10] and store.read_success(run_dir) is None


def test_a_late_commit_of_a_dead_attempt_is_void(run_dir: Path, dead: None, monkeypatch: pytest.MonkeyPatch):
    first = begin(run_dir)
    save(run_dir, first, 10)
    second = begin(run_dir, resumes_from=10)
    # It had asked whether it is newest just before it was taken over.
    monkeypatch.setattr(first, "require_newest", lambda action: None)
    save(run_dir, first, 20)
    save(run_dir, first, 30)
    assert commit_file(run_dir, 20).exists() and store.complete_steps(run_dir) == [10]
    save(run_dir, second, 20)
    assert store.complete_steps(run_dir) == [10, 20] and store.read_commit(run_dir, 20).attempt == 2
    store.clean(run_dir, second, keep_last=2)
    assert os.listdir(commit_file(run_dir, 30).parent) == []
    check_reader(run_dir, 20)
    assert {p.name for p in commit_file(run_dir, 20).parent.iterdir()} == {"a2", "COMMIT"}


def test_a_late_commit_while_the_same_step_is_being_saved(run_dir: Path, dead: None, monkeypatch):
    first, second = begin(run_dir), begin(run_dir)
    monkeypatch.setattr(first, "require_newest", lambda action: None)
    directory = store.checkpoint_dir(run_dir, 20, 2)
    write_shards(directory, 20)
    save(run_dir, first, 20)
    assert store.complete_steps(run_dir) == []
    store.clean(run_dir, second, keep_last=1)
    save(run_dir, first, 20)
    store.commit(run_dir, 20, second, store.hash_files(directory))
    assert store.read_commit(run_dir, 20).attempt == 2
    check_reader(run_dir, 20)


def test_a_commit_that_races_with_a_takeover_is_not_reported(run_dir: Path, dead: None, monkeypatch):
    """The successor has decided on its step; the COMMIT lands before it has cleared what lies above."""
    first = begin(run_dir)
    create_exclusive = attempts.create_exclusive

    def taken_over_meanwhile(path: Path, data: bytes) -> bool:
        start_attempt(run_dir, log=str).set_resumes_from(0)
        return create_exclusive(path, data)

    monkeypatch.setattr(store, "create_exclusive", taken_over_meanwhile)
    with pytest.raises(Fenced, match=r"attempt 1 may not commit step 10.*newest attempt: 2"):
        save(run_dir, first, 10)
    assert commit_file(run_dir, 10).exists() and store.complete_steps(run_dir) == []


def test_going_back_past_a_damaged_checkpoint(run_dir: Path, dead: None):
    first = begin(run_dir)
    for step in (10, 20, 30):
        save(run_dir, first, step)
    (store.shard_dir(run_dir, 30) / SHARDS[0]).unlink()
    second = start_attempt(run_dir, log=str)
    assert resume(run_dir, second) == 20
    assert store.complete_steps(run_dir) == [10, 20] and not commit_file(run_dir, 30).parent.exists()
    save(run_dir, second, 30)
    assert store.complete_steps(run_dir) == [10, 20, 30]
    check_reader(run_dir, 30)


def test_retention(run_dir: Path, dead: None):
    attempt = begin(run_dir)
    for step in range(10, 80, 10):
        save(run_dir, attempt, step)
    store.clean(run_dir, attempt, keep_last=2, keep_steps=[20, 40])
    assert store.complete_steps(run_dir) == [20, 40, 60, 70]
    store.clean(run_dir, attempt, keep_last=5)
    assert store.complete_steps(run_dir) == [20, 40, 60, 70]
    store.clean(run_dir, attempt, keep_last=1, keep_steps=[40])
    assert store.complete_steps(run_dir) == [40, 70]
    store.clean(run_dir, attempt, keep_last=1)
    store.clean(run_dir, attempt, keep_last=1)
    check_reader(run_dir, 70)
    assert os.listdir(run_dir / "checkpoints") == ["step_00000070"]
    with pytest.raises(ValueError, match="keep_last=0"):
        store.clean(run_dir, attempt, keep_last=0)


def test_multiples_stay(run_dir: Path, dead: None):
    attempt = begin(run_dir)
    for step in range(10, 80, 10):
        save(run_dir, attempt, step)
        store.clean(run_dir, attempt, keep_last=1, keep_steps=[10], keep_every_steps=30)
    assert store.complete_steps(run_dir) == [10, 30, 60, 70]


def test_the_format_of_other_shards_is_said(run_dir: Path, dead: None):
    attempt = begin(run_dir)
    for step, options in ((10, {}), (20, {"format": "deepspeed"})):
        directory = store.checkpoint_dir(run_dir, step, attempt.number)
        write_shards(directory, step)
        store.commit(run_dir, step, attempt, store.hash_files(directory), **options)
    assert [store.read_commit(run_dir, step).format for step in (10, 20)] == ["dcp", "deepspeed"]
    assert "format" not in json.loads(commit_file(run_dir, 10).read_text())
    store.verify(run_dir, 20)


def test_a_complete_checkpoint_is_replaced_in_one_instant(run_dir: Path, dead: None):
    save(run_dir, begin(run_dir), 10)
    second = begin(run_dir, 10)
    directory = store.checkpoint_dir(run_dir, 10, 2, replaces=True)
    write_shards(directory, 10)
    check_reader(run_dir, 10)
    store.commit(run_dir, 10, second, store.hash_files(directory), replaces=True)
    assert store.shard_dir(run_dir, 10) == directory
    with pytest.raises(FileExistsError):
        store.checkpoint_dir(run_dir, 10, 2, replaces=True)
    store.clean(run_dir, second, keep_last=1)
    assert sorted(os.listdir(directory.parent)) == ["COMMIT", "a2"]
    check_reader(run_dir, 10)


def test_ranks_share_out_the_verification(run_dir: Path, dead: None):
    attempt = begin(run_dir)
    save(run_dir, attempt, 10)
    path = store.shard_dir(run_dir, 10) / SHARDS[1]
    path.write_bytes(b"X" + path.read_bytes()[1:])
    store.verify(run_dir, 10, part=(0, 2))
    with pytest.raises(BrokenCheckpoint, match=f"{path} has sha256"):
        store.verify(run_dir, 10, part=(1, 2))
    store.verify(run_dir, 10, part=(2, 3))


def test_a_damaged_newest_checkpoint_replaces_none(run_dir: Path, dead: None):
    attempt = begin(run_dir)
    for step in (10, 20, 30):
        save(run_dir, attempt, step)
    (store.shard_dir(run_dir, 30) / SHARDS[0]).unlink()
    store.clean(run_dir, attempt, keep_last=1)
    assert store.complete_steps(run_dir) == [20, 30]
    store.verify(run_dir, 20)


def test_cleaning_leaves_a_save_under_way_alone(run_dir: Path, dead: None):
    first = begin(run_dir)
    for step in (10, 20):
        write_shards(store.checkpoint_dir(run_dir, step, 1), step)
    attempt = begin(run_dir)
    write_shards(store.checkpoint_dir(run_dir, 10, 2), 10)
    save(run_dir, attempt, 20)
    save(run_dir, attempt, 30)
    under_way = store.checkpoint_dir(run_dir, 40, 2)
    write_shards(under_way, 40)
    store.clean(run_dir, attempt, keep_last=1)
    assert sorted(os.listdir(run_dir / "checkpoints")) == ["step_00000030", "step_00000040"]
    store.commit(run_dir, 40, attempt, store.hash_files(under_way))
    check_reader(run_dir, 40)
    assert not first.is_newest()


def test_shards_are_emptied_before_they_are_written_anew(run_dir: Path, dead: None):
    begin(run_dir)
    (store.checkpoint_dir(run_dir, 10, 1) / "left over").touch()
    assert os.listdir(store.checkpoint_dir(run_dir, 10, 1)) == []


@pytest.mark.parametrize("room", [0, 100, 600, 980, 1100])
def test_a_full_disk_costs_the_save_only(run_dir: Path, dead: None, monkeypatch, room: int):
    attempt = begin(run_dir)
    save(run_dir, attempt, 10)
    write = os.write

    def write_while_there_is_room(fd: int, data: bytes) -> int:
        nonlocal room
        if room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = write(fd, data[:room])
        room -= written
        return written

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write_while_there_is_room)
        with pytest.raises(OSError, match="No space left"):
            save(run_dir, attempt, 20)
        store.clean(run_dir, attempt, keep_last=1)
    assert store.complete_steps(run_dir) == [10]
    check_reader(run_dir, 10)
    save(run_dir, attempt, 30)
    store.clean(run_dir, attempt, keep_last=1)
    check_reader(run_dir, 30)
    assert os.listdir(run_dir / "checkpoints") == ["step_00000030"]


def test_power_may_fail_any_time(run_dir: Path, faults: Faults):
    """What COMMIT vouches for is flushed before it, and it is flushed before anything older goes."""
    attempt = begin(run_dir)
    save(run_dir, attempt, 10)
    with faults.at(-1, "before", lambda: None):
        save(run_dir, attempt, 20)
        store.clean(run_dir, attempt, keep_last=1)
    new, old = commit_file(run_dir, 20).parent, commit_file(run_dir, 10).parent
    flushed: list[str] = []
    opened = ""
    committed = gone = 0
    for place, (name, args) in enumerate(faults.trace):
        if name == "open":
            opened = str(args[0])
        elif name == "fsync":
            flushed.append(opened)
        elif name == "link" and args[1] == new / "COMMIT":
            committed = place
            needed = [new / "a2" / part for part in (".", *SHARDS, "extra")]
            needed = [Path(str(path).replace("/a2", "/a1")) for path in needed]
            assert {str(path) for path in (*needed, args[0], new, new.parent)} <= set(flushed)
            flushed.clear()
        elif name == "rename" and args[0] == old / "COMMIT":
            assert committed and str(new) in flushed
            gone = place
            flushed.clear()
        elif name in ("unlink", "rmdir") and not str(args[0]).endswith(".tmp"):
            assert not committed or (gone and str(old) in flushed)
    assert 0 < committed < gone


def test_success(run_dir: Path, dead: None):
    attempt = begin(run_dir)
    assert store.read_success(run_dir) is None
    with pytest.raises(FileNotFoundError, match="no complete checkpoint at step 10"):
        store.write_success(run_dir, 10, attempt)
    save(run_dir, attempt, 10)
    store.write_success(run_dir, 10, attempt)
    assert store.read_success(run_dir) == 10
    assert json.loads((run_dir / "SUCCESS").read_text()) == {"step": 10}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"every_steps": 0}, "checkpoint.every_steps must be at least 1, got 0"),
        ({"every_steps": 1, "keep_last": 0}, "checkpoint.keep_last must be at least 1, got 0"),
        ({"every_steps": 1, "upload_attempts": 0}, "checkpoint.upload_attempts must be at least 1, got 0"),
        ({"every_steps": 4, "keep_every_steps": 6}, "a multiple of every_steps, 4, got 6"),
        ({"every_steps": 1, "keep_steps": [5, 0]}, "checkpoint.keep_steps .* got \\[5, 0\\]"),
    ],
)
def test_config_is_checked(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        CheckpointConfig(**options)


def test_config_is_no_part_of_the_identity():
    fields = CheckpointConfig.__dataclass_fields__.values()
    assert [f.name for f in fields if f.metadata["identity"] is not False] == []
    assert CheckpointConfig(every_steps=5) == CheckpointConfig(every_steps=5, keep_last=2, keep_steps=[])


# With real processes ------------------------------------------------------------------------------

TRAIN = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_store import *
run_dir = Path(sys.argv[1])
with start_attempt(run_dir, heartbeat_s=0.01, timeout_s=60, log=str) as attempt:
    step = resume(run_dir, attempt)
    print("resumed", step, flush=True)
    while True:
        step += 1
        save(run_dir, attempt, step)
        print("saved", step, flush=True)
        store.clean(run_dir, attempt, keep_last=1)
"""


def test_processes_killed_in_the_middle(run_dir: Path):
    saved = 0
    for delay in (0.0, 0.011, 0.034, 0.079):
        command = [sys.executable, "-c", TRAIN, str(run_dir), str(Path(__file__).parent)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            # The one before is dead, so there is nothing to wait for.
            assert int(process.stdout.readline().split()[1]) >= saved
            for _ in range(3):
                process.stdout.readline()
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
            lines = process.stdout.read().split("\n")
        saved = max([saved + 3, *(int(line.split()[1]) for line in lines if line.startswith("saved "))])
        check_reader(run_dir, saved)
    assert max(attempts.attempt_numbers(run_dir)) == 4
