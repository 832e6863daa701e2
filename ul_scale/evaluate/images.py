"""Pictures, and PSNR. Images are float in [-1, 1], (n, 1 or 3, H, W); clips (n, 1 or 3, T, H, W)."""

import io
import math
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from ul_scale.checkpoint.files import write_atomic

TILE_PX = 96
"""Smaller images are enlarged by a whole factor, pixel by pixel, to about this size."""
GAP_PX = 4
BACKGROUND, INK = (255, 255, 255), (85, 85, 85)
FONT_PX = 13
CAPTION_PX, CAPTION_LINES = 11, 3
"""Of the text below a tile; what does not fit in so many lines ends in an ellipsis."""
GIVEN, BORDER_PX = (240, 130, 20), 3
"""Around the frames of a clip that were given, not generated."""
CLIP_FRAME_MS = 125


def psnr(originals: Tensor, reconstructions: Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB: the mean of each image's own, not that of the mean error.

    The peak is 2, the width of [-1, 1]; reconstructions are clipped to it first, as an image file would.
    An exact reconstruction has an infinite ratio, and so has the mean then.
    """
    # Imported here: it takes seconds, and most evaluations have no use for it.
    from torchmetrics.functional.image import peak_signal_noise_ratio

    if originals.shape != reconstructions.shape:
        raise ValueError(f"PSNR of {tuple(originals.shape)} against {tuple(reconstructions.shape)} images")
    per_image = tuple(range(1, originals.ndim))
    ratio = peak_signal_noise_ratio(
        reconstructions.float().clamp(-1, 1), originals.float(), data_range=2.0, dim=per_image
    )
    return float(ratio)


def to_pil(image: Tensor) -> Image.Image:
    """Return one image (1 or 3, H, W) in [-1, 1] as RGB, clipped and rounded to 8 bits."""
    pixels = ((image.detach().float().clamp(-1, 1) + 1) * 127.5).round().to("cpu", torch.uint8)
    return Image.fromarray(pixels.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())


def _sheet(
    tiles: list[list[Image.Image]], labels: Sequence[str] = (), titles: Sequence[str] = ()
) -> Image.Image:
    """Return rows of equal tiles on white, with a label left of each row and a title over each column."""
    font = ImageFont.load_default(FONT_PX)
    width, height = tiles[0][0].size
    columns = max(len(row) for row in tiles)
    left = max((int(font.getlength(label)) + 2 * GAP_PX for label in labels), default=0)
    top = FONT_PX + 2 * GAP_PX if titles else 0
    size = (left + columns * (width + GAP_PX) - GAP_PX, top + len(tiles) * (height + GAP_PX) - GAP_PX)
    sheet = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        draw.text((left + column * (width + GAP_PX) + width / 2, top / 2), title, INK, font, anchor="mm")
    for row, line in enumerate(tiles):
        y = top + row * (height + GAP_PX)
        if labels:
            draw.text((left - 2 * GAP_PX, y + height / 2), labels[row], INK, font, anchor="rm")
        for column, tile in enumerate(line):
            sheet.paste(tile, (left + column * (width + GAP_PX), y))
    return sheet


def _tiles(images: Tensor, columns: int) -> list[list[Image.Image]]:
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images) or columns < 1:
        raise ValueError(
            f"a picture needs images (n, 1 or 3, H, W) with n > 0 and at least one column, "
            f"got {tuple(images.shape)} and {columns} columns"
        )
    factor = max(1, round(TILE_PX / max(images.shape[2:])))
    size = (images.shape[3] * factor, images.shape[2] * factor)
    tiles = [to_pil(image).resize(size, Image.Resampling.NEAREST) for image in images]
    return [tiles[start : start + columns] for start in range(0, len(tiles), columns)]


def save_grid(
    images: Tensor, path: Path, columns: int, titles: Sequence[str] = (), captions: Sequence[str] = ()
) -> None:
    """Write images row by row as one PNG.

    Args:
        images: (n, 1 or 3, H, W).
        path: of the PNG.
        columns: images in a row.
        titles: over each column, if any.
        captions: below each image, if any, in a few lines.
    """
    tiles = _tiles(images, columns)
    if len(titles) > columns:
        raise ValueError(f"{len(titles)} titles for {columns} columns")
    if captions:
        if len(captions) != len(images):
            raise ValueError(f"{len(captions)} captions for {len(images)} images")
        tiles = _with_captions(tiles, captions)
    _write_png(_sheet(tiles, titles=titles), path)


def _with_captions(tiles: list[list[Image.Image]], captions: Sequence[str]) -> list[list[Image.Image]]:
    """Return rows of tiles, all equally high, with captions below them."""
    font = ImageFont.load_default(CAPTION_PX)
    width, height = tiles[0][0].size
    texts = [_wrap(caption, font, width) for caption in captions]
    line_px = CAPTION_PX + 3
    size = (width, height + GAP_PX + max(map(len, texts)) * line_px)
    remaining = iter(texts)

    def captioned(tile: Image.Image) -> Image.Image:
        image = Image.new("RGB", size, BACKGROUND)
        image.paste(tile)
        draw = ImageDraw.Draw(image)
        for number, line in enumerate(next(remaining)):
            draw.text((width / 2, height + GAP_PX + number * line_px), line, INK, font, anchor="ma")
        return image

    return [[captioned(tile) for tile in row] for row in tiles]


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Return a text in lines of at most `width` pixels, broken at spaces, or within words that are longer."""
    # Pillow's own font has no letters with accents.
    text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        lines += [""] if lines[-1] else []
        for letter in word:
            lines += [""] if font.getlength(lines[-1] + letter) > width else []
            lines[-1] += letter
    if len(lines) > CAPTION_LINES:
        last = lines[CAPTION_LINES - 1] + "…"
        while font.getlength(last) > width and len(last) > 1:
            last = last[:-2] + "…"
        lines = [*lines[: CAPTION_LINES - 1], last]
    return lines


def save_clips(
    videos: Tensor, path: Path, *, given_frames: int = 0, columns: int = 16, frame_ms: int = CLIP_FRAME_MS
) -> None:
    """Write clips as a PNG, a row for each and a column for each frame, and beside it as a moving WebP.

    Args:
        videos: (n, 1 or 3, T, H, W).
        path: of the PNG; the WebP has its name, with another suffix.
        given_frames: the first so many frames have a coloured frame.
        columns: frames that the PNG shows at most, evenly spaced from the first to the last.
        frame_ms: how long the WebP shows a frame.
    """
    frames = _frame_tiles(videos)
    if given_frames:
        borders = [GIVEN if number < given_frames else BACKGROUND for number in range(len(frames))]
        frames = [
            [ImageOps.expand(tile, BORDER_PX, border) for tile in tiles]
            for tiles, border in zip(frames, borders)
        ]
    _write_png(_sheet(_strips(frames, columns)), path)
    side = math.ceil(math.sqrt(len(videos)))
    sheets = [_sheet([tiles[i : i + side] for i in range(0, len(tiles), side)]) for tiles in frames]
    data = io.BytesIO()
    sheets[0].save(
        data, "WEBP", save_all=True, append_images=sheets[1:], duration=frame_ms, loop=0, lossless=True
    )
    write_atomic(path.with_suffix(".webp"), data.getvalue())


def _frame_tiles(videos: Tensor) -> list[list[Image.Image]]:
    """Return for each frame the tiles of all clips."""
    if videos.ndim != 5 or not videos.shape[2]:
        raise ValueError(f"a film needs clips (n, 1 or 3, T, H, W) with T > 0, got {tuple(videos.shape)}")
    return [_tiles(frame, len(videos))[0] for frame in videos.unbind(2)]


def _strips(frames: list[list[Image.Image]], columns: int) -> list[list[Image.Image]]:
    """Return a row for each clip, of so many frames at most, evenly spaced from the first to the last."""
    shown = torch.linspace(0, len(frames) - 1, min(columns, len(frames))).round().int().tolist()
    return [list(row) for row in zip(*(frames[number] for number in shown))]


def save_pairs(originals: Tensor, reconstructions: Tensor, path: Path, columns: int = 8) -> None:
    """Write a PNG of labelled rows: originals, and their reconstructions below them.

    Of images there are `columns` in a row; of clips a row shows so many frames of one.
    """
    if originals.shape != reconstructions.shape:
        raise ValueError(f"pairs of {tuple(originals.shape)} and {tuple(reconstructions.shape)} images")

    def rows(x: Tensor) -> list[list[Image.Image]]:
        return _strips(_frame_tiles(x), columns) if x.ndim == 5 else _tiles(x, columns)

    paired = [row for pair in zip(rows(originals), rows(reconstructions)) for row in pair]
    _write_png(_sheet(paired, ("original", "reconstruction") * (len(paired) // 2)), path)


def _write_png(sheet: Image.Image, path: Path) -> None:
    """Write a PNG whole or not at all: reports read it while others evaluate."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = io.BytesIO()
    sheet.save(data, "PNG", optimize=True)
    write_atomic(path, data.getvalue())
