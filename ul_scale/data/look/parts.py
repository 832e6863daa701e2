"""The kinds of content that parts hold, told by their suffixes, and a check of each in full."""

import io
import json
from typing import Any, Literal

import numpy as np
from PIL import Image

from ul_scale.data.decode import IMAGE_PARTS, VIDEO_PARTS, decode_npy
from ul_scale.data.images import IMAGE_FORMATS, open_image
from ul_scale.data.sample import Buffer, Sample
from ul_scale.data.transforms import check_pixels
from ul_scale.data.video import open_video

Kind = Literal["image", "video", "array", "label", "text", "json"]
CONTENT: tuple[Kind, ...] = ("image", "video", "array")


def kind_of(part: str) -> Kind | None:
    """Return what a part holds; None if it is of no known kind."""
    if part in IMAGE_PARTS:
        return "image"
    if part in VIDEO_PARTS:
        return "video"
    if part.split(".")[-1] == "npy":
        return "array"
    named: dict[str, Kind] = {"cls": "label", "txt": "text", "json": "json"}
    return named.get(part)


def check_part(part: str, data: Buffer, num_classes: int | None) -> None:
    """Decode a part in full: every frame, every number. Parts of no known kind pass.

    Args:
        part: its suffix.
        data: its bytes.
        num_classes: labels must be less; None if that is not known.

    Raises:
        ValueError: saying what is wrong with it.
        ImportError: if it is a video and PyAV is not installed.
    """
    kind = kind_of(part)
    if kind == "image":
        _check_image(data)
    elif kind == "video":
        _check_video(data)
    elif kind == "array":
        array = decode_npy(data)
        if array.dtype.kind in "fc" and not np.isfinite(array).all():
            raise ValueError(f"{np.count_nonzero(~np.isfinite(array))} of {array.size} values are not finite")
    elif kind == "label":
        _check_label(data, num_classes)
    elif kind == "text":
        if not _text(data).strip():
            raise ValueError("the caption is empty")
    elif kind == "json":
        _json(data)


def read_caption(sample: Sample) -> str | None:
    """Return a sample's caption, from its `txt` or the "caption" of its `json`; None if it has none.

    Unlike `decode.caption_of`, which training uses, this tells an empty caption from a missing one.

    Raises:
        ValueError: if the part is not UTF-8, or not JSON.
    """
    if "txt" in sample.parts:
        return _text(sample.parts["txt"]).strip()
    fields = _json(sample.parts["json"]) if "json" in sample.parts else None
    caption = fields.get("caption") if isinstance(fields, dict) else None
    if not isinstance(caption, str):
        return None
    # JSON can hold half a surrogate pair, which nothing can print.
    return caption.encode(errors="replace").decode().strip()


def open_frames(data: Buffer) -> tuple[Image.Image, int]:
    """Open a still or animated image without decoding it, and return how many frames it has.

    Raises:
        ValueError: if its headers are no image's, or it has more than MAX_PIXELS pixels.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
        # Of a JPEG (MPO) or PNG with several pictures, training takes the first, as of a still.
        frames = getattr(image, "n_frames", 1) if image.format == "WEBP" else 1
    except Exception as error:  # Pillow's plugins raise many classes on damaged files
        raise ValueError(image_reason(error)) from error
    check_pixels(*image.size)
    return image, frames


def image_reason(error: Exception) -> str:
    """Return in a line why an image cannot be read; Pillow names a file in memory by its address."""
    reason = "no known format" if isinstance(error, Image.UnidentifiedImageError) else str(error)
    return f"not a readable image ({type(error).__name__}: {reason})".replace("\n", " ")


def _check_image(data: Buffer) -> None:
    image, frames = open_frames(data)
    if frames == 1:
        open_image(data)
        return
    for frame in range(frames):
        try:
            image.seek(frame)
            image.load()
        except Exception as error:
            raise ValueError(f"frame {frame} of {frames}: {image_reason(error)}") from error


def _check_video(data: Buffer) -> None:
    frames = 0
    with open_video(bytes(data)) as (container, stream):
        for frame in container.decode(stream):
            if frame.is_corrupt:
                raise ValueError(f"frame {frames} of the video is damaged")
            frames += 1
    if not frames:
        raise ValueError("a video without frames")


def _check_label(data: Buffer, num_classes: int | None) -> None:
    text = bytes(data)
    try:
        label = int(text)
    except ValueError:
        raise ValueError(f"{text[:40]!r} is not a class id") from None
    if label < 0 or (num_classes is not None and label >= num_classes):
        expected = "at least 0" if num_classes is None else f"0 to {num_classes - 1}"
        raise ValueError(f"class {label}; expected {expected}")


def _text(data: Buffer) -> str:
    try:
        return bytes(data).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start})") from None


def _json(data: Buffer) -> Any:
    try:
        return json.loads(_text(data))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from None
