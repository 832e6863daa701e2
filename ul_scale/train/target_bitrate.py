"""A run's bitrate held at ``loss.target_bits_per_pixel``: the stage's controller, told of every step."""

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from ul_scale.config import AutoencoderRun
from ul_scale.parallel.engine import LocalEngine, Process
from ul_scale.stages.bitrate_control import BitrateControl
from ul_scale.train.ema import Ema
from ul_scale.train.loop import micro_batches, take
from ul_scale.train.metrics import BITS_PER_PIXEL
from ul_scale.train.optim import learning_rate

NOTEWORTHY_ERROR = 0.25
"""A few batches say no better than this whether a target is held; ul-scale bitrate does."""
MEASURE_EVERY = 10
"""Steps from one forward pass of the averaged weights to the next: 3 % of training."""

Steer = Callable[[int, Mapping[str, Tensor], Mapping[str, Tensor], Mapping[str, Tensor]], None]


def bitrate_steering(
    control: BitrateControl, config: AutoencoderRun, engine: LocalEngine, ema: Ema, process: Process
) -> Steer:
    """Return what tells a controller of a step's bitrate over all ranks, without waiting for the device.

    What is evaluated later are averaged weights, whose prior needs fewer bits than the noisy ones that are
    trained; so now and then a step's batch is measured with both.

    Args:
        control: of the stage that is trained, as it was before the engine wrapped it.
        config: of the run.
        engine: the wrapped stage.
        ema: its averages, of which the first is meant.
        process: this process.
    """
    loss, optim, train = config.loss, config.optim, config.train
    average = str(config.ema.half_lives_samples[0])

    def steer(
        step: int, sums: Mapping[str, Tensor], batch: Mapping[str, Tensor], noise: Mapping[str, Tensor]
    ) -> None:
        measured = [sums[BITS_PER_PIXEL].double()]
        if control.is_controlling(step, train.steps) and step % MEASURE_EVERY == 0:
            with engine.averaged(ema.averages[average]):
                parts = micro_batches(len(batch["weight"]), config.parallel.accumulation_steps)
                terms = [engine.forward(take(batch, rows), take(noise, rows), step) for rows in parts]
            bits = torch.cat([each[BITS_PER_PIXEL] for each in terms])
            measured.append((batch["weight"] / train.batch_size * bits).sum().double())
        values = torch.stack(measured)
        if process.world_size > 1:
            dist.all_reduce(values)
        control.observe(
            values[0],
            values[1] if len(values) > 1 else None,
            step,
            train.steps,
            scheduled=loss.loss_factor_at(step + 1),
            lr_share=learning_rate(optim, step, train.steps) / optim.lr,
        )

    return steer


def describe_settled(control: BitrateControl) -> str:
    """Return what c_lf a run ends with, for a person."""
    bits, target = float(control.expected_bits), control.target
    text = (
        f"c_lf settled at {float(control.loss_factor):.4f}: {bits:.4f} bits per pixel expected, "
        f"loss.target_bits_per_pixel is {target:g}"
    )
    if abs(bits / target - 1) > NOTEWORTHY_ERROR:
        text = f"warning: {text}; more train.steps, or another optim.lr, would bring it nearer"
    return text
