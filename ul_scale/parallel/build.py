"""From a stage and section ``parallel`` to an engine; and whether they fit the processes that there are."""

from importlib.util import find_spec

import torch.distributed as dist
from torch import nn

from ul_scale.parallel.blocks import prepare_blocks
from ul_scale.parallel.engine import Engine, LocalEngine, OptimizerFactory, ParallelConfig, Process


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def nearest(choices: list[int], wanted: int) -> str:
    """Return the choices next to a number that is none of them, as words."""
    below, above = [n for n in choices if n < wanted], [n for n in choices if n > wanted]
    return " or ".join(str(n) for n in below[-1:] + above[:1])


def check_layout(config: ParallelConfig, world_size: int, samples_per_rank: int) -> None:
    """Check that a number of processes and a rank's share of the batch can be laid out as asked.

    Raises:
        ValueError: naming the numbers, and the nearest that work.
    """
    if config.engine == "none" and world_size > 1:
        raise ValueError(
            f"parallel.engine is none, which is one process, but there are {world_size}; "
            "set parallel.engine=fsdp, or start one process"
        )
    if world_size % config.dp_replicate:
        raise ValueError(
            f"parallel.dp_replicate is {config.dp_replicate}, which does not divide {world_size} processes; "
            f"expected {nearest(divisors(world_size), config.dp_replicate)}"
        )
    if samples_per_rank % config.accumulation_steps:
        raise ValueError(
            f"parallel.accumulation_steps is {config.accumulation_steps}, but a rank has {samples_per_rank} "
            f"samples per step; expected {nearest(divisors(samples_per_rank), config.accumulation_steps)}"
        )


def check_process(config: ParallelConfig) -> None:
    """Check that this process can run the engine.

    Raises:
        ValueError: if it was not started as one of several, or the engine's package is missing.
    """
    if config.engine == "none":
        return
    if not dist.is_initialized():
        raise ValueError(
            f"parallel.engine={config.engine} needs torchrun --nproc-per-node=N -m ul_scale.cli train …, "
            "or python launch/submit.py CONFIG --processes N"
        )
    if config.engine == "deepspeed" and find_spec("deepspeed") is None:
        raise ValueError(
            "parallel.engine is deepspeed, which is not installed: pip install ul-scale[deepspeed]"
        )


def build_engine(
    config: ParallelConfig,
    stage: nn.Module,
    make_optimizer: OptimizerFactory,
    *,
    clip_norm: float,
    precision: str,
    process: Process,
    samples_per_rank: int,
) -> Engine:
    """Wrap a stage for training: activation checkpointing, compilation per block, then sharding.

    Args:
        config: which engine, and how.
        stage: the same on every rank; changed in place.
        make_optimizer: called with the wrapped stage.
        clip_norm: largest global gradient norm.
        precision: ``fp32`` or ``bf16``.
        process: this process.
        samples_per_rank: samples of a step on this rank.

    Raises:
        ValueError: if the engine does not fit the number of processes.
    """
    check_layout(config, process.world_size, samples_per_rank)
    prepare_blocks(stage, activation_checkpointing=config.activation_checkpointing, compiled=config.compile)
    if config.engine == "none":
        return LocalEngine(stage, make_optimizer, clip_norm=clip_norm, precision=precision, process=process)
    if config.engine == "fsdp":
        from ul_scale.parallel.fsdp import FsdpEngine

        return FsdpEngine(
            stage, make_optimizer, config=config, clip_norm=clip_norm, precision=precision, process=process
        )
    from ul_scale.parallel.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(
        stage,
        make_optimizer,
        config=config,
        clip_norm=clip_norm,
        precision=precision,
        process=process,
        samples_per_rank=samples_per_rank,
    )
