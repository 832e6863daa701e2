import math

import pytest
import torch

from ul_scale.diffusion import losses
from ul_scale.diffusion.process import add_noise, alpha_sigma, eps_from_v, v_from_x_eps, x_from_v
from ul_scale.diffusion.schedule import Schedule, latent_schedule


def optimal_v(z_t, log_snr, variance):
    """Return v̂ of the best denoiser for z ~ N(0, variance): the closed form E[z | z_t]."""
    alpha, sigma = alpha_sigma(log_snr, z_t)
    z_hat = alpha * variance / (alpha**2 * variance + sigma**2) * z_t
    return (alpha * z_t - z_hat) / sigma


@pytest.mark.parametrize("kind", ["cosine", "linear"])
@pytest.mark.parametrize("variance", [0.01, 0.25, 1.0, 4.0])
@pytest.mark.parametrize("log_snr_min", [-10.0, -6.0])
def test_prior_elbo_of_a_gaussian_is_the_closed_form(kind, variance, log_snr_min):
    schedule = Schedule(log_snr_max=5.0, log_snr_min=log_snr_min, kind=kind)
    g = torch.Generator().manual_seed(0)
    n, dims = 4096, 64
    z = variance**0.5 * torch.randn(n, dims, generator=g, dtype=torch.float64)
    eps = torch.randn(n, dims, generator=g, dtype=torch.float64)
    t = losses.stratified_t(0.5, torch.arange(n, dtype=torch.float64), n)
    log_snr = schedule.log_snr(t)
    v_hat = optimal_v(add_noise(z, eps, log_snr), log_snr, variance)
    elbo = losses.prior_elbo(v_from_x_eps(z, eps, log_snr), v_hat, t, schedule)
    kl = losses.kl_at_t1(z, log_snr_min)

    snr_0, snr_1 = math.exp(5.0), math.exp(log_snr_min)
    integral = 0.5 * math.log((1 + snr_0 * variance) / (1 + snr_1 * variance))
    a2, s2 = 1 / (1 + math.exp(-log_snr_min)), 1 / (1 + math.exp(log_snr_min))
    kl_mean = 0.5 * (a2 * variance + s2 - 1 - math.log(s2))
    for value, expected in ((elbo, integral), (kl, kl_mean)):
        error = 4 * value.std().item() / n**0.5 / dims
        assert value.mean().item() / dims == pytest.approx(expected, abs=error + 1e-9)


def test_gaussian_bound_is_2_5034_nats_per_dimension():
    # By quadrature: no noise at all, the expectation over z and ε is taken in closed form.
    schedule = latent_schedule()
    n = 200_001
    t = losses.stratified_t(0.5, torch.arange(n, dtype=torch.float64), n)
    # E ‖z − ẑ‖² = 1 / (1 + e^λ) for unit variance; in v form the error is that divided by σ² = sigmoid(−λ).
    v = torch.ones(n, 1, dtype=torch.float64)
    integral = losses.prior_elbo(v, torch.zeros_like(v), t, schedule).mean()
    kl = losses.kl_at_t1(torch.ones(1, 1, dtype=torch.float64), -10.0)
    assert (integral + kl).item() == pytest.approx(2.5034, abs=5e-5)


def test_kl_is_torchs():
    z = torch.linspace(-3, 3, 7, dtype=torch.float64)[:, None]
    a2 = torch.sigmoid(torch.tensor(-4.0, dtype=torch.float64))
    q = torch.distributions.Normal(a2.sqrt() * z, (1 - a2).sqrt())
    p = torch.distributions.Normal(torch.zeros_like(z), torch.ones_like(z))
    torch.testing.assert_close(losses.kl_at_t1(z, -4.0), torch.distributions.kl_divergence(q, p)[:, 0])


def test_v_eps_and_x_forms_agree_in_fp32():
    g = torch.Generator().manual_seed(1)
    x, eps, error = (torch.randn(256, 3, 8, 8, generator=g) for _ in range(3))
    schedule = latent_schedule()
    t = losses.stratified_t(0.3, torch.arange(256.0), 256)
    log_snr = schedule.log_snr(t)
    x_t, v = add_noise(x, eps, log_snr), v_from_x_eps(x, eps, log_snr)
    v_hat = v + error
    half_slope = -0.5 * schedule.log_snr_slope(t)
    in_eps = half_slope * losses.sum_of_squares(eps - eps_from_v(x_t, v_hat, log_snr))
    in_x = half_slope * log_snr.exp() * losses.sum_of_squares(x - x_from_v(x_t, v_hat, log_snr))
    in_v = losses.prior_elbo(v, v_hat, t, schedule)
    torch.testing.assert_close(in_v, in_eps, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(in_v, in_x, rtol=1e-5, atol=1e-5)


def test_decoder_loss_is_the_papers_formula():
    schedule = Schedule(log_snr_max=10.0, log_snr_min=-10.0, kind="linear")
    t = torch.tensor([0.25], dtype=torch.float64)  # λ = 5, λ' = −20
    v, v_hat = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    eps_mse = 5 / (1 + math.exp(-5))
    expected = 0.5 * 20 * 1.7 / (1 + math.exp(5 - 3)) * eps_mse
    value = losses.decoder_loss(v, v_hat, t, schedule, loss_factor=1.7, loss_bias=3.0)
    assert value.item() == pytest.approx(expected, rel=1e-12)


def test_bits_per_pixel():
    assert losses.bits_per_pixel(torch.tensor(1024 * math.log(2)), 32 * 32).item() == pytest.approx(1.0)


def test_stratified_t_has_one_value_in_each_stratum():
    t = losses.stratified_t(0.99, torch.randperm(32, generator=torch.Generator().manual_seed(0)).float(), 32)
    assert sorted((t * 32).floor().int().tolist()) == list(range(32))
