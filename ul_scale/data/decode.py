"""From the bytes of a sample's part to pixels or an array, on formats that carry no code."""

import io
import math
from functools import lru_cache
from typing import Literal

import numpy as np
from PIL import Image

IMAGE_PARTS = ("jpg", "jpeg", "png", "webp")
LATENT_PART = "z_clean.npy"
# Suffixes lie (ImageNet has a PNG named .JPEG), so any of these is tried; what else Pillow could open
# is left out, some of it starts other programs.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
# Modes of more than 8 bits would be clipped in silence.
EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")

Buffer = bytes | memoryview


def open_image(data: Buffer) -> Image.Image:
    """Return a decoded image in the mode it was stored in. EXIF rotation is not applied.

    Raises:
        ValueError: if it is not an image of 8 bits per channel, or is damaged.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
        image.load()
    # Pillow's plugins raise many classes on damaged files, SyntaxError and struct.error among them.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".replace("\n", " ")
        raise ValueError(f"not a readable image ({reason})") from error
    if image.mode not in EIGHT_BIT_MODES:
        raise ValueError(f"an image of mode {image.mode}; expected 8 bits per channel")
    return image


def decode_image(data: Buffer, channels: int) -> Image.Image:
    """Return an image in grey or RGB; transparency is dropped.

    Args:
        data: the image's file.
        channels: 1 for grey, 3 for RGB.

    Raises:
        ValueError: if the bytes are not an image of 8 bits per channel.
    """
    return open_image(data).convert("L" if channels == 1 else "RGB")


def decode_npy(data: Buffer) -> np.ndarray:
    """Return the array of an .npy file, a read-only view of the bytes.

    Raises:
        ValueError: if it is not a whole .npy file, or holds pickled objects.
    """
    if bytes(data[:6]) != b"\x93NUMPY" or len(data) < 12:
        raise ValueError("not an .npy file")
    length_bytes = 2 if data[6] == 1 else 4
    start = 8 + length_bytes + int.from_bytes(data[8 : 8 + length_bytes], "little")
    dtype, shape, order = _npy_header(bytes(data[:start]))
    if len(data) - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f".npy data has {len(data) - start} bytes, its header says {shape} of {dtype}")
    return np.frombuffer(data, dtype, offset=start).reshape(shape, order=order)


@lru_cache(maxsize=256)  # the samples of a set share their header
def _npy_header(header: bytes) -> tuple[np.dtype, tuple[int, ...], Literal["C", "F"]]:
    stream = io.BytesIO(header)
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    if dtype.hasobject:
        raise ValueError(".npy file of pickled objects, which are never loaded")
    return dtype, shape, "F" if fortran else "C"
