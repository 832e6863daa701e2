import pytest
import torch

from ul_scale.diffusion.process import alpha_sigma
from ul_scale.diffusion.samplers import ancestral, ddim
from ul_scale.diffusion.schedule import latent_schedule

MEANS, STDS, WEIGHTS = torch.tensor([-1.5, 1.5]), torch.tensor([0.2, 0.4]), torch.tensor([0.3, 0.7])


def mixture_denoiser(z_t, log_snr):
    """Return v̂ of the exact posterior mean for a two-component Gaussian mixture."""
    alpha, sigma = alpha_sigma(log_snr, z_t)
    variance = alpha**2 * STDS.double() ** 2 + sigma**2
    log_p = torch.log(WEIGHTS.double()) - 0.5 * (z_t - alpha * MEANS) ** 2 / variance - 0.5 * variance.log()
    posterior = torch.softmax(log_p, dim=1)
    means = MEANS + alpha * STDS.double() ** 2 / variance * (z_t - alpha * MEANS)
    z_hat = (posterior * means).sum(1, keepdim=True)
    return (alpha * z_t - z_hat) / sigma


def generators(n):
    return [torch.Generator().manual_seed(i) for i in range(n)]


@pytest.mark.parametrize("gamma", [0.0, 0.3])
def test_ancestral_sampling_reproduces_a_gaussian_mixture_at_the_last_noise_level(gamma):
    n = 4000
    z_1 = torch.randn(n, 1, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    z_0 = ancestral(
        mixture_denoiser, z_1, latent_schedule(), num_steps=150, generators=generators(n), gamma=gamma
    )
    check_mixture(z_0)


def test_ddim_reproduces_a_gaussian_mixture():
    z_1 = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    check_mixture(ddim(mixture_denoiser, z_1, latent_schedule(), num_steps=150))


def check_mixture(z_0):
    """The state at λ = 5 is α_0 z + σ_0 ε, not z: its spread contains the noise."""
    n = len(z_0)
    alpha, sigma = (float(c) for c in alpha_sigma(torch.tensor([5.0]), torch.zeros(1, 1)))
    right = z_0[:, 0] > 0
    assert right.double().mean().item() == pytest.approx(0.7, abs=5 * (0.21 / n) ** 0.5)
    for component, part in ((0, z_0[~right]), (1, z_0[right])):
        std = (alpha**2 * STDS[component].item() ** 2 + sigma**2) ** 0.5
        assert part.mean().item() == pytest.approx(alpha * MEANS[component].item(), abs=0.03)
        assert part.std().item() == pytest.approx(std, rel=0.06)


def test_a_sample_does_not_depend_on_its_batch():
    z_1 = torch.randn(6, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    whole = ancestral(mixture_denoiser, z_1, latent_schedule(), num_steps=5, generators=generators(6))
    parts = [
        ancestral(mixture_denoiser, z_1[i : i + 1], latent_schedule(), num_steps=5, generators=[g])
        for i, g in enumerate(generators(6))
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=1e-12)


def test_no_steps_is_an_error():
    with pytest.raises(ValueError, match="at least one step"):
        ddim(mixture_denoiser, torch.zeros(1, 1), latent_schedule(), num_steps=0)
