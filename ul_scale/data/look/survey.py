"""Count what samples hold, from their headers: nothing is decoded but latents and animated images."""

import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ul_scale.data.decode import decode_npy, label_of
from ul_scale.data.images import orientation_of
from ul_scale.data.look.parts import kind_of, open_frames, read_caption
from ul_scale.data.sample import BadSample, Buffer, Sample
from ul_scale.data.video import open_video, webp_durations_ms

_UNREADABLE_SHOWN = 20

Report = dict[str, Any]


@dataclass(frozen=True)
class Video:
    """What a video's headers and packets say; zero where they do not."""

    width: int
    height: int
    frames: int
    duration_s: float
    frame_rate: float
    codec: str


@dataclass
class Moments:
    """Sums over latents of one part, per channel."""

    shapes: Counter[str] = field(default_factory=Counter)
    count: int = 0
    not_finite: int = 0
    sums: np.ndarray = field(default_factory=lambda: np.zeros((2, 1)))

    def add(self, array: np.ndarray) -> None:
        self.shapes[f"{array.dtype} {'×'.join(map(str, array.shape)) or 'scalar'}"] += 1
        values = array.astype(np.float64).reshape(len(array) if array.ndim > 2 else 1, -1)
        if not np.isfinite(values).all():
            self.not_finite += 1
        elif self.count == 0 or len(values) == self.sums.shape[1]:
            self.count += values.shape[1]
            self.sums = self.sums + np.stack([values.sum(1), (values**2).sum(1)])

    def describe(self) -> Report:
        mean, square = self.sums / max(self.count, 1)
        std = np.sqrt(np.maximum(square - mean**2, 0))
        total = mean.mean()
        return {
            "samples": sum(self.shapes.values()),
            "shapes": dict(self.shapes.most_common()),
            "not_finite": self.not_finite,
            "mean": float(total),
            "std": math.sqrt(max(float(square.mean() - total**2), 0.0)),
            "channel_mean": mean.tolist(),
            "channel_std": std.tolist(),
        }


@dataclass
class Survey:
    """Counts what samples hold, in memory that grows with the variety, not with the number."""

    samples: int = 0
    labels: Counter[int] = field(default_factory=Counter)
    captions: Counter[str] = field(default_factory=Counter)
    empty_captions: int = 0
    missing_captions: int = 0
    images: Counter[tuple[int, int]] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    rotated: int = 0
    videos: Counter[Video] = field(default_factory=Counter)
    latents: dict[str, Moments] = field(default_factory=lambda: defaultdict(Moments))
    unreadable: int = 0
    reasons: list[Report] = field(default_factory=list)

    def add(self, sample: Sample) -> None:
        """Count a sample; a part that cannot be read is counted as that."""
        self.samples += 1
        self.missing_captions += not {"txt", "json"} & set(sample.parts)
        faults = {}
        for part, data in sample.parts.items():
            try:
                self._add_part(sample, part, data)
            except BadSample as error:
                faults[part] = str(error).removeprefix(f"{sample.name}.{part}: ")
            except ValueError as error:
                faults[part] = str(error)
        self.unreadable += bool(faults)
        self.reasons += [{"sample": sample.name, "part": part, "reason": faults[part]} for part in faults]
        del self.reasons[_UNREADABLE_SHOWN:]

    def _add_part(self, sample: Sample, part: str, data: Buffer) -> None:
        kind = kind_of(part)
        if kind == "label":
            self.labels[label_of(sample)] += 1
        elif kind == "text" or (kind == "json" and "txt" not in sample.parts):
            self._add_caption(read_caption(sample))
        elif kind == "video":
            self.videos[probe_video(data)] += 1
        elif kind == "image":
            self._add_image(data)
        elif kind == "array":
            self.latents[part].add(decode_npy(data))

    def _add_caption(self, caption: str | None) -> None:
        if caption is None:
            self.missing_captions += 1
        elif caption:
            self.captions[caption] += 1
        else:
            self.empty_captions += 1

    def _add_image(self, data: Buffer) -> None:
        image, frames = open_frames(data)
        turned = orientation_of(image)
        size = image.size if turned < 5 else (image.height, image.width)
        if frames > 1:
            seconds = webp_durations_ms(bytes(data)).sum() / 1000
            self.videos[Video(*size, frames, seconds, frames / seconds, f"animated {image.format}")] += 1
            return
        self.images[size] += 1
        self.modes[image.mode] += 1
        self.formats[image.format or "?"] += 1
        self.rotated += turned != 1


def probe_video(data: Buffer) -> Video:
    """Return what a video file says about itself; its packets are counted where its header has no number.

    Raises:
        ValueError: if it is no video, or has no frames.
        ImportError: if PyAV is not installed.
    """
    with open_video(bytes(data)) as (container, stream):
        frames = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
        rate = float(stream.average_rate or 0)
        if stream.duration is not None:
            duration_s = float(stream.duration * stream.time_base)
        else:
            duration_s = (container.duration or 0) / 1e6  # FFmpeg's unit of a container's duration
        size, codec = (stream.width, stream.height), stream.codec_context.name
    if not frames:
        raise ValueError("a video without frames")
    return Video(*size, frames, round(duration_s, 3), round(rate, 3), codec)
