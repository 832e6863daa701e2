"""Pictures for people, and PSNR. Images are float in [-1, 1], (n, 1 or 3, H, W)."""

import io
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ul_scale.checkpoint.files import write_atomic

TILE_PX = 96
"""Smaller images are enlarged by a whole factor, pixel by pixel, to about this size."""
GAP_PX = 4
BACKGROUND, INK = (255, 255, 255), (85, 85, 85)
FONT_PX = 13


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


def _sheet(tiles: list[list[Image.Image]], labels: Sequence[str], titles: Sequence[str]) -> Image.Image:
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


def save_grid(images: Tensor, path: Path, columns: int, titles: Sequence[str] = ()) -> None:
    """Write images row by row as one PNG, with an optional title over each column."""
    tiles = _tiles(images, columns)
    if len(titles) > columns:
        raise ValueError(f"{len(titles)} titles for {columns} columns")
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(_sheet(tiles, (), titles), path)


def save_pairs(originals: Tensor, reconstructions: Tensor, path: Path, columns: int = 8) -> None:
    """Write a PNG of labelled rows: originals, and their reconstructions below them."""
    if originals.shape != reconstructions.shape:
        raise ValueError(f"pairs of {tuple(originals.shape)} and {tuple(reconstructions.shape)} images")
    pairs = zip(_tiles(originals, columns), _tiles(reconstructions, columns))
    rows = [row for pair in pairs for row in pair]
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(_sheet(rows, ("original", "reconstruction") * (len(rows) // 2), ()), path)


def _write(sheet: Image.Image, path: Path) -> None:
    """Write a PNG whole or not at all: reports read it while others evaluate."""
    data = io.BytesIO()
    sheet.save(data, "PNG", optimize=True)
    write_atomic(path, data.getvalue())
