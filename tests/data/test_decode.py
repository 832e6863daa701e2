"""Decoding against Pillow's and numpy's own, the crop against ADM's recipe."""

import io
import pickle

import numpy as np
import pytest
from PIL import Image

from ul_scale.data.decode import decode_image, decode_npy
from ul_scale.data.transforms import center_crop, is_flipped, to_unit_range
from ul_scale.keyed import uniform

from .conftest import image_bytes, images

GREY, COLOUR = images(1)[0], images(1, channels=3)[0]


@pytest.mark.parametrize("options", [{"form": "PNG"}, {"form": "WEBP", "lossless": True}])
def test_lossless_images_come_back(options: dict) -> None:
    grey, colour = image_bytes(GREY, **options), memoryview(image_bytes(COLOUR, **options))
    assert np.array_equal(decode_image(grey, 1), GREY)
    assert np.array_equal(decode_image(colour, 3), COLOUR)
    assert np.array_equal(decode_image(grey, 3), np.repeat(GREY[:, :, None], 3, 2))
    assert np.asarray(decode_image(colour, 1)).shape == (8, 8)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_modes_of_8_bits(mode: str) -> None:
    stream = io.BytesIO()
    Image.fromarray(COLOUR).convert(mode).save(stream, "JPEG" if mode == "CMYK" else "PNG")
    assert np.asarray(decode_image(stream.getvalue(), 3)).shape == (8, 8, 3)
    assert np.asarray(decode_image(stream.getvalue(), 1)).dtype == np.uint8


def test_deeper_pixels_are_not_clipped_in_silence() -> None:
    with pytest.raises(ValueError, match="mode I;16; expected 8 bits per channel"):
        decode_image(image_bytes(GREY.astype(np.uint16) * 257), 1)


@pytest.mark.parametrize(
    "data",
    [b"", b"text", image_bytes(COLOUR)[:100], image_bytes(COLOUR, "JPEG")[:400], image_bytes(COLOUR, "GIF")],
)
def test_what_is_no_whole_image(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"^not a readable image \(.+\)$"):
        decode_image(data, 3)


def npy(array: np.ndarray, **options) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", "<f8", "u1"])
@pytest.mark.parametrize("shape", [(4, 8, 8), (2, 3, 4, 5), (5,), (0, 3)])
def test_npy(dtype: str, shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).normal(size=shape).astype(dtype)
    for data in (npy(array), npy(np.asfortranarray(array)), memoryview(npy(array))):
        decoded = decode_npy(data)
        assert decoded.dtype == array.dtype and np.array_equal(decoded, array)


def test_npy_of_a_later_version() -> None:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, GREY, version=(2, 0))
    assert np.array_equal(decode_npy(stream.getvalue()), GREY)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not an .npy file"),
        (npy(GREY)[:-1], "63 bytes, its header says"),
        (npy(GREY) + b"x", "65 bytes, its header says"),
        (npy(np.array([{}], object), allow_pickle=True), "pickled objects, which are never loaded"),
        (pickle.dumps(GREY), "not an .npy file"),
    ],
)
def test_what_is_no_plain_npy(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_npy(data)


def adm_center_crop(image: Image.Image, size: int) -> np.ndarray:
    """The steps of guided-diffusion's center_crop_arr."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), resample=Image.BICUBIC)
    array = np.array(image)
    y, x = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[y : y + size, x : x + size]


@pytest.mark.parametrize("shape", [(8, 8), (20, 33), (50, 17), (7, 90), (16, 16), (64, 64), (33, 16)])
def test_center_crop_is_adms(shape: tuple[int, int]) -> None:
    colour = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    for image, channels in [(Image.fromarray(colour), 3), (Image.fromarray(colour[:, :, 0]), 1)]:
        cropped = center_crop(image, 16)
        assert cropped.dtype == np.uint8 and cropped.shape == (16, 16, channels)
        assert np.array_equal(cropped.squeeze(), adm_center_crop(image, 16))


def test_to_unit_range() -> None:
    out = to_unit_range([COLOUR, COLOUR[:, ::-1]])
    assert out.dtype == np.float32 and out.shape == (2, 3, 8, 8) and out.flags.c_contiguous
    assert np.allclose(out[0], COLOUR.transpose(2, 0, 1) / 255 * 2 - 1, atol=1e-6)
    assert np.array_equal(out[1], out[0][:, :, ::-1])
    assert to_unit_range([np.array([[[0], [255]]], np.uint8)]).ravel().tolist() == [-1.0, 1.0]


def test_flips_are_keyed_by_seed_epoch_and_sample() -> None:
    names = [f"set/0/{i}" for i in range(400)]
    flips = [is_flipped(0, 0, name) for name in names]
    assert flips == [uniform(0, "flip", 0, name) < 0.5 for name in names]
    assert 150 < sum(flips) < 250
    for seed, epoch in [(1, 0), (0, 1)]:
        assert 150 < sum(is_flipped(seed, epoch, name) != flip for name, flip in zip(names, flips)) < 250
