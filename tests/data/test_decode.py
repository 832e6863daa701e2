"""Decoding against numpy's own pixels, and what a set or a sample must have."""

import io
import json
import pickle
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ul_scale.data import transforms
from ul_scale.data.config import DataConfig
from ul_scale.data.decode import caption_of, decode_npy, label_of, make_decoder
from ul_scale.data.images import decode_image, open_image
from ul_scale.data.sample import BadSample, Draw, Sample
from ul_scale.data.transforms import is_flipped, random_crop

from .conftest import image_bytes, images

GREY, COLOUR = images(1)[0], images(1, channels=3)[0]
ALPHA = images(1, seed=1)[0]
NAMES = [f"set/0/{number}" for number in range(20)]


def png(pixels: np.ndarray, colour_type: int, chunks: bytes = b"") -> bytes:
    """Write a PNG by the specification: pixels of any depth, (H, W) or (H, W, C); chunks go before IDAT."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width = pixels.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, pixels.dtype.itemsize * 8, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(row.dtype.newbyteorder(">")).tobytes() for row in pixels)
    extra = chunk(chunks[:4], chunks[4:]) if chunks else b""
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + extra
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def over_white(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha.reshape(alpha.shape + (1,) * (pixels.ndim - 2)) / 255
    return pixels * share + 255 * (1 - share)


def as_read(data: bytes, channels: int) -> np.ndarray:
    return np.asarray(decode_image(data, channels)).astype(int)


@pytest.mark.parametrize("options", [{"form": "PNG"}, {"form": "BMP"}, {"form": "WEBP", "lossless": True}])
def test_lossless_images_come_back(options: dict) -> None:
    grey, colour = image_bytes(GREY, **options), memoryview(image_bytes(COLOUR, **options))
    assert np.array_equal(decode_image(grey, 1), GREY)
    assert np.array_equal(decode_image(colour, 3), COLOUR)
    assert np.array_equal(decode_image(grey, 3), np.repeat(GREY[:, :, None], 3, 2))
    weighted = COLOUR @ np.array([0.299, 0.587, 0.114])
    assert np.abs(as_read(bytes(colour), 1) - weighted).max() <= 1


def test_what_is_transparent_shows_white() -> None:
    rgba = np.dstack([COLOUR, ALPHA])
    assert np.abs(as_read(png(rgba, 6), 3) - over_white(COLOUR, ALPHA)).max() <= 1
    grey_alpha = np.dstack([GREY, ALPHA])
    assert open_image(png(grey_alpha, 4)).mode == "L"
    assert np.abs(as_read(png(grey_alpha, 4), 1) - over_white(GREY, ALPHA)).max() <= 1
    webp = image_bytes(rgba, "WEBP", lossless=True, exact=True)
    assert np.abs(as_read(webp, 3) - over_white(COLOUR, ALPHA)).max() <= 1
    opaque = np.dstack([COLOUR, np.full_like(GREY, 255)])
    assert np.array_equal(as_read(png(opaque, 6), 3), COLOUR)


def test_transparent_colours_and_palettes() -> None:
    colour = COLOUR.copy()
    colour[2, 3] = key = (10, 20, 30)
    keyed = png(colour, 2, b"tRNS" + struct.pack(">3H", *key))
    colour[2, 3] = 255
    assert np.array_equal(as_read(keyed, 3), colour)

    grey = GREY.copy()
    grey[grey == 7] = 8
    grey[0, 0] = 7
    keyed = png(grey, 0, b"tRNS" + struct.pack(">H", 7))
    grey[0, 0] = 255
    assert np.array_equal(as_read(keyed, 1), grey)

    numbers, palette = np.arange(64, dtype=np.uint8).reshape(8, 8), images(1, 16, 3)[0].reshape(256, 3)
    plain = Image.fromarray(numbers, "P")
    plain.putpalette(palette.tobytes())
    for options, expected in [
        ({}, palette[numbers]),
        ({"transparency": 5}, np.where((numbers == 5)[:, :, None], 255, palette[numbers])),
    ]:
        stream = io.BytesIO()
        plain.save(stream, "PNG", **options)
        assert np.array_equal(as_read(stream.getvalue(), 3), expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_16_bits_are_scaled(channels: int) -> None:
    """Within one level of v / 257, from black to white."""
    deep = np.random.default_rng(0).integers(0, 2**16, (8, 8, channels), dtype=np.uint16)
    deep[0, :2] = [[0] * channels, [65535] * channels]
    expected = deep / 257
    pixels = as_read(png(deep, 0 if channels == 1 else 2), channels).reshape(8, 8, channels)
    assert np.abs(pixels - expected).max() <= 1 and pixels[0, 0, 0] == 0 and pixels[0, 1, 0] == 255
    alpha = ALPHA.astype(np.uint16) * 257
    pixels = as_read(png(np.dstack([deep, alpha]), 4 if channels == 1 else 6), channels)
    assert np.abs(pixels.reshape(8, 8, channels) - over_white(expected, ALPHA)).max() <= 2


def test_1_bit() -> None:
    stream = io.BytesIO()
    Image.fromarray(GREY > 127).save(stream, "PNG")
    assert np.array_equal(as_read(stream.getvalue(), 1), np.where(GREY > 127, 255, 0))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_images_are_set_upright(orientation: int, form: str) -> None:
    """By the EXIF standard's sides of the scene that the first stored row and column are."""
    upright = COLOUR[:, :6]
    stored = {
        1: upright,
        2: upright[:, ::-1],  # top, right
        3: upright[::-1, ::-1],  # bottom, right
        4: upright[::-1],  # bottom, left
        5: upright.swapaxes(0, 1),  # left, top
        6: upright.swapaxes(0, 1)[::-1],  # right, top
        7: upright.swapaxes(0, 1)[::-1, ::-1],  # right, bottom
        8: upright.swapaxes(0, 1)[:, ::-1],  # left, bottom
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = image_bytes(np.ascontiguousarray(stored), form, exif=exif, lossless=True)
    assert np.array_equal(as_read(data, 3), upright)


def test_cmyk_as_adobe_stores_it() -> None:
    """Ink stored inverted, with an Adobe marker; (1 - ink) * (1 - black) without a profile."""
    ink = np.broadcast_to(np.array([40, 90, 200, 30], np.uint8), (16, 16, 4))
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(ink), "CMYK").save(stream, "JPEG", quality=100)
    assert b"Adobe" in stream.getvalue()
    expected = (255 - ink[0, 0, :3].astype(float)) * (255 - 30) / 255
    assert np.abs(as_read(stream.getvalue(), 3) - expected).max() <= 3


@pytest.mark.parametrize(
    "data",
    [b"", b"text", image_bytes(COLOUR)[:100], image_bytes(COLOUR, "JPEG")[:400], image_bytes(COLOUR, "GIF")],
)
def test_what_is_no_whole_image(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"^not a readable image \(.+\)$"):
        decode_image(data, 3)


def test_images_of_too_many_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transforms, "MAX_PIXELS", 63)
    with pytest.raises(ValueError, match=r"^8 × 8 pixels; expected at most 63 of them$"):
        decode_image(image_bytes(COLOUR), 3)


def test_a_png_named_jpg() -> None:
    decode = make_decoder(["jpg"], DataConfig(image_size=8), "set")
    assert np.array_equal(decode(Sample("a", {"jpg": image_bytes(COLOUR)}), None).array, COLOUR)


def test_augmentation_is_for_training_only() -> None:
    pixels = images(1, 24, 3)[0]
    plain = DataConfig(image_size=16)
    random = DataConfig(image_size=16, crop="random", horizontal_flip=True)
    decoders = [make_decoder(["png"], config, "set") for config in (plain, random)]
    seen = set()
    for name in NAMES:
        sample = Sample(name, {"png": image_bytes(pixels)})
        centre, same, drawn = (
            decoders[0](sample, Draw(0, 1)).array,
            decoders[1](sample, None).array,
            decoders[1](sample, Draw(0, 1)).array,
        )
        assert np.array_equal(centre, same)
        crop = random_crop(16, 0, 1, name)
        expected = transforms.crop_image(Image.fromarray(pixels), crop)
        assert np.array_equal(drawn, expected[:, ::-1] if is_flipped(0, 1, name) else expected)
        seen.add(drawn.tobytes())
    assert len(seen) > 10


@pytest.mark.parametrize(
    ("parts", "settings", "message"),
    [
        (["flac"], {}, "set: the samples have flac; expected one of jpg, jpeg, png, webp, bmp, mp4, "),
        (["mp4", "cls"], {}, r"set holds videos \(mp4\): set data.frames, or 1 for single frames"),
        (["jpg"], {"frames": 16}, r"data.frames is 16, but set holds images \(jpg\)"),
        (["jpg"], {"image_size": None}, "data.image_size is not set, and set holds images"),
        (["mp4"], {"image_size": None, "frames": 2}, "data.image_size is not set, and set holds videos"),
        (["jpg"], {"captions": True}, "data.captions is set, but the samples of set have jpg; expected txt"),
        (["z_clean.npy"], {"horizontal_flip": True}, "data.horizontal_flip is set, but set holds latents"),
        (["z_clean.npy"], {"crop": "random"}, "data.crop is random, but set holds latents"),
    ],
)
def test_sets_that_do_not_fit_the_config(parts: list[str], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_decoder(parts, DataConfig(**{"image_size": 8, **settings}), "set")


def test_samples_without_an_image_are_bad() -> None:
    decode = make_decoder(["jpg", "txt"], DataConfig(image_size=8), "set")
    with pytest.raises(BadSample, match="^set/0/a: has no image, only txt$"):
        decode(Sample("set/0/a", {"txt": b"a"}), None)
    with pytest.raises(BadSample, match=r"^set/0/a.jpg: not a readable image \(.+\)$"):
        decode(Sample("set/0/a", {"jpg": b"\xff\xd8\xff"}), None)


def npy(array: np.ndarray, **options: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


def test_flipped_latents_are_taken_when_a_flip_is_drawn() -> None:
    z, flipped = np.zeros((4, 2, 2), np.float32), np.ones((4, 2, 2), np.float16)
    both = {"z_clean.npy": npy(z), "z_clean_flipped.npy": npy(flipped)}
    decode = make_decoder(list(both), DataConfig(horizontal_flip=True), "set")
    for name in NAMES:
        taken = decode(Sample(name, both), Draw(0, 0)).array
        assert np.array_equal(taken, flipped if is_flipped(0, 0, name) else z)
        assert not decode(Sample(name, both), None).array.any()
    never = make_decoder(list(both), DataConfig(), "set")
    assert not any(never(Sample(name, both), Draw(0, 0)).array.any() for name in NAMES)
    name = next(name for name in NAMES if is_flipped(0, 0, name))
    with pytest.raises(BadSample, match=f"^{name}: has no z_clean_flipped.npy, only z_clean.npy$"):
        decode(Sample(name, {"z_clean.npy": npy(z)}), Draw(0, 0))


@pytest.mark.parametrize(
    ("parts", "caption"),
    [
        ({"txt": "a höuse\n".encode()}, "a höuse"),
        ({"txt": b"\xef\xbb\xbfwith a mark"}, "with a mark"),
        ({"json": json.dumps({"caption": "ä\t", "width": 3}).encode()}, "ä"),
        ({"txt": b"text first", "json": b"{}"}, "text first"),
    ],
)
def test_captions(parts: dict[str, bytes], caption: str) -> None:
    assert caption_of(Sample("set/0/a", parts)) == caption
    decode = make_decoder(["png", *parts], DataConfig(image_size=8, captions=True), "set")
    assert decode(Sample("set/0/a", {"png": image_bytes(COLOUR), **parts}), None).text == caption
    decode = make_decoder(["png", *parts], DataConfig(image_size=8), "set")
    assert decode(Sample("set/0/a", {"png": image_bytes(COLOUR), **parts}), None).text is None


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"png": b""}, "set/0/a: has no caption, only png"),
        ({"txt": b" \n"}, "set/0/a.txt: the caption is empty"),
        ({"txt": b"caf\xe9"}, "set/0/a.txt: not UTF-8 .byte 3."),
        ({"json": b'{"caption": null}'}, "set/0/a.json: has no text under caption"),
        ({"json": b'{"text": "a"}'}, "set/0/a.json: has no text under caption"),
        ({"json": b'["caption"]'}, "set/0/a.json: has no text under caption"),
        ({"json": b"{"}, "set/0/a.json: has no text under caption"),
        ({"json": b'{"caption": "\\ud800"}'}, "set/0/a.json: has no text under caption"),
        ({"json": b"[" * 100_000}, "set/0/a.json: has no text under caption"),
    ],
)
def test_samples_without_a_caption_are_bad(parts: dict[str, bytes], message: str) -> None:
    with pytest.raises(BadSample, match=f"^{message}$"):
        caption_of(Sample("set/0/a", parts))


def test_labels() -> None:
    assert label_of(Sample("a", {"cls": memoryview(b"12\n")})) == 12 and label_of(Sample("a", {})) == -1
    with pytest.raises(BadSample, match=r"^set/0/a.cls: b'cat' is not a class id$"):
        label_of(Sample("set/0/a", {"cls": b"cat"}))


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
