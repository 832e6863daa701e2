"""Whole estimates and whole samples against closed forms, within their own standard errors."""

import math

import pytest
import torch
from scipy.integrate import quad

from ul_scale.diffusion import losses
from ul_scale.diffusion.process import add_noise, alpha_sigma, v_from_x_eps
from ul_scale.diffusion.samplers import ancestral, ddim, dpmpp_2m
from ul_scale.diffusion.schedule import Schedule, importance_density, latent_schedule

# The same end points by three ways.
KINDS = {"cosine": {"kind": "cosine"}, "linear": {"kind": "linear"}, "shifted": {"shift": -2.0}}


def optimal_v(x_t, log_snr, variance):
    """Return v̂ of the best denoiser for x ~ N(0, variance): the closed form E[x | x_t]."""
    alpha, sigma = alpha_sigma(log_snr, x_t)
    x_hat = alpha * variance / (alpha**2 * variance + sigma**2) * x_t
    return (alpha * x_t - x_hat) / sigma


def estimate(loss, schedule, variance, *, density=None, dtype=torch.float64):
    """Return the mean loss per dimension of N(0, variance), and its standard error.

    Args:
        loss: maps (x, v, v_hat, t, weight of t) to (b,) nats.
        schedule: of the loss.
        variance: of the data.
        density: of t; None for uniform.
        dtype: of everything.
    """
    repeats, n, dims = 32, 512, 32
    g = torch.Generator().manual_seed(0)
    means = torch.empty(repeats, dtype=torch.float64)
    for repeat in range(repeats):
        x, eps = (torch.randn(n, dims, generator=g, dtype=dtype) for _ in range(2))
        x = variance**0.5 * x
        offset = torch.rand(1, generator=g).item()
        t = losses.stratified_t(offset, torch.randperm(n, generator=g).to(dtype), n)
        t, weight = (t, torch.ones_like(t)) if density is None else density.warp(t)
        log_snr = schedule.log_snr(t)
        v_hat = optimal_v(add_noise(x, eps, log_snr), log_snr, variance)
        means[repeat] = loss(x, v_from_x_eps(x, eps, log_snr), v_hat, t, weight).double().mean() / dims
    return means.mean().item(), means.std().item() / repeats**0.5


def gaussian_bound(variance, log_snr_max, log_snr_min):
    """Return mutual information of z_clean and z_0, plus KL(q(z_1) ‖ N(0, 1)) of the marginals; nats."""
    information = 0.5 * math.log1p(math.exp(log_snr_max) * variance)
    alpha2 = 1 / (1 + math.exp(-log_snr_min))
    end_variance = alpha2 * variance + 1 - alpha2
    return information + 0.5 * (end_variance - 1 - math.log(end_variance))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variance", [0.01, 0.25, 1.0, 4.0])
@pytest.mark.parametrize("log_snr_min", [-10.0, -4.0])
@pytest.mark.parametrize("sampling", ["uniform", "importance", "fp32"])
def test_the_priors_bound_of_a_gaussian(kind, variance, log_snr_min, sampling):
    schedule = Schedule(log_snr_max=5.0, log_snr_min=log_snr_min, **KINDS[kind])

    def bound(z, v, v_hat, t, weight):
        return weight * losses.prior_elbo(v, v_hat, t, schedule) + losses.kl_to_normal(z, log_snr_min)

    mean, error = estimate(
        bound,
        schedule,
        variance,
        density=importance_density(schedule, None) if sampling == "importance" else None,
        dtype=torch.float32 if sampling == "fp32" else torch.float64,
    )
    expected = gaussian_bound(variance, 5.0, log_snr_min)
    assert error < 0.015 * expected, "an error that would hide a mistake"
    assert mean == pytest.approx(expected, abs=4 * error)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("variance", "loss_bias"), [(0.02, 3.0), (0.25, 0.0), (1.0, 4.0)])
@pytest.mark.parametrize("importance", [False, True])
def test_the_sigmoid_weighted_losses_of_a_gaussian(kind, variance, loss_bias, importance):
    schedule = Schedule(log_snr_max=10.0, log_snr_min=-10.0, **KINDS[kind])

    def decoder(x, v, v_hat, t, weight):
        terms = {"loss_factor": 1.5, "loss_bias": loss_bias}
        return weight * losses.decoder_loss(v, v_hat, t, schedule, **terms)

    density = importance_density(schedule, loss_bias) if importance else None
    mean, error = estimate(decoder, schedule, variance, density=density)
    # E (ε − ε̂)² = e^λ s² / (1 + e^λ s²).
    integral, _ = quad(
        lambda λ: 0.75 / (1 + math.exp(λ - loss_bias)) / (1 + math.exp(-λ) / variance), -10, 10, epsrel=1e-10
    )
    assert error < 0.015 * integral
    assert mean == pytest.approx(integral, abs=4 * error)


def test_the_bound_is_2_5034_nats_per_dimension_of_unit_variance():
    # By quadrature: no noise at all, the expectation over z and ε is taken in closed form.
    schedule = latent_schedule()
    n = 200_001
    t = losses.stratified_t(0.5, torch.arange(n, dtype=torch.float64), n)
    # E ‖z − ẑ‖² = 1 / (1 + e^λ) for unit variance; in v form the error is that over σ² = sigmoid(−λ): 1.
    v = torch.ones(n, 1, dtype=torch.float64)
    integral = losses.prior_elbo(v, torch.zeros_like(v), t, schedule).mean()
    kl = losses.kl_to_normal(torch.ones(1, 1, dtype=torch.float64), -10.0)
    assert (integral + kl).item() == pytest.approx(2.5034, abs=5e-5)
    assert gaussian_bound(1.0, 5.0, -10.0) == pytest.approx(2.5034, abs=5e-5)


WEIGHTS = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
MEANS = torch.tensor([[-2.0, 1.0], [1.5, 1.0], [0.0, -2.0]], dtype=torch.float64)
COVARIANCES = torch.tensor(
    [[[0.3, 0.2], [0.2, 0.4]], [[0.5, -0.3], [-0.3, 0.3]], [[0.05, 0.02], [0.02, 0.2]]], dtype=torch.float64
)


def responsibilities_and_means(x_t, log_snr):
    """Return p(mode | x_t), and E[x | x_t, mode]; x_t (b, n, 2) all at one noise level."""
    alpha, sigma = (c.squeeze() for c in alpha_sigma(log_snr[:1], torch.zeros(1, dtype=torch.float64)))
    precision = torch.linalg.inv(alpha**2 * COVARIANCES + sigma**2 * torch.eye(2))
    away = x_t[:, :, None] - alpha * MEANS
    scaled = torch.einsum("kij,bnkj->bnki", precision, away)
    log_p = WEIGHTS.log() + 0.5 * precision.logdet() - 0.5 * (away * scaled).sum(-1)
    return torch.softmax(log_p, -1), MEANS + alpha * torch.einsum("kij,bnkj->bnki", COVARIANCES, scaled)


def mixture_denoiser(x_t, log_snr):
    share, means = responsibilities_and_means(x_t, log_snr)
    x_hat = (share[..., None] * means).sum(2)
    alpha, sigma = alpha_sigma(log_snr, x_t)
    return (alpha * x_t - x_hat) / sigma


@pytest.mark.parametrize(
    ("sampler", "num_steps", "options"),
    [
        (ancestral, 200, {"gamma": 0.0}),
        (ancestral, 200, {"gamma": 1.0}),
        (ddim, 150, {}),
        (dpmpp_2m, 40, {}),
    ],
)
def test_samples_of_a_mixture_have_its_mean_covariance_and_mode_weights(sampler, num_steps, options):
    g = torch.Generator().manual_seed(5)
    x_1 = torch.randn(8, 2000, 2, generator=g, dtype=torch.float64)
    if sampler is ancestral:
        options = {**options, "generators": [torch.Generator().manual_seed(i) for i in range(8)]}
    x_0 = sampler(mixture_denoiser, x_1, latent_schedule(), num_steps=num_steps, **options)

    # What is sampled is q at λ = 5: α_0 x + σ_0 ε, whose spread contains the noise.
    alpha2, sigma2 = 1 / (1 + math.exp(-5)), 1 / (1 + math.exp(5))
    mean = WEIGHTS @ MEANS
    spread = torch.einsum("k,kij->ij", WEIGHTS, COVARIANCES + MEANS[:, :, None] * MEANS[:, None])
    covariance = alpha2 * (spread - mean[:, None] * mean) + sigma2 * torch.eye(2)
    # Averaged over q, p(mode | x) is the mode's weight, and p(mode | x) f(x) is weight · E[f | mode].
    share, _ = responsibilities_and_means(x_0, torch.tensor([5.0], dtype=torch.float64))
    away, away_from_mode = x_0 - alpha2**0.5 * mean, x_0[:, :, None] - alpha2**0.5 * MEANS
    of_modes = alpha2 * COVARIANCES + sigma2 * torch.eye(2)
    for name, values, expected in (
        ("mean", away, torch.zeros(2)),
        ("covariance", away[..., :, None] * away[..., None, :], covariance),
        ("weights", share, WEIGHTS),
        ("means of the modes", share[..., None] * away_from_mode, torch.zeros(3, 2)),
        (
            "covariances of the modes",
            share[..., None, None] * away_from_mode[..., :, None] * away_from_mode[..., None, :],
            WEIGHTS[:, None, None] * of_modes,
        ),
    ):
        values = values.flatten(0, 1).flatten(1)
        standard_errors = (values.mean(0) - expected.flatten()) / (values.std(0) / len(values) ** 0.5)
        assert standard_errors.abs().max() < 4, name
