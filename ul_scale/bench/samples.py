"""Images and videos as files, for benchmarks of reading and decoding: made up, or taken from a data set."""

import contextlib
import io
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from ul_scale.data.config import DataConfig
from ul_scale.data.decode import IMAGE_PARTS, label_of
from ul_scale.data.fetch import Fetcher
from ul_scale.data.index import Index, open_index
from ul_scale.data.plan import cut_chunks
from ul_scale.data.storage import ReadPolicy

NUM_CLASSES = 10
IMAGE_SHAPE, VIDEO_SHAPE = (375, 500), (256, 340)
"""Height and width of ImageNet's median image, and of Kinetics as it is commonly stored."""
VIDEO_FRAMES, VIDEO_RATE = 250, 25
KINDS = {"image": IMAGE_PARTS, "video": ("mp4", "webm")}
_FIELD_SIZE = 2048


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Give a folder to fill that takes its name when that is done."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    partial.rename(folder)


def samples_as_files(
    work_dir: Path, kind: str, count: int, data: str | None, say: Callable[[str], object]
) -> Path | None:
    """Return a folder of `<class>/<file>`, made or copied unless it is there; None if `data` has none.

    Args:
        work_dir: that the folder is in.
        kind: image or video.
        count: of samples, at most.
        data: URL of indexed shards; None makes the samples up.
        say: takes a line where this takes a while.

    Raises:
        ValueError: if the shards have no index.
        ImportError: if PyAV is needed and not installed.
    """
    if data is None:
        folder = work_dir / f"{kind}s-{count}" / "files"
        if not folder.exists():
            say(f"making {count} {kind}s in {folder}")
            with whole_folder(folder) as partial:
                (make_videos if kind == "video" else make_images)(partial, count)
        return folder
    index = open_index(data)
    part = next((part for part in KINDS[kind] if part in index.parts), None)
    if part is None:
        return None
    count = min(count, len(index))
    folder = work_dir / f"{index.dataset}-{index.fingerprint[:10]}-{kind}s-{count}" / "files"
    if not folder.exists():
        say(f"copying {count} {kind}s to {folder}")
        with whole_folder(folder) as partial:
            _copy(index, part, count, partial)
    return folder


def _copy(index: Index, part: str, count: int, folder: Path) -> None:
    config = DataConfig()
    fetcher = Fetcher(index, ReadPolicy.of(config))
    bounds = cut_chunks(
        index.shard[:count], index.offset[:count], index.size[:count], config.chunk_bytes, count
    ).tolist()
    for start, stop in pairwise(bounds):
        for number, sample in enumerate(fetcher.read(start, stop), start):
            if part in sample.parts:
                _path(folder, label_of(sample), number, part).write_bytes(sample.parts[part])
    fetcher.close()


def make_images(folder: Path, count: int) -> None:
    """Write ``folder/<class>/<number>.jpg``, about 100 KB each: noise whose spectrum falls like a photo's."""
    field = _one_over_f_field()

    def make(number: int) -> None:
        rng = np.random.default_rng(number)
        strength = rng.uniform(25, 50)
        image = Image.fromarray(_picture(field, rng, IMAGE_SHAPE, strength), "YCbCr").convert("RGB")
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=90)
        _path(folder, number % NUM_CLASSES, number, "jpg").write_bytes(stream.getvalue())

    _make_all(make, count)


def make_videos(folder: Path, count: int) -> None:
    """Write ``folder/<class>/<number>.mp4``: ten seconds each of a window that moves over such noise.

    Raises:
        ImportError: if PyAV is not installed.
    """
    import av

    field = _one_over_f_field()
    height, width = VIDEO_SHAPE

    def make(number: int) -> None:
        rng = np.random.default_rng(number)
        still = Image.fromarray(_picture(field, rng, (2 * height, 2 * width), 40), "YCbCr").convert("RGB")
        pixels, (down, right) = np.asarray(still), rng.uniform(0.2, 1, 2)
        with av.open(str(_path(folder, number % NUM_CLASSES, number, "mp4")), "w") as container:
            stream = container.add_stream("libx264", rate=VIDEO_RATE)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.options = {"preset": "veryfast", "crf": "23", "g": "250", "threads": "1"}
            for frame in range(VIDEO_FRAMES):
                top, left = int(frame * down), int(frame * right)
                window = np.ascontiguousarray(pixels[top : top + height, left : left + width])
                container.mux(stream.encode(av.VideoFrame.from_ndarray(window, format="rgb24")))
            container.mux(stream.encode())

    _make_all(make, count)


def _make_all(make: Callable[[int], None], count: int) -> None:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(make, range(count)))


def _path(folder: Path, label: int, number: int, suffix: str) -> Path:
    path = folder / str(max(label, 0)) / f"{number:08d}.{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _one_over_f_field() -> np.ndarray:
    """Return noise with amplitude 1/frequency and deviation 1, float32 (2048, 2048)."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(_FIELD_SIZE)[:, None], np.fft.rfftfreq(_FIELD_SIZE))
    frequency[0, 0] = np.inf
    waves = rng.standard_normal((2, *frequency.shape))
    field = np.fft.irfft2((waves[0] + 1j * waves[1]) / frequency, (_FIELD_SIZE, _FIELD_SIZE))
    return (field / field.std()).astype(np.float32)


def _picture(
    field: np.ndarray, rng: np.random.Generator, shape: tuple[int, int], strength: float
) -> np.ndarray:
    """Return three pieces of the field as luminance and weaker colours, uint8 YCbCr (H, W, 3)."""

    def piece() -> np.ndarray:
        top, left = (rng.integers(_FIELD_SIZE - side) for side in shape)
        return field[top : top + shape[0], left : left + shape[1]]

    pixels = np.stack([128 + strength * scale * piece() for scale in (1.0, 0.35, 0.35)], axis=-1)
    return np.clip(pixels, 0, 255).astype(np.uint8)
