"""Samplers that walk from t = 1 down to t = 0 on any schedule, and return the *noisy* end state."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ul_scale.diffusion.process import alpha_sigma, eps_from_v, x_from_v
from ul_scale.diffusion.schedule import Schedule

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""Maps (x_t, log_snr (b,)) to v̂ of x_t's shape."""

SAMPLERS = ("ancestral", "ddim", "dpmpp_2m")


def sample(
    name: str,
    denoise: Denoiser,
    x_1: Tensor,
    schedule: Schedule,
    *,
    num_steps: int,
    generators: Sequence[torch.Generator],
    gamma: float = 0.0,
) -> Tensor:
    """Return x at t = 0 by the sampler of that name.

    Args:
        name: one of ``SAMPLERS``.
        denoise: the model, perhaps ``guided``.
        x_1: (b, ...) standard normal noise.
        schedule: λ(t); its λ(0) is the noise level of what is returned.
        num_steps: number of evaluations of ``denoise``.
        generators: one for each example; the two samplers of the ODE draw nothing from them.
        gamma: of ``ancestral``.

    Raises:
        ValueError: if the name is unknown, or for a bad value of the other arguments.
    """
    if name == "ancestral":
        return ancestral(denoise, x_1, schedule, num_steps=num_steps, generators=generators, gamma=gamma)
    if name == "ddim":
        return ddim(denoise, x_1, schedule, num_steps=num_steps)
    if name == "dpmpp_2m":
        return dpmpp_2m(denoise, x_1, schedule, num_steps=num_steps)
    raise ValueError(f"sampler is {name!r}; expected one of {', '.join(SAMPLERS)}")


def guided(
    conditional: Denoiser, unconditional: Denoiser, *, scale: float, interval: tuple[float, float]
) -> Denoiser:
    """Return the denoiser with classifier-free guidance where log_snr is in the interval.

    There v̂ = v̂_unconditional + scale · (v̂_conditional − v̂_unconditional), which is the same guidance in
    v, ε and x; elsewhere v̂_conditional. Source: arXiv 2207.12598 and, for the interval, 2404.07724.

    Args:
        conditional: the denoiser with its condition.
        unconditional: the denoiser without; evaluated only if an example of the batch needs it.
        scale: 1 is no guidance.
        interval: lowest and highest log_snr with guidance, nats.

    Raises:
        ValueError: if the interval's ends are the wrong way round.
    """
    low, high = interval
    if not low <= high:
        raise ValueError(f"guidance interval is {interval}; expected the lower log-SNR first")
    if scale == 1:
        return conditional

    def denoise(x_t: Tensor, log_snr: Tensor) -> Tensor:
        v_hat = conditional(x_t, log_snr)
        inside = (low <= log_snr) & (log_snr <= high)
        if not inside.any():
            return v_hat
        v_free = unconditional(x_t, log_snr)
        inside = inside.view((-1,) + (1,) * (x_t.ndim - 1))
        return torch.where(inside, v_free + scale * (v_hat - v_free), v_hat)

    return denoise


def _log_snr_steps(schedule: Schedule, num_steps: int, like: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return λ before and after each step, (b,) both, at equal steps of t."""
    if num_steps < 1:
        raise ValueError(f"a sampler needs at least one step; got {num_steps}")
    times = torch.linspace(1, 0, num_steps + 1, dtype=like.dtype, device=like.device)
    log_snrs = [schedule.log_snr(t.expand(len(like))) for t in times]
    return list(zip(log_snrs[:-1], log_snrs[1:]))


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

    Raises:
        ValueError: if gamma is out of range, or generators and examples differ in number.
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma of the ancestral sampler is {gamma}; expected a number from 0 to 1")
    if len(generators) != len(x_1):
        raise ValueError(f"{len(x_1)} examples need as many generators; got {len(generators)}")
    x_t = x_1
    for log_snr_t, log_snr_s in _log_snr_steps(schedule, num_steps, x_1):
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
    for log_snr_t, log_snr_s in _log_snr_steps(schedule, num_steps, x_1):
        v_hat = denoise(x_t, log_snr_t)
        alpha_s, sigma_s = alpha_sigma(log_snr_s, x_t)
        x_t = alpha_s * x_from_v(x_t, v_hat, log_snr_t) + sigma_s * eps_from_v(x_t, v_hat, log_snr_t)
    return x_t


def dpmpp_2m(denoise: Denoiser, x_1: Tensor, schedule: Schedule, *, num_steps: int) -> Tensor:
    """Return x at t = 0 along the same ODE as ``ddim``, to second order in the step.

    x̂ is extrapolated linearly in λ over each step from the last two evaluations (DPM-Solver++(2M),
    arXiv 2211.01095, algorithm 2). A step with nothing before it, or more than twice as long in λ as the
    one before it, is that of ``ddim``: extrapolated so far, the last steps of a cosine schedule would be
    worse than without.
    """
    x_t = x_1
    before: tuple[Tensor, Tensor] | None = None
    for log_snr_t, log_snr_s in _log_snr_steps(schedule, num_steps, x_1):
        x_hat = x_from_v(x_t, denoise(x_t, log_snr_t), log_snr_t)
        _, sigma_t = alpha_sigma(log_snr_t, x_t)
        alpha_s, sigma_s = alpha_sigma(log_snr_s, x_t)
        # The paper's λ is log(α / σ), half the log-SNR.
        half_step = ((log_snr_s - log_snr_t) / 2).view_as(alpha_s)
        x_middle = x_hat
        if before is not None:
            x_hat_before, half_step_before = before
            distance = half_step / (2 * half_step_before)
            x_middle = x_hat + torch.where(distance <= 1, distance, 0) * (x_hat - x_hat_before)
        x_t = (sigma_s / sigma_t) * x_t - alpha_s * torch.expm1(-half_step) * x_middle
        before = x_hat, half_step
    return x_t
