"""Processes that read and decode, so that the training process keeps its interpreter for the device.

``python -m ul_scale.data.worker FD`` takes a job from an open file and writes rows to its standard output
until its standard input is closed, by its parent or by its parent's death. It imports no torch (unless it
resizes JPEGs) and starts in well under a second. What it writes is read by its parent alone.
"""

import contextlib
import os
import pickle
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Generator
from pathlib import Path
from typing import IO, Any

import numpy as np

from ul_scale.data.ahead import ahead
from ul_scale.data.produce import Job, Rows

MAX_DEATHS = 3
"""In a row, without a row in between; then it is not chance."""
_LENGTH = struct.Struct("<Q")
_PIPE_BYTES = 2**20
_F_SETPIPE_SZ = 1031


class WorkerDied(ChildProcessError):
    """A process that reads data died again and again."""


class Worker:
    """A process that makes a job's rows from a step on; if it dies, another goes on where it was.

    Args:
        job: what to make.
        step: the first.
        depth: steps that it makes ahead.
    """

    def __init__(self, job: Job, step: int, depth: int) -> None:
        self._job, self._step, self._depth = pickle.dumps(job), step, depth
        self._deaths, self._closed = 0, False
        self._lock = threading.Lock()
        self._process = self._start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def next(self) -> Rows | None:
        """Return the next step's rows, None after the last.

        Raises:
            OSError, ValueError: what the job raised.
            WorkerDied: if that happened several times in a row.
        """
        while True:
            try:
                rows = self._receive()
            except EOFError:
                self._restart()
                continue
            self._step, self._deaths = self._step + 1, 0
            return rows

    def close(self) -> None:
        """End the process; whoever waits in ``next`` comes back with ``WorkerDied``."""
        with self._lock:
            self._closed = True
            self._end()

    def _start(self) -> "subprocess.Popen[bytes]":
        package, environment = Path(__file__).parents[2], dict(os.environ)
        if package.name != "site-packages":
            given = environment.get("PYTHONPATH")
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(package), given]))
        with tempfile.TemporaryFile() as job:  # a pipe would have to be written while the process starts
            job.write(struct.pack("<QQ", self._step, self._depth) + self._job)
            job.seek(0)
            return subprocess.Popen(
                # -P: what lies in the folder that training was started from is not to be imported.
                [sys.executable, "-P", "-m", "ul_scale.data.worker", str(job.fileno())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=[job.fileno()],
                bufsize=0,
                env=environment,
                start_new_session=True,
            )

    def _restart(self) -> None:
        with self._lock:
            if self._closed:
                raise WorkerDied("closed")
            self._deaths += 1
            self._end()
            how = self._process.returncode
            how_text = f"signal {-how}" if how is not None and how < 0 else f"exit code {how}"
            if self._deaths >= MAX_DEATHS:
                raise WorkerDied(
                    f"a process that reads data died {self._deaths} times in a row at step {self._step}, the "
                    f"last time by {how_text}; if memory ran out, lower data.window_chunks or data.workers"
                )
            print(f"a process that reads data died ({how_text}); another takes over", file=sys.stderr)
            self._process = self._start()

    def _end(self) -> None:
        process = self._process
        assert process.stdin is not None
        with contextlib.suppress(OSError):
            process.stdin.close()
        try:
            process.wait(timeout=0.2 if self._closed else 2)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _receive(self) -> Rows | None:
        pipe = self._process.stdout
        assert pipe is not None
        (length,) = _LENGTH.unpack(_read(pipe, _LENGTH.size))
        header: Any = pickle.loads(_read(pipe, length))
        if isinstance(header, BaseException):
            raise header
        if header is None:
            return None
        rows: Rows
        rows, dtype, shape = header
        rows.array = np.empty(shape, dtype)
        _read_into(pipe, rows.array.data.cast("B"))
        return rows


def memory_bytes(workers: list[Worker]) -> int:
    """Return what the processes hold in memory now, bytes; 0 where the system does not tell."""
    total = 0
    for worker in workers:
        with contextlib.suppress(OSError):
            pages = int(Path(f"/proc/{worker.pid}/statm").read_text().split()[1])
            total += pages * os.sysconf("SC_PAGE_SIZE")
    return total


def _read(pipe: IO[bytes], size: int) -> bytearray:
    data = bytearray(size)
    _read_into(pipe, memoryview(data))
    return data


def _read_into(pipe: Any, view: memoryview) -> None:
    while len(view):
        count = pipe.readinto(view)
        if not count:
            raise EOFError
        view = view[count:]


def _write(pipe: Any, view: memoryview) -> None:
    while len(view):
        view = view[pipe.write(view) :]


# In the process ----------------------------------------------------------------------------------


def _send(pipe: Any, rows: Rows | BaseException | None) -> None:
    array = np.empty(0)
    message: Any = rows
    if isinstance(rows, Rows):
        array, rows.array = np.ascontiguousarray(rows.array), np.empty(0)
        message = rows, array.dtype, array.shape
    header = pickle.dumps(message)
    _write(pipe, memoryview(_LENGTH.pack(len(header)) + header))
    if array.size:
        _write(pipe, array.data.cast("B"))


def main() -> None:
    # The parent decides when this ends; a signal to the whole group is meant for it.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    with open(int(sys.argv[1]), "rb") as file:
        step, depth = struct.unpack("<QQ", file.read(16))
        job = file.read()
    source = os.fdopen(os.dup(0), "rb", buffering=0)
    sink = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what a library prints must not come between the rows
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    with contextlib.suppress(OSError):
        import fcntl

        fcntl.fcntl(sink.fileno(), _F_SETPIPE_SZ, _PIPE_BYTES)
    threading.Thread(target=_end_with, args=(source,), daemon=True).start()
    try:
        rows: Generator[Rows, None, None] = ahead(pickle.loads(job).rows(step, threading.Event()), depth)
        for item in rows:
            _send(sink, item)
        _send(sink, None)
    except BrokenPipeError:
        pass
    except (OSError, ValueError) as error:  # one line for a person
        _send(sink, error)
    except BaseException:
        _send(sink, RuntimeError(f"in a process that reads data: {traceback.format_exc()}"))
    os._exit(0)  # threads may be waiting for a bucket


def _end_with(source: Any) -> None:
    """End this process as soon as its parent closes the pipe, or dies."""
    while source.read(1):
        pass
    os._exit(0)


if __name__ == "__main__":
    main()
