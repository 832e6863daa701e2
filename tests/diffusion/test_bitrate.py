import math

import pytest
import torch

from ul_scale.diffusion import bitrate


def simulate(target, *, lag_steps, gain, steps=2000, bits_at_2=0.1, start_factor=2.0):
    """Return bits and c_lf by step of a latent whose log bits follow ``gain`` · ln(c_lf − 1) with a lag."""
    log_bits, bits, factors = math.log(bits_at_2), [], []
    integral = bitrate.log_excess(torch.tensor(start_factor, dtype=torch.float64))
    for _ in range(steps):
        error = bitrate.error(torch.tensor(math.exp(log_bits), dtype=torch.float64), target)
        integral = bitrate.integrate(integral, error, 1 / steps)
        factor = bitrate.loss_factor_of(integral + bitrate.PROPORTIONAL_GAIN * error)
        log_bits += (math.log(bits_at_2) + gain * math.log(factor - 1) - log_bits) / lag_steps
        bits.append(math.exp(log_bits))
        factors.append(float(factor))
    return bits, factors


@pytest.mark.parametrize("gain", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("lag_steps", [5, 80, 250])
@pytest.mark.parametrize("target", [0.03, 0.3])
def test_a_lagging_latent_is_brought_to_its_target(target, lag_steps, gain):
    bits, factors = simulate(target, lag_steps=lag_steps, gain=gain)
    # Far from proportional bits leave a remainder that a window is too short for.
    assert bits[-1] == pytest.approx(target, rel=0.03 if gain == 0.5 else 0.01)
    # Where bits = bits_at_2 (c − 1)^gain is the target.
    assert factors[-1] == pytest.approx(1 + (target / 0.1) ** (1 / gain), rel=0.05)
    overshoot = [math.log(b / target) * math.copysign(1, target - 0.1) for b in bits]
    assert max(overshoot) < 0.1


def test_c_lf_and_its_log_excess_are_inverse_and_limited():
    factors = torch.tensor([1.02, 1.5, 3.0, 900.0], dtype=torch.float64)
    torch.testing.assert_close(bitrate.loss_factor_of(bitrate.log_excess(factors)), factors)
    out_of_range = torch.tensor([-1.0, 0.5, 1.0, 1e9, math.inf], dtype=torch.float64)
    excess = bitrate.loss_factor_of(bitrate.log_excess(out_of_range)) - 1
    torch.testing.assert_close(excess, torch.tensor([0.01, 0.01, 0.01, 1e3, 1e3], dtype=torch.float64))


def test_the_error_is_the_logarithm_of_what_is_missing_and_limited():
    bits = torch.tensor([0.05, 0.1, 0.2, 1e-9, 0.0, 50.0], dtype=torch.float64)
    expected = torch.tensor([math.log(2), 0, -math.log(2), 3, 3, -3], dtype=torch.float64)
    torch.testing.assert_close(bitrate.error(bits, 0.1), expected)


def test_an_unattainable_target_does_not_wind_up():
    integral = torch.zeros((), dtype=torch.float64)
    for _ in range(10_000):
        integral = bitrate.integrate(integral, torch.tensor(1.0, dtype=torch.float64), 0.01)
    assert bitrate.loss_factor_of(integral) == pytest.approx(1 + bitrate.MAX_EXCESS)
    steps = 0
    while integral > 0:
        integral = bitrate.integrate(integral, torch.tensor(-1.0, dtype=torch.float64), 0.01)
        steps += 1
    assert steps == math.ceil(math.log(bitrate.MAX_EXCESS) / (0.01 * bitrate.INTEGRAL_GAIN))


def test_an_estimate_below_zero_is_far_too_few_bits():
    assert bitrate.error(torch.tensor(-0.1, dtype=torch.float64), 0.1) == bitrate.MAX_ERROR


def test_a_step_that_was_skipped_leaves_the_mean_alone():
    mean = torch.tensor(0.5, dtype=torch.float64)
    assert bitrate.running_mean(mean, torch.tensor(math.nan), 0.1) == 0.5
    assert bitrate.running_mean(mean, torch.tensor(1.0), 0.1) == pytest.approx(0.55)
