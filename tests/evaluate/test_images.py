import math

import numpy as np
import pytest
import torch
from PIL import Image

from ul_scale.evaluate.images import (
    BORDER_PX,
    CAPTION_LINES,
    FONT_PX,
    GAP_PX,
    GIVEN,
    psnr,
    save_clips,
    save_grid,
    save_pairs,
    to_pil,
)


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


def test_captions_stand_below_their_images(tmp_path):
    images = torch.full((3, 1, 96, 96), -1.0)
    save_grid(images, tmp_path / "grid.png", columns=2, captions=["cat", "a dog on the moon, far away", ""])
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    below = (grid.shape[0] - GAP_PX) // 2 - 96  # of each row
    assert grid.shape[1] == 2 * 96 + GAP_PX and below > 2 * 11
    text = [
        grid[top + 96 : top + 96 + below, left : left + 96]
        for top in (0, 96 + below + GAP_PX)
        for left in (0, 96 + GAP_PX)
    ]
    ink = [np.flatnonzero((tile < 200).any((1, 2))) for tile in text]
    lines = [1 + int((np.diff(rows) > 1).sum()) if len(rows) else 0 for rows in ink]
    assert lines[0] == 1 and lines[1] >= 2 and lines[2:] == [0, 0]
    assert all((grid[top : top + 96, :96] == 0).all() for top in (0, 96 + below + GAP_PX))


def test_long_captions_stay_within_their_tiles(tmp_path):
    images, paths = torch.full((2, 1, 96, 96), 1.0), [tmp_path / f"{n}.png" for n in range(3)]
    for path, caption in zip(paths, ("many words " * 30, "w" * 300, "naïve café")):
        save_grid(images, path, columns=2, captions=[caption, ""])
    long, word, accents = (np.asarray(Image.open(path)) for path in paths)
    assert long.shape == word.shape and 96 + CAPTION_LINES * 11 < len(long) < 96 + CAPTION_LINES * 20
    assert all((sheet[:, 96:] == 255).all() for sheet in (long, word))
    save_grid(images, tmp_path / "plain.png", columns=2, captions=["naive cafe", ""])
    assert (accents == np.asarray(Image.open(tmp_path / "plain.png"))).all()


def clips(count: int, frames: int) -> torch.Tensor:
    """Return clips whose pixels tell clip and frame."""
    value = torch.arange(count)[:, None] * 0.2 + torch.arange(frames) * 0.05 - 0.9
    return value.view(count, 1, frames, 1, 1).expand(-1, -1, -1, 32, 32)


def test_a_film_has_a_row_for_each_clip_and_frames_what_was_given(tmp_path):
    videos, tile = clips(3, 8), 96 + 2 * BORDER_PX
    save_clips(videos, tmp_path / "film.png", given_frames=2)
    film = np.asarray(Image.open(tmp_path / "film.png"))
    assert film.shape == (3 * (tile + GAP_PX) - GAP_PX, 8 * (tile + GAP_PX) - GAP_PX, 3)
    centre = film[tile // 2 :: tile + GAP_PX, tile // 2 :: tile + GAP_PX, 0]
    assert (centre == np.round((videos[:, 0, :, 0, 0].numpy() + 1) * 127.5)).all()
    corners = film[0, :: tile + GAP_PX].tolist()
    assert corners == [list(GIVEN)] * 2 + [[255, 255, 255]] * 6

    with Image.open(tmp_path / "film.webp") as moving:
        assert moving.n_frames == 8 and moving.info["loop"] == 0
        assert moving.size == (2 * (tile + GAP_PX) - GAP_PX, 2 * (tile + GAP_PX) - GAP_PX)
        for number in range(8):
            moving.seek(number)
            shown = np.asarray(moving.convert("RGB"))
            assert shown[tile // 2, tile // 2, 0] == round((float(videos[0, 0, number, 0, 0]) + 1) * 127.5)
            assert (tuple(shown[0, 0]) == GIVEN) == (number < 2)


def test_a_long_film_is_thinned_out_evenly(tmp_path):
    save_clips(clips(1, 31)[:, :, :, :, :16] / 2, tmp_path / "film.png", columns=4)
    film = np.asarray(Image.open(tmp_path / "film.png"))
    width = (film.shape[1] - 3 * GAP_PX) // 4
    expected = clips(1, 31)[0, 0, [0, 10, 20, 30], 0, 0] / 2
    middle = film[48, width // 2 :: width + GAP_PX, 0]
    assert middle.tolist() == np.round((expected.numpy() + 1) * 127.5).tolist()


def test_pairs_of_clips_lie_below_each_other(tmp_path):
    videos = clips(2, 4)
    save_pairs(videos, -videos, tmp_path / "pairs.png")
    pairs = np.asarray(Image.open(tmp_path / "pairs.png"))
    left = pairs.shape[1] - 4 * 96 - 3 * GAP_PX
    shown = pairs[48 :: 96 + GAP_PX, left + 48 :: 96 + GAP_PX, 0]
    expected = torch.stack([videos, -videos], dim=1)[:, :, 0, :, 0, 0].flatten(0, 1)
    assert (shown == np.round((expected.numpy() + 1) * 127.5)).all()


def test_bad_pictures_are_named(tmp_path):
    with pytest.raises(ValueError, match="2 captions for 3 images"):
        save_grid(torch.zeros(3, 1, 8, 8), tmp_path / "grid.png", columns=2, captions=["a", "b"])
    with pytest.raises(ValueError, match=r"a film needs clips .* got \(2, 1, 8, 8\)"):
        save_clips(torch.zeros(2, 1, 8, 8), tmp_path / "film.png")
    with pytest.raises(ValueError, match=r"\(0, 1, 8, 8\)"):
        save_grid(torch.zeros(0, 1, 8, 8), tmp_path / "grid.png", columns=1)
    with pytest.raises(ValueError, match="3 titles for 2"):
        save_grid(torch.zeros(2, 1, 8, 8), tmp_path / "grid.png", columns=2, titles=["a", "b", "c"])
    with pytest.raises(ValueError, match="pairs of"):
        save_pairs(torch.zeros(2, 1, 8, 8), torch.zeros(3, 1, 8, 8), tmp_path / "pairs.png")
