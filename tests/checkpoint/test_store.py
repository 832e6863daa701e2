"""The commit protocol under attack: kills, errors, sleeps and power loss at every single file operation."""

import contextlib
import errno
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ul_scale.checkpoint import attempts, store
from ul_scale.checkpoint.attempts import Attempt, start_attempt
from ul_scale.checkpoint.store import BrokenCheckpoint

SHARDS = ("__0_0.distcp", "__1_0.distcp", "extra/rng.bin")
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
    """A process that resumes, then saves twice and keeps one checkpoint, unless something befalls it."""

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir
        self.number = 0
        self.resumed_from: int | None = None
        self.committed: list[int] = []

    def live(self) -> None:
        attempt = start_attempt(self.run_dir, log=str)
        # The heartbeat thread dies with its process.
        attempt._closed.set()
        self.number = attempt.number
        step = resume(self.run_dir, attempt)
        self.resumed_from = step
        for step in (step + 10, step + 20):
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
    """Counts this thread's file operations and calls ``strike`` around the chosen one.

    ``when`` is "before" or "after" the operation; a write is first cut in half.
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
                args = (args[0], args[1][: len(args[1]) // 2])
                real(*args)
                self.strike()
            elif chosen and self.when == "before":
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
    return Faults(monkeypatch)


@pytest.fixture
def history(tmp_path: Path, faults: Faults) -> Path:
    """A run at step 20, with all that may lie about: damage, late commits, torn and half-saved steps."""
    run_dir = tmp_path / "history"
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


def length_of_life(history: Path, faults: Faults) -> int:
    life = Life(fresh(history))
    with faults.at(-1, "before", lambda: None):
        life.live()
    assert (life.resumed_from, life.committed) == (20, [30, 40])
    print(len(faults.trace), [n for n,_ in faults.trace])
    return len(faults.trace)


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_at_every_operation(history: Path, faults: Faults, monkeypatch, when: str, links: bool):
    if not links:
        no_links(monkeypatch)
    operations = length_of_life(history, faults)
    assert operations > 100
    for k in range(0, operations, 1 if links else 3):
        life = Life(fresh(history))
        with faults.at(k, when, faults.kill), contextlib.suppress(Killed):
            life.live()
        # The damaged step 30 is still shown until it has been found out.
        if life.resumed_from is not None:
            check_reader(life.run_dir, max([20, *life.committed]))
        check_recovery(life.run_dir, max([20, *life.committed]))
    assert k > operations - 4 and life.committed[:1] == [30]


def test_killed_again_while_recovering(history: Path, faults: Faults):
    operations = length_of_life(history, faults)
    for k in range(0, operations, 11):
        for again in range(k % 7, operations, 29):
            first, second = Life(fresh(history)), Life(history.with_name("run"))
            with faults.at(k, "after", faults.kill), contextlib.suppress(Killed):
                first.live()
            with faults.at(again, "before", faults.kill), contextlib.suppress(Killed):
                second.live()
            check_recovery(first.run_dir, max([20, *first.committed, *second.committed]))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_error_at_every_operation(history: Path, faults: Faults, code: int, when: str):
    """The process lives on after the error and may well clean up; the run loses nothing by either."""
    operations = length_of_life(history, faults)

    def fail() -> None:
        raise OSError(code, os.strerror(code))

    for k in range(0, operations, 2):
        life = Life(fresh(history))
        with faults.at(k, when, fail), contextlib.suppress(OSError):
            life.live()
        if life.resumed_from is not None:
            check_reader(life.run_dir, max([20, *life.committed]))
        check_recovery(life.run_dir, max([20, *life.committed]))


def test_sleeping_at_every_operation(history: Path, faults: Faults):
    """A process stops at operation k, is thought dead and taken over, and then wakes up and goes on."""
    operations = length_of_life(history, faults)
    fates = set()
    for k in range(operations):
        sleeper, successor = Life(fresh(history)), Life(history.with_name("run"))
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
        last = successor
        if sleeper.number > successor.number:
            # It had not become an attempt yet, and now succeeds the successor.
            assert sleeper.resumed_from == successor.committed[-1]
            last = sleeper
        else:
            # A step may be called committed only if whoever comes later sees it.
            assert all(step <= successor.resumed_from for step in sleeper.committed)
        check_reader(sleeper.run_dir, last.committed[-1])
        check_recovery(sleeper.run_dir, last.committed[-1])
    # FileNotFoundError: it was writing shards when the successor removed them.
    assert fates == {"Fenced", "done", "FileNotFoundError"}
