"""Crops against ADM's recipes, draws against their keys."""

import math

import numpy as np
import pytest
from PIL import Image

from ul_scale.data.transforms import Crop, center_crop, crop_image, is_flipped, random_crop
from ul_scale.keyed import uniform

SHAPES = [(8, 8), (20, 33), (50, 17), (7, 90), (16, 16), (64, 64), (33, 16)]
NAMES = [f"set/0/{i}" for i in range(400)]


def adm_resize(image: Image.Image, side: int) -> np.ndarray:
    """The steps of guided-diffusion's center_crop_arr and random_crop_arr."""
    while min(*image.size) >= 2 * side:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.BOX)
    scale = side / min(*image.size)
    return np.array(image.resize(tuple(round(x * scale) for x in image.size), resample=Image.BICUBIC))


def adm_center_crop(image: Image.Image, size: int) -> np.ndarray:
    array = adm_resize(image, size)
    y, x = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[y : y + size, x : x + size]


@pytest.mark.parametrize("shape", SHAPES)
def test_center_crop_is_adms(shape: tuple[int, int]) -> None:
    colour = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    for image, channels in [(Image.fromarray(colour), 3), (Image.fromarray(colour[:, :, 0]), 1)]:
        cropped = center_crop(image, 16)
        assert cropped.dtype == np.uint8 and cropped.shape == (16, 16, channels)
        assert np.array_equal(cropped.squeeze(), adm_center_crop(image, 16))


@pytest.mark.parametrize("shape", SHAPES)
def test_random_crops_are_squares_of_adms_resized_image(shape: tuple[int, int]) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))
    for name in NAMES[:5]:
        crop = random_crop(16, 0, 0, name)
        array = adm_resize(image, crop.side)
        squares = np.lib.stride_tricks.sliding_window_view(array, (16, 16), (0, 1)).transpose(0, 1, 3, 4, 2)
        cropped = crop_image(image, crop)
        assert (squares == cropped).all((2, 3, 4)).any()


def test_random_crops_reach_every_side_and_place_alike() -> None:
    """As randrange(ceil(size), ceil(size / 0.8) + 1) and randrange(room + 1) do."""
    crops = [random_crop(16, 0, 0, name) for name in NAMES]
    sides, counts = np.unique([crop.side for crop in crops], return_counts=True)
    assert sides.tolist() == list(range(16, math.ceil(16 / 0.8) + 1)) and counts.min() > 400 / 5 / 2
    numbered = np.arange(400).reshape(20, 20)
    corners = np.array([divmod(int(crop.cut(numbered)[0, 0, 0]), 20) for crop in crops])
    for along in corners.T:  # 5 places each
        assert np.unique(along).tolist() == [0, 1, 2, 3, 4] and np.bincount(along).min() > 400 / 5 / 2
    assert abs(np.corrcoef(corners.T)[0, 1]) < 0.15


def test_the_centre_is_rounded_as_adms() -> None:
    numbered = np.arange(19 * 18).reshape(19, 18)
    assert Crop(16, 18).cut(numbered)[0, 0, 0] == 1 * 18 + 1


def test_random_crops_and_flips_are_keyed_by_seed_epoch_and_sample() -> None:
    crops, flips = [random_crop(16, 0, 0, n) for n in NAMES], [is_flipped(0, 0, n) for n in NAMES]
    assert crops == [random_crop(16, 0, 0, n) for n in NAMES]
    assert flips == [uniform(0, "flip", 0, n) < 0.5 for n in NAMES] and 150 < sum(flips) < 250
    for seed, epoch in [(1, 0), (0, 1)]:
        assert 150 < sum(is_flipped(seed, epoch, n) != flip for n, flip in zip(NAMES, flips)) < 250
        assert sum(random_crop(16, seed, epoch, n) == crop for n, crop in zip(NAMES, crops)) == 0


def test_a_strip_does_not_grow_beyond_memory() -> None:
    with pytest.raises(ValueError, match=r"^256 × 1280000 pixels; expected at most 67,108,864 of them$"):
        center_crop(Image.new("L", (2, 10_000)), 256)
