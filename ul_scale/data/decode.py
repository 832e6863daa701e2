"""From the bytes of a sample's part to pixels or an array, on formats that carry no code."""

import io
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
from PIL import Image

from ul_scale.data.config import DataConfig
from ul_scale.data.sample import BadSample, Buffer, Decode, Draw, Example, Sample
from ul_scale.data.transforms import center_crop, is_flipped

IMAGE_PARTS = ("jpg", "jpeg", "png", "webp")
LATENT_PART = "z_clean.npy"
# Suffixes lie (ImageNet has a PNG named .JPEG), so any of these is tried; what else Pillow could open
# is left out, some of it starts other programs.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
# Modes of more than 8 bits would be clipped in silence.
EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")


def make_decoder(parts: Sequence[str], config: DataConfig, url: str) -> Decode:
    """Return the function that decodes a set's samples.

    Args:
        parts: that its samples have.
        config: how they are decoded.
        url: of the set, for messages.

    Raises:
        ValueError: if the set does not fit the config.
    """
    if LATENT_PART in parts:
        if config.horizontal_flip:
            raise ValueError(f"data.horizontal_flip is set, but {url} holds latents, not images")
        return _decode_latent
    if not set(IMAGE_PARTS) & set(parts):
        expected = ", ".join([*IMAGE_PARTS, LATENT_PART])
        raise ValueError(f"{url}: the samples have {', '.join(parts)}; expected one of {expected}")
    size, channels, flip = config.image_size, config.channels, config.horizontal_flip
    if size is None:
        raise ValueError(f"data.image_size is not set, and {url} holds images")

    def decode(sample: Sample, draw: Draw | None) -> Example:
        part = next((part for part in IMAGE_PARTS if part in sample.parts), None)
        if part is None:
            raise BadSample(f"{sample.name}: has no image, only {', '.join(sample.parts)}")
        try:
            pixels = center_crop(decode_image(sample.parts[part], channels), size)
        except ValueError as error:
            raise BadSample(f"{sample.name}.{part}: {error}") from error
        if flip and draw is not None and is_flipped(draw.seed, draw.epoch, sample.name):
            pixels = pixels[:, ::-1]
        return Example(pixels, label_of(sample))

    return decode


def _decode_latent(sample: Sample, draw: Draw | None) -> Example:
    if LATENT_PART not in sample.parts:
        raise BadSample(f"{sample.name}: has no {LATENT_PART}, only {', '.join(sample.parts)}")
    try:
        return Example(decode_npy(sample.parts[LATENT_PART]), label_of(sample))
    except ValueError as error:
        raise BadSample(f"{sample.name}.{LATENT_PART}: {error}") from error


def label_of(sample: Sample) -> int:
    """Return a sample's class, -1 if it has none."""
    text = bytes(sample.parts.get("cls", b"-1"))
    try:
        return int(text)
    except ValueError:
        raise BadSample(f"{sample.name}.cls: {text[:40]!r} is not a class id") from None


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
