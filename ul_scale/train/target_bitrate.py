"""A run's bitrate held at ``loss.target_bits_per_pixel``: the stage's controller, told of every step."""

from collections.abc import Callable, Mapping

import torch.distributed as dist
from torch import Tensor

from ul_scale.config import AutoencoderRun
from ul_scale.diffusion import bitrate
from ul_scale.parallel.engine import Process
from ul_scale.stages.bitrate_control import BitrateControl
from ul_scale.train.metrics import BITS_PER_PIXEL
from ul_scale.train.optim import learning_rate

NOTEWORTHY_ERROR = 0.25
"""A few batches say no better than this whether a target is held; ul-scale bitrate does."""


def bitrate_steering(
    control: BitrateControl,
    config: AutoencoderRun,
    process: Process,
    *,
    latent_dims: int,
    num_pixels: int,
) -> Callable[[int, Mapping[str, Tensor]], None]:
    """Return what tells a controller of a step's bitrate over all ranks, without waiting for the device.

    Args:
        control: of the stage that is trained, as it was before the engine wrapped it.
        config: of the run.
        process: this process.
        latent_dims: of an image's latent.
        num_pixels: of an image.
    """
    loss, optim, steps = config.loss, config.optim, config.train.steps

    def steer(step: int, sums: Mapping[str, Tensor]) -> None:
        bits = sums[BITS_PER_PIXEL].double()  # a copy, so that the reduction leaves the metrics alone
        if process.world_size > 1:
            dist.all_reduce(bits)
        lr = learning_rate(optim, step, steps)
        control.observe(
            bitrate.lasting_bits(bits, lr, latent_dims=latent_dims, num_pixels=num_pixels),
            step,
            steps,
            scheduled=loss.loss_factor_at(step + 1),
            lr_share=lr / optim.lr,
        )

    return steer


def describe_settled(control: BitrateControl) -> str:
    """Return what c_lf a run ends with, for a person."""
    bits, target = float(control.bits_per_pixel), control.target
    text = (
        f"c_lf settled at {float(control.loss_factor):.4f}: {bits:.4f} bits per pixel expected, "
        f"loss.target_bits_per_pixel is {target:g}"
    )
    if abs(bits / target - 1) > NOTEWORTHY_ERROR:
        text = f"warning: {text}; more train.steps, or another optim.lr, would bring it nearer"
    return text
