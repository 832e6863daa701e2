"""Moving averages of the parameters: by half-life in samples, and power functions of the run's length."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ul_scale.checkpoint import ema_snapshots
from ul_scale.checkpoint.ema_snapshots import MAX_WIDTH, ema_name

MIN_WIDTH = 0.001


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """Section ``ema``."""

    half_lives_samples: list[int] = field(default_factory=list)
    """One average each, in training samples. The first is the one that is evaluated."""
    power_widths: list[float] = field(default_factory=list, metadata={"legacy": []})
    """One power-function EMA each (EDM2), by its relative width, such as [0.05, 0.1]."""
    snapshot_every_steps: int | None = field(default=None, metadata={"identity": False})
    """Keep the power-function EMAs after every so many steps, so that any width can be rebuilt later."""

    def __post_init__(self) -> None:
        if not self.half_lives_samples or min(self.half_lives_samples) <= 0:
            raise ValueError(
                f"ema.half_lives_samples is {list(self.half_lives_samples)}; expected numbers above 0"
            )
        widths = list(self.power_widths)
        if any(not MIN_WIDTH <= width < MAX_WIDTH or round(width, 3) != width for width in widths):
            raise ValueError(
                f"ema.power_widths is {widths}; expected relative widths of at most 3 decimals, "
                f"from {MIN_WIDTH} to below {MAX_WIDTH:.3f}"
            )
        for name in ("half_lives_samples", "power_widths"):
            values = list(getattr(self, name))
            if len(set(values)) < len(values):
                raise ValueError(f"ema.{name} is {values}; expected each once")
        if self.snapshot_every_steps is not None and (self.snapshot_every_steps < 1 or not widths):
            raise ValueError(
                f"ema.snapshot_every_steps is {self.snapshot_every_steps} and ema.power_widths is {widths}; "
                "expected 1 or more, and widths to keep"
            )

    def snapshot_due(self, completed: int) -> bool:
        """Say whether a snapshot is due after so many completed steps."""
        return self.snapshot_every_steps is not None and completed % self.snapshot_every_steps == 0


class Ema:
    """The averages of one model. Their tensors have the layout of the parameters that they follow.

    Args:
        config: which averages.
        parameters: returns the parameters, or this rank's shards of them, in fp32 by name; asked at every
            update, for an engine may have put others in their place.
    """

    def __init__(self, config: EmaConfig, parameters: Callable[[], Mapping[str, Tensor]]):
        self._parameters = parameters
        self._half_lives = {str(half_life): half_life for half_life in config.half_lives_samples}
        self._widths = {ema_name(width): width for width in config.power_widths}
        initial = parameters()
        self.averages = {
            name: {key: value.detach().clone() for key, value in initial.items()}
            for name in (*self._half_lives, *self._widths)
        }

    @torch.no_grad()
    def update(self, step: int, batch_size: int) -> None:
        """Move towards the parameters after step ``step`` (from 0); the decays depend on it alone.

        By half-life it is 0.5^(batch / half-life), at first no more than (1 + n) / (10 + n) after n steps,
        so that the initial weights are forgotten early. Power functions forget them at the first step.
        """
        parameters = self._parameters()
        for name, average in self.averages.items():
            if name in self._widths:
                decay = ema_snapshots.decay(self._widths[name], step + 1)
            else:
                decay = min(0.5 ** (batch_size / self._half_lives[name]), (1 + step) / (10 + step))
            current = [parameters[key] for key in average]
            torch._foreach_lerp_(list(average.values()), current, 1 - decay)

    def power_averages(
        self, whole: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    ) -> dict[str, dict[str, Tensor]]:
        """Return the power-function EMAs in full on rank 0, empty elsewhere; collective.

        Args:
            whole: the engine's: an average to full CPU tensors on rank 0, to nothing elsewhere.
        """
        return {name: whole(self.averages[name]) for name in self._widths}

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return ``{name: {parameter: average}}``; loading writes into these tensors in place."""
        return self.averages
