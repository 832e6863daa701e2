"""Attempts: one writer at a time, taken over at once where death can be seen, by the heartbeat elsewhere."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ul_scale.checkpoint import attempts, files
from ul_scale.checkpoint.attempts import Attempt, Fenced, RunBusy, attempt_numbers, start_attempt

HOLD = """
import sys, time
from pathlib import Path
from ul_scale.checkpoint.attempts import RunBusy, start_attempt
go = Path(sys.argv[1]) / "go"
print("ready", flush=True)
while not go.exists():
    time.sleep(0.001)
try:
    print("attempt", start_attempt(Path(sys.argv[1]) / "run", log=str).number, flush=True)
except RunBusy:
    print("busy", flush=True)
else:
    time.sleep(60)
"""


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def processes(tmp_path: Path):
    """Start processes that try to become an attempt once ``go`` is called; end them afterwards."""
    started: list[subprocess.Popen] = []

    def start(count: int) -> list[subprocess.Popen]:
        for _ in range(count):
            command = [sys.executable, "-c", HOLD, str(tmp_path)]
            started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        for process in started[-count:]:
            assert process.stdout.readline() == "ready\n"
        (tmp_path / "go").touch()
        return started[-count:]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def record_of(attempt: Attempt) -> dict:
    return json.loads(attempt.path.read_text())


def fake_attempt(run_dir: Path, **changes: object) -> Path:
    """Leave the file of an attempt behind that, unless changed, lives on another host."""
    path = run_dir / "attempts" / "1.json"
    files.make_dirs(path.parent)
    record = {"attempt": 1, "token": "x", "host": "far-away", "boot_id": "other", "pid_namespace": "pid:[1]"}
    record |= {"pid": 12, "process_start": 34, "resumes_from": None, "heartbeat": 0, "ended": False}
    files.write_atomic(path, json.dumps(record | changes).encode())
    return path


def quick(run_dir: Path, **options: float) -> Attempt:
    return start_attempt(run_dir, **({"timeout_s": 0.4, "heartbeat_s": 0.1} | options), log=str)


def test_first_attempt_is_recorded(run_dir: Path):
    with start_attempt(run_dir) as attempt:
        record = record_of(attempt)
        assert (attempt.number, record["attempt"], record["token"]) == (1, 1, attempt.token)
        assert record["pid"] == os.getpid() and record["resumes_from"] is None and not record["ended"]
        assert attempt.is_newest()
        attempt.set_resumes_from(0)
        assert record_of(attempt)["resumes_from"] == attempt.resumes_from == 0
    assert record_of(attempt)["ended"] is True


def test_attempts_tell_what_they_said_last(run_dir: Path):
    """A torn file says nothing; an attempt that changes its mind, or its run, is read anew."""
    assert attempts.read_attempts(run_dir) == {}
    fake_attempt(run_dir)
    (run_dir / "attempts/2.json").write_bytes(b'{"att')
    assert {n: said.get("resumes_from", "") for n, said in attempts.read_attempts(run_dir).items()} == {
        1: None,
        2: "",
    }
    fake_attempt(run_dir, resumes_from=40)
    assert attempts.read_attempts(run_dir)[1]["resumes_from"] == 40


def test_an_ended_attempt_is_followed_at_once(run_dir: Path):
    start_attempt(run_dir).close()
    lines: list[str] = []
    with start_attempt(run_dir, log=lines.append) as second:
        assert second.number == 2
    assert len(lines) == 1 and "attempt 1" in lines[0] and "ended" in lines[0]


def test_this_very_process_counts_as_alive(run_dir: Path):
    with start_attempt(run_dir), pytest.raises(RunBusy, match=f"attempt 1, process {os.getpid()}"):
        start_attempt(run_dir)


def test_a_live_process_is_not_disturbed(run_dir: Path, processes):
    (holder,) = processes(1)
    assert holder.stdout.readline() == "attempt 1\n"
    begin = time.monotonic()
    with pytest.raises(RunBusy) as busy:
        start_attempt(run_dir)
    assert time.monotonic() - begin < 1
    message = str(busy.value)
    assert "\n" not in message and "same command" in message
    assert str(holder.pid) in message and str(run_dir) in message and os.uname().nodename in message
    assert attempt_numbers(run_dir) == [1]


@pytest.mark.parametrize("reaped", [True, False], ids=["gone", "zombie"])
def test_a_killed_process_is_taken_over_at_once(run_dir: Path, processes, reaped: bool):
    (holder,) = processes(1)
    assert holder.stdout.readline() == "attempt 1\n"
    holder.send_signal(signal.SIGKILL)
    if reaped:
        holder.wait()
    else:
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
        assert attempts._process(holder.pid)[0] == "Z"
    begin = time.monotonic()
    with start_attempt(run_dir, log=str) as attempt:
        assert attempt.number == 2
    assert time.monotonic() - begin < 1


def test_a_reused_process_id_is_not_the_process(run_dir: Path):
    own = attempts._identity()
    fake_attempt(run_dir, **own | {"process_start": own["process_start"] + 1})
    with start_attempt(run_dir, log=str) as attempt:
        assert attempt.number == 2


def test_process_names_may_hold_anything(tmp_path: Path):
    program = tmp_path / "a) Z 1 ("
    shutil.copy("/bin/sleep", program)
    with subprocess.Popen([program, "60"]) as process:
        own, other = attempts._process(os.getpid()), attempts._process(process.pid)
        process.kill()
    assert other[0] != "Z" and other[1] >= own[1]


def test_of_processes_racing_for_a_dead_run_one_wins(run_dir: Path, processes):
    start_attempt(run_dir).close()
    racers = processes(4)
    answers = sorted(racer.stdout.readline() for racer in racers)
    assert answers == ["attempt 2\n"] + 3 * ["busy\n"]
    assert attempt_numbers(run_dir) == [1, 2]


def test_of_threads_racing_one_wins(tmp_path: Path):
    for round_ in range(20):
        barrier, won, lost = threading.Barrier(6), [], []

        def race(run_dir=tmp_path / str(round_), barrier=barrier, won=won, lost=lost):
            barrier.wait()
            try:
                won.append(start_attempt(run_dir, log=str))
            except RunBusy as busy:
                lost.append(busy)

        threads = [threading.Thread(target=race) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1 and len(lost) == 5
        won[0].close()


def test_a_silent_host_is_waited_for(run_dir: Path):
    fake_attempt(run_dir)
    lines: list[str] = []
    begin = time.monotonic()
    with start_attempt(run_dir, timeout_s=0.4, heartbeat_s=0.1, log=lines.append) as attempt:
        assert attempt.number == 2
    assert 0.4 <= time.monotonic() - begin < 2
    assert "far-away" in lines[0] and "waiting 0.4 s" in lines[0] and "no heartbeat" in lines[1]


@pytest.mark.parametrize("changes", [{"heartbeat": 1}, {"resumes_from": 40}])
def test_a_host_that_gives_a_sign_is_busy(run_dir: Path, changes: dict):
    fake_attempt(run_dir)
    sign = threading.Timer(0.2, lambda: fake_attempt(run_dir, **changes))
    sign.start()
    with pytest.raises(RunBusy, match=r"process 12 on far-away"):
        quick(run_dir, timeout_s=5)
    sign.join()
    assert attempt_numbers(run_dir) == [1]


def test_a_host_that_ends_while_watched_is_followed(run_dir: Path):
    fake_attempt(run_dir)
    sign = threading.Timer(0.2, lambda: fake_attempt(run_dir, ended=True))
    sign.start()
    with quick(run_dir, timeout_s=60) as attempt:
        assert attempt.number == 2
    sign.join()


@pytest.mark.parametrize("differs", ["boot_id", "pid_namespace"])
def test_a_process_id_means_nothing_elsewhere(run_dir: Path, differs: str):
    """Alive or dead, a process with that number here is not the one over there."""
    for pid in (os.getpid(), 2**22 + 1):
        shutil.rmtree(run_dir, ignore_errors=True)
        fake_attempt(run_dir, **attempts._identity() | {"pid": pid, differs: "other"})
        begin = time.monotonic()
        with quick(run_dir) as attempt:
            assert attempt.number == 2
        assert time.monotonic() - begin >= 0.4


def test_another_users_hidden_process_is_not_taken_for_dead(run_dir: Path, monkeypatch: pytest.MonkeyPatch):
    fake_attempt(run_dir, **attempts._identity() | {"pid": 1})

    def hidden(*_: int):
        raise PermissionError(errno.EPERM, "not yours")

    monkeypatch.setattr(os, "kill", hidden)
    assert attempts.is_alive(json.loads((run_dir / "attempts/1.json").read_text())) is None


@pytest.mark.parametrize("torn", [b"", b'{"attempt": 1, "tok', b"[]", b"\xff\x00"])
def test_a_torn_file_does_not_wedge_the_run(run_dir: Path, torn: bytes):
    fake_attempt(run_dir).write_bytes(torn)
    with quick(run_dir) as attempt:
        assert attempt.number == 2 and attempt.is_newest()


def test_heartbeat_goes_on_through_a_full_disk(run_dir: Path, monkeypatch: pytest.MonkeyPatch):
    lines: list[str] = []
    write, full = os.write, threading.Event()

    def write_if_space(fd: int, data: bytes) -> int:
        if full.is_set():
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data)

    monkeypatch.setattr(os, "write", write_if_space)

    def wait_for(condition) -> None:
        deadline = time.monotonic() + 5
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    with start_attempt(run_dir, heartbeat_s=0.02, log=lines.append) as attempt:
        wait_for(lambda: record_of(attempt)["heartbeat"] > 1)
        full.set()
        wait_for(lambda: lines)
        before = record_of(attempt)["heartbeat"]
        full.clear()
        wait_for(lambda: record_of(attempt)["heartbeat"] > before)
    assert "heartbeat of attempt 1 failed" in lines[0] and "No space" in lines[0]
    closed = attempt.path.read_bytes()
    time.sleep(0.1)
    assert attempt.path.read_bytes() == closed and attempt_numbers(run_dir) == [1]
    assert os.listdir(run_dir / "attempts") == ["1.json"]


def test_the_older_attempt_is_fenced(run_dir: Path, monkeypatch: pytest.MonkeyPatch):
    first = start_attempt(run_dir)
    monkeypatch.setattr(attempts, "is_alive", lambda record: False)
    with start_attempt(run_dir, log=str) as second:
        assert second.is_newest() and not first.is_newest()
        with pytest.raises(Fenced, match=r"attempt 1 may not commit.*taken over.*newest attempt: 2"):
            first.require_newest("commit step 3")
        with pytest.raises(Fenced):
            first.set_resumes_from(0)
    first.close()


def test_a_namesake_in_a_deleted_and_recreated_run_is_left_alone(run_dir: Path):
    old = start_attempt(run_dir, heartbeat_s=0.02, log=str)
    run_dir.rename(run_dir.with_name("removed"))
    with start_attempt(run_dir, log=str) as new:
        assert new.number == old.number == 1
        assert new.is_newest() and not old.is_newest()
        time.sleep(0.1)
        old.close()
        assert record_of(new)["token"] == new.token and not record_of(new)["ended"]


def test_a_deleted_run_is_no_reason_to_fail_at_the_end(run_dir: Path):
    attempt = start_attempt(run_dir, log=str)
    shutil.rmtree(run_dir)
    assert not attempt.is_newest()
    attempt.close()
    assert not run_dir.exists()


def test_timeout_must_exceed_the_heartbeat(run_dir: Path):
    with pytest.raises(ValueError, match="got 30 s, 20 s"):
        start_attempt(run_dir, timeout_s=30, heartbeat_s=20)


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_exclusive_create_gives_a_name_to_one_writer(tmp_path: Path, monkeypatch, links: bool):
    if not links:

        def unsupported(*_: object, **__: object):
            raise OSError(errno.ENOTSUP, "Operation not supported")

        monkeypatch.setattr(os, "link", unsupported)
    path = tmp_path / "name"
    assert files.create_exclusive(path, b"first")
    assert not files.create_exclusive(path, b"second")
    assert path.read_bytes() == b"first" and os.listdir(tmp_path) == ["name"]


def test_exclusive_create_recognises_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    link = os.link

    def answer_lost(source: Path, target: Path):
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", answer_lost)
    assert files.create_exclusive(tmp_path / "name", b"mine")


def test_remove_if_spares_what_was_not_judged(tmp_path: Path):
    path = tmp_path / "name"
    path.write_bytes(b"newer")
    files.remove_if(path, b"older")
    assert path.read_bytes() == b"newer" and os.listdir(tmp_path) == ["name"]
    files.remove_if(path, b"newer")
    files.remove_if(path, b"newer")
    assert os.listdir(tmp_path) == []
