"""The arithmetic that holds a latent at a bitrate: a PI controller of the loss factor, in logarithms.

Bits rise with c_lf, and near c_lf = 1 they vanish, so what is controlled is ln(c_lf − 1), the *log excess*,
and what is compared is ln(target / bits). The bias b is left alone: sigmoid(b − λ) saturates, and a
controller that acts on it winds up.

Where bits are near to proportional to c_lf − 1 and training follows with a lag of τ steps, a proportional
gain of 1 with an integral gain of 1 / τ cancels the lag: c_lf goes to its final value at once and stays there
while the bits follow. Integral control alone swings, and a c_lf that swings towards 1 loses information that
the latent regains slowly. Times are shares of the control window and of the learning rate, so the same gains
suit any length of run; τ of about a seventh of the window is what short runs show.
"""

import math

import torch
from torch import Tensor

INTEGRAL_GAIN = 12.0
"""Log excess per unit of ln(target / bits), over one control window at the full learning rate."""
PROPORTIONAL_GAIN = 1.0
"""Log excess per unit of ln(target / bits), at once."""
AVERAGED_SHARE, MIN_AVERAGED_STEPS = 0.02, 10
"""Horizon of the running mean of bits, as a share of the control window, and at least so many steps."""
MAX_ERROR = 3.0
"""Largest |ln(target / bits)| that is acted on."""
MIN_EXCESS, MAX_EXCESS = 1e-2, 1e3
"""Range of c_lf − 1: beyond it lie collapse, and no more bits; an unattainable target stops here."""
REGRET = 15.0
"""Nats per latent dimension that the noise of the weights costs the prior, per unit of learning rate.

Averaged weights, and those of a decayed learning rate, are free of it, but then it is too late to correct
c_lf. Fitted to runs of configs/quickstart, where it is 0.032 bits per pixel at lr 6e-3; at the learning rates
of large models it is next to nothing."""
MAX_REGRET = 0.75
"""Largest share of the measured bits that is taken for regret."""


def log_excess(loss_factor: Tensor) -> Tensor:
    """Return ln(c_lf − 1), within the range of control."""
    return torch.log((loss_factor - 1).clamp(MIN_EXCESS, MAX_EXCESS))


def loss_factor_of(log_excess: Tensor) -> Tensor:
    """Return c_lf = 1 + e^(log excess), within the range of control."""
    return 1 + torch.exp(log_excess).clamp(MIN_EXCESS, MAX_EXCESS)


def running_mean(mean: Tensor, value: Tensor, weight: float) -> Tensor:
    """Return the mean moved towards a value; one that is not finite, of a skipped step, is left out."""
    return torch.where(value.isfinite(), mean + weight * (value - mean), mean)


def lasting_bits(bits: Tensor, lr: float, *, latent_dims: int, num_pixels: int) -> Tensor:
    """Return the bits per pixel that are expected of averaged weights.

    Args:
        bits: per pixel, as measured in training.
        lr: learning rate.
        latent_dims: of an image's latent.
        num_pixels: of an image.
    """
    regret = REGRET * lr * latent_dims / (num_pixels * math.log(2))
    return torch.maximum(bits - regret, (1 - MAX_REGRET) * bits)


def error(bits: Tensor, target: float) -> Tensor:
    """Return ln(target / bits), limited to ±``MAX_ERROR``."""
    return (math.log(target) - torch.log(bits)).clamp(-MAX_ERROR, MAX_ERROR)


def integrate(integral: Tensor, error: Tensor, window_share: float) -> Tensor:
    """Return the integral part after a step.

    Args:
        integral: before it; a log excess.
        error: ln(target / bits).
        window_share: the step's share of the control window, times its share of the peak learning rate:
            what trains slowly must be steered slowly.
    """
    moved = integral + INTEGRAL_GAIN * window_share * error
    # Kept in range, so that it does not wind up while a target is out of reach.
    return moved.clamp(math.log(MIN_EXCESS), math.log(MAX_EXCESS))
