import math

import pytest
import torch

from ul_scale.diffusion import losses
from ul_scale.diffusion.process import add_noise, eps_from_v, v_from_x_eps, x_from_v
from ul_scale.diffusion.schedule import Schedule


@pytest.mark.parametrize("log_snr", [-10.0, -4.0, 5.0])
def test_kl_is_torchs(log_snr):
    z = torch.linspace(-3, 3, 7, dtype=torch.float64)[:, None]
    a2 = torch.sigmoid(torch.tensor(log_snr, dtype=torch.float64))
    q = torch.distributions.Normal(a2.sqrt() * z, (1 - a2).sqrt())
    p = torch.distributions.Normal(torch.zeros_like(z), torch.ones_like(z))
    expected = torch.distributions.kl_divergence(q, p)[:, 0]
    torch.testing.assert_close(losses.kl_to_normal(z, log_snr), expected, rtol=1e-7, atol=1e-12)


def test_variance_gain_is_the_entropy_that_a_latents_own_variance_adds_to_the_noise():
    log_variance = torch.tensor([[-9.0, -2.0], [0.0, 3.0]])
    alpha2, sigma2 = 1 / (1 + math.exp(-5)), 1 / (1 + math.exp(5))
    noisier = torch.distributions.Normal(0.0, (alpha2 * log_variance.exp() + sigma2).sqrt())
    plain = torch.distributions.Normal(0.0, sigma2**0.5)
    expected = (noisier.entropy() - plain.entropy()).sum(1)
    torch.testing.assert_close(losses.variance_gain(log_variance, 5.0), expected)


def test_mse_loss_is_a_gaussian_log_likelihood_but_for_a_constant():
    g = torch.Generator().manual_seed(0)
    x, x_hat = torch.randn(2, 4, 3, 2, 2, generator=g, dtype=torch.float64)
    p = torch.distributions.Normal(x_hat, math.exp(-3 / 2))
    expected = 1.7 * (p.log_prob(x_hat) - p.log_prob(x)).flatten(1).sum(1)
    torch.testing.assert_close(losses.mse_loss(x, x_hat, loss_factor=1.7, loss_bias=3.0), expected)


@pytest.mark.parametrize("kind", ["cosine", "linear"])
@pytest.mark.parametrize("loss_bias", [None, 0.0, 3.0])
@pytest.mark.parametrize("log_snr_max", [5.0, 10.0])
def test_v_eps_and_x_forms_agree_in_fp32(kind, loss_bias, log_snr_max):
    g = torch.Generator().manual_seed(1)
    x, eps, error = (torch.randn(256, 3, 8, 8, generator=g) for _ in range(3))
    schedule = Schedule(log_snr_max=log_snr_max, log_snr_min=-10.0, kind=kind)
    t = losses.stratified_t(0.3, torch.arange(256.0), 256)
    log_snr = schedule.log_snr(t)
    x_t, v = add_noise(x, eps, log_snr), v_from_x_eps(x, eps, log_snr)
    v_hat = v + error
    weight = -0.5 * schedule.log_snr_slope(t)
    if loss_bias is None:
        in_v = losses.prior_elbo(v, v_hat, t, schedule)
    else:
        in_v = losses.base_loss(v, v_hat, t, schedule, loss_bias=loss_bias)
        decoder = losses.decoder_loss(v, v_hat, t, schedule, loss_factor=1.7, loss_bias=loss_bias)
        torch.testing.assert_close(decoder, 1.7 * in_v, rtol=1e-6, atol=0)
        weight = weight * torch.sigmoid(loss_bias - log_snr)
    in_eps = weight * losses.sum_of_squares(eps - eps_from_v(x_t, v_hat, log_snr))
    in_x = weight * log_snr.exp() * losses.sum_of_squares(x - x_from_v(x_t, v_hat, log_snr))
    torch.testing.assert_close(in_v, in_eps, rtol=1e-5, atol=0)
    torch.testing.assert_close(in_v, in_x, rtol=1e-5, atol=0)


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
