import math

import numpy as np
import pytest
import torch
from PIL import Image

from ul_scale.evaluate.images import FONT_PX, GAP_PX, psnr, save_grid, save_pairs, to_pil


def test_psnr_is_the_mean_of_each_images_decibels():
    originals = torch.zeros(2, 3, 4, 4)
    errors = torch.tensor([0.2, 0.02]).view(2, 1, 1, 1)
    # Peak 2: 20 log10(2 / 0.2) = 20 dB and 40 dB; the mean error would give 23 dB.
    assert psnr(originals, originals + errors) == pytest.approx(30, abs=1e-4)


def test_psnr_clips_reconstructions_and_takes_videos():
    white = torch.ones(2, 3, 5, 4, 4)
    assert psnr(white * 0.8, white * 7) == pytest.approx(20, abs=1e-4)
    assert psnr(white, white * 7) == math.inf
    with pytest.raises(ValueError, match="PSNR of"):
        psnr(white, white[:1])


def test_pixels_are_clipped_and_rounded():
    pixels = np.asarray(to_pil(torch.tensor([[[-1.5, -1.0, 0.0, 1.0, 9.0]]])))
    assert pixels[0, :, 0].tolist() == [0, 0, 128, 255, 255]
    assert (pixels == pixels[..., :1]).all()


def test_a_grid_enlarges_tiny_images_pixel_by_pixel(tmp_path):
    images = torch.linspace(-1, 1, 5 * 32 * 32).view(5, 1, 32, 32)
    save_grid(images, tmp_path / "new" / "grid.png", columns=3)
    grid = np.asarray(Image.open(tmp_path / "new" / "grid.png"))
    assert grid.shape == (2 * 96 + GAP_PX, 3 * 96 + 2 * GAP_PX, 3)
    second = grid[:96, 96 + GAP_PX : 2 * 96 + GAP_PX]
    assert (second == second[::3, ::3].repeat(3, 0).repeat(3, 1)).all()
    assert (second[::3, ::3] == np.asarray(to_pil(images[1]))).all()
    assert (grid[96 + GAP_PX :, 2 * (96 + GAP_PX) :] == 255).all()  # the sixth place is empty


def test_large_images_keep_their_size_and_titles_stand_above(tmp_path):
    save_grid(torch.zeros(2, 3, 128, 256), tmp_path / "grid.png", columns=2, titles=["a", "b"])
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    top = FONT_PX + 2 * GAP_PX
    assert grid.shape == (top + 128, 2 * 256 + GAP_PX, 3)
    assert (grid[:top] < 255).any() and (grid[top:, :256] == 128).all()


def test_pairs_lie_below_each_other_with_labels(tmp_path):
    originals = torch.full((6, 1, 32, 32), -1.0)
    save_pairs(originals, -originals * 0.999, tmp_path / "pairs.png", columns=4)
    pairs = np.asarray(Image.open(tmp_path / "pairs.png"))
    assert pairs.shape[0] == 4 * 96 + 3 * GAP_PX  # two rows of pairs
    column = pairs[48 :: 96 + GAP_PX, -10 - 2 * (96 + GAP_PX), 0]
    assert column.tolist() == [0, 255, 0, 255]
    left = pairs.shape[1] - 4 * 96 - 3 * GAP_PX
    assert left > 40 and (pairs[:96, :left] < 255).any()


def test_bad_pictures_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"\(0, 1, 8, 8\)"):
        save_grid(torch.zeros(0, 1, 8, 8), tmp_path / "grid.png", columns=1)
    with pytest.raises(ValueError, match="3 titles for 2"):
        save_grid(torch.zeros(2, 1, 8, 8), tmp_path / "grid.png", columns=2, titles=["a", "b", "c"])
    with pytest.raises(ValueError, match="pairs of"):
        save_pairs(torch.zeros(2, 1, 8, 8), torch.zeros(3, 1, 8, 8), tmp_path / "pairs.png")
