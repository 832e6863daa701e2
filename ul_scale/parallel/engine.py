"""The small interface between the loop and how a stage is spread over processes; and engine ``none``."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

NOT_IDENTITY: dict[str, Any] = {"identity": False}


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Section ``parallel``: how a run is spread out. Nothing here changes what it computes."""

    engine: str = field(default="none", metadata=NOT_IDENTITY)
    """``none`` (one process) or ``fsdp``."""
    accumulation_steps: int = field(default=1, metadata=NOT_IDENTITY)
    """Micro-batches per step; each rank's samples are cut into so many."""
    threads: int | None = field(default=None, metadata=NOT_IDENTITY)
    """CPU threads of torch per process; null: torch's choice."""

    def __post_init__(self) -> None:
        if self.engine not in ("none", "fsdp"):
            raise ValueError(f"parallel.engine is {self.engine!r}; expected 'none' or 'fsdp'")
        if self.accumulation_steps < 1:
            raise ValueError(f"parallel.accumulation_steps is {self.accumulation_steps}; expected 1 or more")


OptimizerFactory = Callable[[nn.Module], torch.optim.Optimizer]


@dataclass(frozen=True)
class Process:
    """This process among the run's: what torchrun's environment says, or one process alone."""

    rank: int
    world_size: int
    device: torch.device


class Engine(Protocol):
    """What the loop needs of a parallelism, and no more."""

    stage: nn.Module

    def forward(self, batch: Mapping[str, Any], noise: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
        """Run the wrapped stage on this rank's (micro-)batch."""
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate gradients of this rank's share of the loss, to be summed over ranks.

        ``last`` on the step's last micro-batch.
        """
        ...

    def step(self, lr: float) -> Tensor:
        """Clip, update, clear gradients; return the true global gradient norm before clipping."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return ``model`` and ``optim``, sharded as they are, named as in the unwrapped stage."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` returned, after a load into its tensors."""
        ...


class LocalEngine:
    """Engine ``none``: one process, the stage as it is. The base of those that only wrap it differently."""

    def __init__(
        self, stage: nn.Module, make_optimizer: OptimizerFactory, clip_norm: float, process: Process
    ):
        self.stage = self.wrap(stage.to(process.device), process)
        self.optimizer = make_optimizer(self.stage)
        self.clip_norm = clip_norm

    def wrap(self, stage: nn.Module, process: Process) -> nn.Module:
        return stage

    def forward(self, batch: Mapping[str, Any], noise: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
        return self.stage(batch, noise, step)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()

    def step(self, lr: float) -> Tensor:
        grad_norm = nn.utils.clip_grad_norm_(self.stage.parameters(), self.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        return grad_norm

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": get_model_state_dict(self.stage),
            "optim": get_optimizer_state_dict(self.stage, self.optimizer),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stage.load_state_dict(state["model"])
        set_optimizer_state_dict(self.stage, self.optimizer, state["optim"])


def build_engine(
    config: ParallelConfig,
    stage: nn.Module,
    make_optimizer: OptimizerFactory,
    clip_norm: float,
    process: Process,
) -> Engine:
    """Wrap a stage for training.

    Args:
        config: which engine.
        stage: the same on every rank.
        make_optimizer: called with the wrapped stage.
        clip_norm: largest global gradient norm.
        process: this process.

    Raises:
        ValueError: if the engine does not fit the number of processes.
    """
    if config.engine == "fsdp":
        from ul_scale.parallel.fsdp import FsdpEngine

        if not dist.is_initialized():
            raise ValueError("parallel.engine=fsdp needs torchrun --nproc-per-node=N -m ul_scale.cli train …")
        return FsdpEngine(stage, make_optimizer, clip_norm, process)
    if process.world_size > 1:
        raise ValueError(
            f"parallel.engine=none is one process, but torchrun started {process.world_size}; "
            "set parallel.engine=fsdp"
        )
    return LocalEngine(stage, make_optimizer, clip_norm, process)
