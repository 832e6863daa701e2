"""JPEGs decoded and resized fast: at more than twice the exact path's rate, and close to what it gives.

The exact path decodes all pixels, halves them by averages and ends with a bicubic resize (ADM's recipe).
Here libjpeg-turbo decodes at 1/2, 1/4 or 1/8 in place of up to three halvings, which skips most of the work,
and torch's vectorised bicubic does the rest. An image that needs no halving differs from the exact path's by
rounding alone. The others differ because the mean of 2 x 2 pixels is a softer low-pass than fewer
coefficients of the cosine transform: see MIN_PSNR_DB.
"""

import io

import numpy as np
import simplejpeg
from PIL import Image

from ul_scale.data.images import TURNS, orientation_of
from ul_scale.data.sample import Buffer
from ul_scale.data.transforms import MAX_PIXELS, Crop, resized_shape

# Distance from the exact path at 64 pixels or more, for images with the 1/f spectrum of photographs: least
# peak signal-to-noise ratio, and largest mean absolute difference in 8-bit levels. Both are met where the
# shorter side is just twice what is asked for; the median over sizes is 40 dB.
MIN_PSNR_DB = 28.0
MAX_MEAN_LEVELS = 8.0
MAX_HALVINGS = 3
# Keeps a rounded-down product from losing the last row; moves no pixel by more than a thousandth.
_GUARD = 1e-3


def crop_jpeg(data: Buffer, channels: int, crop: Crop) -> np.ndarray | None:
    """Decode, resize and crop a JPEG, upright.

    Args:
        data: the image's file.
        channels: 1 for grey, 3 for RGB.
        crop: of the image.

    Returns:
        uint8 (size, size, channels); none for what only the exact path can do or judge: CMYK, more pixels
        than may be decoded, damaged files, other formats.

    Raises:
        ValueError: if the resized image would have more than MAX_PIXELS pixels.
    """
    if data[:3] != b"\xff\xd8\xff":
        return None
    # Pillow raises many classes on damaged files, and has the last word on them.
    try:
        header = Image.open(io.BytesIO(data), formats=("JPEG",))
        orientation = orientation_of(header)
    except Exception:
        return None
    (width, height), stored = header.size, {"L": "GRAY", "RGB": "RGB"}.get(header.mode)
    if stored is None or width * height > MAX_PIXELS:
        return None
    to_width, to_height, halvings = resized_shape(width, height, crop.side)
    reduction = 2 ** min(halvings, MAX_HALVINGS)
    try:
        pixels = simplejpeg.decode_jpeg(
            data,
            stored,
            min_height=-(-height // reduction),
            min_width=-(-width // reduction),
            min_factor=float(reduction),
        )
    except ValueError:
        return None
    if stored == "RGB" and channels == 1:
        pixels = np.array(Image.fromarray(pixels).convert("L"))[:, :, None]
    # The last row and column of a reduced image may lie partly outside the image.
    pixels = _resize(pixels, height / reduction, width / reduction, to_height, to_width)
    if orientation in TURNS:
        flat = pixels[:, :, 0] if pixels.shape[2] == 1 else pixels
        pixels = np.asarray(Image.fromarray(flat).transpose(TURNS[orientation]))
    square = crop.cut(pixels)
    return np.repeat(square, 3, 2) if square.shape[-1] < channels else square


def _resize(pixels: np.ndarray, height: float, width: float, to_height: int, to_width: int) -> np.ndarray:
    """Resize the top left height x width of uint8 (H, W, C) to (to_height, to_width, C)."""
    if pixels.shape[:2] == (to_height, to_width) == (height, width):
        return pixels
    # Pillow's resize would take twice as long as all the rest; torch is worth its second of import.
    import torch

    resized = torch.nn.functional.interpolate(
        torch.from_numpy(pixels).permute(2, 0, 1)[None],
        scale_factor=((to_height + _GUARD) / height, (to_width + _GUARD) / width),
        mode="bicubic",
        antialias=True,
    )
    return resized[0].permute(1, 2, 0).numpy()
