"""FLOPs and activation memory of any network, from its layers' shapes on the meta device.

A multiply-accumulate counts as 2 FLOPs; a training step is 3 × forward. Linear layers, convolutions
and attention count, as in the paper; norms and activations do not.
"""

import copy
import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from ul_scale.models.layers import Attention, CrossAttention, TransformerBlock

TRAINING_FACTOR = 3
Call = Callable[[nn.Module], object]
"""Runs a network, on the meta device, with meta inputs."""


def _layer_flops(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> int:
    match layer:
        case nn.Linear():
            return 2 * output.numel() * layer.in_features
        case nn.Conv2d() | nn.Conv3d():
            return 2 * output.numel() * layer.weight[0].numel()
        case Attention():
            b, n, c = inputs[0].shape
            return 4 * b * n * n * c  # q kᵀ and the sum over v; its linear layers count themselves
        case CrossAttention():
            x, text = inputs[:2]
            return 4 * x.numel() * text.shape[1]
    return 0


def forward_flops(module: nn.Module, call: Call) -> int:
    """Return the FLOPs of one call.

    Args:
        module: the network, on any device, before it is sharded; neither changed nor its weights copied.
        call: is given a copy of the module that is on the meta device.
    """
    total = 0

    def count(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        nonlocal total
        total += _layer_flops(layer, inputs, output)

    on_meta = _on_meta(module)
    for layer in on_meta.modules():
        layer.register_forward_hook(count)
    with torch.no_grad():
        call(on_meta)
    return total


def _on_meta(module: nn.Module) -> nn.Module:
    tensors = itertools.chain(module.parameters(), module.buffers())
    return copy.deepcopy(module, {id(tensor): tensor.to("meta") for tensor in tensors})


_IN_BF16 = {F.linear, F.conv2d, F.conv3d, F.scaled_dot_product_attention}
_IN_FP32 = {F.layer_norm, F.group_norm}


class _AsOnGPU(TorchFunctionMode):
    """Let the meta device save what a GPU does: no matrix of all pairs in attention; autocast's dtypes."""

    def __init__(self, precision: str, weights: set[int]):
        super().__init__()
        self.precision = precision
        self.weights = weights  # storages; those of their casts join them
        self.casts: list[Tensor] = []  # alive, so that no other tensor gets their address

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == dtype:
            return value
        cast = value.to(dtype)
        if _storage(value) in self.weights:
            self.weights.add(_storage(cast))
            self.casts.append(cast)
        return cast

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.precision == "bf16" and (func in _IN_BF16 or func in _IN_FP32):
            dtype = torch.bfloat16 if func in _IN_BF16 else torch.float32
            args = [self._cast(value, dtype) for value in args]
            kwargs = {name: self._cast(value, dtype) for name, value in kwargs.items()}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        mask = kwargs.get("attn_mask")
        mask = None if mask is None else args[0].new_empty(mask.shape)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args[:3], attn_mask=mask)[0]


@dataclass(frozen=True)
class ActivationMemory:
    """Bytes of one call that wait for its backward pass; weights and what backward allocates not included."""

    none: int
    """Without activation checkpointing."""
    full: int
    """With every block checkpointed: their inputs, what is saved between them, and the largest block."""


def activation_memory(module: nn.Module, call: Call, *, precision: str = "fp32") -> ActivationMemory:
    """Return what autograd saves in one call, for planning.

    Args:
        module: the network; what is frozen saves little. Its ``ordered_blocks`` are what is checkpointed.
        call: is given a copy of the module that is on the meta device.
        precision: fp32; or bf16, under autocast on a GPU: matrix products, convolutions and attention in
            bf16, norms in fp32. Its casts of weights are not counted.
    """
    on_meta = _on_meta(module)
    weights = {_storage(tensor) for tensor in itertools.chain(on_meta.parameters(), on_meta.buffers())}
    seen: dict[int, Tensor] = {}  # by storage, which must live on, or another might get its address
    saved: dict[int | None, set[int]] = {None: set()}  # by block; None: outside of all
    block: int | None = None
    block_inputs: set[int] = set()

    def note(tensor: Tensor, place: set[int]) -> Tensor:
        if (key := _storage(tensor)) not in weights:
            seen[key] = tensor
            place.add(key)
        return tensor

    def enter(index: int, inputs: tuple[Any, ...]) -> None:
        nonlocal block
        block, saved[index] = index, set()
        for value in inputs:
            if isinstance(value, Tensor):
                note(value, block_inputs)

    def leave(*_: Any) -> None:
        nonlocal block
        block = None

    def total(keys: set[int]) -> int:
        return sum(seen[key].untyped_storage().nbytes() for key in keys)

    for index, layer in enumerate(getattr(on_meta, "ordered_blocks", list)()):
        layer.register_forward_pre_hook(lambda _, inputs, index=index: enter(index, inputs))
        layer.register_forward_hook(leave)
    on_gpu = _AsOnGPU(precision, weights)
    with on_gpu, saved_tensors_hooks(lambda tensor: note(tensor, saved[block]), lambda tensor: tensor):
        call(on_meta)
    everything = set().union(*saved.values())
    kept = saved.pop(None) | block_inputs
    largest = max((total(inside - kept) for inside in saved.values()), default=0)
    return ActivationMemory(none=total(everything), full=total(kept) + largest)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def blocks_by_tokens(module: nn.Module, call: Call) -> dict[int, int]:
    """Return how many transformer blocks work on how many tokens, the most tokens first."""
    blocks: Counter[int] = Counter()
    on_meta = _on_meta(module)
    for layer in on_meta.modules():
        if isinstance(layer, TransformerBlock):
            layer.register_forward_hook(lambda _, inputs, output: blocks.update([inputs[0].shape[1]]))
    with torch.no_grad():
        call(on_meta)
    return dict(sorted(blocks.items(), reverse=True))


def meta(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a batch of one example of a shape, without memory behind it."""
    return torch.zeros(1, *shape, dtype=dtype, device="meta")


def training_flops(forward: Mapping[str, int]) -> int:
    """Return what training on one example takes, from the forward FLOPs of each network that is trained."""
    return TRAINING_FACTOR * sum(forward.values())


def num_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
