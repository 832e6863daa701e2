import math

import pytest
import torch

from ul_scale.diffusion.schedule import Schedule, latent_schedule, pixel_schedule

SCHEDULES = [
    latent_schedule(),
    pixel_schedule(32),
    pixel_schedule(512),
    Schedule(log_snr_max=7.0, log_snr_min=-9.0, kind="linear"),
]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_slope_is_the_derivative(schedule):
    t = torch.linspace(0.001, 0.999, 501, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(schedule.log_snr(t).sum(), t)
    torch.testing.assert_close(schedule.log_snr_slope(t), slope, rtol=1e-9, atol=1e-9)
    assert (slope < 0).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_end_points_are_exact(schedule):
    ends = schedule.log_snr(torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(
        ends,
        torch.tensor([schedule.log_snr_max, schedule.log_snr_min], dtype=torch.float64),
        rtol=1e-9,
        atol=1e-9,
    )


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
