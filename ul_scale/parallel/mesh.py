"""Processes: join them however they were started, agree among them, and lay them out on a mesh."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ul_scale.parallel.engine import Process

T = TypeVar("T")


@contextmanager
def distributed() -> Iterator[Process]:
    """Join the processes that torchrun (or anything that sets its variables) started, or run alone.

    Collectives on CPU tensors use gloo beside NCCL, so that flags never wait for the GPU.
    """
    cuda = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "WORLD_SIZE" not in os.environ:
        yield Process(rank=0, world_size=1, device=device)
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        yield Process(rank=dist.get_rank(), world_size=dist.get_world_size(), device=device)
    finally:
        dist.destroy_process_group()


def data_parallel_mesh(process: Process) -> DeviceMesh:
    return init_device_mesh(process.device.type, (process.world_size,), mesh_dim_names=("dp_shard",))


def broadcast_object(value: T, process: Process) -> T:
    """Return rank 0's value on every rank."""
    if process.world_size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]
