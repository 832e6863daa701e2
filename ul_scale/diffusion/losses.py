"""The terms of the Unified Latents objective, per example and summed over dimensions, in nats.

All networks predict v; every squared error below uses the equal forms of a variance-preserving process,
e^λ ‖x − x̂‖² = ‖ε − ε̂‖² = sigmoid(λ) ‖v − v̂‖².
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ul_scale.diffusion.schedule import Schedule


def sum_of_squares(a: Float[Tensor, "b ..."]) -> Float[Tensor, " b"]:
    """Return the sum of squares of each example, in fp32 at least."""
    return a.to(torch.promote_types(a.dtype, torch.float32)).square().flatten(1).sum(1)


def eps_error(
    v: Float[Tensor, "b ..."], v_hat: Float[Tensor, "b ..."], log_snr: Float[Tensor, " b"]
) -> Float[Tensor, " b"]:
    """Return ‖ε − ε̂‖² = sigmoid(λ) ‖v − v̂‖²."""
    return torch.sigmoid(log_snr) * sum_of_squares(v - v_hat)


def prior_elbo(
    v: Float[Tensor, "b ..."],
    v_hat: Float[Tensor, "b ..."],
    t: Float[Tensor, " b"],
    schedule: Schedule,
) -> Float[Tensor, " b"]:
    """Return the unweighted diffusion term ½ (−λ') e^λ ‖z_clean − ẑ‖², nats (UL, eq. for L_z)."""
    return -0.5 * schedule.log_snr_slope(t) * eps_error(v, v_hat, schedule.log_snr(t))


def kl_to_normal(z_clean: Float[Tensor, "b ..."], log_snr: float) -> Float[Tensor, " b"]:
    """Return KL(q(z_t | x) ‖ N(0, I)) = Σ ½ (α² z_clean² + σ² − 1 − ln σ²) at a noise level, nats.

    At t = 1 it is a term of the prior's bound; at t = 0 all of the rate under a normal prior.
    """
    alpha2 = 1 / (1 + math.exp(-log_snr))
    # σ² − 1 − ln σ² with σ² = 1 − α²; log1p keeps the digits that 1 − α² would lose.
    constant = -alpha2 - math.log1p(-alpha2)
    dims = z_clean[0].numel()
    return 0.5 * (alpha2 * sum_of_squares(z_clean) + constant * dims)


def variance_gain(log_variance: Float[Tensor, "b ..."], log_snr_max: float) -> Float[Tensor, " b"]:
    """Return Σ ½ ln(σ_z² e^{λ_z(0)} + 1), nats: what a latent of variance σ_z² saves (UL, ablation D)."""
    return 0.5 * F.softplus(log_variance.float() + log_snr_max).flatten(1).sum(1)


def mse_loss(
    x: Float[Tensor, "b ..."],
    x_hat: Float[Tensor, "b ..."],
    *,
    loss_factor: float | Tensor,
    loss_bias: float,
) -> Float[Tensor, " b"]:
    """Return c_lf ½ e^b ‖x − x̂‖², nats: a Gaussian likelihood of variance e^−b."""
    return loss_factor * (0.5 * math.exp(loss_bias)) * sum_of_squares(x - x_hat)


def decoder_loss(
    v: Float[Tensor, "b ..."],
    v_hat: Float[Tensor, "b ..."],
    t: Float[Tensor, " b"],
    schedule: Schedule,
    *,
    loss_factor: float | Tensor,
    loss_bias: float,
) -> Float[Tensor, " b"]:
    """Return ½ (−λ') c_lf sigmoid(b − λ) ‖ε − ε̂‖², nats (UL, Fig. 3).

    The weight discounts low noise levels; its value 1 is the break-even between a nat of latent and a
    nat of image. The KL at t = 1 has no gradient and is left out.
    """
    return loss_factor * base_loss(v, v_hat, t, schedule, loss_bias=loss_bias)


def base_loss(
    v: Float[Tensor, "b ..."],
    v_hat: Float[Tensor, "b ..."],
    t: Float[Tensor, " b"],
    schedule: Schedule,
    *,
    loss_bias: float,
) -> Float[Tensor, " b"]:
    """Return the sigmoid-weighted loss ½ (−λ') sigmoid(b − λ) ‖ε − ε̂‖² (SiD2, arXiv 2410.19324), nats."""
    log_snr = schedule.log_snr(t)
    weight = -0.5 * schedule.log_snr_slope(t) * torch.sigmoid(loss_bias - log_snr)
    return weight * eps_error(v, v_hat, log_snr)


def bits_per_pixel(nats: Tensor, num_pixels: int) -> Tensor:
    """Return nats / (H · W · ln 2); for video, count the pixels of all frames."""
    return nats / (num_pixels * math.log(2))


def stratified_t(offset: float, permutation: Float[Tensor, " b"], batch_size: int) -> Float[Tensor, " b"]:
    """Return times in [0, 1): one per stratum of width 1 / batch_size, all moved by the same offset.

    Args:
        offset: one uniform number in [0, 1) for the whole batch.
        permutation: which stratum each example takes, values in [0, batch_size).
        batch_size: the *global* batch size.
    """
    return (permutation + offset) / batch_size
