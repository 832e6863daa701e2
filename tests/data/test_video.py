"""Clips of videos whose frames show their number, so that what was picked can be told."""

import io
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ul_scale.data import transforms, video
from ul_scale.data.config import DataConfig
from ul_scale.data.decode import make_decoder
from ul_scale.data.sample import BadSample, Draw, Example, Sample
from ul_scale.data.transforms import Crop, crop_image
from ul_scale.data.video import Frames, container_format, read_clip
from ul_scale.keyed import uniform

from .conftest import image_bytes

av = pytest.importorskip("av")
SIZE = 32
CENTRE = Crop(SIZE, SIZE)
FORMATS = [
    ("mp4", "libx264"),
    ("mp4", "mpeg4"),
    ("mov", "libx264"),
    ("webm", "libvpx-vp9"),
    ("webm", "libvpx"),
    ("matroska", "libx264"),
    ("avi", "mpeg4"),
]
NUM_FRAMES = 60
FAST_START = (("movflags", "faststart"),)
FRAGMENTS = (("movflags", "frag_keyframe+empty_moov"),)


def frame(number: int, width: int = 48, height: int = SIZE) -> np.ndarray:
    """Return six bars, black or white by the bits of a number: safe from any codec."""
    bits = np.array([number >> bit & 1 for bit in range(6)], np.uint8) * 255
    return np.broadcast_to(bits[np.arange(height) * 6 // height, None, None], (height, width, 3)).copy()


def number_of(pixels: np.ndarray) -> int:
    rows = pixels.mean((1, 2))
    return sum(1 << bit for bit in range(6) if rows[int((bit + 0.5) * len(rows) / 6)] > 127)


def numbers_of(clip: np.ndarray) -> list[int]:
    return [number_of(pixels) for pixels in clip]


@cache
def make_video(
    container: str = "mp4",
    codec: str = "libx264",
    *,
    times_ms: Sequence[int] = tuple(range(0, 40 * NUM_FRAMES, 40)),
    gop: int = 12,
    size: tuple[int, int] = (48, SIZE),
    rotation: int = 0,
    options: Sequence[tuple[str, str]] = (),
) -> bytes:
    if codec not in av.codecs_available:
        pytest.skip(f"PyAV was built without {codec}")
    file = tempfile.NamedTemporaryFile()
    with file, av.open(file.name, "w", format=container, options=dict(options)) as target:
        # Key frames where they are asked for, and nowhere else.
        stream = target.add_stream(
            codec, rate=25, options={"sc_threshold": "0"} if codec == "libx264" else {}
        )
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.gop_size = gop
        if container != "avi":
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        for number, time in enumerate(times_ms):
            picture = av.VideoFrame.from_ndarray(frame(number, *size), format="rgb24")
            picture.pts, picture.time_base = time, Fraction(1, 1000)
            if container == "avi":
                picture.pts, picture.time_base = number, Fraction(1, 25)
            target.mux(stream.encode(picture))
        target.mux(stream.encode(None))
        target.close()
        return file.read()


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The frames that were decoded."""
    frames, decoded_from = [], video._decoded_from

    def spy(*args: Any) -> Iterator[Any]:
        for picture in decoded_from(*args):
            frames.append(picture)
            yield picture

    monkeypatch.setattr(video, "_decoded_from", spy)
    return frames


@pytest.mark.parametrize(("container", "codec"), FORMATS)
def test_the_frames_asked_for_are_given(container: str, codec: str) -> None:
    data = memoryview(make_video(container, codec))
    for start, first in [(0.0, 0), (None, 19), (0.5, 19), (0.999, 38)]:  # 39 places for 22 frames of 60
        clip = read_clip(data, Frames(8, stride=3), start, 3, CENTRE)
        assert clip.shape == (8, SIZE, SIZE, 3) and clip.dtype == np.uint8
        assert numbers_of(clip) == [first + 3 * k for k in range(8)]
    assert read_clip(data, Frames(2), 0.3, 1, Crop(16, 16)).shape == (2, 16, 16, 1)


@pytest.mark.parametrize(("container", "codec"), FORMATS)
def test_decoding_begins_at_the_key_frame_before_the_clip(
    container: str, codec: str, decoded: list[Any]
) -> None:
    data = make_video(container, codec, gop=10)
    assert numbers_of(read_clip(data, Frames(4), 0.97, 3, CENTRE)) == [55, 56, 57, 58]
    assert len(decoded) <= 4 + 10 and decoded[0].key_frame


def test_what_cannot_be_sought_is_decoded_from_the_start(decoded: list[Any]) -> None:
    data = make_video(gop=1000)
    assert numbers_of(read_clip(data, Frames(2), 0.9, 3, CENTRE)) == [53, 54]
    assert len(decoded) == 55


def test_a_seek_that_goes_too_far_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    data, decoded_from = make_video(), video._decoded_from

    def too_far(container: Any, stream: Any, stamp: int) -> Iterator[Any]:
        beyond = 0 if stamp == 0 else int(1.0 / stream.time_base)
        return decoded_from(container, stream, stamp + beyond)

    monkeypatch.setattr(video, "_decoded_from", too_far)
    assert numbers_of(read_clip(data, Frames(3), 0.3, 3, CENTRE)) == [17, 18, 19]


VARIABLE_MS = (0, 40, 80, 500, 540, 580, 620, 1500, 1510, 1520, 2000, 2400)


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_a_frame_rate_takes_the_nearest_frames_in_time(container: str) -> None:
    data = make_video(container, "libx264", times_ms=VARIABLE_MS)
    for rate, count, start in [(5, 6, 0.0), (5, 6, None), (10, 20, 0.3), (25, 16, 0.9), (2.5, 3, 0.5)]:
        clip = numbers_of(read_clip(data, Frames(count, rate=rate), start, 3, CENTRE))
        slack = VARIABLE_MS[-1] - 1000 * (count - 1) / rate
        wanted = slack * (0.5 if start is None else start) + 1000 * np.arange(count) / rate
        distance = np.abs(np.array(VARIABLE_MS) - wanted[:, None])
        # Halfway between two, either will do.
        assert np.allclose(distance[np.arange(count), clip], distance.min(1), atol=1)


def test_constant_rates_are_thinned_evenly() -> None:
    clip = read_clip(make_video(), Frames(12, rate=5.0), 0.0, 3, CENTRE)  # 25 frames a second
    assert numbers_of(clip) == list(range(0, 60, 5))


def test_the_last_frame_of_a_short_video_is_held() -> None:
    data = make_video(times_ms=(0, 40, 80, 120, 160))
    assert numbers_of(read_clip(data, Frames(8), 0.7, 3, CENTRE)) == [0, 1, 2, 3, 4, 4, 4, 4]
    assert numbers_of(read_clip(data, Frames(5, stride=2), None, 3, CENTRE)) == [0, 2, 4, 4, 4]
    assert numbers_of(read_clip(data, Frames(6, rate=12.5), None, 3, CENTRE)) == [0, 2, 4, 4, 4, 4]


@pytest.mark.parametrize("options", [FRAGMENTS, FAST_START])
def test_files_without_a_length(options: tuple) -> None:
    data = make_video(options=options)
    assert numbers_of(read_clip(data, Frames(4, stride=2), 0.5, 3, CENTRE)) == [27, 29, 31, 33]


def matrix_of(turn: int) -> bytes:
    """The display matrix of a QuickTime track, which maps stored (x, y) to shown: clockwise turns."""
    a, b, c, d = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[turn]
    values = [a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30]
    return b"".join(value.to_bytes(4, "big", signed=True) for value in values)


@pytest.mark.parametrize("turn", [90, 180, 270])
def test_rotated_videos_are_set_upright(turn: int) -> None:
    plain = make_video(times_ms=(0, 40), size=(64, 64))
    identity = b"".join(v.to_bytes(4, "big") for v in (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30))
    at = plain.index(identity, plain.index(b"tkhd"))
    turned = plain[:at] + matrix_of(turn) + plain[at + 36 :]
    clip, shown = (read_clip(data, Frames(2), None, 3, Crop(64, 64)) for data in (plain, turned))
    assert np.array_equal(shown, np.rot90(clip, -turn // 90, axes=(1, 2)))


def test_all_frames_are_cropped_alike() -> None:
    data = make_video(times_ms=(0, 40, 80), size=(96, 64))
    with av.open(io.BytesIO(data)) as container:
        pictures = [Image.fromarray(f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]
    crop = Crop(16, 19, 0.9, 0.2)
    clip = read_clip(data, Frames(3), None, 3, crop)
    assert np.array_equal(clip, [crop_image(picture, crop) for picture in pictures])


def animation(form: str, count: int = 12, durations: int | list[int] = 50) -> bytes:
    pictures = [Image.fromarray(frame(number)) for number in range(count)]
    stream = io.BytesIO()
    options = {"lossless": True} if form == "WEBP" else {"disposal": 1}
    pictures[0].save(
        stream, form, save_all=True, append_images=pictures[1:], duration=durations, loop=0, **options
    )
    return stream.getvalue()


@pytest.mark.parametrize("form", ["WEBP", "GIF"])
def test_animations(form: str) -> None:
    data = animation(form)
    clip = read_clip(data, Frames(4, stride=2), 0.99, 3, CENTRE)
    assert numbers_of(clip) == [5, 7, 9, 11]
    assert np.array_equal(clip[0], crop_image(Image.fromarray(frame(5)), CENTRE))
    assert numbers_of(read_clip(data, Frames(14), None, 3, CENTRE)) == [*range(12), 11, 11]
    varying = animation(form, 4, [200, 50, 50, 400])
    assert numbers_of(read_clip(varying, Frames(6, rate=20), 0.0, 3, CENTRE)) == [0, 0, 0, 1, 1, 2]


def test_transparent_frames_show_white() -> None:
    stream = io.BytesIO()
    clear = [Image.new("RGBA", (16, 16), (number, 0, 0, 0)) for number in range(3)]
    for number, picture in enumerate(clear):
        picture.putpixel((number, 0), (0, 0, 0, 255))
    clear[0].save(stream, "WEBP", save_all=True, append_images=clear[1:], lossless=True, duration=50)
    clip = read_clip(stream.getvalue(), Frames(3), None, 3, Crop(16, 16))
    assert [np.argwhere(pixels[:, :, 0] == 0).tolist() for pixels in clip] == [[[0, 0]], [[0, 1]], [[0, 2]]]
    assert set(np.unique(clip)) == {0, 255}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: b"", r"not a readable video \(neither MP4"),
        (lambda: b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", r"not a readable video \(neither MP4"),
        (
            lambda: make_video(times_ms=()),
            "has 0 frames; expected a video|not a readable video|no video stream",
        ),
        (lambda: make_video(times_ms=(0,)), "has 1 frame; expected a video"),
        (lambda: animation("WEBP", 1), "has 1 frame; expected a video"),
        (lambda: make_video()[:2000], r"^has 2,000 of \S+ bytes$"),
        (lambda: make_video(options=FAST_START)[:-500], r"^has \S+ of \S+ bytes$"),
        (lambda: make_video("webm", "libvpx")[:-500], r"^has \S+ of \S+ bytes$"),
        (lambda: make_video("avi", "mpeg4")[:-500], r"^has \S+ of \S+ bytes$"),
        (lambda: b"\x1aE\xdf\xa3" + bytes(40), "not a readable video"),
        (lambda: b"\x1aE\xdf\xa3\x18\x53\x80\x67", "not a readable video"),
        (lambda: animation("WEBP")[:-300], "not a readable image"),
        (lambda: b"RIFF\0\0\0\0WEBP" + bytes(40), "has 1 frame"),
        (lambda: b"\0\0\0\x18ftypisom" + bytes(400), "not a readable video|has no video stream"),
    ],
)
def test_what_is_no_whole_video(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_clip(make(), Frames(16), None, 3, CENTRE)
    assert "\n" not in str(caught.value)


def test_damaged_frames_are_not_used() -> None:
    data = bytearray(make_video("avi", "mpeg4"))
    middle = len(data) // 2
    data[middle : middle + 400] = np.random.default_rng(0).bytes(400)
    with pytest.raises(ValueError, match="damaged|not a readable video|can be decoded"):
        read_clip(bytes(data), Frames(60), 0.0, 3, CENTRE)


def test_videos_of_too_many_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transforms, "MAX_PIXELS", 48 * SIZE - 1)
    for data in (make_video(), animation("WEBP")):
        with pytest.raises(ValueError, match=r"^48 × 32 pixels; expected at most 1,535 of them$"):
            read_clip(data, Frames(2), None, 3, Crop(16, 16))


def test_containers_are_told_by_content() -> None:
    assert {container_format(make_video(c, codec)) for c, codec in FORMATS} == {"mov", "matroska", "avi"}


def decode(sample: Sample, draw: Draw | None, parts: list[str], **settings: Any) -> Example:
    return make_decoder(parts, DataConfig(image_size=SIZE, **settings), "set")(sample, draw)


def test_samples() -> None:
    sample = Sample("set/0/a", {"mp4": make_video(), "cls": b"4"})
    settings = {"parts": ["mp4", "cls"], "frames": 16, "frame_stride": 2}
    held_out = decode(sample, None, **settings)
    assert held_out.array.shape == (16, SIZE, SIZE, 3) and held_out.label == 4
    assert numbers_of(held_out.array)[0] == 14  # 29 places
    assert numbers_of(decode(sample, Draw(0, 0), **settings, clip_start="center").array)[0] == 14
    firsts = [numbers_of(decode(sample, Draw(3, epoch), **settings).array)[0] for epoch in range(6)]
    assert firsts == [int(uniform(3, "clip", epoch, sample.name) * 30) for epoch in range(6)]
    assert len(set(firsts)) > 1
    flipped = [
        decode(sample, Draw(3, epoch), **settings, horizontal_flip=True, crop="random").array
        for epoch in range(6)
    ]
    assert all(clip.shape == (16, SIZE, SIZE, 3) for clip in flipped)


def test_single_frames_are_images() -> None:
    moving, still = {"webp": animation("WEBP")}, {"png": image_bytes(frame(33))}
    for parts, number in [(moving, 5), (still, 33)]:
        array = decode(Sample("set/0/a", parts), None, parts=["webp", "png"], frames=1).array
        assert array.shape == (SIZE, SIZE, 3) and number_of(array) == number
    array = decode(Sample("set/0/a", {"mp4": make_video()}), None, parts=["mp4"], frames=1).array
    assert array.shape == (SIZE, SIZE, 3) and number_of(array) == 29
    # Without frames, an animation is its first.
    assert number_of(decode(Sample("a", moving), None, parts=["webp"]).array) == 0


def test_samples_without_a_video_are_bad() -> None:
    with pytest.raises(BadSample, match="^set/0/a: has no video, only png$"):
        decode(Sample("set/0/a", {"png": b""}), None, parts=["mp4", "png"], frames=2)
    with pytest.raises(BadSample, match=r"^set/0/a.webp: has 1 frame; expected a video$"):
        decode(Sample("set/0/a", {"webp": animation("WEBP", 1)}), None, parts=["webp"], frames=2)


def test_a_missing_pyav_is_named() -> None:
    """In a process of its own, where av cannot be imported; WebP needs none."""
    code = """
import sys
sys.modules["av"] = None
from ul_scale.data.config import DataConfig
from ul_scale.data.decode import make_decoder
config = DataConfig(image_size=8, frames=2)
make_decoder(["webp"], config, "set")
try:
    make_decoder(["mp4"], config, "set")
except ImportError as error:
    print(error, "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "videos need PyAV: pip install 'ul-scale[video]' False\n"
