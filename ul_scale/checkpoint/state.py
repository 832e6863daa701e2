"""Sharded save and load of a training state with torch.distributed.checkpoint, inside the commit protocol."""

import warnings
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException

from ul_scale.checkpoint import store
from ul_scale.checkpoint.attempts import Attempt

# One process needs no process group; torch says so at every save.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def save(state: dict[str, Any], run_dir: Path, step: int, attempt: Attempt | None, number: int) -> None:
    """Write the state of all ranks and commit it; returns on every rank after the commit.

    Args:
        state: nested dicts of tensors, sharded tensors and numbers; the same keys on every rank.
        run_dir: the run's directory.
        step: completed steps.
        attempt: rank 0's attempt; None on the others.
        number: the attempt's number.
    """
    directory = store.checkpoint_dir(run_dir, step, number, create=attempt is not None)
    if dist.is_initialized():
        dist.barrier()
    writer = FileSystemWriter(directory, single_file_per_rank=True, sync_files=True)
    dcp.save(state, storage_writer=writer, no_dist=not dist.is_initialized())
    files = store.hash_files(directory, prefixes=(f"__{dist.get_rank() if dist.is_initialized() else 0}_",))
    if dist.is_initialized():
        gathered: list[dict[str, Any]] = [{}] * dist.get_world_size()
        dist.all_gather_object(gathered, files)
        files = {name: entry for part in gathered for name, entry in part.items()}
    if attempt is not None:
        files |= store.hash_files(directory, prefixes=(".metadata",))
        store.commit(run_dir, step, attempt, files)
    if dist.is_initialized():
        dist.barrier()


def load(state: dict[str, Any], run_dir: Path, step: int) -> None:
    """Load a committed checkpoint into the tensors of ``state``, at any world size.

    torch keeps the layout of a checkpoint in a pickle: call ``store.verify`` first, which compares every
    file with the hashes in COMMIT.

    Raises:
        BrokenCheckpoint: if a tensor is missing or of another shape.
    """
    directory = store.shard_dir(run_dir, step)
    try:
        reader = FileSystemReader(directory)
        dcp.load(state, storage_reader=reader, no_dist=not dist.is_initialized())
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise store.BrokenCheckpoint(f"{directory} does not fit this code or config: {cause}") from None
