"""The noise of a training step: keyed by (seed, step, purpose, lane), so the same for every world size."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ul_scale import keyed
from ul_scale.diffusion.losses import stratified_t
from ul_scale.diffusion.schedule import Schedule, TimeDensity, importance_density

TIME_SAMPLING = ("uniform", "importance")


@dataclass(frozen=True)
class NoiseSpec:
    """What a stage draws per step: times by purpose, and ε by purpose with its shape per example.

    Times without a density are uniform.
    """

    times: Mapping[str, TimeDensity | None]
    eps: Mapping[str, tuple[int, ...]]


def check_time_sampling(name: str) -> None:
    if name not in TIME_SAMPLING:
        raise ValueError(f"loss.time_sampling is {name!r}; expected one of {', '.join(TIME_SAMPLING)}")


def time_density(time_sampling: str, schedule: Schedule, loss_bias: float | None) -> TimeDensity | None:
    """Return the density of a loss's times, for ``loss.time_sampling``; None: uniform."""
    return importance_density(schedule, loss_bias) if time_sampling == "importance" else None


def draw_noise(
    spec: NoiseSpec,
    *,
    seed: int,
    step: int,
    lanes: Sequence[int],
    lane_size: int,
    batch_size: int,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """Return ``t/<purpose>`` (b,) and ``eps/<purpose>`` (b, ...) for the given lanes' examples, in order.

    Where times have a density p, also ``t_weight/<purpose>`` (b,), 1 / p(t), for the losses drawn at them.

    t is stratified over the *global* batch, with one offset and one permutation per purpose; ε is drawn
    on the device for whole lanes.

    Args:
        spec: what to draw.
        seed: the run's seed.
        step: the step, from 0.
        lanes: the lanes that this rank holds.
        lane_size: examples per lane.
        batch_size: the global batch size.
        device: where the noise is needed. CPU and CUDA streams differ.
    """
    noise = {}
    for purpose, density in spec.times.items():
        strata = keyed.permutation(batch_size, seed, f"t/{purpose}", step).reshape(-1, lane_size)[list(lanes)]
        offset = keyed.uniform(seed, f"t/{purpose}/offset", step)
        strata_f = torch.as_tensor(strata.ravel(), dtype=torch.float32, device=device)
        noise[f"t/{purpose}"] = stratified_t(offset, strata_f, batch_size)
        if density is not None:
            noise[f"t/{purpose}"], noise[f"t_weight/{purpose}"] = density.warp(noise[f"t/{purpose}"])
    generator = torch.Generator(device=device)
    for purpose, shape in spec.eps.items():
        noise[f"eps/{purpose}"] = torch.cat(
            [
                torch.randn(
                    (lane_size, *shape),
                    generator=generator.manual_seed(keyed.seed_of(seed, f"eps/{purpose}", step, lane) >> 1),
                    device=device,
                )
                for lane in lanes
            ]
        )
    return noise
