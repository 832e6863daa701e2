"""From the bytes of an image file to an upright image of 8 bits per channel, with nothing to see through."""

import io
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, UnidentifiedImageError

from ul_scale.data.sample import Buffer
from ul_scale.data.transforms import check_pixels

# Suffixes lie (ImageNet has a PNG named .JPEG), so any of these is tried; what else Pillow could open
# is left out, some of it starts other programs.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
# What sets an image upright, by its EXIF orientation.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION_TAG = 0x0112


def open_image(data: Buffer) -> Image.Image:
    """Return an image upright, as grey ("L") or RGB of 8 bits per channel.

    What is transparent shows white: the colour stored under it is arbitrary, and often black. Of 16 bits
    the upper 8 are kept. CMYK is taken as Adobe stores it; embedded colour profiles are not applied.

    Raises:
        ValueError: if it is not an image, is damaged, or has more than MAX_PIXELS pixels.
    """
    with pillow_errors():
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    check_pixels(*image.size)
    with pillow_errors():
        image.load()
    plain = flatten(image)
    orientation = orientation_of(image)
    return plain.transpose(TURNS[orientation]) if orientation in TURNS else plain


def decode_image(data: Buffer, channels: int) -> Image.Image:
    """Return an image upright in grey or RGB, as `open_image` does.

    Args:
        data: the image's file.
        channels: 1 for grey, 3 for RGB.

    Raises:
        ValueError: as `open_image` does.
    """
    return open_image(data).convert("L" if channels == 1 else "RGB")


@contextmanager
def pillow_errors() -> Iterator[None]:
    """Turn what Pillow's plugins raise on damaged files, SyntaxError among it, into ValueError."""
    try:
        yield
    except MemoryError:  # says nothing about the image
        raise
    except UnidentifiedImageError:
        raise ValueError("not a readable image (neither JPEG, PNG, WebP nor BMP)") from None
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".replace("\n", " ")
        raise ValueError(f"not a readable image ({reason})") from error


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 (upright) if there is none that can be read."""
    # Cameras and editors write broken EXIF to good images.
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:
        return 1


def flatten(image: Image.Image) -> Image.Image:
    """Return a loaded image of any mode as "L" or "RGB", over white."""
    if image.mode.startswith("I"):  # 16-bit grey
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        grey = image.mode in ("1", "L", "LA")
        opaque = image.convert("LA" if grey else "RGBA")
        white = Image.new("L" if grey else "RGB", image.size, "white")
        white.paste(opaque.convert(white.mode), mask=opaque.getchannel("A"))
        return white
    if image.mode in ("L", "RGB"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")
