"""Where images are cropped, and the resizing that published ImageNet scores share (ADM's)."""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

from ul_scale.keyed import uniform

# A larger image would take more than 256 MB as Pillow holds it: some small files unpack to far more.
MAX_PIXELS = 2**26
# A random crop is a square of at least this share of the shorter side, as in ADM.
MIN_CROP_FRACTION = 0.8


class Crop(NamedTuple):
    """A square cut from an image whose shorter side was resized.

    Attributes:
        size: height and width of the square, pixels.
        side: pixels of the shorter side before the cut, at least `size`.
        top: how far down in the room that is left, in [0, 1); none for the middle.
        left: how far to the right, likewise.
    """

    size: int
    side: int
    top: float | None = None
    left: float | None = None

    def cut(self, pixels: np.ndarray) -> np.ndarray:
        """Return the square of a resized image (H, W) or (H, W, C), a view (size, size, channels)."""
        height, width = pixels.shape[:2]
        top, left = _place(self.top, height - self.size), _place(self.left, width - self.size)
        square = pixels[top : top + self.size, left : left + self.size]
        return square.reshape(self.size, self.size, -1)


def _place(fraction: float | None, room: int) -> int:
    return room // 2 if fraction is None else int(fraction * (room + 1))


def random_crop(size: int, seed: int, epoch: int, name: str) -> Crop:
    """Return a sample's crop in an epoch, distributed as ADM's `random_crop_arr` distributes it."""
    side, top, left = (uniform(seed, "crop", epoch, name, what) for what in ("side", "top", "left"))
    largest = math.ceil(size / MIN_CROP_FRACTION)
    return Crop(size, size + int(side * (largest - size + 1)), top, left)


def check_pixels(width: int, height: int) -> None:
    """Refuse what would take more memory than an image may.

    Raises:
        ValueError: if there are more than MAX_PIXELS pixels.
    """
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} × {height} pixels; expected at most {MAX_PIXELS:,} of them")


def resized_shape(width: int, height: int, side: int) -> tuple[int, int, int]:
    """Return the width and height after `resize_shortest_side`, and how often it halves on the way.

    Raises:
        ValueError: if the result would have more than MAX_PIXELS pixels, as of a long strip.
    """
    halvings = 0
    while min(width, height) >= 2 * side:
        width, height, halvings = width // 2, height // 2, halvings + 1
    scale = side / min(width, height)
    width, height = round(width * scale), round(height * scale)
    check_pixels(width, height)
    return width, height, halvings


def resize_shortest_side(image: Image.Image, side: int) -> Image.Image:
    """Resize so that the shorter side has `side` pixels.

    Halving by averages before the bicubic step avoids aliasing, as in ADM's preprocessing, which
    published ImageNet scores share.

    Raises:
        ValueError: if the result would have more than MAX_PIXELS pixels.
    """
    width, height, halvings = resized_shape(*image.size, side)
    for _ in range(halvings):
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def crop_image(image: Image.Image, crop: Crop) -> np.ndarray:
    """Resize the shorter side and cut the square, uint8 (size, size, channels).

    Raises:
        ValueError: if the resized image would have more than MAX_PIXELS pixels.
    """
    if image.size != (crop.side, crop.side):
        image = resize_shortest_side(image, crop.side)
    return crop.cut(np.asarray(image))


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """Resize the shorter side to `size` and return the centre, uint8 (size, size, channels)."""
    return crop_image(image, Crop(size, size))


def is_flipped(seed: int, epoch: int, name: str) -> bool:
    """Say whether a sample is mirrored in an epoch: half of them are, each by its own key."""
    return uniform(seed, "flip", epoch, name) < 0.5
