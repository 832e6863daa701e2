"""The arithmetic that holds a latent at a bitrate: a PI controller of the loss factor, in logarithms.

Bits rise with c_lf, and near c_lf = 1 they vanish, so what is controlled is ln(c_lf − 1), the *log excess*,
and what is compared is ln(target / bits). The bias b is left alone: sigmoid(b − λ) saturates, and a
controller that acts on it winds up.

Bits are near to proportional to c_lf − 1, and training follows with a lag. A proportional part beside the
integral one cancels most of the lag; integral control alone swings, and a c_lf that swings towards 1 loses
information that the latent regains slowly. Times are shares of the control window, so the same gains suit any
length of run.

What is held is the bitrate of averaged weights, which are what is evaluated. The noise of the weights that
are trained costs the prior bits: at high learning rates up to a third of them, and next to none once the rate
has decayed, when it is too late to correct c_lf.
"""

import math

import torch
from torch import Tensor

INTEGRAL_GAIN = 14.0
"""Log excess per unit of ln(target / bits), over one control window at the full learning rate."""
PROPORTIONAL_GAIN = 1.5
"""Log excess per unit of ln(target / bits), at once."""
AVERAGED_SHARE, MIN_AVERAGED_STEPS = 0.02, 10
"""Horizon of the running mean of bits, as a share of the control window, and at least so many steps."""
MAX_ERROR = 3.0
"""Largest |ln(target / bits)| that is acted on."""
MIN_EXCESS, MAX_EXCESS = 1e-2, 1e3
"""Range of c_lf − 1: beyond it lie collapse, and no more bits; an unattainable target stops here."""
SHARE_MEASURES = 8
"""Measurements of averaged weights that their share of the bits is averaged over."""


def log_excess(loss_factor: Tensor) -> Tensor:
    """Return ln(c_lf − 1), within the range of control."""
    return torch.log((loss_factor - 1).clamp(MIN_EXCESS, MAX_EXCESS))


def loss_factor_of(log_excess: Tensor) -> Tensor:
    """Return c_lf = 1 + e^(log excess), within the range of control."""
    return 1 + torch.exp(log_excess).clamp(MIN_EXCESS, MAX_EXCESS)


def running_mean(mean: Tensor, value: Tensor, weight: float | Tensor) -> Tensor:
    """Return the mean moved towards a value; one that is not finite, of a skipped step, is left out."""
    return torch.where(value.isfinite(), mean + weight * (value - mean), mean)


def error(bits: Tensor, target: float) -> Tensor:
    """Return ln(target / bits), limited to ±``MAX_ERROR``."""
    # An estimate with a learned variance may fall below 0.
    return (math.log(target) - torch.log(bits.clamp(min=0))).clamp(-MAX_ERROR, MAX_ERROR)


def integrate(integral: Tensor, error: Tensor, window_share: float) -> Tensor:
    """Return the integral part after a step.

    Args:
        integral: before it; a log excess.
        error: ln(target / bits).
        window_share: the step's share of the control window, times the root of its share of the peak learning
            rate: what trains slowly must be steered slowly, but what a decaying rate shifts must be met.
    """
    moved = integral + INTEGRAL_GAIN * window_share * error
    # Kept in range, so that it does not wind up while a target is out of reach.
    return moved.clamp(math.log(MIN_EXCESS), math.log(MAX_EXCESS))
