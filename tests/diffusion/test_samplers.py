import math

import pytest
import torch

from ul_scale.diffusion.process import alpha_sigma
from ul_scale.diffusion.samplers import SAMPLERS, ancestral, ddim, dpmpp_2m, guided, sample
from ul_scale.diffusion.schedule import Schedule, latent_schedule, pixel_schedule

LINEAR = Schedule(log_snr_max=5.0, log_snr_min=-10.0, kind="linear")


def gaussian_denoiser(mean, variance):
    """Return the exact v̂ for data N(mean, variance); the two are numbers, or (b, 1), one for each example."""

    def denoise(x_t, log_snr):
        alpha, sigma = alpha_sigma(log_snr, x_t)
        x_hat = mean + alpha * variance / (alpha**2 * variance + sigma**2) * (x_t - alpha * mean)
        return (alpha * x_t - x_hat) / sigma

    return denoise


def generators(n):
    return [torch.Generator().manual_seed(i) for i in range(n)]


def ode_solution(x_1, schedule, mean, variance):
    """Return x at t = 0: the probability flow of a Gaussian keeps each point's quantile."""
    ends = schedule.log_snr(torch.tensor([1.0, 0.0], dtype=torch.float64))
    alpha, sigma = alpha_sigma(ends, torch.zeros(2, 1))
    std = (alpha**2 * variance + sigma**2).sqrt()
    return alpha[1] * mean + (x_1 - alpha[0] * mean) * std[1] / std[0]


@pytest.mark.parametrize(("sampler", "order"), [(ddim, 1), (dpmpp_2m, 2)])
@pytest.mark.parametrize("schedule", [latent_schedule(), LINEAR])
@pytest.mark.parametrize(("mean", "variance"), [(0.5, 0.25), (0.0, 4.0)])
def test_order_of_convergence_to_the_exact_solution_of_the_ode(sampler, order, schedule, mean, variance):
    x_1 = torch.tensor([[-1.5], [0.3], [2.0]], dtype=torch.float64)
    exact = ode_solution(x_1, schedule, mean, variance)
    denoise = gaussian_denoiser(mean, variance)
    errors = [
        (sampler(denoise, x_1, schedule, num_steps=n) - exact).abs().max().item() for n in (160, 320, 640)
    ]
    for coarse, fine in zip(errors, errors[1:]):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("num_steps", [5, 10, 20, 40, 80])
@pytest.mark.parametrize("schedule", [latent_schedule(), pixel_schedule(64), pixel_schedule(512), LINEAR])
@pytest.mark.parametrize(("mean", "variance"), [(0.5, 0.25), (0.3, 0.01), (0.0, 4.0)])
def test_the_second_order_is_never_worse_than_the_first(num_steps, schedule, mean, variance):
    # A fixed extrapolation is: three times worse for 20 steps of the schedule for 512 pixels.
    x_1 = torch.tensor([[-1.5], [0.3], [2.0]], dtype=torch.float64)
    exact = ode_solution(x_1, schedule, mean, variance)
    denoise = gaussian_denoiser(mean, variance)
    first, second = (
        (sampler(denoise, x_1, schedule, num_steps=num_steps) - exact).abs().max()
        for sampler in (ddim, dpmpp_2m)
    )
    assert second < first


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_an_ancestral_step_draws_from_the_posterior_of_the_process(gamma):
    # From λ_t = −1 to λ_s = 2 with x̂ = 0.7, against conditioning of the joint Gaussian of (x_s, x_t).
    x_hat, log_snr_s, log_snr_t = 0.7, 2.0, -1.0
    alpha, sigma = alpha_sigma(torch.tensor([log_snr_s, log_snr_t]).double(), torch.zeros(2, 1))
    (alpha_s, alpha_t), (sigma_s, sigma_t) = alpha[:, 0].tolist(), sigma[:, 0].tolist()
    forward = alpha_t / alpha_s
    var_s, var_t, cov = sigma_s**2, sigma_t**2, forward * sigma_s**2
    x_t = torch.randn(3, 5, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    mean = alpha_s * x_hat + cov / var_t * (x_t - alpha_t * x_hat)
    lower, upper = var_s - cov**2 / var_t, var_t - forward**2 * var_s  # var(x_s | x_t, x), var(x_t | x_s)
    variance = lower ** (1 - gamma) * upper**gamma
    noise = torch.stack([torch.randn(5, generator=g, dtype=torch.float64) for g in generators(3)])
    x_s = ancestral(
        gaussian_denoiser(x_hat, 0.0),
        x_t,
        Schedule(log_snr_max=log_snr_s, log_snr_min=log_snr_t),
        num_steps=1,
        generators=generators(3),
        gamma=gamma,
    )
    torch.testing.assert_close(x_s, mean + variance**0.5 * noise)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("schedule", [latent_schedule(), pixel_schedule(512), LINEAR])
def test_one_step_and_the_end_in_fp32_are_finite_and_at_the_last_noise_level(name, schedule):
    # Data that is one point: any number of steps ends exactly at N(α_0 · point, σ_0²).
    denoise = gaussian_denoiser(0.5, 0.0)
    x_1 = torch.randn(2, 5000, generator=torch.Generator().manual_seed(0))
    alpha, sigma = alpha_sigma(torch.tensor([schedule.log_snr_max]), torch.zeros(1))
    for num_steps in (1, 50):
        x_0 = sample(name, denoise, x_1, schedule, num_steps=num_steps, generators=generators(2))
        assert x_0.dtype == torch.float32
        # The error of the mean: 4 · σ_0 / √10000, and rounding at λ = 10.
        assert x_0.mean().item() == pytest.approx(0.5 * alpha.item(), abs=0.04 * sigma.item() + 1e-4)
        assert x_0.std().item() == pytest.approx(sigma.item(), rel=0.05)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sample_depends_on_its_generator_and_on_nothing_else_of_the_batch(name):
    x_1 = torch.randn(6, 3, generator=torch.Generator().manual_seed(3))
    means = torch.linspace(-1, 1, 6)[:, None]

    def run(rows):
        strength = guided(
            gaussian_denoiser(means[rows], 0.2),
            gaussian_denoiser(0.0, 1.0),
            scale=2.0,
            interval=(-3.0, 2.0),
        )
        return sample(
            name,
            strength,
            x_1[rows],
            latent_schedule(),
            num_steps=12,
            generators=generators(6)[rows],
            gamma=0.3,
        )

    whole = run(slice(0, 6))
    assert torch.equal(whole, run(slice(0, 6)))
    assert torch.equal(whole, torch.cat([run(slice(0, 2)), run(slice(2, 6))]))


def test_guidance_is_on_where_the_interval_is_for_each_example():
    calls = []

    def unconditional(x_t, log_snr):
        calls.append(log_snr)
        return torch.ones_like(x_t)

    denoise = guided(lambda x_t, _: 3 * torch.ones_like(x_t), unconditional, scale=2.5, interval=(-1.0, 2.0))
    log_snr = torch.tensor([-1.1, -1.0, 0.0, 2.0, 2.1])
    v_hat = denoise(torch.zeros(5, 2, 2), log_snr)
    assert v_hat[:, 0, 0].tolist() == [3.0, 6.0, 6.0, 6.0, 3.0]
    assert len(calls) == 1
    assert denoise(torch.zeros(2, 1), torch.tensor([-4.0, 7.0])).tolist() == [[3.0], [3.0]]
    assert len(calls) == 1, "outside the interval only the conditional one is evaluated"


def test_guidance_of_scale_1_is_the_conditional_denoiser():
    def never(x_t, log_snr):
        raise AssertionError("evaluated")

    conditional = gaussian_denoiser(0.0, 1.0)
    assert guided(conditional, never, scale=1.0, interval=(-20.0, 20.0)) is conditional


@pytest.mark.parametrize("name", SAMPLERS)
def test_guidance_between_gaussians_of_one_variance_moves_the_mean(name):
    # q(x_t | c) are N(α m, v): the guided score is that of N(α w m, v), exactly.
    variance, scale = 0.25, 3.0
    denoise = guided(
        gaussian_denoiser(0.4, variance),
        gaussian_denoiser(0.0, variance),
        scale=scale,
        interval=(-20.0, 20.0),
    )
    moved = gaussian_denoiser(0.4 * scale, variance)
    x_1 = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    one, other = (
        sample(name, d, x_1, latent_schedule(), num_steps=9, generators=generators(3))
        for d in (denoise, moved)
    )
    torch.testing.assert_close(one, other)


def test_bad_arguments_are_named():
    denoise, x_1, schedule = gaussian_denoiser(0.0, 1.0), torch.zeros(2, 1), latent_schedule()
    with pytest.raises(ValueError, match="'euler'; expected one of ancestral, ddim, dpmpp_2m"):
        sample("euler", denoise, x_1, schedule, num_steps=4, generators=generators(2))
    for name in SAMPLERS:
        with pytest.raises(ValueError, match="at least one step; got 0"):
            sample(name, denoise, x_1, schedule, num_steps=0, generators=generators(2))
    with pytest.raises(ValueError, match="gamma of the ancestral sampler is 1.5"):
        ancestral(denoise, x_1, schedule, num_steps=4, generators=generators(2), gamma=1.5)
    with pytest.raises(ValueError, match="2 examples need as many generators; got 1"):
        ancestral(denoise, x_1, schedule, num_steps=4, generators=generators(1))
    with pytest.raises(ValueError, match="guidance interval"):
        guided(denoise, denoise, scale=2.0, interval=(3.0, -3.0))
