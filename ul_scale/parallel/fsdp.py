"""Engine ``fsdp``: parameters, gradients, optimizer state and EMAs sharded with FSDP2."""

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from ul_scale.models.layers import ResBlock, TransformerBlock
from ul_scale.parallel.engine import LocalEngine, OptimizerFactory, Process
from ul_scale.parallel.mesh import data_parallel_mesh


class FsdpEngine(LocalEngine):
    """Shard each block, then the rest, over all processes. State is named as in the unwrapped stage."""

    def __init__(
        self, stage: nn.Module, make_optimizer: OptimizerFactory, clip_norm: float, process: Process
    ):
        super().__init__(stage, make_optimizer, clip_norm, process)
        self.world_size = process.world_size

    def wrap(self, stage: nn.Module, process: Process) -> nn.Module:
        mesh = data_parallel_mesh(process)
        for module in stage.modules():
            if isinstance(module, ResBlock | TransformerBlock):
                fully_shard(module, mesh=mesh)
        fully_shard(stage, mesh=mesh)
        return stage

    def backward(self, loss: Tensor, *, last: bool) -> None:
        assert isinstance(self.stage, FSDPModule)
        # Reduce gradients once a step, not once a micro-batch.
        self.stage.set_requires_gradient_sync(last)
        # FSDP averages gradients over ranks; the loss is a sum over them.
        (self.world_size * loss).backward()

    def step(self, lr: float) -> Tensor:
        grad_norm = super().step(lr)
        # A norm of sharded gradients is a partial value until it is reduced over the mesh.
        return grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm
