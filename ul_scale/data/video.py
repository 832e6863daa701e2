"""Clips from videos (PyAV) and animated WebP (Pillow): which frames, and no more decoding than they need."""

import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from PIL import Image

from ul_scale.data.images import flatten, pillow_errors
from ul_scale.data.sample import Buffer
from ul_scale.data.transforms import MAX_PIXELS, Crop, check_pixels, crop_image

# Frames of animations that are shown for no longer than this are shown for the other, as browsers do.
_SHORTEST_MS, _DEFAULT_MS = 10, 100
_QUARTER_TURNS = {
    1: Image.Transpose.ROTATE_90,
    2: Image.Transpose.ROTATE_180,
    3: Image.Transpose.ROTATE_270,
}


@dataclass(frozen=True)
class Frames:
    """Which frames of a video make a clip.

    Attributes:
        count: frames of the clip.
        stride: frames of the video from one of the clip to the next, where there is no rate.
        rate: frames of the clip per second.
    """

    count: int
    stride: int = 1
    rate: float | None = None

    def pick(self, times: np.ndarray, start: float | None) -> np.ndarray:
        """Return the numbers of the frames, ascending, [count].

        A video that is too short for the clip is taken from its first frame on, and its last is held.

        Args:
            times: of the video's frames, seconds, ascending, [N].
            start: where the clip begins among the places it can, in [0, 1); none for the middle.
        """
        if self.rate is None:
            room = max(0, len(times) - 1 - (self.count - 1) * self.stride)
            first = room // 2 if start is None else int(start * (room + 1))
            return np.minimum(first + self.stride * np.arange(self.count), len(times) - 1)
        slack = max(0.0, times[-1] - times[0] - (self.count - 1) / self.rate)
        wanted = times[0] + slack * (0.5 if start is None else start) + np.arange(self.count) / self.rate
        return np.abs(times - wanted[:, None]).argmin(1)


def read_clip(data: Buffer, frames: Frames, start: float | None, channels: int, crop: Crop) -> np.ndarray:
    """Return a clip, every frame upright and cropped alike, uint8 (T, size, size, channels).

    Frames are chosen by their time stamps, not by the rate that the file claims. Pixels are taken as square.

    Args:
        data: an MP4, QuickTime, Matroska, WebM, AVI, GIF or WebP file.
        frames: which frames make the clip.
        start: where it begins among the places it can, in [0, 1); none for the middle.
        channels: 1 for grey, 3 for RGB.
        crop: of all its frames.

    Raises:
        ValueError: if it is none of these, is damaged, has no frames, or one where a clip has several.
        ImportError: if PyAV is missing, except for WebP.
    """

    def pick(times: np.ndarray) -> np.ndarray:
        if len(times) == 0 or (len(times) == 1 and frames.count > 1):
            raise ValueError(f"has {len(times)} frame{'s' * (len(times) == 0)}; expected a video")
        return frames.pick(times, start)

    def finish(image: Image.Image) -> np.ndarray:
        return crop_image(image.convert("L" if channels == 1 else "RGB"), crop)

    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return np.stack(_webp_clip(bytes(data), pick, finish))
    return np.stack(_video_clip(bytes(data), pick, finish))


Pick = Callable[[np.ndarray], np.ndarray]
Finish = Callable[[Image.Image], np.ndarray]


def import_av() -> Any:
    """Return PyAV.

    Raises:
        ImportError: if it is not installed, with the remedy.
    """
    try:
        import av
    except ImportError as error:
        raise ImportError("videos need PyAV: pip install 'ul-scale[video]'") from error
    return av


def container_format(data: Buffer) -> str:
    """Return FFmpeg's name of a video's container.

    FFmpeg is never left to guess: among what it knows are playlists, which open other files.

    Raises:
        ValueError: if it is another format.
    """
    if data[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide"):
        return "mov"
    if data[:4] == b"\x1aE\xdf\xa3":
        return "matroska"
    if data[:4] == b"RIFF" and data[8:12] == b"AVI ":
        return "avi"
    if data[:4] == b"GIF8":
        return "gif"
    raise ValueError("not a readable video (neither MP4, QuickTime, Matroska, WebM, AVI, GIF nor WebP)")


def announced_bytes(data: Buffer, form: str) -> int:
    """Return the length that a file's outermost boxes add up to, 0 if they do not say.

    FFmpeg plays what there is of a truncated file.
    """
    end = 0
    if form == "avi":
        end = 8 + int.from_bytes(data[4:8], "little")
    segment = bytes(data[:4096]).find(b"\x18\x53\x80\x67") + 4
    if form == "matroska" and 4 <= segment < len(data):
        length_bytes = 9 - data[segment].bit_length()  # a leading bit marks how many there are
        size = int.from_bytes(data[segment : segment + length_bytes], "big") ^ 1 << 7 * length_bytes
        if size != (1 << 7 * length_bytes) - 1:  # unknown
            end = segment + length_bytes + size
    # What follows the last box need not be one.
    while form == "mov" and end + 8 <= len(data) and bytes(data[end + 4 : end + 8]).isalnum():
        size = int.from_bytes(data[end : end + 4], "big")
        if size == 1:
            size = int.from_bytes(data[end + 8 : end + 16], "big")
        if size < 8:  # 0: up to the end, however far that is
            break
        end += size
    return end


@contextmanager
def open_video(data: bytes) -> Iterator[tuple[Any, Any]]:
    """Open a file's first video stream; FFmpeg's errors become ValueError."""
    av, form = import_av(), container_format(data)
    if len(data) < announced_bytes(data, form):
        raise ValueError(f"has {len(data):,} of {announced_bytes(data, form):,} bytes")
    try:
        with av.open(io.BytesIO(data), format=form, metadata_errors="ignore") as container:
            if not container.streams.video:
                raise ValueError("has no video stream")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise ValueError("has a video stream that cannot be decoded")
            check_pixels(stream.width, stream.height)
            # Several samples are decoded at a time; threads of each one's own would only compete.
            stream.thread_type = "NONE"
            stream.codec_context.thread_count = 1
            # The frames of a damaged file can be larger than it says.
            stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
            yield container, stream
    except (av.FFmpegError, EOFError) as error:
        reason = f"{type(error).__name__}: {error}".replace("\n", " ")
        raise ValueError(f"not a readable video ({reason})") from error


def _video_clip(data: bytes, pick: Pick, finish: Finish) -> list[np.ndarray]:
    with open_video(data) as (container, stream):
        stamps = _stamps(container, stream)
        wanted = stamps[pick(stamps * float(stream.time_base or 1))]
        for origin in (wanted[0], stamps[0]):
            frames = _decoded_from(container, stream, int(origin))
            first = next(frames, None)
            # Where key frames are not what the index says, decoding may begin too late: then from the start.
            if first is not None and _stamp(first) <= wanted[0]:
                break
        return _collect(chain([first] if first else [], frames), wanted, finish)


def _stamps(container: Any, stream: Any) -> np.ndarray:
    """Return the time stamps of a stream's frames in the order of display, read without decoding."""
    packets = container.demux(stream)
    times = [(packet.pts, packet.dts) for packet in packets if packet.size and not packet.is_discard]
    # AVI has no times of display, only of decoding.
    which = 1 if any(pts is None for pts, _ in times) else 0
    return np.unique(np.array([time[which] for time in times if time[which] is not None], np.int64))


def _decoded_from(container: Any, stream: Any, stamp: int) -> Iterator[Any]:
    """Yield decoded frames in the order of display, from the last key frame up to a time stamp."""
    container.seek(stamp, stream=stream)
    yield from container.decode(stream)


def _stamp(frame: Any) -> int:
    stamp = frame.dts if frame.pts is None else frame.pts
    if stamp is None:
        raise ValueError("has frames without time stamps")
    return int(stamp)


def _collect(frames: Iterable[Any], wanted: np.ndarray, finish: Finish) -> list[np.ndarray]:
    """Return the wanted frames; a time stamp without a frame (a packet never shown) gets the next one."""
    clip: list[np.ndarray] = []
    for frame in frames:
        due = int(np.searchsorted(wanted, _stamp(frame), side="right")) - len(clip)
        if due > 0:
            if frame.is_corrupt:
                raise ValueError("a frame is damaged")
            clip += [finish(frame_image(frame))] * due
        if len(clip) == len(wanted):
            return clip
    raise ValueError(f"only {len(clip)} of {len(wanted)} frames can be decoded")


def frame_image(frame: Any) -> Image.Image:
    """Return a frame as a player shows it, converted in one thread: more cost more than they gain."""
    if any(component.is_alpha for component in frame.format.components):
        image = flatten(Image.fromarray(frame.to_ndarray(format="rgba", threads=1)))
    else:
        image = Image.fromarray(frame.to_ndarray(format="rgb24", threads=1))
    turns = frame.rotation // 90 % 4
    return image.transpose(_QUARTER_TURNS[turns]) if turns else image


def _webp_clip(data: bytes, pick: Pick, finish: Finish) -> list[np.ndarray]:
    shown_ms = webp_durations_ms(data)
    chosen = pick((np.cumsum(shown_ms) - shown_ms) / 1000)
    with pillow_errors():
        image = Image.open(io.BytesIO(data), formats=("WEBP",))
    check_pixels(*image.size)
    clip: list[np.ndarray] = []
    for number, repeats in zip(*np.unique(chosen, return_counts=True)):
        with pillow_errors():
            image.seek(int(number))
            image.load()
        clip += [finish(flatten(image))] * int(repeats)
    return clip


def webp_durations_ms(data: bytes) -> np.ndarray:
    """Return how long each frame is shown, from the file's chunks: Pillow would have to decode them all."""
    shown, offset = [], 12
    while offset + 8 <= len(data):
        size = int.from_bytes(data[offset + 4 : offset + 8], "little")
        if data[offset : offset + 4] == b"ANMF":
            duration = int.from_bytes(data[offset + 20 : offset + 23], "little")
            shown.append(duration if duration > _SHORTEST_MS else _DEFAULT_MS)
        offset += 8 + size + size % 2
    return np.array(shown or [_DEFAULT_MS])
