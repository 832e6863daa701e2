"""The loss factor of a run that holds a target bitrate: what a stage keeps of its controller."""

import torch
from torch import Tensor, nn

from ul_scale.diffusion import bitrate


class BitrateControl(nn.Module):
    """Holds a latent at a bitrate by adapting c_lf while it trains, then keeps the c_lf that it found.

    Until ``start`` c_lf follows a schedule, from there on it is controlled from the value it has, and from
    ``end`` on it is fixed. All state is in fp64 buffers, never on the host: checkpoints hold it, and it
    follows from the bits observed alone, so ranks that observe the same global mean agree bit for bit.

    Args:
        target_bits_per_pixel: to hold.
        loss_factor: c_lf at step 0.
        start: share of the run's steps after which control begins.
        end: share of the run's steps after which c_lf is fixed.
    """

    loss_factor: Tensor
    """c_lf of the next step; once fixed, the value that the run has settled on."""
    integral: Tensor
    bits_per_pixel: Tensor
    """Running mean of what was observed in training."""
    averaged_share: Tensor
    """Running mean of averaged weights' bits, as a share of those in training on the same batches."""
    measurements: Tensor
    """Of averaged weights, so far."""

    def __init__(self, target_bits_per_pixel: float, loss_factor: float, *, start: float, end: float):
        super().__init__()
        self.target, self.start, self.end = target_bits_per_pixel, start, end
        factor = torch.tensor(loss_factor, dtype=torch.float64)
        self.register_buffer("loss_factor", factor)
        self.register_buffer("integral", bitrate.log_excess(factor))
        self.register_buffer("bits_per_pixel", torch.tensor(target_bits_per_pixel, dtype=torch.float64))
        self.register_buffer("averaged_share", torch.ones((), dtype=torch.float64))
        self.register_buffer("measurements", torch.zeros((), dtype=torch.float64))

    def is_controlling(self, step: int, steps: int) -> bool:
        """Say whether c_lf is adapted after a step (from 0) of so many."""
        return self.start <= (step + 1) / steps < self.end

    @property
    def expected_bits(self) -> Tensor:
        """Bits per pixel that averaged weights are expected to have."""
        return self.bits_per_pixel * self.averaged_share

    @torch.no_grad()
    def observe(
        self,
        bits_per_pixel: Tensor,
        averaged: Tensor | None,
        step: int,
        steps: int,
        *,
        scheduled: float,
        lr_share: float,
    ) -> None:
        """Take a step's bitrate and set c_lf of the next one. Waits for no device.

        Args:
            bits_per_pixel: (), mean over the *global* batch.
            averaged: the same of averaged weights on the same batch and noise, where it was measured.
            step: that was trained, from 0.
            steps: the run's length.
            scheduled: c_lf of the next step by the schedule.
            lr_share: learning rate, as a share of its peak.
        """
        window = (self.end - self.start) * steps
        horizon = max(bitrate.MIN_AVERAGED_STEPS, bitrate.AVERAGED_SHARE * window)
        weight = max(1 / horizon, 1 / (step + 1))
        mean = bitrate.running_mean(self.bits_per_pixel, bits_per_pixel.double(), weight)
        self.bits_per_pixel.copy_(mean)
        if averaged is not None:
            ratio = averaged / bits_per_pixel
            self.measurements += ratio.isfinite()
            newest = (1 / self.measurements.clamp(min=1)).clamp(min=1 / bitrate.SHARE_MEASURES)
            share = bitrate.running_mean(self.averaged_share, ratio, newest)
            self.averaged_share.copy_(share)
        if (step + 1) / steps < self.start:
            self.loss_factor.fill_(scheduled)
            self.integral.copy_(bitrate.log_excess(self.loss_factor))
            return
        if not self.is_controlling(step, steps):
            self.loss_factor.copy_(bitrate.loss_factor_of(self.integral))
            return
        error = bitrate.error(self.expected_bits, self.target)
        self.integral.copy_(bitrate.integrate(self.integral, error, lr_share**0.5 / window))
        self.loss_factor.copy_(bitrate.loss_factor_of(self.integral + bitrate.PROPORTIONAL_GAIN * error))
