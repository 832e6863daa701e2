"""Warnings of a latent that carries no information."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ul_scale.stages.autoencoder import AutoencoderLoss, AutoencoderModel
from ul_scale.train.metrics import BITS_PER_PIXEL

MIN_NATS_PER_DIM = 0.05
"""The paper's useful latents carry 0.1 and more, its failure (λ_z(0) = 10) 0.04; a small autoencoder's at
c_lf ≤ 1 ended at 0.03 on Fashion-MNIST (configs/README.md)."""
WATCHED_AFTER = 0.1
"""Share of a run after which its latent is judged: it comes to life only once the decoder looks at it."""


def warn_of_loss_factor(loss: AutoencoderLoss, model: AutoencoderModel) -> str | None:
    """Return a warning if the objective's optimum is a latent without information, else None."""
    as_in_paper = model.prior_kind == model.decoder_kind == "diffusion" and loss.prior_gradient
    if not as_in_paper or loss.target_bits_per_pixel is not None or loss.loss_factor > 1:
        return None
    return (
        f"warning: loss.loss_factor is {loss.loss_factor:g}; expected above 1: up to there a bit in the "
        "latent costs more than it saves the decoder, and the optimum is a latent that carries no information"
    )


@dataclass
class CollapseWatch:
    """Warns once when the latent carries next to nothing.

    Args:
        num_pixels: of an image.
        latent_dims: of its latent.
        steps: the run's length.
    """

    num_pixels: int
    latent_dims: int
    steps: int
    _told: bool = field(default=False, init=False)

    def judge(self, completed: int, terms: Mapping[str, Tensor], log: Callable[[str], object]) -> None:
        """Judge the mean loss terms of a logged step; ``log`` takes one line for a person."""
        if self._told or completed <= WATCHED_AFTER * self.steps:
            return
        # The KL at t = 1 is the price of a latent that noise does not hide, not information kept.
        bits = float(terms[BITS_PER_PIXEL]) - float(terms["bits_per_pixel/kl"])
        nats = bits * self.num_pixels * math.log(2) / self.latent_dims
        if nats < MIN_NATS_PER_DIM:
            self._told = True
            log(
                f"warning: step {completed}: the latent is collapsing: it carries {nats:.2g} nats per "
                f"dimension, expected {MIN_NATS_PER_DIM} or more; raise loss.loss_factor or loss.loss_bias, "
                "or start with a higher c_lf (loss.loss_factor_start, loss.loss_factor_warmup_steps)"
            )
