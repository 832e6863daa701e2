"""The forward process x_t = α x + σ ε, and conversions between predictions of x, ε and v = α ε − σ x."""

import torch
from jaxtyping import Float
from torch import Tensor


def alpha_sigma(log_snr: Float[Tensor, " b"], like: Tensor) -> tuple[Tensor, Tensor]:
    """Return α and σ, shaped to broadcast over ``like`` (b, ...)."""
    shape = (-1,) + (1,) * (like.ndim - 1)
    return (
        torch.sigmoid(log_snr).sqrt().view(shape),
        torch.sigmoid(-log_snr).sqrt().view(shape),
    )


def add_noise(
    x: Float[Tensor, "b ..."], eps: Float[Tensor, "b ..."], log_snr: Float[Tensor, " b"]
) -> Float[Tensor, "b ..."]:
    """Return x_t = α x + σ ε."""
    alpha, sigma = alpha_sigma(log_snr, x)
    return alpha * x + sigma * eps


def v_from_x_eps(
    x: Float[Tensor, "b ..."], eps: Float[Tensor, "b ..."], log_snr: Float[Tensor, " b"]
) -> Float[Tensor, "b ..."]:
    """Return v = α ε − σ x (Salimans & Ho, arXiv 2202.00512)."""
    alpha, sigma = alpha_sigma(log_snr, x)
    return alpha * eps - sigma * x


def x_from_v(
    x_t: Float[Tensor, "b ..."], v: Float[Tensor, "b ..."], log_snr: Float[Tensor, " b"]
) -> Float[Tensor, "b ..."]:
    """Return x = α x_t − σ v."""
    alpha, sigma = alpha_sigma(log_snr, x_t)
    return alpha * x_t - sigma * v


def eps_from_v(
    x_t: Float[Tensor, "b ..."], v: Float[Tensor, "b ..."], log_snr: Float[Tensor, " b"]
) -> Float[Tensor, "b ..."]:
    """Return ε = σ x_t + α v."""
    alpha, sigma = alpha_sigma(log_snr, x_t)
    return sigma * x_t + alpha * v


def precondition_v(log_snr: Float[Tensor, " b"], std: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (c_in, c_skip, c_out) with v̂ = c_skip z_t + c_out F(c_in z_t) for data of std ``std``.

    The network's input and its target both have unit variance, whatever std is; at std = 1 this is
    plain v-prediction. The noise itself is never rescaled: z_t stays in the encoder's units.
    Source: Karras et al., arXiv 2206.00364, table 1, written for a variance-preserving process.
    """
    alpha, sigma = alpha_sigma(log_snr, like)
    variance = alpha**2 * std**2 + sigma**2
    return variance.rsqrt(), alpha * sigma * (1 - std**2) / variance, std * variance.rsqrt()
