"""The small interface between the loop and how a stage is spread over processes; and engine ``none``."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

NOT_IDENTITY: dict[str, Any] = {"identity": False}
ENGINES = ("none", "fsdp", "deepspeed")
ACTIVATION_CHECKPOINTING = ("none", "selective", "full")
PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Section ``parallel``: how a run is spread out. Nothing here changes what it computes."""

    engine: str = field(default="none", metadata=NOT_IDENTITY)
    """``none`` (one process), ``fsdp`` (FSDP2) or ``deepspeed`` (ZeRO)."""
    accumulation_steps: int = field(default=1, metadata=NOT_IDENTITY)
    """Micro-batches per step; each rank's samples are cut into so many."""
    threads: int | None = field(default=None, metadata=NOT_IDENTITY)
    """CPU threads of torch per process; null: torch's choice."""
    dp_replicate: int = field(default=1, metadata=NOT_IDENTITY)
    """fsdp: replicas of the model, each sharded over world size / dp_replicate ranks (HSDP)."""
    reshard_after_forward: bool = field(default=True, metadata=NOT_IDENTITY)
    """fsdp: free a block's gathered parameters after its forward; false: faster, more memory."""
    prefetch_blocks: int = field(default=1, metadata=NOT_IDENTITY)
    """fsdp: blocks whose parameters are gathered ahead of use, forward and backward."""
    zero_stage: int = field(default=2, metadata=NOT_IDENTITY)
    """deepspeed: shard optimizer state (1), gradients too (2), parameters too (3)."""
    offload_optimizer: bool = field(default=False, metadata=NOT_IDENTITY)
    """deepspeed: optimizer state and update on the CPU."""
    activation_checkpointing: str = field(default="none", metadata=NOT_IDENTITY)
    """``none``; ``selective``: keep what matrix products, convolutions and attention give and recompute
    the rest; ``full``: keep each block's input only."""
    compile: bool = field(default=False, metadata=NOT_IDENTITY)
    """torch.compile each block; one that does not compile runs as it is, and a line says why."""
    timeout_s: float = field(default=600.0, metadata=NOT_IDENTITY)
    """A collective that takes longer ends the process, with its rank, step and phase."""

    def __post_init__(self) -> None:
        for name, choices in (
            ("engine", ENGINES),
            ("activation_checkpointing", ACTIVATION_CHECKPOINTING),
            ("zero_stage", (1, 2, 3)),
        ):
            if getattr(self, name) not in choices:
                expected = ", ".join(map(str, choices))
                raise ValueError(f"parallel.{name} is {getattr(self, name)!r}; expected one of {expected}")
        for name, least in (("accumulation_steps", 1), ("dp_replicate", 1), ("prefetch_blocks", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"parallel.{name} is {getattr(self, name)}; expected {least} or more")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"parallel.threads is {self.threads}; expected 1 or more, or none")
        if not 0 < self.timeout_s < 1e9:
            raise ValueError(f"parallel.timeout_s is {self.timeout_s}; expected seconds above 0, below 1e9")
        if self.dp_replicate > 1 and self.engine != "fsdp":
            raise ValueError(
                f"parallel.dp_replicate is {self.dp_replicate}, which is for parallel.engine=fsdp; "
                f"it is {self.engine}"
            )


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
    checkpoint_format: str
    """Of COMMIT: ``dcp``, which loads at any world size, or ``deepspeed``."""

    def forward(self, batch: Mapping[str, Any], noise: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
        """Run the wrapped stage on this rank's (micro-)batch."""
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate gradients of this rank's share of the loss, to be summed over ranks.

        A share that is not finite makes the gradient norm so on every rank. ``last`` on the step's last
        micro-batch.
        """
        ...

    def step(self, lr: float) -> Tensor:
        """Clip, update, clear gradients; return the true global gradient norm before clipping.

        If that is not finite, nothing is updated. It is the same on every rank, and still on the device.
        """
        ...

    def parameters(self) -> Mapping[str, Tensor]:
        """Return what averages follow: this rank's fp32 (shards of the) trained parameters by name."""
        ...

    def whole(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors laid out like ``parameters`` in full, on rank 0's CPU; {} on the other ranks."""
        ...

    def saved(self, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return tensors laid out like ``parameters`` as a checkpoint holds them; may be collective."""
        ...

    def blank(self, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return tensors to load what ``saved`` gave into; may be ``values`` themselves."""
        ...

    def restore(self, values: Mapping[str, Tensor], loaded: Mapping[str, Tensor]) -> None:
        """Take into ``values`` what was loaded into ``blank(values)``."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds of ``model`` and ``optim``, named as in the unwrapped stage."""
        ...

    def blank_state(self, checkpoint_format: str) -> dict[str, Any]:
        """Return the state to load a checkpoint of a format into.

        Raises:
            ValueError: if this engine cannot go on from that format.
        """
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what was loaded into ``blank_state``."""
        ...

    def save_files(self, directory: Path) -> None:
        """Write this rank's files that are not in ``state_dict``, if the engine has a format of its own."""
        ...

    def load_files(self, directory: Path) -> None:
        """Take back what ``save_files`` wrote."""
        ...


class LocalEngine:
    """Engine ``none``: one process, the stage as it is. The base of those that only wrap it differently."""

    checkpoint_format = "dcp"

    def __init__(
        self,
        stage: nn.Module,
        make_optimizer: OptimizerFactory,
        *,
        clip_norm: float,
        precision: str,
        process: Process,
    ):
        self.process, self.precision = process, precision
        self.stage = self.wrap(stage.to(process.device))
        self.optimizer = make_optimizer(self.stage)
        self.clip_norm = clip_norm
        self._trained = {name: p for name, p in self.stage.named_parameters() if p.requires_grad}

    def wrap(self, stage: nn.Module) -> nn.Module:
        return stage

    def forward(self, batch: Mapping[str, Any], noise: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
        with torch.autocast(self.process.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.stage(batch, noise, step)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        backward(loss)

    def step(self, lr: float) -> Tensor:
        grad_norm = nn.utils.clip_grad_norm_(self._trained.values(), self.clip_norm)
        if isinstance(grad_norm, DTensor):
            # A norm of sharded gradients is a partial value until it is reduced over the mesh.
            grad_norm = grad_norm.full_tensor()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # A fused optimizer leaves everything as it is, on the device, where this says 1.
        self.optimizer.found_inf = (~grad_norm.isfinite()).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return grad_norm

    @contextmanager
    def averaged(self, average: Mapping[str, Tensor]) -> Iterator[None]:
        """Give the stage an average's weights, laid out like ``parameters``, to run without gradients."""
        current = {name: p.detach().clone() for name, p in self._trained.items()}
        self._assign(average)
        self.stage.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.stage.train()
            self._assign(current)

    @torch.no_grad()
    def _assign(self, values: Mapping[str, Tensor]) -> None:
        for name, p in self._trained.items():
            p.copy_(values[name])

    def parameters(self) -> Mapping[str, Tensor]:
        return self._trained

    def whole(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        result = {}
        for name, value in values.items():
            full = value.full_tensor() if isinstance(value, DTensor) else value
            if self.process.rank == 0:
                result[name] = full.detach().to("cpu", copy=True)
        return result

    def saved(self, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return values

    def blank(self, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return values

    def restore(self, values: Mapping[str, Tensor], loaded: Mapping[str, Tensor]) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": get_model_state_dict(self.stage, options=StateDictOptions(ignore_frozen_params=True)),
            "optim": get_optimizer_state_dict(self.stage, self.optimizer),
        }

    def blank_state(self, checkpoint_format: str) -> dict[str, Any]:
        if checkpoint_format != self.checkpoint_format:
            raise ValueError(
                f"the checkpoint is one of engine {checkpoint_format}; expected parallel.engine="
                f"{checkpoint_format}, or first run: ul-scale checkpoint convert RUN"
            )
        return self.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stage.load_state_dict(state["model"], strict=False)  # frozen parameters are not in it
        set_optimizer_state_dict(self.stage, self.optimizer, state["optim"])

    def save_files(self, directory: Path) -> None:
        pass

    def load_files(self, directory: Path) -> None:
        pass


def backward(loss: Tensor, scale: float = 1.0) -> None:
    """Run the backward pass of ``scale`` · loss; a loss that is not finite makes every gradient NaN."""
    # Without this, an infinite loss could have finite gradients on one rank and pass unseen.
    loss.backward(gradient=scale + 0 * loss.detach())
