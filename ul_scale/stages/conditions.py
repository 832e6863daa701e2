"""What a base model is conditioned on: a class, a text, the first frames of a video."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditions:
    """Conditions of b samples; None for those that a model has not.

    Attributes:
        label: (b,) classes, −1 for none.
        text: (b, n, width) embeddings of the text's tokens.
        text_mask: (b, n), True where there is a token; no token at all is no text.
        z_given: (b, C, t, h, w) latent of the given frames, which were encoded alone.
        is_given: (b,), whether a sample has given frames.
    """

    label: Tensor | None = None
    text: Tensor | None = None
    text_mask: Tensor | None = None
    z_given: Tensor | None = None
    is_given: Tensor | None = None

    @classmethod
    def of(cls, batch: Mapping[str, Tensor]) -> "Conditions":
        """Return those that a batch holds."""
        z_given = batch.get("z_given")
        return cls(
            label=batch.get("label"),
            text=batch.get("text_embedding"),
            text_mask=batch.get("text_mask"),
            z_given=z_given,
            is_given=None if z_given is None else z_given.new_ones(len(z_given), dtype=torch.bool),
        )

    def without(self, dropped: Tensor) -> "Conditions":
        """Return them with nothing told of some samples: all conditions of a sample go together.

        Args:
            dropped: (b,) bool.
        """
        return replace(
            self,
            label=None if self.label is None else torch.where(dropped, -1, self.label),
            text_mask=None if self.text_mask is None else self.text_mask & ~dropped[:, None],
            is_given=None if self.is_given is None else self.is_given & ~dropped,
        )

    def none(self) -> "Conditions":
        """Return them with nothing told of any sample."""
        for told in (self.label, self.text_mask, self.is_given):
            if told is not None:
                return self.without(torch.ones(len(told), dtype=torch.bool, device=told.device))
        return self


UNTOLD = Conditions()
"""Of a model that has none."""


def first_frames(x: Tensor, count: int, time_downsampling: int) -> Tensor:
    """Return the given frames (b, c, t, H, W) of videos as they are encoded: alone, so that nothing leaks.

    The last one is repeated until the encoder can downsample them.

    Args:
        x: (b, c, T, H, W).
        count: frames that are given.
        time_downsampling: of the encoder.
    """
    frames = torch.arange(-(-count // time_downsampling) * time_downsampling, device=x.device)
    return x[:, :, frames.clamp(max=count - 1)]
