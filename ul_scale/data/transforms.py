"""Deterministic transforms of decoded images."""

from typing import Any

import numpy as np
from PIL import Image

from ul_scale.keyed import uniform


def resize_shortest_side(image: Image.Image, side: int) -> Image.Image:
    """Resize so that the shorter side has `side` pixels.

    Halving by averages before the bicubic step avoids aliasing, as in ADM's preprocessing, which
    published ImageNet scores share.
    """
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """Resize the shorter side to `size` and return the centre, uint8 (size, size, channels)."""
    if image.size != (size, size):
        image = resize_shortest_side(image, size)
    pixels = np.asarray(image).reshape(image.height, image.width, -1)
    top, left = (image.height - size) // 2, (image.width - size) // 2
    return pixels[top : top + size, left : left + size]


def is_flipped(seed: int, epoch: int, name: str) -> bool:
    """Say whether a sample is mirrored in an epoch: half of them are, each by its own key."""
    return uniform(seed, "flip", epoch, name) < 0.5


def to_unit_range(images: list[np.ndarray]) -> np.ndarray:
    """Stack uint8 images (height, width, channels) to float32 in [-1, 1], (B, C, H, W)."""
    stacked: np.ndarray[Any, Any] = np.stack(images).transpose(0, 3, 1, 2)
    out = np.empty(stacked.shape, np.float32)
    np.divide(stacked, np.float32(127.5), out=out)
    out -= 1
    return out
