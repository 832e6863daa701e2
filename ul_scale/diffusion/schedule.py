"""Noise schedules as log-SNR λ(t), with λ'(t) in closed form.

Variance preserving: α² = sigmoid(λ), σ² = sigmoid(−λ). t = 0 is the least noise, t = 1 is noise.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


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
        if not self.log_snr_max > self.log_snr_min:
            raise ValueError(
                f"schedule needs log_snr_max > log_snr_min; got {self.log_snr_max} and {self.log_snr_min}"
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


def latent_schedule(log_snr_max: float = 5.0, log_snr_min: float = -10.0) -> Schedule:
    """Return λ_z; λ_z(0) = 5 is both the encoder's fixed noise and the prior's lowest noise level."""
    return Schedule(log_snr_max=log_snr_max, log_snr_min=log_snr_min)


def pixel_schedule(image_size: int, log_snr_max: float = 10.0, log_snr_min: float = -10.0) -> Schedule:
    """Return λ_x, a cosine shifted by 2 ln(64 / H) above 64 px."""
    return Schedule(
        log_snr_max=log_snr_max,
        log_snr_min=log_snr_min,
        shift=min(0.0, 2 * math.log(64 / image_size)),
    )
