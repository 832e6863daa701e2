"""A step's losses by noise level: which part of the schedule learns, and which blows up."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ul_scale.diffusion.schedule import Schedule

TimedLosses = Mapping[str, tuple[str, Schedule]]
"""By purpose of a stage's times (``t/<purpose>``): the loss term drawn at them, and their schedule."""


class NoiseBins:
    """Means of per-example losses over bins of equal width in t, least noise first.

    Their names tell their range of log-SNR. Where t is uniform, they are equally full.

    Args:
        timed_losses: of the stage.
        num_bins: for each loss.
    """

    def __init__(self, timed_losses: TimedLosses, num_bins: int = 8):
        self._losses = {purpose: name for purpose, (name, _) in timed_losses.items()}
        self._num_bins = num_bins
        self._names = {
            purpose: bin_names(f"loss_by_noise/{purpose}", schedule, num_bins)
            for purpose, (_, schedule) in timed_losses.items()
        }

    def sums(
        self, terms: Mapping[str, Tensor], noise: Mapping[str, Tensor], weight: Tensor
    ) -> dict[str, Tensor]:
        """Return per purpose (2, num_bins): Σ weight · loss and Σ weight, on the device.

        Sums only, so micro-batches and ranks are added up. Without atomics, so the same bits every time.

        Args:
            terms: per-example losses (b,) by name.
            noise: the same examples' ``t/<purpose>`` (b,) in [0, 1), and ``t_weight/<purpose>`` where the
                losses are weighted by it.
            weight: (b,), 0 for surplus examples.
        """
        sums = {}
        for purpose, loss in self._losses.items():
            bins = (noise[f"t/{purpose}"] * self._num_bins).long().clamp(max=self._num_bins - 1)
            inside = bins == torch.arange(self._num_bins, device=bins.device)[:, None]
            # Selected rather than multiplied by 0: a loss that is not finite stays in its own bin.
            counted = weight * noise.get(f"t_weight/{purpose}", 1.0)
            values = torch.stack([weight * terms[loss].detach(), counted])
            sums[f"noise_bins/{purpose}"] = torch.where(inside, values[:, None], 0.0).sum(-1)
        return sums

    def finish(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the mean of every bin that is not empty, by its name.

        Args:
            sums: what ``sums`` returned, added up over micro-batches and ranks; may hold others' too.
        """
        means: dict[str, float] = {}
        for purpose, names in self._names.items():
            totals, weights = sums[f"noise_bins/{purpose}"].tolist()
            means |= {name: total / w for name, total, w in zip(names, totals, weights) if w > 0}
        return means


def bin_names(prefix: str, schedule: Schedule, num_bins: int) -> list[str]:
    """Return such names as ``<prefix>/0_log_snr_5.0_to_3.2``; the number keeps them in order."""
    edges = schedule.log_snr(torch.linspace(0, 1, num_bins + 1, dtype=torch.float64)).tolist()
    return [
        f"{prefix}/{i}_log_snr_{high:.1f}_to_{low:.1f}" for i, (high, low) in enumerate(zip(edges, edges[1:]))
    ]
