"""Who may write to a run: attempts, their heartbeat and their fencing.

Every life of a run is an attempt, numbered from 1. It exists once ``attempts/<n>.json`` has been
created *exclusively*, so of two processes that start at once exactly one gets the number. The newest
attempt is the run's only writer: whoever is not newest is fenced, may be stuck or on a host that was
thought lost, and must neither commit nor delete.
"""

import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from ul_scale.checkpoint.files import (
    create_exclusive,
    decode,
    encode,
    is_local,
    list_names,
    list_versions,
    make_dirs,
    read,
    read_all,
    write_atomic,
)

_NAME = re.compile(r"\d+\.json")
# What the attempts of runs in buckets said, and the version that was read.
_seen: dict[str, tuple[str, dict[str, Any]]] = {}


class RunBusy(RuntimeError):
    """Another live process is writing to this run."""


class Fenced(RuntimeError):
    """A newer attempt has taken this run over: this process may no longer write to it."""


def attempt_path(run_dir: Path, number: int) -> Path:
    return run_dir / "attempts" / f"{number}.json"


def attempt_numbers(run_dir: Path) -> list[int]:
    """Return the numbers of all attempts, ascending."""
    names = list_names(run_dir / "attempts")
    return sorted(int(name[:-5]) for name in names if _NAME.fullmatch(name))


def read_attempts(run_dir: Path) -> dict[int, dict[str, Any]]:
    """Return what each attempt's file says, by its number.

    A run that is preempted a lot has hundreds of them, of which only the newest changes: in a bucket,
    those that are as they were are not read again.
    """
    versions = list_versions(run_dir / "attempts")
    paths = {int(name[:-5]): run_dir / "attempts" / name for name in versions if _NAME.fullmatch(name)}
    changed = [n for n, path in paths.items() if _seen.get(str(path), ("",))[0] != versions[path.name]]
    fresh = {n: decode(data) for n, data in zip(changed, read_all(paths[n] for n in changed))}
    for n, record in fresh.items():
        if (version := versions[paths[n].name]) is not None:
            _seen[str(paths[n])] = version, record
    return {n: fresh[n] if n in fresh else _seen[str(path)][1] for n, path in sorted(paths.items())}


class Attempt:
    """One life of a run. Its heartbeat goes on in a thread until ``close`` or the end of the process."""

    def __init__(self, path: Path, record: dict[str, Any], heartbeat_s: float, log: Callable[[str], object]):
        self.path = path
        self.number: int = record["attempt"]
        self.token: str = record["token"]
        self._record = record
        self._log = log
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._beat, args=(heartbeat_s,), daemon=True)
        self._thread.start()

    @property
    def resumes_from(self) -> int | None:
        """The step it resumes from, 0 for a fresh start, None while undecided."""
        return self._record["resumes_from"]

    def is_newest(self) -> bool:
        """Say whether this is the run's newest attempt.

        The token tells it from a namesake, should the run directory have been deleted and begun anew.
        """
        newest = max(attempt_numbers(self.path.parent.parent), default=0) == self.number
        return newest and self._is_ours()

    def require_newest(self, action: str) -> None:
        """Raise ``Fenced`` unless this is the newest attempt."""
        if not self.is_newest():
            newest = max(attempt_numbers(self.path.parent.parent), default=0)
            raise Fenced(
                f"{self.path.parent.parent}: attempt {self.number} may not {action}: the run was taken over"
                f" (newest attempt: {newest}); this process can only end"
            )

    def set_resumes_from(self, step: int) -> None:
        """Record the step that this attempt continues from: older attempts' later commits are void."""
        self.require_newest(f"resume from step {step}")
        self._write(resumes_from=step)

    def close(self) -> None:
        """Stop the heartbeat and say that this attempt has ended, so that the next need not wait."""
        self._closed.set()
        self._thread.join()
        try:
            self._write(ended=True)
        except OSError as error:
            self._log(f"could not mark attempt {self.number} as ended: {error}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _is_ours(self) -> bool:
        return decode(read(self.path)).get("token") == self.token

    def _write(self, **changes: object) -> None:
        with self._lock:
            self._record |= changes
            if self._is_ours():
                write_atomic(self.path, encode(self._record))

    def _beat(self, heartbeat_s: float) -> None:
        while not self._closed.wait(heartbeat_s):
            try:
                self._write(heartbeat=self._record["heartbeat"] + 1)
            except OSError as error:  # A full disk or a server away for a while must not end the heartbeat.
                self._log(f"heartbeat of attempt {self.number} failed: {error}")


def _identity() -> dict[str, Any]:
    """Return who we are, and where a process id means us: on this boot of this host, in this namespace."""
    try:
        return {
            "boot_id": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            "pid_namespace": os.readlink("/proc/self/ns/pid"),
            "pid": os.getpid(),
            "process_start": _process(os.getpid())[1],
        }
    except OSError:  # Not Linux: the heartbeat has to do.
        return {"boot_id": None, "pid_namespace": None, "pid": os.getpid(), "process_start": None}


def _process(pid: int) -> tuple[str, int]:
    """Return state and start time (clock ticks since boot) of a process, from its ``/proc/<pid>/stat``."""
    # The name stands in parentheses and may hold any character; after it come fields 3 (state) to 52.
    fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    return fields[0].decode(), int(fields[19])


def is_alive(record: dict[str, Any]) -> bool | None:
    """Say whether an attempt's process lives; None if only its heartbeat can tell."""
    here = _identity()
    if record.get("ended"):
        return False
    if here["boot_id"] is None or any(record.get(key) != here[key] for key in ("boot_id", "pid_namespace")):
        return None
    try:
        os.kill(record["pid"], 0)
        state, start = _process(record["pid"])
    except ProcessLookupError:
        return False
    except OSError:
        return None  # Another user's process, which /proc may hide from us.
    return state not in "ZX" and start == record.get("process_start")


def _wait_until_free(run_dir: Path, number: int, timeout_s: float, log: Callable[[str], object]) -> None:
    """Return once attempt ``number`` may be taken over; raise ``RunBusy`` if its process lives."""
    path = attempt_path(run_dir, number)
    first = read(path)
    deadline = time.monotonic() + timeout_s
    waiting = False
    while (now := read(path)) is not None:
        record = decode(now)
        owner = f"attempt {number}, process {record.get('pid')} on {record.get('host')}"
        alive = is_alive(record)
        if alive is False:
            log(f"taking over from {owner}, which has ended")
            return
        if alive or now != first:
            raise RunBusy(
                f"{run_dir} is in use by {owner}: end that process or wait until it is done,"
                " then give the same command again"
            )
        if time.monotonic() >= deadline:
            log(f"taking over from {owner}: no heartbeat for {timeout_s:g} s")
            return
        if not waiting:
            log(f"{run_dir} was in use by {owner}: waiting {timeout_s:g} s for a heartbeat")
            waiting = True
        time.sleep(min(1.0, timeout_s / 20))


def start_attempt(
    run_dir: Path,
    *,
    timeout_s: float = 120.0,
    heartbeat_s: float = 20.0,
    log: Callable[[str], object] = print,
) -> Attempt:
    """Become the run's next attempt, its only writer.

    The newest attempt is taken over at once if it has ended or if its process on this host is gone, a
    zombie, or another one by now. Elsewhere only its heartbeat can tell: it has to stay unchanged for
    ``timeout_s`` on our own clock, for the clocks of two hosts need not agree.

    Args:
        run_dir: the run's directory, made if need be; local or in a bucket.
        timeout_s: patience with a heartbeat, in seconds.
        heartbeat_s: seconds between this attempt's own heartbeats.
        log: takes one line for a person.

    Raises:
        RunBusy: another process is alive and writes to this run.
        ValueError: if one missed heartbeat would already exceed the timeout.
        OSError: the directory cannot be written to, or its store has no exclusive create.
    """
    if timeout_s <= 2 * heartbeat_s:
        raise ValueError(f"timeout_s must exceed two heartbeats: got {timeout_s:g} s, {heartbeat_s:g} s")
    make_dirs(run_dir / "attempts")
    while True:
        newest = max(attempt_numbers(run_dir), default=0)
        if newest:
            _wait_until_free(run_dir, newest, timeout_s, log)
        record = {
            "attempt": newest + 1,
            "token": str(uuid.uuid4()),
            "host": socket.gethostname(),
            **_identity(),
            "resumes_from": None,
            "heartbeat": 0,
            "ended": False,
        }
        path = attempt_path(run_dir, newest + 1)
        if create_exclusive(path, encode(record)):
            if not is_local(path) and create_exclusive(path, encode(record | {"ended": True})):
                raise OSError(
                    f"{path} could be created twice: this store ignores conditional writes (If-None-Match),"
                    " without which two processes could write to one run"
                )
            return Attempt(path, record, heartbeat_s, log)
