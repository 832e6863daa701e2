"""Images and videos that are written again, and damaged ones: against Pillow, numpy and known frames."""

import hashlib
import io
import multiprocessing
import shutil
import struct
import tempfile
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ul_scale.data.writing import recode
from ul_scale.data.writing.recode import Encoding, recode_image, recode_video, video_encoder

from ..conftest import image_bytes, images

av = pytest.importorskip("av")
KEEP = Encoding()


def smooth(height: int, width: int) -> np.ndarray:
    """Return an RGB image that survives compression and resizing."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 / width, y * 255 / height, 128 + 0 * x], -1).astype(np.uint8)


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def animation(form: str, count: int = 4) -> bytes:
    frames = [Image.fromarray(frame) for frame in images(count, 16, 3)]
    stream = io.BytesIO()
    frames[0].save(stream, form, save_all=True, append_images=frames[1:], duration=40, lossless=True)
    return stream.getvalue()


# Images


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_an_image_keeps_its_bytes(form: str) -> None:
    data = image_bytes(smooth(9, 12), form)
    for encoding in (KEEP, Encoding(shortest_side=9)):
        assert recode_image(data, encoding) == ({"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}[form], data)


@pytest.mark.parametrize(("image_format", "form"), [("webp", "WEBP"), ("png", "PNG"), ("jpg", "JPEG")])
def test_images_in_another_format(image_format: str, form: str) -> None:
    original = smooth(30, 40)
    part, data = recode_image(image_bytes(original), Encoding(image_format=image_format))
    assert part == image_format and Image.open(io.BytesIO(data)).format == form
    error = np.abs(pixels(data).astype(int) - original)
    assert error.max() == 0 if image_format != "jpg" else 0 < error.mean() < 2


def test_larger_images_are_reduced() -> None:
    part, data = recode_image(image_bytes(smooth(60, 120), "JPEG", quality=95), Encoding(shortest_side=30))
    assert part == "jpg" and pixels(data).shape == (30, 60, 3)
    assert np.abs(pixels(data).astype(int) - smooth(30, 60)).mean() < 6
    part, data = recode_image(image_bytes(images(1, 40)[0]), Encoding(shortest_side=10))
    assert part == "png" and Image.open(io.BytesIO(data)).mode == "L"


def test_jpeg_quality_has_its_effect() -> None:
    original = images(1, 32, 3)[0]
    sizes, errors = [], []
    for quality in (20, None, 100):
        data = recode_image(image_bytes(original), Encoding(image_format="jpg", quality=quality))[1]
        sizes.append(len(data))
        errors.append(np.abs(pixels(data).astype(int) - original).mean())
    assert sizes == sorted(sizes) and errors == sorted(errors, reverse=True)


def test_a_turned_photo_is_written_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown a quarter turn clockwise
    data = image_bytes(smooth(20, 40), "JPEG", exif=exif, quality=95)
    assert recode_image(data, KEEP) == ("jpg", data)
    written = pixels(recode_image(data, Encoding(image_format="png"))[1])
    assert written.shape == (40, 20, 3)
    assert np.abs(written.astype(int) - np.rot90(smooth(20, 40), -1)).mean() < 4


def test_the_content_tells_the_part() -> None:
    bmp, gif = image_bytes(smooth(8, 8), "BMP"), image_bytes(smooth(8, 8), "GIF")
    part, data = recode_image(bmp, KEEP)
    assert part == "png" and (pixels(data) == smooth(8, 8)).all()
    part, data = recode_image(gif, KEEP)
    still = np.asarray(Image.open(io.BytesIO(gif)).convert("RGB"))
    assert part == "png" and (np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) == still).all()


@pytest.mark.parametrize("form", ["WEBP", "GIF"])
def test_animations_keep_their_bytes(form: str) -> None:
    data = animation(form)
    for encoding in (KEEP, Encoding(shortest_side=4, image_format="jpg")):
        assert recode_image(data, encoding) == (form.lower(), data)
    with pytest.raises(ValueError, match="not a readable image"):
        recode_image(data[: len(data) * 3 // 4], KEEP)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("encoding", [KEEP, Encoding(shortest_side=4)])
def test_damaged_images(form: str, encoding: Encoding) -> None:
    data = image_bytes(images(1, 32, 3)[0], form)
    for damaged in (b"", b"\x89PNG", data[: len(data) // 2]):
        with pytest.raises(ValueError, match="not a readable image") as caught:
            recode_image(damaged, encoding)
        assert "\n" not in str(caught.value)


# Videos: the brightness of frame n is 16 + 4 n, in the left half only.


def frame_pixels(number: int, height: int, width: int) -> np.ndarray:
    frame = np.full((height, width, 3), 16, np.uint8)
    frame[:, : width // 2] = 16 + 4 * number
    return frame


def video(
    count: int = 30, size: tuple[int, int] = (48, 64), rate: int = 30, form: str = "mp4", **times
) -> bytes:
    path = Path(tempfile.mkdtemp()) / "video"
    options = {"movflags": "faststart"} if form == "mp4" else {}
    with av.open(str(path), "w", format=form, options=options) as container:
        track = container.add_stream("mpeg4" if form == "avi" else "libx264", rate=rate)
        track.height, track.width, track.pix_fmt, track.bit_rate = *size, "yuv420p", 8_000_000
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(frame_pixels(number, *size), format="rgb24")
            frame.pts, frame.time_base = times.get("pts", range(count))[number], Fraction(1, rate)
            container.mux(track.encode(frame))
        container.mux(track.encode(None))
    data = path.read_bytes()
    shutil.rmtree(path.parent)
    return data


def shown(data: bytes) -> tuple[list[int], list[float], tuple[int, ...]]:
    """Return the numbers of the frames in a video, their times, and their shape."""
    with av.open(io.BytesIO(data)) as container:
        frames = [
            (frame.to_ndarray(format="rgb24"), float(frame.time)) for frame in container.decode(video=0)
        ]
    numbers = [
        round((float(frame[2:-2, 2 : frame.shape[1] // 2 - 4].mean()) - 16) / 4) for frame, _ in frames
    ]
    return numbers, [time for _, time in frames], frames[0][0].shape


@pytest.mark.parametrize("form", ["mp4", "matroska", "avi"])
def test_a_video_keeps_its_bytes(form: str) -> None:
    data = video(form=form)
    part = {"matroska": "mkv"}.get(form, form)
    for encoding in (KEEP, Encoding(shortest_side=48, frame_rate=30)):
        assert recode_video(data, part, encoding) == (part, data)
    assert recode_video(data, "mov", KEEP)[0] == {"mp4": "mov"}.get(form, part)  # a suffix that lies


def test_a_slower_video_shows_the_frames_of_its_times() -> None:
    part, data = recode_video(video(), "mp4", Encoding(frame_rate=10))
    numbers, times, shape = shown(data)
    assert part == "mp4" and shape == (48, 64, 3)
    assert numbers == list(range(0, 30, 3)) and np.allclose(times, np.arange(10) / 10)


def test_uneven_times_become_even() -> None:
    pts = [0, 1, 2, 3, 20, 21, 22, 23, 24, 29]
    numbers, times, _ = shown(recode_video(video(10, pts=pts), "mp4", Encoding(frame_rate=5))[1])
    due = [max(i for i, at in enumerate(pts) if at <= 6 * k) for k in range(5)]
    assert numbers[:5] == due and np.allclose(times[:5], np.arange(5) / 5)


@pytest.mark.parametrize("form", ["mp4", "matroska", "avi"])
def test_larger_videos_are_reduced(form: str) -> None:
    part, data = recode_video(video(12, form=form), "mp4", Encoding(shortest_side=33))
    numbers, times, shape = shown(data)
    assert part == "mp4"
    assert (
        shape == (32, 44, 3)
        and numbers == list(range(12))
        and np.allclose(times, np.arange(12) / 30, atol=1e-3)
    )


def test_a_written_video_is_always_the_same_and_can_be_sought() -> None:
    data, encoding = video(60), Encoding(shortest_side=32, frame_rate=20)
    written = recode_video(data, "mp4", encoding)[1]
    assert written == recode_video(data, "mp4", encoding)[1]
    with av.open(io.BytesIO(written)) as container:
        keys = [packet.pts * packet.time_base for packet in container.demux(video=0) if packet.is_keyframe]
    assert np.all(np.diff([float(key) for key in keys]) <= 1) and len(keys) >= 2


def digests(times: int) -> set[str]:
    """Recode after other encoders, which leave memory as it was not before."""
    encoding = Encoding(shortest_side=32, frame_rate=20)
    return {hashlib.sha256(recode_video(video(60), "mp4", encoding)[1]).hexdigest() for _ in range(times)}


@pytest.mark.exhaustive
def test_busy_processes_write_a_video_the_same_hundreds_of_times() -> None:
    with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert len(set().union(*pool.map(digests, [400] * 4))) == 1


@pytest.mark.parametrize(("number", "part"), [(1, "webm"), (2, "mp4")])
def test_without_h264_another_encoder_is_used(monkeypatch, number: int, part: str) -> None:
    monkeypatch.setattr(recode, "_VIDEO_ENCODERS", [("none", "mp4", {}), recode._VIDEO_ENCODERS[number]])
    video_encoder.cache_clear()
    try:
        written, data = recode_video(video(12), "mp4", Encoding(shortest_side=32, frame_rate=10))
    finally:
        video_encoder.cache_clear()
    assert written == part and shown(data)[0] == [0, 3, 6, 9]


def turned(data: bytes, height: int) -> bytes:
    """Return an MP4 that asks to be shown a quarter turn clockwise: x' = h - y, y' = x (ISO/IEC 14496-12)."""
    edited = bytearray(data)
    at = edited.index(b"tkhd") + 4 + 40  # version, flags, times, id, duration, layer, volume; then the matrix
    assert struct.unpack_from(">2i", edited, at) == (0x10000, 0)
    struct.pack_into(">9i", edited, at, 0, 0x10000, 0, -0x10000, 0, 0, height << 16, 0, 0x40000000)
    return bytes(edited)


def test_a_turned_video_is_written_upright() -> None:
    written = recode_video(turned(video(4), 48), "mp4", Encoding(shortest_side=24))[1]
    with av.open(io.BytesIO(written)) as container:
        frame = list(container.decode(video=0))[3].to_ndarray(format="rgb24").astype(int)
    expected = np.rot90(frame_pixels(3, 24, 32), -1).astype(int)
    assert frame.shape == expected.shape == (32, 24, 3) and np.abs(frame - expected).mean() < 4


@pytest.mark.parametrize("matrix", ["ITU709", "ITU601"])
@pytest.mark.parametrize("levels", ["MPEG", "JPEG"])
def test_colours_stay(matrix: str, levels: str) -> None:
    colour, stream = np.array([200, 30, 60], np.uint8), io.BytesIO()
    space, span = av.video.reformatter.Colorspace[matrix], av.video.reformatter.ColorRange[levels]
    with av.open(stream, "w", format="mp4") as container:
        track = container.add_stream("libx264", rate=30, options={"crf": "5"})
        track.height, track.width, track.pix_fmt = 48, 64, "yuv420p"
        track.codec_context.colorspace, track.codec_context.color_range = space, span
        frame = av.VideoFrame.from_ndarray(np.tile(colour, (48, 64, 1)), format="rgb24")
        frame = frame.reformat(format="yuv420p", dst_colorspace=space, dst_color_range=span)
        frame.pts, frame.time_base = 0, Fraction(1, 30)
        container.mux(track.encode(frame))
        container.mux(track.encode(None))
    for data in (stream.getvalue(), turned(stream.getvalue(), 48)):
        written = recode_video(data, "mp4", Encoding(shortest_side=24))[1]
        with av.open(io.BytesIO(written)) as container:
            shown_colour = next(container.decode(video=0)).to_ndarray(format="rgb24").mean((0, 1))
        assert np.abs(shown_colour - colour).max() < 6


@pytest.mark.parametrize("form", ["mp4", "matroska", "avi"])
def test_videos_that_are_cut_short(form: str) -> None:
    data = video(60, form=form)
    for share in (0.5, 0.8, 0.97):
        with pytest.raises(ValueError, match="ends after|not a readable video|is damaged|has [0-9,]+ of"):
            recode_video(data[: int(len(data) * share)], "mp4", KEEP)


def test_damaged_videos(tmp_path: Path) -> None:
    data = video(60)
    listing = tmp_path / "secret.mp4"
    listing.write_bytes(data)
    cases = {
        b"": "neither MP4",
        data[:200]: "has no video stream|not a readable video|has [0-9,]+ of",
        f"#EXTM3U\n#EXTINF:1,\n{listing}\n#EXT-X-ENDLIST\n".encode(): "neither MP4",
        f"ffconcat version 1.0\nfile {listing}\n".encode(): "neither MP4",
    }
    for damaged, message in cases.items():
        for encoding in (KEEP, Encoding(shortest_side=16)):
            with pytest.raises(ValueError, match=message) as caught:
                recode_video(damaged, "mp4", encoding)
            assert "\n" not in str(caught.value)


def test_videos_without_frames_or_with_a_broken_clock() -> None:
    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4") as container:
        track = container.add_stream("aac", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 8000
        container.mux(track.encode(sound))
        container.mux(track.encode(None))
    with pytest.raises(ValueError, match="has no video stream"):
        recode_video(stream.getvalue(), "mp4", KEEP)
    late = video(30, pts=[*range(29), 30 * 70])
    with pytest.raises(ValueError, match="its time jumps from"):
        recode_video(late, "mp4", Encoding(shortest_side=16))


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_format": "tiff"}, "image format 'tiff'; expected one of keep, webp, png, jpg"),
        ({"shortest_side": 0}, "shortest side 0; expected at least 1"),
        ({"quality": 101}, "quality 101; expected 1 to 100"),
        ({"quality": 90, "image_format": "webp"}, "images are written as lossless webp"),
        ({"frame_rate": 0.0}, "frame rate 0.0; expected more than 0"),
    ],
)
def test_options_that_do_not_fit(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Encoding(**options)


def test_options_of_the_other_kind() -> None:
    with pytest.raises(ValueError, match="a frame rate is given, and the source holds images"):
        Encoding(frame_rate=5).check_kind("images")
    for encoding in (Encoding(quality=5), Encoding(image_format="png")):
        with pytest.raises(
            ValueError, match="an image format or quality is given, and the source holds videos"
        ):
            encoding.check_kind("videos")
