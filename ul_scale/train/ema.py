"""Exponential moving averages of the parameters, by half-life in samples; sharded like the parameters."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """Section ``ema``."""

    half_lives_samples: list[int] = field(default_factory=list)
    """One average each, in training samples. The first is the one that is evaluated."""

    def __post_init__(self) -> None:
        if not self.half_lives_samples or min(self.half_lives_samples) <= 0:
            raise ValueError(
                f"ema.half_lives_samples is {list(self.half_lives_samples)}; expected numbers above 0"
            )


class Ema:
    """The averages of one module. Their tensors have the placement of the parameters that they follow."""

    def __init__(self, config: EmaConfig, module: nn.Module):
        self.parameters = dict(module.named_parameters())
        self.averages = {
            str(half_life): {name: p.detach().clone() for name, p in self.parameters.items()}
            for half_life in config.half_lives_samples
        }

    @torch.no_grad()
    def update(self, step: int, batch_size: int) -> None:
        """Move towards the parameters after step ``step`` (from 0).

        The decay is 0.5^(batch / half-life), at first no more than (1 + n) / (10 + n) after n steps, so
        that the initial weights are forgotten early.
        """
        for half_life, average in self.averages.items():
            decay = min(0.5 ** (batch_size / int(half_life)), (1 + step) / (10 + step))
            torch._foreach_lerp_(list(average.values()), list(self.parameters.values()), 1 - decay)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return ``{half-life: {parameter: average}}``; loading writes into these tensors in place."""
        return self.averages
