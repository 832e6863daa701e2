"""Noise schedules as log-SNR λ(t), with λ'(t) in closed form, and the density that t is drawn from.

Variance preserving: α² = sigmoid(λ), σ² = sigmoid(−λ). t = 0 is the least noise, t = 1 is noise.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

MAX_NATS = 200.0
"""Largest size of a log-SNR, a shift or a bias: the exponential of a sum of two does not overflow."""

# Where the angles of a cosine, in single precision, round to π/2 (log-SNR NaN) or its slope is infinite.
_COSINE_MIN, _COSINE_MAX = -32.0, 170.0


def check_nats(section: str, config: object, *names: str) -> None:
    """Raise ``ValueError`` if one of a config's log-SNRs, shifts or biases is NaN or absurdly large."""
    for name in names:
        value = getattr(config, name)
        if not abs(value) <= MAX_NATS:
            raise ValueError(f"{section}.{name} is {value}; expected nats from {-MAX_NATS:g} to {MAX_NATS:g}")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A log-SNR schedule between exact end points.

    Args:
        log_snr_max: λ(0), nats.
        log_snr_min: λ(1), nats.
        kind: ``cosine`` or ``linear`` in λ.
        shift: added to a cosine whose own end points are moved by −shift, so that the end points
            above hold after the shift (simple diffusion, arXiv 2301.11093, section 2).
    """

    log_snr_max: float
    log_snr_min: float
    kind: str = "cosine"
    shift: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ("cosine", "linear"):
            raise ValueError(f"schedule kind is {self.kind!r}; expected 'cosine' or 'linear'")
        check_nats("schedule", self, "log_snr_max", "log_snr_min", "shift")
        if not self.log_snr_max > self.log_snr_min:
            raise ValueError(
                f"schedule needs log_snr_max > log_snr_min; got {self.log_snr_max} and {self.log_snr_min}"
            )
        start, end = self.log_snr_max - self.shift, self.log_snr_min - self.shift
        if self.kind == "cosine" and not (start <= _COSINE_MAX and end >= _COSINE_MIN):
            raise ValueError(
                f"cosine schedule's log_snr_max and log_snr_min, less its shift, are {start:g} and {end:g}; "
                f"expected at most {_COSINE_MAX:g} and at least {_COSINE_MIN:g}"
            )

    def _cosine_angles(self) -> tuple[float, float]:
        """Return the angles u at t = 0 and t = 1, where λ = −2 ln tan(u) + shift."""
        start, end = self.log_snr_max - self.shift, self.log_snr_min - self.shift
        return math.atan(math.exp(-start / 2)), math.atan(math.exp(-end / 2))

    def log_snr(self, t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Return λ(t), nats."""
        if self.kind == "linear":
            return self.log_snr_max + (self.log_snr_min - self.log_snr_max) * t
        start, end = self._cosine_angles()
        return -2 * torch.log(torch.tan(start + (end - start) * t)) + self.shift

    def log_snr_slope(self, t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Return λ'(t) = dλ/dt < 0, nats per unit of t."""
        if self.kind == "linear":
            return torch.full_like(t, self.log_snr_min - self.log_snr_max)
        start, end = self._cosine_angles()
        return -4 * (end - start) / torch.sin(2 * (start + (end - start) * t))


def latent_schedule(log_snr_max: float = 5.0, log_snr_min: float = -10.0, shift: float = 0.0) -> Schedule:
    """Return λ_z; λ_z(0) = 5 is both the encoder's fixed noise and the prior's lowest noise level."""
    return Schedule(log_snr_max=log_snr_max, log_snr_min=log_snr_min, shift=shift)


def pixel_schedule(image_size: int, log_snr_max: float = 10.0, log_snr_min: float = -10.0) -> Schedule:
    """Return λ_x, a cosine shifted by 2 ln(64 / H) above 64 px."""
    return Schedule(
        log_snr_max=log_snr_max,
        log_snr_min=log_snr_min,
        shift=min(0.0, 2 * math.log(64 / image_size)),
    )


@dataclass(frozen=True)
class TimeDensity:
    """A density of t, constant on bins of equal width over [0, 1), to sample t by importance.

    The expected loss stays the same and its variance falls (arXiv 2303.00848).

    Args:
        masses: probability of each bin, least noise first; all above 0, or a part of the loss is never seen.
    """

    masses: tuple[float, ...]

    def __post_init__(self) -> None:
        if not min(self.masses, default=0) > 0:
            raise ValueError(
                f"masses of a time density must be above 0; least is {min(self.masses, default=0)}"
            )
        if not abs(math.fsum(self.masses) - 1) < 1e-9:
            raise ValueError(f"masses of a time density must sum to 1; got {math.fsum(self.masses)}")

    def warp(self, u: Float[Tensor, " b"]) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """Return t = F⁻¹(u) in [0, 1) and weight = 1 / p(t), so that E_u[weight · loss(t)] = E_t[loss(t)].

        F⁻¹ rises, so a stratified u stays stratified.

        Args:
            u: uniform numbers in [0, 1), stratified or not; their dtype and device are those of the result.
        """
        masses = torch.tensor(self.masses, dtype=torch.float64, device="cpu")
        edges = torch.cat([masses.new_zeros(1), masses.cumsum(0)])[:-1].to(u)
        masses = masses.to(u)
        bins = torch.searchsorted(edges, u, right=True) - 1
        t = (bins + (u - edges[bins]) / masses[bins]) / len(self.masses)
        # Rounding may reach 1, which belongs to no bin.
        return t.clamp(max=1 - torch.finfo(u.dtype).eps / 2), 1 / (len(self.masses) * masses[bins])


@lru_cache
def importance_density(
    schedule: Schedule, loss_bias: float | None, uniform_share: float = 0.5, num_bins: int = 256
) -> TimeDensity:
    """Return the density ∝ the loss that standard normal data has with the optimal denoiser, plus uniform.

    That loss is ½ (−λ') w(λ) sigmoid(λ). A loss per example is a sum over many dimensions, so it varies
    little at a given t, and the best density is close to ∝ the loss itself.

    Args:
        schedule: λ(t) of the loss.
        loss_bias: b of w = sigmoid(b − λ), nats; None for the unweighted ELBO of the prior.
        uniform_share: of the uniform density in the mixture; weights are at most 1 / uniform_share.
        num_bins: bins of equal width.

    Raises:
        ValueError: if uniform_share is not in (0, 1].
    """
    if not 0 < uniform_share <= 1:
        raise ValueError(f"uniform_share is {uniform_share}; expected a share above 0, at most 1")
    # On the CPU although a model may be built under another default device, such as meta.
    t = torch.linspace(0, 1, num_bins + 1, dtype=torch.float64, device="cpu")
    edges = schedule.log_snr(t).tolist()
    # The midpoint rule in λ, where the integrand is smooth, whatever the slope of λ(t) does in a bin.
    losses = [(high - low) * _loss_density((high + low) / 2, loss_bias) for high, low in pairwise(edges)]
    total = math.fsum(losses)
    return TimeDensity(
        tuple(uniform_share / num_bins + (1 - uniform_share) * loss / total for loss in losses)
    )


def _loss_density(log_snr: float, loss_bias: float | None) -> float:
    """Return w(λ) sigmoid(λ), the weighted ‖ε − ε̂‖² per nat of λ and dimension."""
    sigmoid = 1 / (1 + math.exp(-log_snr))
    return sigmoid if loss_bias is None else sigmoid / (1 + math.exp(log_snr - loss_bias))
