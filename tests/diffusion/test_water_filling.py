import math

import pytest
import torch
from scipy.integrate import quad
from scipy.optimize import minimize_scalar

from ul_scale.diffusion import losses
from ul_scale.diffusion.process import add_noise, alpha_sigma, v_from_x_eps
from ul_scale.diffusion.schedule import latent_schedule, pixel_schedule
from ul_scale.diffusion.water_filling import latent_variance, noise_floor, predicted_bits_per_pixel, rate


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


# μ* − b by c_lf, to the digits given.
BREAK_EVEN = {
    1.1: -3.33, 1.25: -2.05, 1.3: -1.79, 1.5: -1.04, 1.6: -0.76, 1.7: -0.53, 1.9: -0.16, 2.1: 0.14, 3.0: 1.04
}  # fmt: skip


@pytest.mark.parametrize("loss_factor", BREAK_EVEN)
@pytest.mark.parametrize("loss_bias", [0.0, 3.0])
def test_the_floors_table(loss_factor, loss_bias):
    floor = noise_floor(loss_factor, loss_bias)
    assert -math.log(floor) - loss_bias == pytest.approx(BREAK_EVEN[loss_factor], abs=0.0051)


@pytest.mark.parametrize("loss_factor", [1 + 1e-9, 1.001, 1.5, 1.95, 2.0, 2.05, 4.0, 1e3])
def test_the_floor_is_where_a_nat_of_latent_saves_a_nat_of_image(loss_factor):
    d = math.log(noise_floor(loss_factor, 0.0))
    # 1 − W(d) = W(−d) = E[sigmoid(−d − y)] over the logistic distribution, whose digits survive at c_lf ≈ 1.
    e = -abs(d)
    weight, _ = quad(
        lambda y: sigmoid(e - y) * sigmoid(y) * sigmoid(-y), -60, 60, points=[e, 0], epsabs=1e-14, epsrel=1e-9
    )
    assert weight == pytest.approx(1 / loss_factor if d <= 0 else 1 - 1 / loss_factor, rel=1e-6)


@pytest.mark.parametrize(
    ("loss_factor", "loss_bias"), [(1.1, 4.0), (1.3, 3.0), (1.5, 3.5), (2.1, 3.0), (3.0, 1.0)]
)
@pytest.mark.parametrize("variance", [0.5, 4.0])
def test_the_whole_objective_is_least_at_the_floor(loss_factor, loss_bias, variance):
    """With everything that the relation leaves out: the KL at t = 1 and the pixel schedule's ends."""

    def objective(log_z_variance):
        z_variance = math.exp(log_z_variance)
        precision = 1 / variance + math.exp(5) * z_variance / variance
        alpha2 = sigmoid(-10)
        prior = 0.5 * math.log((1 + math.exp(5) * z_variance) / (1 + math.exp(-10) * z_variance))
        kl = 0.5 * (alpha2 * z_variance - alpha2 - math.log1p(-alpha2))
        decoder, _ = quad(
            lambda λ: sigmoid(loss_bias - λ) * sigmoid(λ - math.log(precision)), -10, 10, epsabs=1e-11
        )
        return prior + kl + 0.5 * loss_factor * decoder

    best = minimize_scalar(objective, bounds=(-14, 4), method="bounded", options={"xatol": 1e-8})
    coded_to = variance / (1 + math.exp(5 + best.x))
    floor = noise_floor(loss_factor, loss_bias)
    assert coded_to == pytest.approx(min(floor, variance), rel=0.01)


def test_rate_and_latents_of_components_above_and_below_the_floor():
    variances = torch.tensor([4.0, 1.0, 0.5, 0.1])
    assert rate(variances, 0.5) == pytest.approx(0.5 * math.log(8 * 2), rel=1e-6)
    z_variance = latent_variance(variances, 0.5)
    # Its mutual information with z_0 is the component's rate.
    nats = 0.5 * torch.log1p(math.exp(5) * z_variance)
    torch.testing.assert_close(nats, 0.5 * torch.tensor([8.0, 2.0, 1.0, 1.0]).log())
    bits = predicted_bits_per_pixel(variances, 2.0, 0.0, 16)  # the floor of c_lf = 2 is e^−b
    assert bits == pytest.approx(0.5 * math.log2(4) / 16, rel=1e-6)


@pytest.mark.parametrize("loss_factor", [1.0, 0.9])
def test_nothing_is_coded_at_c_lf_of_at_most_1(loss_factor):
    assert noise_floor(loss_factor, 10.0) == math.inf
    variances = torch.tensor([1e6, 1.0])
    assert predicted_bits_per_pixel(variances, loss_factor, 10.0, 4) == 0.0
    assert latent_variance(variances, math.inf).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("loss_factor", [0.0, -1.0, math.inf, math.nan])
def test_a_loss_factor_that_is_none_is_refused(loss_factor):
    with pytest.raises(ValueError, match="loss_factor is"):
        noise_floor(loss_factor, 0.0)


class LinearToy:
    """Gaussian data and a linear encoder, trained on the losses with the best denoisers for it.

    At every step the denoisers are the closed-form optimum for the encoder as it is, and constants to the
    gradient, as the trained networks of the method are: it reaches the encoder through z_t and z_clean of
    the prior's loss, and through z_0 of the decoder's.
    """

    def __init__(self, variances, *, loss_factor, loss_bias, seed):
        self.g = torch.Generator().manual_seed(seed)
        dims = len(variances)
        # No component is an axis of x.
        self.axes, _ = torch.linalg.qr(torch.randn(dims, dims, generator=self.g, dtype=torch.float64))
        self.variances = variances
        self.precision = self.axes @ torch.diag(1 / variances) @ self.axes.T
        self.encoder = 0.1 * torch.randn(dims, dims, generator=self.g, dtype=torch.float64)
        self.encoder.requires_grad_()
        self.schedules = latent_schedule(), pixel_schedule(64)
        self.loss = {"loss_factor": loss_factor, "loss_bias": loss_bias}

    def randn(self, n):
        return torch.randn(n, len(self.variances), generator=self.g, dtype=torch.float64)

    def times(self, n):
        permutation = torch.randperm(n, generator=self.g).double()
        return losses.stratified_t(torch.rand(1, generator=self.g).item(), permutation, n)

    def batch_loss(self, n):
        x = (self.randn(n) * self.variances.sqrt()) @ self.axes.T
        z_clean = x @ self.encoder.T
        z_0 = add_noise(z_clean, self.randn(n), torch.full((n,), 5.0, dtype=torch.float64))
        total = losses.kl_to_normal(z_clean, -10.0)
        for clean, denoise, schedule in zip((z_clean, x), self.denoisers(z_0), self.schedules):
            t, eps = self.times(n), self.randn(n)
            log_snr = schedule.log_snr(t)
            x_t = add_noise(clean, eps, log_snr)
            alpha, sigma = alpha_sigma(log_snr, x_t)
            v, v_hat = v_from_x_eps(clean, eps, log_snr), (alpha * x_t - denoise(x_t, log_snr)) / sigma
            if clean is z_clean:
                total = total + losses.prior_elbo(v, v_hat, t, schedule)
            else:
                total = total + losses.decoder_loss(v, v_hat, t, schedule, **self.loss)
        return total.mean()

    def denoisers(self, z_0):
        """Return E[z_clean | z_t] and E[x | x_t, z_0] as functions of z_t and x_t."""
        encoder = self.encoder.detach()
        z_variances, z_axes = torch.linalg.eigh(encoder @ torch.linalg.inv(self.precision) @ encoder.T)
        # z_0 = α_0 E x + σ_0 ε tells of x with precision e^5 Eᵀ E.
        precisions, x_axes = torch.linalg.eigh(self.precision + math.exp(5) * encoder.T @ encoder)
        told = math.exp(5) / sigmoid(5) ** 0.5 * z_0 @ encoder

        def prior(z_t, log_snr):
            alpha, sigma = alpha_sigma(log_snr, z_t)
            return z_t @ z_axes * (alpha * z_variances / (alpha**2 * z_variances + sigma**2)) @ z_axes.T

        def decoder(x_t, log_snr):
            alpha, sigma = alpha_sigma(log_snr, x_t)
            snr = (alpha / sigma) ** 2
            return (told + snr * x_t / alpha) @ x_axes / (precisions + snr) @ x_axes.T

        return prior, decoder

    def train(self, num_steps, batch_size, lr=0.05):
        optim = torch.optim.Adam([self.encoder], lr=lr)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optim, num_steps)
        for _ in range(num_steps):
            optim.zero_grad()
            self.batch_loss(batch_size).backward()
            optim.step()
            decay.step()

    @torch.no_grad()
    def coded(self):
        """Return the variance of each component given z_0, and the mutual information of x and z_0, nats."""
        precision = self.precision + math.exp(5) * self.encoder.T @ self.encoder
        left = torch.diagonal(self.axes.T @ torch.linalg.inv(precision) @ self.axes)
        return left, 0.5 * (torch.logdet(precision) + self.variances.log().sum()).item()


VARIANCES = torch.tensor([2.0, 0.5, 0.08, 0.02], dtype=torch.float64)


def excess(loss_factor, loss_bias, seed, **training):
    """Return ln of the trained variances over the predicted ones, and of the rates."""
    toy = LinearToy(VARIANCES, loss_factor=loss_factor, loss_bias=loss_bias, seed=seed)
    toy.train(**training)
    left, nats = toy.coded()
    floor = noise_floor(loss_factor, loss_bias)
    ratios = torch.cat([left / VARIANCES.clamp(max=floor), left.new_tensor([nats / rate(VARIANCES, floor)])])
    return ratios.log()


# Two components above the floor of 0.14, or three above that of 0.04.
@pytest.mark.parametrize(("loss_factor", "num_coded"), [(1.5, 2), (2.1, 3)])
def test_training_codes_the_components_above_the_floor_down_to_it(loss_factor, num_coded):
    *left, nats = excess(loss_factor, 3.0, seed=0, num_steps=500, batch_size=1024).tolist()
    assert left[:num_coded] == pytest.approx([0] * num_coded, abs=0.12)
    assert left[num_coded:] == pytest.approx([0] * (4 - num_coded), abs=0.01)
    assert nats == pytest.approx(0, abs=0.04)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("loss_factor", "loss_bias"), [(1.3, 2.5), (1.3, 4.0), (1.5, 3.0), (1.9, 3.0), (2.1, 3.0), (3.0, 3.5)]
)
def test_trained_floors_of_many_seeds_are_right_on_average(loss_factor, loss_bias):
    num_seeds = 8
    runs = torch.stack(
        [excess(loss_factor, loss_bias, seed, num_steps=600, batch_size=4096) for seed in range(num_seeds)]
    )
    error = runs.std(0) / num_seeds**0.5
    print(f"{loss_factor=} {loss_bias=} mean {runs.mean(0).tolist()} ± {error.tolist()}")
    assert error.max() < 0.05
    # What the relation leaves out is below 1 %.
    assert (runs.mean(0).abs() < 4 * error + 0.01).all()


def test_training_at_c_lf_below_1_collapses():
    toy = LinearToy(VARIANCES, loss_factor=0.9, loss_bias=3.0, seed=0)
    assert toy.coded()[1] > 1
    toy.train(200, batch_size=1024)
    assert toy.coded()[1] < 0.01
