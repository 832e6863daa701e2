"""Engine ``fsdp``: parameters, gradients, optimizer state and averages sharded with FSDP2."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from ul_scale.parallel.blocks import blocks_of
from ul_scale.parallel.engine import LocalEngine, OptimizerFactory, ParallelConfig, Process, backward
from ul_scale.parallel.mesh import data_parallel_mesh


class FsdpEngine(LocalEngine):
    """Shard each block, then the rest, over ``dp_shard``; replicate over ``dp_replicate`` if it is not 1.

    In bf16, parameters are gathered and multiplied in bf16; the shards that the optimizer updates, and
    the sums of gradients, are fp32. State is named as in the unwrapped stage.
    """

    def __init__(
        self,
        stage: nn.Module,
        make_optimizer: OptimizerFactory,
        *,
        config: ParallelConfig,
        clip_norm: float,
        precision: str,
        process: Process,
    ):
        self.config = config
        super().__init__(stage, make_optimizer, clip_norm=clip_norm, precision=precision, process=process)

    def wrap(self, stage: nn.Module) -> nn.Module:
        return shard(
            stage, data_parallel_mesh(self.process, self.config.dp_replicate), self.config, self.precision
        )

    @contextmanager
    def averaged(self, average: Mapping[str, Tensor]) -> Iterator[None]:
        with super().averaged(average):
            yield
            for module in self.stage.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()  # or the next forward pass would find the average gathered

    def backward(self, loss: Tensor, *, last: bool) -> None:
        assert isinstance(self.stage, FSDPModule)
        # Reduce gradients once a step, not once a micro-batch.
        self.stage.set_requires_gradient_sync(last)
        # FSDP averages gradients over ranks; the loss is a sum over them.
        backward(loss, self.process.world_size)


def shard(stage: nn.Module, mesh: DeviceMesh, config: ParallelConfig, precision: str) -> nn.Module:
    """Apply ``fully_shard`` to each block and to what is left, in place."""
    # Inputs stay as they are: times and noise must not be rounded. Autocast meets them at the layers.
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision == "bf16" else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    blocks = blocks_of(stage)
    sharded = [
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=config.reshard_after_forward)
        for block in blocks
    ]
    fully_shard(stage, mesh=mesh, mp_policy=policy)
    for i, block in enumerate(sharded):
        ahead = sharded[i + 1 : i + 1 + config.prefetch_blocks]
        behind = sharded[max(0, i - config.prefetch_blocks) : i][::-1]
        block.set_modules_to_forward_prefetch(ahead)
        block.set_modules_to_backward_prefetch(behind)
    return stage
