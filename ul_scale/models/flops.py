"""Forward and training FLOPs of any network, from its layers' shapes on the meta device.

A multiply-accumulate counts as 2 FLOPs; a training step is 3 × forward. Linear layers, convolutions
and attention count, as in the paper; norms and activations do not.
"""

import copy
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ul_scale.models.layers import Attention

TRAINING_FACTOR = 3


def _layer_flops(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> int:
    match layer:
        case nn.Linear():
            return 2 * output.numel() * layer.in_features
        case nn.Conv2d():
            return 2 * output.numel() * layer.weight[0].numel()
        case Attention():
            b, n, c = inputs[0].shape
            return 4 * b * n * n * c  # q kᵀ and the sum over v; its linear layers count themselves
    return 0


def forward_flops(module: nn.Module, call: Callable[[nn.Module], object]) -> int:
    """Return the FLOPs of one call.

    Args:
        module: the network, on any device, before it is sharded; neither changed nor its weights copied.
        call: runs a copy of the module that is on the meta device, with meta inputs.
    """
    total = 0

    def count(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        nonlocal total
        total += _layer_flops(layer, inputs, output)

    tensors = itertools.chain(module.parameters(), module.buffers())
    on_meta = copy.deepcopy(module, {id(tensor): tensor.to("meta") for tensor in tensors})
    handles = [layer.register_forward_hook(count) for layer in on_meta.modules()]
    with torch.no_grad():
        call(on_meta)
    for handle in handles:
        handle.remove()
    return total


def meta(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a batch of one example of a shape, without memory behind it."""
    return torch.zeros(1, *shape, dtype=dtype, device="meta")


def training_flops(forward: Mapping[str, int]) -> int:
    """Return what training on one example takes, from the forward FLOPs of each network that is trained."""
    return TRAINING_FACTOR * sum(forward.values())


def num_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
