"""Samplers that walk from t = 1 down to t = 0 on any schedule, and return the *noisy* end state."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ul_scale.diffusion.process import alpha_sigma, eps_from_v, x_from_v
from ul_scale.diffusion.schedule import Schedule

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""Maps (x_t, log_snr (b,)) to v̂ of x_t's shape."""


def _times(num_steps: int, like: Tensor) -> Tensor:
    if num_steps < 1:
        raise ValueError(f"a sampler needs at least one step; got {num_steps}")
    return torch.linspace(1, 0, num_steps + 1, dtype=like.dtype, device=like.device)


def ancestral(
    denoise: Denoiser,
    x_1: Tensor,
    schedule: Schedule,
    *,
    num_steps: int,
    generators: Sequence[torch.Generator],
    gamma: float = 0.0,
) -> Tensor:
    """Return x at t = 0, sampled with the DDPM posterior q(x_s | x_t, x̂).

    The posterior's variance is interpolated geometrically between its lower bound (gamma = 0) and
    its upper bound (gamma = 1), as in simple diffusion (arXiv 2301.11093, appendix).

    Args:
        denoise: the model.
        x_1: (b, ...) standard normal noise.
        schedule: λ(t); its λ(0) is the noise level of what is returned.
        num_steps: number of evaluations of ``denoise``.
        generators: one for each example, so that a sample does not depend on its batch.
        gamma: interpolation of the log-variance, in [0, 1].
    """
    x_t = x_1
    times = _times(num_steps, x_1)
    for t, s in zip(times[:-1], times[1:]):
        log_snr_t = schedule.log_snr(t.expand(len(x_t)))
        log_snr_s = schedule.log_snr(s.expand(len(x_t)))
        x_hat = x_from_v(x_t, denoise(x_t, log_snr_t), log_snr_t)
        alpha_t, sigma_t = alpha_sigma(log_snr_t, x_t)
        alpha_s, sigma_s = alpha_sigma(log_snr_s, x_t)
        # r = SNR(t) / SNR(s) and c = 1 − r: the share of the noise at t that is new since s.
        r = torch.exp(log_snr_t - log_snr_s).view_as(alpha_t)
        c = -torch.expm1(log_snr_t - log_snr_s).view_as(alpha_t)
        mean = r * (alpha_s / alpha_t) * x_t + c * alpha_s * x_hat
        std = sigma_s * c.sqrt() * (sigma_t / sigma_s) ** gamma
        noise = torch.stack(
            [torch.randn(x_t.shape[1:], generator=g, dtype=x_t.dtype, device=x_t.device) for g in generators]
        )
        x_t = mean + std * noise
    return x_t


def ddim(denoise: Denoiser, x_1: Tensor, schedule: Schedule, *, num_steps: int) -> Tensor:
    """Return x at t = 0 along the probability-flow ODE: x_s = α_s x̂ + σ_s ε̂ (arXiv 2010.02502)."""
    x_t = x_1
    times = _times(num_steps, x_1)
    for t, s in zip(times[:-1], times[1:]):
        log_snr_t = schedule.log_snr(t.expand(len(x_t)))
        v_hat = denoise(x_t, log_snr_t)
        alpha_s, sigma_s = alpha_sigma(schedule.log_snr(s.expand(len(x_t))), x_t)
        x_t = alpha_s * x_from_v(x_t, v_hat, log_snr_t) + sigma_s * eps_from_v(x_t, v_hat, log_snr_t)
    return x_t
