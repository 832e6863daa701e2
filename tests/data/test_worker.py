"""Worker processes: the same batches as without, whatever happens to them."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from itertools import islice
from pathlib import Path

import pytest

from ul_scale.data import stream as stream_module
from ul_scale.data import worker as workers
from ul_scale.data.config import DataConfig
from ul_scale.data.index import Index
from ul_scale.data.indexing import build_index
from ul_scale.data.plan import lane_slots
from ul_scale.data.stream import LaneStream, iterate, make_plan

from .conftest import image_bytes, images, tar_bytes, write_shards
from .test_stream import equal

BATCH_SIZE = 12


def config(**options) -> DataConfig:
    return DataConfig(image_size=8, channels=1, lanes=4, chunk_bytes=3 * 2048, window_chunks=2, **options)


@pytest.fixture
def index(tmp_path: Path) -> Index:
    write_shards(str(tmp_path / "train"), [13, 0, 1, 30, 20])
    return build_index(str(tmp_path / "train"))


def stream(index: Index, settings: DataConfig, rank: int = 0, size: int = 1) -> LaneStream:
    plan = make_plan(index, settings, seed=0, batch_size=BATCH_SIZE)
    return LaneStream(index, plan, settings, lane_slots(plan.lanes, rank, size))


def take(of: LaneStream, start: int, stop: int) -> list:
    batches = of.batches(start)
    taken = list(islice(batches, stop - start))
    batches.close()
    return taken


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 10
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(is_alive, pids))


@pytest.mark.parametrize(("count", "size"), [(1, 1), (3, 2)])
def test_batches_are_those_of_threads(index: Index, count: int, size: int) -> None:
    for rank in range(size):
        alone = take(stream(index, config(workers=0, horizontal_flip=True), rank, size), 3, 9)
        processes = take(stream(index, config(workers=count, horizontal_flip=True), rank, size), 3, 9)
        assert all(map(equal, alone, processes)) and len(alone) == 6


def test_a_killed_worker_changes_nothing(index: Index, capfd: pytest.CaptureFixture[str]) -> None:
    steps = 400
    running = stream(index, config(workers=2, prefetch_steps=1))
    batches, taken, killed = running.batches(), [], list[int]()
    for number, batch in zip(range(steps), batches):
        taken.append(batch)
        # What it has written is still read, so a dead one may be met here again.
        if (pid := running._crew.workers[number % 2].pid) not in killed and len(killed) < 4:
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
    batches.close()
    assert all(map(equal, take(stream(index, config(workers=0)), 0, steps), taken)) and len(killed) == 4
    # All but perhaps the last, whose rows were still to be read.
    assert capfd.readouterr().err.count("a process that reads data died (signal 9); another takes over") >= 3


def test_a_worker_that_always_dies_ends_the_run(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(
        workers.WorkerDied, match=r"died 3 times in a row at step 5, the last time by exit code 1"
    ):
        next(stream(index, config(workers=1)).batches(5))


def test_workers_end_with_the_iterator_and_with_their_parent(index: Index) -> None:
    running = stream(index, config(workers=2))
    batches = running.batches()
    next(batches)
    pids = [worker.pid for worker in running._crew.workers]
    assert all(map(is_alive, pids)) and running.memory_bytes() > 2 * 10**7
    del batches
    gc.collect()
    wait_until_gone(pids)

    script = (
        "import sys, time; from tests.data.test_worker import *\n"
        "running = stream(build_index(sys.argv[1]), config(workers=2)); batches = running.batches()\n"
        "next(batches); print(*[w.pid for w in running._crew.workers], flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script, index.url], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2 and all(map(is_alive, pids))
    parent.kill()
    parent.wait()
    wait_until_gone(pids)


def test_signals_to_the_group_leave_workers_to_their_parent(index: Index) -> None:
    running = stream(index, config(workers=1, prefetch_steps=1))
    batches = running.batches()
    next(batches)
    [worker] = running._crew.workers
    pid = worker.pid
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(pid, number)
    list(islice(batches, 8))
    assert worker.pid == pid
    batches.close()


def test_workers_import_nothing_from_the_current_folder(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "queue.py").write_text("raise RuntimeError('not the standard library')")
    monkeypatch.chdir(tmp_path)
    assert len(take(stream(index, config(workers=1)), 0, 1)) == 1


def test_closed_while_they_start_none_is_left(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []
    start = workers.Worker._start

    def slow(self: workers.Worker):
        process = start(self)
        started.append(process.pid)
        time.sleep(0.3)
        return process

    monkeypatch.setattr(workers.Worker, "_start", slow)
    crew = stream_module._Crew([object()] * 3, 3)
    thread = threading.Thread(target=lambda: list(crew.steps(0, 1)))
    thread.start()
    while not started:
        time.sleep(0.01)
    crew.end()
    thread.join()
    assert len(started) == 1
    wait_until_gone(started)


def test_workers_import_no_torch(index: Index) -> None:
    code = "import sys, ul_scale.data.worker; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_iterate_in_processes(index: Index) -> None:
    alone = list(iterate(index, config(workers=0), 3, batch_size=10))
    assert [len(batch["keys"]) for batch in alone] == [10] * 6 + [1]
    assert all(map(equal, alone, iterate(index, config(workers=2), 3, batch_size=10)))
    assert all(map(equal, alone, iterate(index, config(workers=3), 3, batch_size=10)))


def test_errors_come_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_bytes({"a.png": image_bytes(images(1)[0]), "b.png": b"no image"}))
    index = build_index(str(tmp_path))
    with pytest.raises(ValueError, match=r"a/b\.png: not a readable image"):
        list(iterate(index, config(workers=1), batch_size=2))
    (tmp_path / "a.tar").unlink()
    with pytest.raises(OSError, match=r"a\.tar: cannot read bytes 0 to \d+"):
        list(iterate(index, config(workers=1, read_attempts=1), batch_size=2))
