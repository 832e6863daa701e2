"""From a sample's parts to an array, a label and a caption, on formats that carry no code."""

import io
import json
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Literal

import numpy as np

from ul_scale.data.config import DataConfig
from ul_scale.data.images import IMAGE_FORMATS as IMAGE_FORMATS
from ul_scale.data.images import decode_image as decode_image
from ul_scale.data.images import open_image as open_image
from ul_scale.data.jpeg import crop_jpeg
from ul_scale.data.sample import BadSample, Buffer, Decode, Draw, Example, Sample
from ul_scale.data.transforms import Crop, crop_image, is_flipped, random_crop
from ul_scale.data.video import Frames, import_av, read_clip
from ul_scale.keyed import uniform

IMAGE_PARTS = ("jpg", "jpeg", "png", "webp", "bmp")
VIDEO_PARTS = ("mp4", "webm", "mkv", "mov", "avi", "gif")
LATENT_PART = "z_clean.npy"
FLIPPED_LATENT_PART = "z_clean_flipped.npy"
GIVEN_PART = "z_given.npy"
FLIPPED_GIVEN_PART = "z_given_flipped.npy"
TEXT_PART = "text.npy"
CAPTION_PARTS = ("txt", "json")

# A sample's array, and that of the frames that are given.
Read = Callable[[Sample, Draw | None], tuple[np.ndarray, np.ndarray | None]]


def make_decoder(parts: Sequence[str], config: DataConfig, url: str) -> Decode:
    """Return the function that decodes a set's samples.

    Latents are taken before images and videos. Where `data.frames` is set, videos (and WebP, animated or
    not, as videos) are; where it is not, images are, and of an animated one the first frame.

    Args:
        parts: that its samples have.
        config: how they are decoded.
        url: of the set, for messages.

    Raises:
        ValueError: if the set does not fit the config.
        ImportError: if it holds videos and PyAV is missing.
    """
    read = _latent_reader(parts, config, url) if LATENT_PART in parts else _pixel_reader(parts, config, url)
    if config.captions and not set(CAPTION_PARTS) & set(parts):
        raise ValueError(
            f"data.captions is set, but the samples of {url} have {', '.join(parts)}; "
            f"expected {' or '.join(CAPTION_PARTS)}"
        )

    if config.embeddings and TEXT_PART not in parts:
        raise ValueError(
            f"data.embeddings is set, but the samples of {url} have {', '.join(parts)}; expected {TEXT_PART} "
            "of ul-scale encode --text-encoder"
        )

    def decode(sample: Sample, draw: Draw | None) -> Example:
        array, z_given = read(sample, draw)
        text = caption_of(sample) if config.captions else None
        embedding = _floats(sample, TEXT_PART, 2) if config.embeddings else None
        return Example(array, label_of(sample), text, embedding, z_given)

    return decode


def _latent_reader(parts: Sequence[str], config: DataConfig, url: str) -> Read:
    given = GIVEN_PART in parts
    for part in (FLIPPED_LATENT_PART, *([FLIPPED_GIVEN_PART] if given else [])):
        if config.horizontal_flip and part not in parts:
            raise ValueError(
                f"data.horizontal_flip is set, but {url} holds latents, not images, and no {part}"
            )
    if config.crop != "center":
        raise ValueError(f"data.crop is {config.crop}, but {url} holds latents, not images")

    def read(sample: Sample, draw: Draw | None) -> tuple[np.ndarray, np.ndarray | None]:
        flip = config.horizontal_flip and draw is not None and is_flipped(draw.seed, draw.epoch, sample.name)
        z_clean = _floats(sample, FLIPPED_LATENT_PART if flip else LATENT_PART)
        return z_clean, _floats(sample, FLIPPED_GIVEN_PART if flip else GIVEN_PART, 4) if given else None

    return read


def _floats(sample: Sample, part: str, dims: int | None = None) -> np.ndarray:
    """Return the floats of an .npy part, with so many dimensions."""
    if part not in sample.parts:
        raise BadSample(f"{sample.name}: has no {part}, only {', '.join(sample.parts)}")
    try:
        array = decode_npy(sample.parts[part])
    except ValueError as error:
        raise BadSample(f"{sample.name}.{part}: {error}") from error
    if array.dtype.kind != "f":
        raise BadSample(f"{sample.name}.{part}: is {array.dtype}, expected floats")
    if dims is not None and array.ndim != dims:
        raise BadSample(f"{sample.name}.{part}: has shape {array.shape}, expected {dims} dimensions")
    return array


def _pixel_reader(parts: Sequence[str], config: DataConfig, url: str) -> Read:
    stills, videos, what = _usable_parts(parts, config, url)
    size, channels = config.image_size, config.channels
    if size is None:
        raise ValueError(f"data.image_size is not set, and {url} holds {what}s")
    frames = Frames(config.frames or 1, config.frame_stride, config.frame_rate)
    if set(videos) - {"webp"}:
        import_av()  # a missing package is to show now

    def read(sample: Sample, draw: Draw | None) -> tuple[np.ndarray, None]:
        part = next((part for part in (*videos, *stills) if part in sample.parts), None)
        if part is None:
            raise BadSample(f"{sample.name}: has no {what}, only {', '.join(sample.parts)}")
        data, crop, start, flip = sample.parts[part], Crop(size, size), None, False
        if draw is not None:
            key = draw.seed, draw.epoch, sample.name
            crop = random_crop(size, *key) if config.crop == "random" else crop
            start = uniform(draw.seed, "clip", *key[1:]) if config.clip_start == "random" else None
            flip = config.horizontal_flip and is_flipped(*key)
        try:
            if part in videos:
                clip = read_clip(data, frames, start, channels, crop)
                pixels = clip if frames.count > 1 else clip[0]
            else:
                pixels = _read_image(data, channels, crop, fast=config.fast_jpeg)
        except ValueError as error:
            raise BadSample(f"{sample.name}.{part}: {error}") from error
        return (pixels[..., ::-1, :] if flip else pixels), None

    return read


def _usable_parts(parts: Sequence[str], config: DataConfig, url: str) -> tuple[list[str], list[str], str]:
    """Return which parts are read as images, which as videos, and what to call them."""
    stills = [part for part in IMAGE_PARTS if part in parts]
    videos = [part for part in VIDEO_PARTS if part in parts]
    if not stills and not videos:
        expected = ", ".join([*IMAGE_PARTS, *VIDEO_PARTS, LATENT_PART])
        raise ValueError(f"{url}: the samples have {', '.join(parts)}; expected one of {expected}")
    if config.frames is None:
        if not stills:
            raise ValueError(
                f"{url} holds videos ({', '.join(videos)}): set data.frames, or 1 for single frames"
            )
        return stills, [], "image"
    videos += [part for part in ("webp",) if part in stills]
    if config.frames > 1 and not videos:
        raise ValueError(f"data.frames is {config.frames}, but {url} holds images ({', '.join(stills)})")
    return (stills, videos, "image") if config.frames == 1 else ([], videos, "video")


def _read_image(data: Buffer, channels: int, crop: Crop, *, fast: bool) -> np.ndarray:
    pixels = crop_jpeg(data, channels, crop) if fast else None
    return crop_image(decode_image(data, channels), crop) if pixels is None else pixels


def label_of(sample: Sample) -> int:
    """Return a sample's class, -1 if it has none."""
    text = bytes(sample.parts.get("cls", b"-1"))
    try:
        label = int(text)
    except ValueError:
        label = -2
    if not -1 <= label < 2**31:
        raise BadSample(f"{sample.name}.cls: {text[:40]!r} is not a class id")
    return label


def caption_of(sample: Sample) -> str:
    """Return a sample's caption: its `txt`, or else "caption" of its `json`, without space around it.

    Raises:
        BadSample: if it has none, or an empty one.
    """
    part = next((part for part in CAPTION_PARTS if part in sample.parts), None)
    if part is None:
        raise BadSample(f"{sample.name}: has no caption, only {', '.join(sample.parts)}")
    try:
        text = bytes(sample.parts[part]).decode("utf-8-sig")
        caption = text if part == "txt" else json.loads(text)["caption"]
        caption = caption.strip()
        caption.encode()  # JSON can hold half a surrogate pair
    except UnicodeDecodeError as error:
        raise BadSample(f"{sample.name}.{part}: not UTF-8 (byte {error.start})") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise BadSample(f"{sample.name}.json: has no text under caption") from None
    if not caption:
        raise BadSample(f"{sample.name}.{part}: the caption is empty")
    return caption


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
    if any(type(size) is not int for size in shape):
        raise ValueError(f".npy header with shape {shape}")
    return dtype, shape, "F" if fortran else "C"
