"""A picture of a set for people: thumbnails, film strips of clips, and latents as principal components.

Under each stand its class and caption, its key and its size. Nothing is cropped: a thumbnail shows the
sample whole, which training may not.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ul_scale.data import storage
from ul_scale.data.decode import TEXT_PART, decode_image, decode_npy
from ul_scale.data.images import flatten, pillow_errors
from ul_scale.data.index import Index
from ul_scale.data.look.inspect import read_samples, spread
from ul_scale.data.look.parts import kind_of, open_frames, read_caption
from ul_scale.data.sample import Buffer, Sample
from ul_scale.data.video import frame_image, open_video

COLUMNS, SAMPLES, STRIP_FRAMES = 8, 48, 5
_STRIP_COLUMNS = 3
_SIDE, _STRIP_SIDE, _GAP = 168, 96, 14
_LINE, _HEADER = 17, 64
_INK, _FAINT, _BOX, _FAULT = "#161616", "#7a7a7a", "#efefef", "#b3261e"
# The first that is installed; Pillow's own knows Latin letters only.
_FONTS = ("NotoSansCJK-Regular.ttc", "NotoSans-Regular.ttf", "DejaVuSans.ttf", "Arial Unicode.ttf")


@dataclass
class Tile:
    """What is shown of a sample: its frames (an image has one) and the lines below, or its fault."""

    key: str
    title: str = ""
    size: str = ""
    frames: list[Image.Image] = field(default_factory=list)
    latent: np.ndarray | None = None
    fault: str = ""


def contact_sheet(
    index: Index, *, samples: int = SAMPLES, policy: storage.ReadPolicy | None = None
) -> Image.Image:
    """Draw samples that are spread over a set.

    Args:
        index: the set.
        samples: how many are drawn.
        policy: of the reads.

    Raises:
        OSError: if a read fails.
        ImportError: if the set has videos and PyAV is not installed.
    """
    numbers = spread(len(index), samples)
    read = read_samples(index, numbers, policy or storage.ReadPolicy())
    tiles = [make_tile(sample, index.classes) for sample in read]
    note = color_latents([tile for tile in tiles if tile.latent is not None])
    heading = f"{index.dataset}: {len(tiles):,} of {len(index):,} samples"
    return draw(tiles, heading, note or index.url)


def make_tile(sample: Sample, classes: Sequence[str] | None) -> Tile:
    """Decode a sample to what is shown of it; a fault is shown in its place."""
    tile = Tile(sample.name.split("/", 2)[-1])
    tile.title = _title(sample, classes)
    try:
        for part, data in sample.parts.items():
            kind = kind_of(part)
            if kind == "video":
                tile.frames, tile.size = video_frames(data)
            elif kind == "image":
                tile.frames, tile.size = _image_frames(data)
            elif kind == "array" and part != TEXT_PART:
                tile.latent = decode_npy(data)
                tile.size = f"{'×'.join(map(str, tile.latent.shape))} {tile.latent.dtype}"
            else:
                continue
            return tile
        tile.fault = f"nothing to show, only {', '.join(sample.parts)}"
    except ValueError as error:
        tile.fault = str(error)
    return tile


def _title(sample: Sample, classes: Sequence[str] | None) -> str:
    words = []
    if "cls" in sample.parts:
        # An id that is none is for `verify`; here it is shown as it stands.
        label = bytes(sample.parts["cls"]).decode(errors="replace")
        known = classes is not None and label.isdecimal() and int(label) < len(classes)
        words.append(f"{label} {classes[int(label)]}" if classes and known else f"class {label}")
    try:
        caption = read_caption(sample)
    except ValueError as error:
        caption = f"(caption: {error})"
    if caption is not None:
        words.append(" ".join(caption.split()) or "(empty caption)")
    return " · ".join(words)


def _image_frames(data: Buffer) -> tuple[list[Image.Image], str]:
    image, count = open_frames(data)
    if count == 1:
        shown = decode_image(data, 3)
        return [_fit(shown, _SIDE)], f"{shown.width}×{shown.height} {image.format} {image.mode}"
    frames = []
    for number in _evenly(count):
        with pillow_errors():
            image.seek(number)
            image.load()
        frames.append(_fit(flatten(image).convert("RGB"), _STRIP_SIDE))
    return frames, f"{image.width}×{image.height} {image.format}, {count} frames"


def video_frames(data: Buffer) -> tuple[list[Image.Image], str]:
    """Return frames from all over a video, and its size in words; it is not decoded whole.

    Raises:
        ValueError: if no frame can be decoded.
        ImportError: if PyAV is not installed.
    """
    frames = []
    with open_video(bytes(data)) as (container, stream):
        seconds = (container.duration or 0) / 1e6
        if stream.duration is not None:
            seconds = float(stream.duration * stream.time_base)
        for number in range(STRIP_FRAMES):
            wanted = (stream.start_time or 0) + int(seconds * number / STRIP_FRAMES / stream.time_base)
            container.seek(wanted, stream=stream)
            frame = None
            for frame in container.decode(stream):
                if frame.pts is None or frame.pts >= wanted:
                    break
            if frame is not None:
                frames.append(_fit(frame_image(frame), _STRIP_SIDE))
        size = f"{stream.width}×{stream.height}, {seconds:.3g} s"
    if not frames:
        raise ValueError("a video without frames")
    return frames, size


def color_latents(tiles: list[Tile]) -> str:
    """Give latents of (C, h, w) or (C, t, h, w) colours that they share, and return what the colours are."""
    shapes = {tile.latent.shape[0] for tile in tiles if tile.latent is not None and tile.latent.ndim > 2}
    if len(shapes) != 1:
        for tile in tiles:
            tile.fault = "latents of several shapes" if shapes else "an array that is no latent"
        return ""
    channels = shapes.pop()
    latents = [np.asarray(tile.latent, np.float64) for tile in tiles]
    vectors = np.concatenate([latent.reshape(channels, -1) for latent in latents], axis=1)
    finite = np.isfinite(vectors).all(axis=0)
    mean = vectors[:, finite].mean(axis=1)
    variance, directions = np.linalg.eigh(np.cov(vectors[:, finite]).reshape(channels, channels))
    basis = directions[:, ::-1][:, :3]
    # The sign of a component is arbitrary: fix it, so that the same set looks the same again.
    basis = basis * np.sign(basis[np.abs(basis).argmax(axis=0), np.arange(basis.shape[1])])
    low, high = np.percentile((vectors[:, finite].T - mean) @ basis, [1, 99], axis=0)
    for tile, latent in zip(tiles, latents):
        parts = (np.moveaxis(latent, 0, -1) - mean) @ basis
        scaled = np.clip(np.nan_to_num((parts - low) / np.maximum(high - low, 1e-12)), 0, 1)
        if scaled.shape[-1] < 3:
            scaled = np.repeat(scaled[..., :1], 3, axis=-1)
        pixels = np.round(255 * scaled).astype(np.uint8)
        frames = [pixels] if pixels.ndim == 3 else [pixels[i] for i in _evenly(len(pixels))]
        tile.frames = [_enlarge(Image.fromarray(frame), len(frames)) for frame in frames]
    shown = variance[::-1][: 3 if channels >= 3 else 1].sum() / max(variance.sum(), 1e-30)
    named = "red, green, blue = the first 3 principal components" if channels >= 3 else "grey = the first one"
    return f"latents, not images: {named} of {channels} channels ({100 * shown:.0f} % of the variance)"


def draw(tiles: list[Tile], heading: str, note: str) -> Image.Image:
    """Lay tiles out in a grid, film strips in fewer columns."""
    strips = any(len(tile.frames) > 1 for tile in tiles)
    columns = min(_STRIP_COLUMNS if strips else COLUMNS, max(len(tiles), 2 if strips else 4))
    height = _STRIP_SIDE if strips else _SIDE
    width = _STRIP_SIDE * STRIP_FRAMES + 4 * (STRIP_FRAMES - 1) if strips else _SIDE
    longest = max(len(tile.title) for tile in tiles)
    title_lines = 2 if longest > 24 and not strips else min(longest, 1)
    step_x, step_y = width + _GAP, height + (title_lines + 2) * _LINE + _GAP + 6
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * step_x + _GAP, _HEADER + rows * step_y + _GAP), "white")
    pen = ImageDraw.Draw(sheet)
    inner = sheet.width - 2 * _GAP
    pen.text((_GAP, 12), _shorten(heading, font(20), inner), _INK, font(20))
    pen.text((_GAP, 38), _shorten(note, font(13), inner), _FAINT, font(13))
    for place, tile in enumerate(tiles):
        x, y = _GAP + place % columns * step_x, _HEADER + place // columns * step_y
        _draw_frames(sheet, pen, tile, (x, y, width, height))
        y += height + 4
        for line in _wrap(tile.title, font(13), width, title_lines) if title_lines else []:
            pen.text((x, y), line, _INK, font(13))
            y += _LINE
        pen.text((x, y), _shorten(tile.key, font(11), width, keep_end=True), _FAINT, font(11))
        pen.text((x, y + _LINE - 3), _shorten(tile.size, font(11), width), _FAINT, font(11))
    return sheet


def _draw_frames(
    sheet: Image.Image, pen: ImageDraw.ImageDraw, tile: Tile, box: tuple[int, int, int, int]
) -> None:
    x, y, width, height = box
    if tile.fault:
        pen.rectangle((x, y, x + width - 1, y + height - 1), "#fbeceb", _FAULT)
        for number, line in enumerate(_wrap(tile.fault, font(12), width - 12, 6)):
            pen.text((x + 6, y + 6 + number * _LINE), line, _FAULT, font(12))
        return
    if len(tile.frames) == 1:
        width = height  # a still among film strips
    pen.rectangle((x, y, x + width - 1, y + height - 1), "#222222" if len(tile.frames) > 1 else _BOX)
    share = width / max(len(tile.frames), 1)
    for number, frame in enumerate(tile.frames):
        frame = _fit(frame, height)
        left = x + round(number * share + (share - frame.width) / 2)
        sheet.paste(frame, (left, y + (height - frame.height) // 2))


def _evenly(count: int) -> list[int]:
    return [number * count // STRIP_FRAMES for number in range(STRIP_FRAMES)]


def _fit(image: Image.Image, side: int) -> Image.Image:
    """Return an image reduced to fit a square; a smaller one is enlarged by a whole factor, unsmoothed."""
    longest = max(image.size)
    if longest > side:
        size = [max(round(length * side / longest), 1) for length in image.size]
        return image.resize((size[0], size[1]), Image.Resampling.LANCZOS)
    factor = side // longest
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _enlarge(image: Image.Image, frames: int) -> Image.Image:
    return _fit(image, _SIDE if frames == 1 else _STRIP_SIDE)


def font(size: int) -> Any:
    """Return a font of that many pixels."""
    for name in _FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)


def _shorten(text: str, face: Any, width: int, *, keep_end: bool = False) -> str:
    """Cut a line to a width in pixels, at its end or its beginning."""
    if face.getlength(text) <= width:
        return text
    while text and face.getlength(f"{text}…") > width:
        text = text[1:] if keep_end else text[:-1]
    return f"…{text}" if keep_end else f"{text}…"


def _wrap(text: str, face: Any, width: int, lines: int) -> list[str]:
    """Break a text into at most that many lines; the last is cut."""
    wrapped: list[str] = []
    words = text.split()
    while words and len(wrapped) < lines - 1:
        count = 1
        while count < len(words) and face.getlength(" ".join(words[: count + 1])) <= width:
            count += 1
        wrapped.append(_shorten(" ".join(words[:count]), face, width))
        words = words[count:]
    return [*wrapped, _shorten(" ".join(words), face, width)] if words or not wrapped else wrapped
