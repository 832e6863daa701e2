import math

import pytest
import torch

from ul_scale.diffusion.losses import stratified_t
from ul_scale.diffusion.schedule import (
    Schedule,
    TimeDensity,
    importance_density,
    latent_schedule,
    pixel_schedule,
)

SCHEDULES = [
    latent_schedule(),
    pixel_schedule(32),
    pixel_schedule(512),
    latent_schedule(10.0, -6.0),
    Schedule(log_snr_max=7.0, log_snr_min=-9.0, kind="linear"),
]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_slope_is_the_derivative(schedule):
    t = torch.linspace(0.001, 0.999, 501, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(schedule.log_snr(t).sum(), t)
    torch.testing.assert_close(schedule.log_snr_slope(t), slope, rtol=1e-9, atol=1e-9)
    assert (slope < 0).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-11), (torch.float32, 1e-4)])
def test_end_points_are_exact(schedule, dtype, error):
    ends = schedule.log_snr(torch.tensor([0.0, 1.0], dtype=dtype))
    expected = torch.tensor([schedule.log_snr_max, schedule.log_snr_min], dtype=dtype)
    torch.testing.assert_close(ends, expected, rtol=0, atol=error)


def test_encoder_noise_has_the_papers_alpha_and_sigma():
    log_snr = latent_schedule().log_snr(torch.zeros(1, dtype=torch.float64))
    assert math.sqrt(torch.sigmoid(log_snr)) == pytest.approx(0.99666, abs=2e-5)
    assert math.sqrt(torch.sigmoid(-log_snr)) == pytest.approx(0.08181, abs=1e-5)


def test_resolution_shift_moves_the_middle_and_not_the_ends():
    t = torch.tensor([0.5], dtype=torch.float64)
    # The unshifted cosine is symmetric: λ(½) = 0. At 512 px the shift is −4.159, but for the moved ends.
    assert pixel_schedule(64).log_snr(t).item() == pytest.approx(0, abs=1e-9)
    assert pixel_schedule(512).log_snr(t).item() == pytest.approx(2 * math.log(64 / 512), abs=0.15)
    assert pixel_schedule(16) == pixel_schedule(64)


def test_a_schedule_that_rises_is_refused():
    with pytest.raises(ValueError, match="log_snr_max > log_snr_min"):
        Schedule(log_snr_max=-1.0, log_snr_min=5.0)


@pytest.mark.parametrize("ends", [(math.nan, 0.0), (math.inf, 0.0), (5.0, -math.inf), (201.0, 0.0)])
def test_absurd_end_points_are_refused(ends):
    with pytest.raises(ValueError, match=r"schedule.log_snr_m\w+ is \S+; expected nats from -200 to 200"):
        Schedule(log_snr_max=ends[0], log_snr_min=ends[1], kind="linear")


@pytest.mark.parametrize(("low", "high"), [(-32.0, 5.0), (-10.0, 170.0)])
def test_a_cosine_is_refused_where_single_precision_ends(low, high):
    schedule, ends = latent_schedule(high, low), torch.tensor([0.0, 1.0])
    assert schedule.log_snr(ends).isfinite().all() and schedule.log_snr_slope(ends).isfinite().all()
    assert (schedule.log_snr_slope(ends) < 0).all()
    with pytest.raises(ValueError, match="cosine schedule's log_snr_max and log_snr_min, less its shift"):
        latent_schedule(high + 0.1 * (high > 100), low - 0.1 * (low < -30))
    Schedule(log_snr_max=200.0, log_snr_min=-200.0, kind="linear")


@pytest.mark.parametrize("loss_bias", [None, -200.0, 200.0])
def test_importance_density_holds_at_the_largest_numbers(loss_bias):
    widest = Schedule(log_snr_max=200.0, log_snr_min=-200.0, kind="linear")
    for schedule in (widest, latent_schedule(170.0, -32.0)):
        assert math.fsum(importance_density(schedule, loss_bias).masses) == pytest.approx(1)


UNEVEN = TimeDensity((0.5, 0.1, 0.3, 0.1))
DENSITIES = [
    UNEVEN,
    TimeDensity((1 - 1e-4, 1e-4)),
    importance_density(latent_schedule(), None),
    importance_density(pixel_schedule(512), 3.0, uniform_share=0.1),
    importance_density(SCHEDULES[-1], 0.0, num_bins=7),
]


@pytest.mark.parametrize("density", DENSITIES)
def test_importance_sampling_leaves_every_expectation_as_it_is(density):
    # By the midpoint rule in u; ∫ t^k dt = 1 / (k + 1), and ∫ cos(2πt) dt = 0.
    n = 4_000_000
    t, weight = density.warp((torch.arange(n, dtype=torch.float64) + 0.5) / n)
    for values, integral in ((t**0, 1), (t, 1 / 2), (t**3, 1 / 4), (torch.cos(2 * math.pi * t), 0)):
        # A step of weight inside a stratum costs the rule at most that step, once for every bin.
        error = (weight.max() - weight.min()).item() * len(density.masses) / n
        assert (weight * values).mean().item() == pytest.approx(integral, abs=error + 1e-12)


@pytest.mark.parametrize("density", DENSITIES)
def test_importance_sampled_times_follow_the_density(density):
    n = 200_000
    t, weight = density.warp((torch.arange(n, dtype=torch.float64) + 0.5) / n)
    bins = (t * len(density.masses)).long()
    share = torch.bincount(bins, minlength=len(density.masses)) / n
    torch.testing.assert_close(share.double(), torch.tensor(density.masses).double(), rtol=0, atol=2 / n)
    p = torch.tensor(density.masses, dtype=torch.float64)[bins] * len(density.masses)
    torch.testing.assert_close(weight, 1 / p)


@pytest.mark.parametrize("density", DENSITIES)
def test_importance_sampled_times_rise_and_stay_below_1_in_fp32(density):
    last = torch.nextafter(torch.tensor([1.0]), torch.zeros(1))
    u = torch.cat([stratified_t(0.0, torch.arange(100_000.0), 100_000), last, torch.ones(1)])
    t, weight = density.warp(u)
    assert t.dtype == weight.dtype == torch.float32
    assert t[0] == 0 and t[-1] < 1 and (t.diff() >= -1e-6).all()
    exact, _ = density.warp(u.double())
    # The bin's edge is rounded to fp32, which a bin of little mass enlarges.
    error = 2e-7 / min(density.masses) / len(density.masses)
    torch.testing.assert_close(t.double(), exact, rtol=0, atol=error + 1e-6)


def test_a_density_is_made_under_any_default_device():
    expected = importance_density(pixel_schedule(128), 1.0)
    importance_density.cache_clear()
    with torch.device("meta"):
        density = importance_density(pixel_schedule(128), 1.0)
        t, _ = density.warp(torch.tensor([0.5], device="cpu"))
    assert density == expected and t.device.type == "cpu"


def test_a_uniform_density_changes_no_bit():
    u = stratified_t(0.37, torch.arange(1000.0), 1000)
    t, weight = importance_density(latent_schedule(), None, uniform_share=1.0).warp(u)
    assert torch.equal(t, u) and torch.equal(weight, torch.ones_like(u))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("loss_bias", [None, 0.0, 3.0])
def test_importance_sampling_lowers_the_variance_for_a_gaussian(schedule, loss_bias):
    def loss(t):  # the mean loss of N(0, 1) with the optimal denoiser at t
        log_snr = schedule.log_snr(t)
        weight = 1 if loss_bias is None else torch.sigmoid(loss_bias - log_snr)
        return -0.5 * schedule.log_snr_slope(t) * weight * torch.sigmoid(log_snr)

    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    plain = loss(u)
    for uniform_share, at_most in ((0.5, 0.7), (0.01, 0.03)):
        t, weight = importance_density(schedule, loss_bias, uniform_share).warp(u)
        sampled = weight * loss(t)
        assert weight.max() <= 1 / uniform_share
        assert sampled.mean().item() == pytest.approx(plain.mean().item(), rel=1e-3)
        assert sampled.var() < at_most * plain.var()


@pytest.mark.parametrize("masses", [(), (0.5, 0.5, 0.0), (0.5, 0.6), (0.5, math.nan)])
def test_masses_that_are_no_density_are_refused(masses):
    with pytest.raises(ValueError, match="masses of a time density must"):
        TimeDensity(masses)


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_a_uniform_share_out_of_range_is_refused(share):
    with pytest.raises(ValueError, match="uniform_share is"):
        importance_density(latent_schedule(), None, uniform_share=share)
