import pytest
import torch

from ul_scale.diffusion.process import (
    add_noise,
    alpha_sigma,
    eps_from_v,
    precondition_v,
    v_from_x_eps,
    x_from_v,
)


@pytest.fixture
def draw():
    g = torch.Generator().manual_seed(0)
    x, eps = (torch.randn(64, 3, 4, 4, generator=g, dtype=torch.float64) for _ in range(2))
    return x, eps, torch.linspace(-10, 10, 64, dtype=torch.float64)


def test_conversions_invert_the_process(draw):
    x, eps, log_snr = draw
    x_t, v = add_noise(x, eps, log_snr), v_from_x_eps(x, eps, log_snr)
    torch.testing.assert_close(x_from_v(x_t, v, log_snr), x)
    torch.testing.assert_close(eps_from_v(x_t, v, log_snr), eps)


def test_variance_is_preserved_and_log_snr_is_the_ratio(draw):
    x, _, log_snr = draw
    alpha, sigma = alpha_sigma(log_snr, x)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha))
    torch.testing.assert_close(torch.log(alpha**2 / sigma**2).flatten(), log_snr)


@pytest.mark.parametrize("std", [0.09, 1.0, 3.0])
def test_preconditioning_gives_unit_variances_for_any_std(draw, std):
    x, _, log_snr = draw
    scale = torch.tensor(std, dtype=torch.float64)
    c_in, c_skip, c_out = precondition_v(log_snr, scale, x)
    alpha, sigma = alpha_sigma(log_snr, x)
    # Moments of z_t and v for z ~ N(0, std²), in closed form.
    var_zt, var_v = alpha**2 * std**2 + sigma**2, alpha**2 + sigma**2 * std**2
    cov = alpha * sigma * (1 - std**2)
    torch.testing.assert_close(c_in**2 * var_zt, torch.ones_like(alpha))
    # The network's target (v − c_skip z_t) / c_out has variance 1, and is uncorrelated with its input.
    torch.testing.assert_close(
        (var_v - 2 * c_skip * cov + c_skip**2 * var_zt) / c_out**2, torch.ones_like(alpha)
    )
    torch.testing.assert_close(cov - c_skip * var_zt, torch.zeros_like(alpha))


def test_preconditioning_is_plain_v_prediction_at_unit_std(draw):
    x, _, log_snr = draw
    for coefficient, expected in zip(precondition_v(log_snr, torch.tensor(1.0), x), (1.0, 0.0, 1.0)):
        torch.testing.assert_close(coefficient, torch.full_like(coefficient, expected))
