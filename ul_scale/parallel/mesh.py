"""Processes: join them however they were started, agree among them, and lay them out on a mesh."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ul_scale.parallel.engine import Process

T = TypeVar("T")


@contextmanager
def distributed(timeout_s: float = 600.0) -> Iterator[Process]:
    """Join the processes that torchrun (or anything that sets its variables) started, or run alone.

    Collectives on CPU tensors use gloo beside NCCL, so that flags never wait for the GPU. A process group
    that the launcher has initialised is used, and left to it.

    Raises:
        ValueError: if this machine has fewer GPUs than processes.
    """
    device = local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # The flight recorder: when a collective times out, what every rank was at is dumped.
        os.environ.setdefault("TORCH_NCCL_TRACE_BUFFER_SIZE", "2000")
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    if "WORLD_SIZE" not in os.environ and not dist.is_initialized():
        yield Process(rank=0, world_size=1, device=device)
        return
    ours = not dist.is_initialized()
    if ours:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    try:
        yield Process(rank=dist.get_rank(), world_size=dist.get_world_size(), device=device)
    finally:
        if ours:
            dist.destroy_process_group()
            # Meshes and hooks keep groups alive in reference cycles, and a group's thread that frees a tensor
            # while the interpreter ends aborts the process. To be collected, a group joins its threads.
            gc.collect()


def local_device() -> torch.device:
    """Return this process's GPU, or the CPU where there is none."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if local_rank >= count:
        raise ValueError(
            f"local rank {local_rank} has no GPU: this machine shows {count}; start at most {count} processes"
        )
    return torch.device("cuda", local_rank)


def data_parallel_mesh(process: Process, dp_replicate: int = 1) -> DeviceMesh:
    """Return the mesh ``dp_replicate × dp_shard``, or ``dp_shard`` alone for one replica."""
    if dp_replicate == 1:
        return init_device_mesh(process.device.type, (process.world_size,), mesh_dim_names=("dp_shard",))
    shape = (dp_replicate, process.world_size // dp_replicate)
    return init_device_mesh(process.device.type, shape, mesh_dim_names=("dp_replicate", "dp_shard"))


PATIENCE_S = 7200.0
"""What one rank may do while the others wait: download a checkpoint, wait for a dead attempt's heartbeat."""


def cpu_group(timeout_s: float, process: Process) -> dist.ProcessGroup | None:
    """Return a gloo group of all ranks with a timeout of its own; None for one process. Collective."""
    if process.world_size == 1:
        return None
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))


def broadcast_object(value: T, process: Process, group: dist.ProcessGroup | None = None) -> T:
    """Return rank 0's value on every rank."""
    if process.world_size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group, device=torch.device("cpu"))
    return box[0]


def gather_objects(value: T, process: Process, group: dist.ProcessGroup | None = None) -> list[T]:
    """Return every rank's value, in order, on rank 0; [] on the others."""
    if process.world_size == 1:
        return [value]
    gathered: list[T | None] | None = [None] * process.world_size if process.rank == 0 else None
    dist.gather_object(value, gathered, dst=0, group=group)
    return gathered or []  # type: ignore[return-value]
