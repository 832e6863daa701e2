"""Check an image or a video by decoding it, and store it smaller or in another format where asked.

What nothing is asked of keeps its bytes. What is written again looks as training would see the original:
upright, in grey or RGB of 8 bits.
"""

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from ul_scale.data.images import IMAGE_FORMATS as STILL_FORMATS
from ul_scale.data.images import open_image
from ul_scale.data.transforms import check_pixels, resize_shortest_side
from ul_scale.data.video import container_format, import_av, open_video

IMAGE_FORMATS = ("keep", "webp", "png", "jpg")
JPEG_QUALITY = 95
# Suffixes lie, so an image's part is told by its content. BMP and still GIF are stored as PNG.
_PARTS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "png", "GIF": "png"}
# FFmpeg's name of a container → what it is stored as, where the suffix lies the first.
_CONTAINER_PARTS = {"mov": ("mp4", "mov"), "matroska": ("mkv", "webm"), "avi": ("avi",), "gif": ("gif",)}
# The first that PyAV's FFmpeg can encode is used: the encoder, the part, its options for high quality.
_VIDEO_ENCODERS = (
    # x264's fast macroblock tree reads memory that nobody wrote: one video in a hundred differed at its next
    # writing. What it uses instead where results must not depend on the CPU does not.
    ("libx264", "mp4", {"crf": "18", "preset": "medium", "x264-params": "cpu-independent=1"}),
    ("libvpx-vp9", "webm", {"crf": "24", "b": "0", "row-mt": "0"}),
    ("mpeg4", "mp4", {"qscale": "3", "flags": "+qscale"}),
)
# Less of a video than its file announces is a truncated one; edit lists may hide a few frames.
_MIN_DECODED_FRACTION = 0.9
# Longest time for which a frame is repeated; more is a damaged clock.
_MAX_PAUSE_S = 60
# Containers round times, Matroska to milliseconds.
_CLOCK_S = 0.001


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How images and videos are stored."""

    shortest_side: int | None = None
    """Pixels to which the shorter side of larger ones is reduced."""
    image_format: str = "keep"
    """Of images: webp (lossless), png or jpg; keep leaves them in their own."""
    quality: int | None = None
    """Of JPEGs that are written, 1 to 100; by default 95."""
    frame_rate: float | None = None
    """Frames per second of videos that have more."""

    def __post_init__(self) -> None:
        if self.image_format not in IMAGE_FORMATS:
            raise ValueError(
                f"image format {self.image_format!r}; expected one of {', '.join(IMAGE_FORMATS)}"
            )
        if self.shortest_side is not None and self.shortest_side < 1:
            raise ValueError(f"shortest side {self.shortest_side}; expected at least 1")
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise ValueError(f"quality {self.quality}; expected 1 to 100")
        if self.quality is not None and self.image_format not in ("keep", "jpg"):
            raise ValueError(f"quality is of JPEGs, and images are written as lossless {self.image_format}")
        if self.frame_rate is not None and not self.frame_rate > 0:
            raise ValueError(f"frame rate {self.frame_rate}; expected more than 0")

    def check_kind(self, kind: str) -> None:
        """Refuse options that images, or videos, do not have.

        Raises:
            ValueError: naming the option.
        """
        if kind == "images" and self.frame_rate is not None:
            raise ValueError("a frame rate is given, and the source holds images")
        if kind == "videos" and (self.image_format != "keep" or self.quality is not None):
            raise ValueError("an image format or quality is given, and the source holds videos")


def recode_image(data: bytes, encoding: Encoding) -> tuple[str, bytes]:
    """Return the part and the bytes under which an image is stored. Animations keep theirs.

    Raises:
        ValueError: if it is damaged, or no image that can be stored.
    """
    try:
        source = Image.open(io.BytesIO(data), formats=(*STILL_FORMATS, "GIF"))
        form = str(source.format)
        if form in ("GIF", "WEBP") and getattr(source, "is_animated", False):
            check_pixels(*source.size)
            for number in range(getattr(source, "n_frames", 1)):
                source.seek(number)
                source.load()
            return form.lower(), data
        if form == "GIF":
            data = _save(source.convert("RGBA"), "png", encoding)
    # Pillow's plugins raise many classes on damaged files, SyntaxError and struct.error among them.
    except Exception as error:
        raise ValueError(f"not a readable image ({_reason(error)})") from error
    image, side = open_image(data), encoding.shortest_side
    part = _PARTS[form] if encoding.image_format == "keep" else encoding.image_format
    if side is not None and min(image.size) > side:
        image = resize_shortest_side(image, side)
    elif encoding.image_format == "keep" and form != "BMP":
        return part, data
    return part, _save(image, part, encoding)


def is_animated(data: bytes) -> bool:
    """Say whether an image file holds several frames."""
    try:
        return bool(
            getattr(Image.open(io.BytesIO(data), formats=(*STILL_FORMATS, "GIF")), "is_animated", False)
        )
    except Exception as error:
        raise ValueError(f"not a readable image ({_reason(error)})") from error


def recode_video(data: bytes, part: str, encoding: Encoding) -> tuple[str, bytes]:
    """Return the part and the bytes under which a video is stored.

    One that is written again has a constant frame rate, a key frame a second to seek to, and no sound.

    Raises:
        ValueError: if it is damaged, shorter than it says, or has no frames.
        ImportError: if PyAV is not installed.
    """
    av, form = import_av(), container_format(data)
    if part not in _CONTAINER_PARTS[form]:
        part = _CONTAINER_PARTS[form][0]
    with open_video(data) as (container, stream):
        frames = _Frames(container, stream)
        if _fits(stream, encoding):
            for _ in frames:
                pass
        else:
            part, data = _write_video(av, frames, stream, encoding)
    return part, data


class _Frames:
    """The frames of a video, checked for damage as they pass."""

    def __init__(self, container: Any, stream: Any) -> None:
        self._container, self._stream = container, stream

    def __iter__(self) -> Iterator[Any]:
        count, end_s = 0, 0.0
        for frame in self._container.decode(self._stream):
            if frame.is_corrupt:
                raise ValueError(f"frame {count} is damaged")
            count += 1
            end_s = max(end_s, frame.time or 0.0)
            yield frame
        if not count:
            raise ValueError("has no frames")
        if count < _MIN_DECODED_FRACTION * self._stream.frames:
            raise ValueError(f"ends after {count} of {self._stream.frames} frames")
        if (end_s + 1 / _rate(self._stream)) < _MIN_DECODED_FRACTION * self._announced_s():
            raise ValueError(f"ends after {end_s:.1f} of {self._announced_s():.1f} s")

    def _announced_s(self) -> float:
        """Return the video's length as its file says, 0 where that may be its sound's."""
        if self._stream.duration is not None:
            return float(self._stream.duration * self._stream.time_base)
        alone = len(self._container.streams) == 1
        return (self._container.duration or 0) / 1e6 if alone else 0.0


@cache
def video_encoder() -> tuple[str, str, dict[str, str]]:
    """Return the encoder that videos are written with, the part that they become, and its options.

    Raises:
        ValueError: if the installed FFmpeg has none.
    """
    av = import_av()
    for name, part, options in _VIDEO_ENCODERS:
        if name in av.codecs_available:
            return name, part, options
    raise ValueError(f"PyAV can encode none of {', '.join(name for name, _, _ in _VIDEO_ENCODERS)}")


def _fits(stream: Any, encoding: Encoding) -> bool:
    """Say whether a video is small and slow enough as it is."""
    side, rate = encoding.shortest_side, encoding.frame_rate
    small = side is None or min(stream.width, stream.height) <= side
    return small and (rate is None or float(_rate(stream)) <= rate * 1.001)


def _rate(stream: Any) -> Fraction:
    rate = stream.average_rate or stream.guessed_rate
    if not rate:
        raise ValueError("has no frame rate")
    return Fraction(rate)


def _write_video(av: Any, frames: Iterable[Any], stream: Any, encoding: Encoding) -> tuple[str, bytes]:
    name, part, options = video_encoder()
    source_rate = _rate(stream)
    rate = min(source_rate, Fraction(encoding.frame_rate or source_rate)).limit_denominator(1001)
    if not rate:
        raise ValueError(f"has {float(source_rate):g} frames per second")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=part, options={"fflags": "+bitexact"}) as target:
        out = None
        for number, frame in enumerate(_at_constant_rate(frames, rate, float(1 / source_rate))):
            if out is None:
                size = _even_size(frame, encoding.shortest_side)
                out = target.add_stream(name, rate=rate, options=options)
                out.width, out.height, out.pix_fmt = *size, "yuv420p"
                context = out.codec_context
                context.thread_count, context.gop_size = 1, max(1, round(rate))
                context.colorspace, context.color_range = frame.colorspace, frame.color_range
            image = _upright(av, frame).reformat(
                *size,
                format="yuv420p",
                interpolation="BICUBIC",
                threads=1,
                dst_colorspace=frame.colorspace,
                dst_color_range=frame.color_range,
            )
            image.pts, image.time_base, image.pict_type = number, 1 / rate, 0
            target.mux(out.encode(image))
        if out is not None:
            target.mux(out.encode(None))
    return part, buffer.getvalue()


def _at_constant_rate(frames: Iterable[Any], rate: Fraction, last_s: float) -> Iterator[Any]:
    """Yield for each k the frame that is shown at k / rate: the last that began by then.

    Args:
        frames: of the source, in the order of their times.
        rate: frames per second.
        last_s: for how long the last frame is shown.
    """
    shown, first, count = None, 0.0, 0
    for frame in frames:
        if frame.time is None:
            raise ValueError("has frames without a time")
        if shown is None:
            first = frame.time
        elif frame.time - first > count / rate + _MAX_PAUSE_S:
            raise ValueError(f"its time jumps from {float(count / rate):.1f} s to {frame.time - first:.1f} s")
        while shown is not None and count / rate < frame.time - first - _CLOCK_S:
            yield shown
            count += 1
        shown = frame
    if shown is not None and count / rate < shown.time - first + last_s - _CLOCK_S:
        yield shown


def _even_size(frame: Any, side: int | None) -> tuple[int, int]:
    """Return width and height after reduction; coded colour has half the pixels, so both are even."""
    width, height = frame.width, frame.height
    if frame.rotation % 180:
        width, height = height, width
    scale = 1.0 if side is None else min(1.0, side / min(width, height))
    return max(2, 2 * round(width * scale / 2)), max(2, 2 * round(height * scale / 2))


def _upright(av: Any, frame: Any) -> Any:
    """Return a frame as a player shows it, where the file asks for a quarter turn."""
    if frame.rotation % 360 == 0:
        return frame
    turned = np.rot90(frame.to_ndarray(format="rgb24", threads=1), frame.rotation // 90)
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(turned), format="rgb24")


def _save(image: Image.Image, part: str, encoding: Encoding) -> bytes:
    options: dict[str, Any] = {"format": "PNG"}
    if part == "webp":
        options = {"format": "WEBP", "lossless": True}
    elif part == "jpg":
        quality = JPEG_QUALITY if encoding.quality is None else encoding.quality
        options = {"format": "JPEG", "quality": quality, "subsampling": 0}
    stream = io.BytesIO()
    image.save(stream, **options)
    return stream.getvalue()


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".replace("\n", " ")
