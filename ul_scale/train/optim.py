"""AdamW and its learning-rate schedule: warm-up, constant, and a decay over the last part."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

DECAY_SHAPES: dict[str, Callable[[float], float]] = {
    "cosine": lambda into: 0.5 * (1 + math.cos(math.pi * into)),
    "linear": lambda into: 1 - into,
    "sqrt": lambda into: 1 - math.sqrt(into),
}
"""Factor on lr by the share of the decay that has passed; sqrt is that of Hägele et al., arXiv 2405.18392."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Section ``optim``."""

    lr: float = 1e-4
    warmup_steps: int = 10_000
    decay_fraction: float = 0.0
    """Share of ``train.steps``, at the end, over which lr falls to 0. 0: constant after the warm-up;
    1: decay throughout; between: warm-up, stable, decay."""
    decay_shape: str = field(default="cosine", metadata={"legacy": "cosine"})
    """``cosine``, ``linear`` or ``sqrt``."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    """Largest global gradient norm."""

    def __post_init__(self) -> None:
        betas_hold = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        for name, holds, expected in (
            ("lr", 0 < self.lr < math.inf, "a number above 0"),
            ("warmup_steps", self.warmup_steps >= 0, "0 or more"),
            ("decay_fraction", 0 <= self.decay_fraction <= 1, "a share from 0 to 1"),
            ("decay_shape", self.decay_shape in DECAY_SHAPES, f"one of {', '.join(DECAY_SHAPES)}"),
            ("betas", betas_hold, "two numbers from 0 to below 1"),
            ("eps", 0 < self.eps < math.inf, "a number above 0"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "a number from 0"),
            ("clip_norm", self.clip_norm > 0, "a number above 0"),
        ):
            if not holds:
                raise ValueError(f"optim.{name} is {getattr(self, name)!r}; expected {expected}")


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Return the learning rate of step ``step`` (from 0) of ``steps``."""
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    decay_steps = config.decay_fraction * steps
    into_decay = step - (steps - decay_steps)
    if not decay_steps or into_decay <= 0:
        return config.lr * warmup
    return config.lr * warmup * DECAY_SHAPES[config.decay_shape](into_decay / decay_steps)


def build_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        [p for p in module.parameters() if p.requires_grad],
        lr=config.lr,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )
