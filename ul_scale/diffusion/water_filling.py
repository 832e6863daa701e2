"""What (c_lf, b) ask of the latent: reverse water-filling, for Gaussian data and ideal networks.

Let a component of the data have variance s², and variance D = e^{−μ} once z_0 is known. Its terms of the
objective are, with E ‖ε − ε̂‖² = sigmoid(λ − μ),

    L_z = ½ ln(s² / D),    L_x = ½ c ∫ sigmoid(b − λ) sigmoid(λ − μ) dλ,

and dL/dμ = ½ (1 − c W(b − μ)), where W(d) = E[sigmoid(d − y)] over the logistic distribution of y. So
components of variance above D* = e^{−μ*}, c W(b − μ*) = 1, are coded down to D*, and the others not at all.

The encoder's fixed noise bounds no D: the scale of z_clean is free, and grows until e^{λ_z(0)} times its
variance is the precision 1 / D − 1 / s² asked for. What is left out is small: the pixel schedule's finite
ends, and KL(q(z_1) ‖ N(0, I)) ≤ ¼ (α_1² var z_clean)² per dimension, nats.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def noise_floor(loss_factor: float, loss_bias: float) -> float:
    """Return D*, the variance to which components are coded; ∞ at c_lf ≤ 1, which codes nothing.

    Args:
        loss_factor: c_lf.
        loss_bias: b, nats.

    Raises:
        ValueError: if c_lf is not a number above 0.
    """
    if not 0 < loss_factor < math.inf:
        raise ValueError(f"loss_factor is {loss_factor}; expected a number above 0")
    if loss_factor <= 1:
        return math.inf
    # W(d) + W(−d) = 1, and W keeps its digits only where it is small.
    if loss_factor >= 2:
        d = _inverse_mean_weight(1 / loss_factor)
    else:
        d = -_inverse_mean_weight((loss_factor - 1) / loss_factor)
    return math.exp(d - loss_bias)


def rate(variances: Float[Tensor, " n"], floor: float) -> float:
    """Return the latent's nats, Σ ½ ln(s² / D*) over the components with s² > D*.

    Args:
        variances: of the data's components: the eigenvalues of its covariance.
        floor: D*.
    """
    return 0.5 * torch.log(variances.double() / floor).clamp(min=0).sum().item()


def latent_variance(
    variances: Float[Tensor, " n"], floor: float, log_snr_max: float = 5.0
) -> Float[Tensor, " n"]:
    """Return the variance of z_clean that codes each component to D*, e^{−λ_z(0)} (s² / D* − 1)⁺."""
    return math.exp(-log_snr_max) * (variances / floor - 1).clamp(min=0)


def predicted_bits_per_pixel(
    variances: Float[Tensor, " n"], loss_factor: float, loss_bias: float, num_pixels: int
) -> float:
    """Return the bitrate of Gaussian data with these variances, as ``losses.bits_per_pixel`` counts it."""
    return rate(variances, noise_floor(loss_factor, loss_bias)) / (num_pixels * math.log(2))


def _mean_weight(d: float) -> float:
    """Return W(d) = e^d (e^d − 1 − d) / (e^d − 1)² for d ≤ 0; rises from 0 to ½."""
    if d > -0.1:
        # Its expansion in h: the quotient cancels to 0 / 0 at 0.
        h = d / 2
        return 0.5 + h * (1 / 3 - h**2 * (2 / 45 - h**2 * (2 / 315 - h**2 * 4 / 4725)))
    return math.exp(d) * (math.expm1(d) - d) / math.expm1(d) ** 2


def _inverse_mean_weight(weight: float) -> float:
    """Return d ≤ 0 with W(d) = weight, by bisection; weight in (0, ½]."""
    low, high = -745.0, 0.0  # e^−745 is the least positive double.
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if _mean_weight(middle) < weight else (low, middle)
    return high
