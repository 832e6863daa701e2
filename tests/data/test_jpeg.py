"""The fast path of JPEGs against the exact one: as near as it says, and never another verdict."""

import io
import threading
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from ul_scale.data import jpeg
from ul_scale.data.config import DataConfig
from ul_scale.data.decode import make_decoder
from ul_scale.data.images import decode_image
from ul_scale.data.jpeg import MAX_MEAN_LEVELS, MIN_PSNR_DB, crop_jpeg
from ul_scale.data.sample import BadSample, Draw, Sample
from ul_scale.data.transforms import Crop, crop_image, random_crop

from .conftest import image_bytes


@cache
def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Return noise with a photograph's spectrum, 1/f or a little softer, in all three channels."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = 1

    def plane(exponent: float) -> np.ndarray:
        spectrum = np.fft.rfft2(rng.normal(size=(height, width))) / frequency**exponent
        values = np.fft.irfft2(spectrum, s=(height, width))
        return (values - values.mean()) / values.std()

    y, cb, cr = 128 + 50 * plane(1.15), 12 * plane(1.45), 12 * plane(1.45)
    return np.clip(np.stack([y + 1.4 * cr, y - 0.34 * cb - 0.71 * cr, y + 1.77 * cb], 2), 0, 255).astype(
        np.uint8
    )


PHOTO = photo(375, 500)


def jpeg_bytes(pixels: np.ndarray, orientation: int = 1, **options: Any) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return image_bytes(pixels, "JPEG", **{"quality": 92, "exif": exif, **options})


def exactly(data: bytes, channels: int, crop: Crop) -> np.ndarray:
    return crop_image(decode_image(data, channels), crop)


def psnr_db(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.square(a.astype(float) - b).mean()))


def fast(data: bytes, channels: int, crop: Crop) -> np.ndarray:
    pixels = crop_jpeg(data, channels, crop)
    assert pixels is not None and pixels.shape == (crop.size, crop.size, channels)
    assert pixels.dtype == np.uint8
    return pixels


@pytest.mark.parametrize("size", [64, 256])
@pytest.mark.parametrize(
    "shape",
    [(375, 500), (500, 333), (128, 171), (512, 640), (259, 700), (801, 1067)],
    ids=lambda shape: f"{shape[0]}",
)
@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}], ids=str)
def test_the_stated_distance_is_kept(size: int, shape: tuple[int, int], options: dict) -> None:
    data = jpeg_bytes(photo(*shape), **options)
    a, b = fast(data, 3, Crop(size, size)), exactly(data, 3, Crop(size, size))
    assert psnr_db(a, b) > MIN_PSNR_DB
    assert np.abs(a.astype(int) - b).mean() < MAX_MEAN_LEVELS
    # One pixel beside is what the bounds tell apart.
    assert psnr_db(a[1:], b[:-1]) < MIN_PSNR_DB


@pytest.mark.parametrize(
    ("shape", "size"), [((375, 500), 256), ((511, 400), 256), ((100, 90), 256), ((64, 64), 64)]
)
def test_without_halving_only_rounding_differs(shape: tuple[int, int], size: int) -> None:
    data = jpeg_bytes(photo(*shape))
    a, b = fast(data, 3, Crop(size, size)).astype(int), exactly(data, 3, Crop(size, size))
    assert np.abs(a - b).max() <= 2 and np.abs(a - b).mean() < 0.1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [64, 256])
def test_turned_photographs(orientation: int, size: int) -> None:
    data = jpeg_bytes(photo(300, 420), orientation)
    for crop in (Crop(size, size), random_crop(size, 0, 0, "a"), Crop(size, size + 9, 0.99, 0.0)):
        assert psnr_db(fast(data, 3, crop), exactly(data, 3, crop)) > MIN_PSNR_DB


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize(("stored", "channels"), [(1, 1), (1, 3), (3, 1)])
def test_grey(stored: int, channels: int, orientation: int) -> None:
    data = jpeg_bytes(PHOTO if stored == 3 else PHOTO[:, :, 1], orientation)
    for size in (64, 256):
        assert (
            psnr_db(fast(data, channels, Crop(size, size)), exactly(data, channels, Crop(size, size)))
            > MIN_PSNR_DB
        )


def test_reductions_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """libjpeg-turbo decodes at the power of two asked for, whatever the remainder."""
    shapes = []

    def spy(*args: Any, **options: Any) -> np.ndarray:
        shapes.append(simplejpeg_decode(*args, **options))
        return shapes[-1]

    simplejpeg_decode = simplejpeg.decode_jpeg
    monkeypatch.setattr(jpeg.simplejpeg, "decode_jpeg", spy)
    for extra in range(17):
        for size, reduction in [(16, 8), (32, 4), (70, 2), (150, 1)]:
            height, width = 160 + extra, 191 - extra
            fast(jpeg_bytes(photo(height, width)), 3, Crop(size, size))
            assert shapes[-1].shape[:2] == (-(-height // reduction), -(-width // reduction))


@pytest.mark.parametrize(
    "data",
    [
        image_bytes(PHOTO),
        b"",
        jpeg_bytes(PHOTO)[:20_000],
        jpeg_bytes(PHOTO)[:100],
        jpeg_bytes(PHOTO)[:-2],
        b"\xff\xd8\xff" + bytes(500),
    ],
    ids=["png", "empty", "cut", "header", "no end", "zeros"],
)
def test_what_is_not_plain_has_the_exact_paths_verdict(data: bytes) -> None:
    outcomes = []
    for fast_jpeg in (True, False):
        decode = make_decoder(["jpg"], DataConfig(image_size=64, fast_jpeg=fast_jpeg), "set")
        try:
            outcomes.append(decode(Sample("set/0/a", {"jpg": data}), None).array.tobytes())
        except BadSample as error:
            outcomes.append(str(error).encode())
    assert outcomes[0] == outcomes[1]


def test_cmyk_and_broken_exif() -> None:
    stream = io.BytesIO()
    Image.fromarray(PHOTO).convert("CMYK").save(stream, "JPEG")
    assert crop_jpeg(stream.getvalue(), 3, Crop(64, 64)) is None
    data = jpeg_bytes(PHOTO, exif=b"Exif\0\0II*\0\xff\xff\xff\xff\xff")
    assert psnr_db(fast(data, 3, Crop(64, 64)), exactly(data, 3, Crop(64, 64))) > MIN_PSNR_DB


def test_turned_off_it_is_exact() -> None:
    data = memoryview(jpeg_bytes(PHOTO))
    sample = Sample("set/0/a", {"jpg": data, "cls": b"3"})
    arrays = {}
    for on in (True, False):
        config = DataConfig(image_size=64, fast_jpeg=on, crop="random")
        arrays[on] = make_decoder(["jpg", "cls"], config, "set")(sample, Draw(1, 2)).array
    crop = random_crop(64, 1, 2, "set/0/a")
    assert np.array_equal(arrays[False], exactly(bytes(data), 3, crop))
    assert not np.array_equal(arrays[True], arrays[False])
    assert psnr_db(arrays[True], arrays[False]) > MIN_PSNR_DB


def longest_pause(call: Callable[[], object]) -> float:
    """Return the longest that another thread stood still beside a call, as a share of the call's time."""
    thread, ticks = threading.Thread(target=call), [time.perf_counter()]
    thread.start()
    while thread.is_alive():
        ticks.append(time.perf_counter())
    return float(np.diff(ticks).max() / (ticks[-1] - ticks[0]))


@pytest.mark.parametrize("size", [512, 1100])
def test_other_threads_run_meanwhile(size: int) -> None:
    """Both where libjpeg-turbo does most of the work and where the resize does much of it."""
    data = jpeg_bytes(np.tile(photo(200, 300), (10, 10, 1)))
    # On a busy machine a thread may stand still for other reasons, but not each time.
    assert min(longest_pause(lambda: crop_jpeg(data, 3, Crop(size, size))) for _ in range(5)) < 0.5
    numbers = np.random.default_rng(0).random(200_000).tolist()
    assert min(longest_pause(lambda: sorted(numbers)) for _ in range(5)) > 0.5
