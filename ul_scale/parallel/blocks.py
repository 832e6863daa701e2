"""What is done to each block of a network before it is sharded: activation checkpointing, then compilation.

Both replace the block's ``forward`` in place, so that modules and parameters keep their names.
"""

import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

aten: Any = torch.ops.aten
# Dear to compute and small to keep, against the norms, activations and modulations around them.
KEPT_OPS = frozenset(
    [
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
        aten.convolution.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
    ]
)


def blocks_of(stage: nn.Module) -> list[nn.Module]:
    """Return the blocks of all networks of a stage, in the order in which they run."""
    networks: list[Any] = [network for network in stage.children() if hasattr(network, "ordered_blocks")]
    return [block for network in networks for block in network.ordered_blocks()]


def prepare_blocks(stage: nn.Module, *, activation_checkpointing: str, compiled: bool) -> None:
    """Checkpoint the activations of the trained blocks, then compile all, in place."""
    reported: set[str] = set()
    for block in blocks_of(stage):
        if any(p.requires_grad for p in block.parameters()):
            block.forward = _checkpointed(block.forward, activation_checkpointing)
        if compiled:
            block.forward = _compiled(block.forward, type(block).__name__, reported)


def _keep(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in KEPT_OPS else CheckpointPolicy.PREFER_RECOMPUTE


def _checkpointed(forward: Callable[..., Any], mode: str) -> Callable[..., Any]:
    if mode == "none":
        return forward
    options: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keep)
    return functools.partial(checkpoint, forward, **options)


def _compiled(forward: Callable[..., Any], name: str, reported: set[str]) -> Callable[..., Any]:
    """Return ``forward`` compiled at its first call, or itself from then on where that fails."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    # Blocks of a class share one code object and its limit: their sizes, with and without gradients.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)

    # Rotary positions are traced anew, as they should be.
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")

    chosen = torch.compile(forward, fullgraph=True)

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal chosen
        if chosen is forward:
            return forward(*args, **kwargs)
        try:
            return chosen(*args, **kwargs)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            chosen = forward
            if name not in reported:
                reported.add(name)
                inner = getattr(error, "inner_exception", error)  # what the compiler said
                cause = next((line.strip() for line in str(inner).splitlines() if line.strip()), "")
                print(
                    f"parallel.compile: {name} runs uncompiled ({type(inner).__name__}: {cause})",
                    file=sys.stderr,
                )
            return forward(*args, **kwargs)

    return call
