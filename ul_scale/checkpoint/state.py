"""Sharded reading and writing of a training state with torch.distributed.checkpoint, on local files."""

import os
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.serialization import get_crc32_options, set_crc32_options

from ul_scale.checkpoint import store, transfer
from ul_scale.checkpoint.files import is_local

# One process needs no process group; torch says so at every save.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def write(state: dict[str, Any], directory: Path, group: dist.ProcessGroup | None = None) -> None:
    """Write this rank's shards of a state and, on rank 0, their layout; collective over ``group``.

    Args:
        state: nested dicts of tensors, sharded tensors and numbers; the same keys on every rank.
        directory: local; each rank may have its own.
        group: of a CPU backend, used by nobody else meanwhile.

    Raises:
        Exception: what made the first rank fail, such as ``OSError``, on every rank.
    """
    writer = FileSystemWriter(directory, single_file_per_rank=True, sync_files=True)
    crc32 = get_crc32_options()
    set_crc32_options(False)  # COMMIT has a sha256 of every file: a second checksum is a quarter of the work
    try:
        dcp.save(state, storage_writer=writer, process_group=group, no_dist=not dist.is_initialized())
    except CheckpointException as error:  # which is no Exception
        raise next(iter(error.failures.values()))[0] from None
    finally:
        set_crc32_options(crc32)


def own_files(directory: Path) -> tuple[str, ...]:
    """Return the beginnings of the names of this rank's files in a directory that all ranks write to."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return (f"__{rank}_", ".metadata") if rank == 0 else (f"__{rank}_",)


@contextmanager
def local_copy(
    run_dir: Path, step: int, scratch: str | None = None, group: dist.ProcessGroup | None = None
) -> Iterator[Path]:
    """Give a local directory with the files of a complete checkpoint, each compared with its hash in COMMIT.

    A bucket's are downloaded, once per host, and removed afterwards. Collective over ``group`` if there are
    several ranks, so that a file that one of them finds broken is broken for all.

    Raises:
        BrokenCheckpoint: naming the first file that is missing or differs.
    """
    commit = store.read_commit(run_dir, step)
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if is_local(run_dir):
        _agree(lambda: store.verify(run_dir, step, part=(rank, size)), group)
        yield store.shard_dir(run_dir, step)
        return
    with transfer.scratch(scratch) as own:
        first_here = int(os.environ.get("LOCAL_RANK", 0)) == 0

        def download() -> str | None:
            if not first_here:
                return None
            transfer.download(store.shard_dir(run_dir, step), own, commit.files)
            return str(own)

        path = _agree(download, group)
        yield Path(path)
        if size > 1:
            dist.barrier(group)  # others of this host may still be reading


def _agree(work: Callable[[], Any], group: dist.ProcessGroup | None) -> Any:
    """Do this rank's part; return what the first rank of this host returned, or raise on all ranks."""
    result, error = None, None
    try:
        result = work()
    except (store.BrokenCheckpoint, OSError) as caught:
        error = caught
    if dist.is_initialized():
        host = socket.gethostname()
        outcomes: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(outcomes, (host, result, error), group=group)
        error = next((e for _, _, e in outcomes if e is not None), None)
        result = next((r for h, r, _ in outcomes if h == host and r is not None), None)
    if error is not None:
        raise error
    return result


def holds(directory: Path, name: str) -> bool:
    """Say whether verified shards hold an entry, such as ``train.step``."""
    return name in FileSystemReader(directory).read_metadata().state_dict_metadata


def load(state: dict[str, Any], directory: Path) -> None:
    """Load shards into the tensors of ``state``, at any world size.

    torch keeps the layout of a checkpoint in a pickle: only what ``local_copy`` gave may be loaded.

    Raises:
        BrokenCheckpoint: if a tensor is missing or of another shape.
    """
    try:
        reader = FileSystemReader(directory)
        dcp.load(state, storage_reader=reader, no_dist=not dist.is_initialized())
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        if isinstance(cause, OSError | MemoryError):  # the files are whole: this machine is not
            raise cause from None
        raise store.BrokenCheckpoint(f"{directory} does not fit this code or config: {cause}") from None
