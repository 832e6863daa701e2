"""A sample on its way: the bytes of its parts, and what they are decoded to. Nothing here needs torch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

Buffer = bytes | memoryview


class BadSample(ValueError):
    """A sample that was read whole and cannot be used; another takes its place in training."""


class Sample(NamedTuple):
    """A sample's name, `dataset/shard/key`, and the bytes of its parts."""

    name: str
    parts: Mapping[str, Buffer]


class Draw(NamedTuple):
    """What a sample's augmentation is keyed by, together with its name."""

    seed: int
    epoch: int


@dataclass(frozen=True)
class Example:
    """A decoded sample.

    Attributes:
        array: an image, uint8 (H, W, C); a clip, uint8 (T, H, W, C); or a latent, floats.
        label: its class, -1 if it has none.
        text: its caption, if captions are asked for.
        embedding: of its caption's tokens, floats (n, width), if embeddings are asked for.
        z_given: the latent of a clip's given frames, which were encoded alone, floats (C, t, h, w), if the
            set has it.
    """

    array: np.ndarray
    label: int
    text: str | None = None
    embedding: np.ndarray | None = None
    z_given: np.ndarray | None = None


Decode = Callable[[Sample, Draw | None], Example]
"""Decodes a sample, augmented as drawn (None: not at all); raises ``BadSample`` naming sample and part."""
