"""Encode a run in several ways, for ``test_encode.py``: ``python encode_ranks.py RUN_DIR RESULTS``.

Every rank is forked from here, so that torch is imported once.
"""

import multiprocessing
import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from ul_scale.evaluate import encode as subject
from ul_scale.train.prepare import latents_dir

FORK = multiprocessing.get_context("fork")
CONFIG = subject.EncodeConfig(samples_per_shard=7, batch_size=3)


def kill_before(number: int) -> None:
    """Let this process be killed when it puts its ``number``-th file in place."""
    replace, count = os.replace, 0

    def counting(*args: object) -> None:
        nonlocal count
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*args)

    os.replace = counting


def kill_before_the_index() -> None:
    subject.build_index = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)


def rank_of(run_dir: Path, rank: int, world_size: int, port: int, prepare: Callable[[int], object]) -> None:
    torch.set_num_threads(2 if world_size == 1 else 1)  # torchrun gives each rank one thread
    if world_size > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"}
    prepare(rank)
    sys.stderr = open(os.devnull, "w")
    folders = subject.encode(run_dir, 2, ["train"], CONFIG)
    assert [folder.name for folder in folders] == (["train"] if rank == 0 else [])


def run(run_dir: Path, world_size: int, prepare: Callable[[int], object] = lambda rank: None) -> list[int]:
    """Encode with so many ranks; return what they ended with."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return join(
        [
            FORK.Process(target=rank_of, args=(run_dir, rank, world_size, port, prepare))
            for rank in range(world_size)
        ]
    )


def join(processes: list) -> list[int]:
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode or 0 for process in processes]


def main() -> None:
    run_dir, results = Path(sys.argv[1]), Path(sys.argv[2])
    folder = latents_dir(run_dir.parent, run_dir.name, 2)

    def keep(name: str) -> None:
        shutil.move(folder, results / name)

    for world_size in (1, 3):
        assert run(run_dir, world_size) == [0] * world_size
        keep(f"{world_size} ranks")
    twins = [FORK.Process(target=rank_of, args=(run_dir, 0, 1, 0, lambda rank: None)) for _ in range(2)]
    assert join(twins) == [0, 0]
    keep("2 encoders at once")
    # There are 7 shards, and 14 files are put in place.
    assert run(run_dir, 1, lambda rank: kill_before(6)) == [-signal.SIGKILL]
    shutil.copytree(folder, results / "half")
    assert run(run_dir, 2) == [0, 0]
    keep("killed, then 2 ranks")
    # The others notice that it has gone, and end in errors.
    ended = run(run_dir, 2, lambda rank: kill_before(2) if rank == 1 else None)
    assert ended[1] == -signal.SIGKILL and ended[0] != 0, ended
    assert run(run_dir, 1) == [0]
    keep("killed 1 of 2, then 1 rank")
    assert run(run_dir, 1, lambda rank: kill_before_the_index()) == [-signal.SIGKILL]
    shutil.copytree(folder, results / "whole but for the index")
    assert run(run_dir, 1) == [0]
    keep("killed before the index")


if __name__ == "__main__":
    main()
