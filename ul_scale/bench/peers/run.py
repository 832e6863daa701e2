"""Let one loader write its format, or read from it, in a process of its own.

    python run.py LOADER write FILES FOLDER             FILES/<class>/<image> → the loader's own format
    python run.py LOADER read FOLDER TASK OUT           measure; TASK is JSON, the outcome goes to OUT

Any interpreter that has the loader's package, torch, numpy and Pillow can run this: the files of this
folder import nothing of ul_scale (but ``with_ours.py``). ``with_<loader>.py`` has two functions, ``write``
and ``batches``; all others share decoder and collation, which are here and are those that users of plain
PyTorch have.
"""

import functools
import importlib
import io
import itertools
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def decode_image(data: bytes, size: int) -> np.ndarray:
    """Return what is commonly done with an image: Pillow, all pixels, bicubic, uint8 (size, size, 3)."""
    return resize_and_crop(Image.open(io.BytesIO(data)).convert("RGB"), size)


def decode_clip(data: bytes, size: int, frames: int) -> np.ndarray:
    """Return consecutive frames from a random one on, uint8 (frames, size, size, 3): seek, then skip."""
    import av

    opened: Any = av.open(io.BytesIO(data))
    with opened as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        start = np.random.randint(0, max(1, stream.frames - frames + 1))
        pts = round(start / stream.average_rate / stream.time_base)
        container.seek(pts, stream=stream)
        wanted = (frame for frame in container.decode(stream) if frame.pts >= pts)
        clip = [resize_and_crop(frame.to_image(), size) for frame in itertools.islice(wanted, frames)]
    return np.stack(clip)


def resize_and_crop(image: Image.Image, size: int) -> np.ndarray:
    """Return the centre of an image whose shorter side is made ``size``."""
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def decode_as_ours(data: bytes, size: int) -> np.ndarray:
    """Decode with ul_scale's decoder, where it can be imported."""
    from ul_scale.data.sample import Sample

    return _our_decoder(size)(Sample("image", {"jpg": data}), None).array


@functools.cache
def _our_decoder(size: int) -> Any:
    from ul_scale.data.config import DataConfig
    from ul_scale.data.decode import make_decoder

    return make_decoder(("jpg",), DataConfig(image_size=size), "memory")


def leave_as_it_is(data: bytes | memoryview) -> bytes:
    return bytes(data)  # LitData gives a view, which cannot cross processes


def make_decode(task: dict[str, Any]) -> Callable[[bytes], Any]:
    if task["kind"] == "bytes":
        return leave_as_it_is
    if task["kind"] == "video":
        return functools.partial(decode_clip, size=task["size"], frames=task["frames"])
    if task["our_decoder"]:
        _our_decoder(task["size"])  # where it cannot be imported, that shows now
        return functools.partial(decode_as_ours, size=task["size"])
    return functools.partial(decode_image, size=task["size"])


def collate(items: list[tuple[Any, int]]) -> tuple[Any, Any]:
    """Stack arrays to one tensor, which goes through shared memory; leave bytes a list."""
    import torch

    data, labels = zip(*items)
    if not isinstance(data[0], np.ndarray):
        return list(data), list(labels)
    return torch.from_numpy(np.stack(data)), torch.tensor(labels)


def read(loader: Any, folder: str, task: dict[str, Any]) -> dict[str, Any]:
    """Return the seconds to the first batch, and those for the task's images after its warm-up."""
    batches = loader.batches(folder, task, make_decode(task), collate)
    first, _ = next(batches)
    first_batch_s = time.time() - task["began"]
    check(first, task)
    for _ in range(task["warmup"] - 1):
        next(batches)
    images, began = 0, time.perf_counter()
    while images < task["images"]:
        _, labels = next(batches)
        images += len(labels)
    seconds = time.perf_counter() - began
    return {"images": images, "seconds": seconds, "first_batch_s": first_batch_s}


def check(data: Any, task: dict[str, Any]) -> None:
    """Make sure that what is measured is what was asked for."""
    if task["kind"] == "bytes":
        assert len(data) == task["batch_size"] and min(map(len, data)) > 100, "not the bytes of images"
        return
    frames = task["frames"] if task["kind"] == "video" else 1
    expected = task["batch_size"] * frames * 3 * task["size"] ** 2
    assert math.prod(data.shape) == expected, f"a batch of shape {tuple(data.shape)}"


def main(name: str, action: str, *args: str) -> None:
    loader = importlib.import_module(f"with_{name.replace('-', '_')}")
    if action == "write":
        files = [(str(path), int(path.parent.name)) for path in sorted(Path(args[0]).glob("*/*"))]
        loader.write(files, args[1])
    else:
        outcome = read(loader, args[0], json.loads(args[1]))
        Path(args[2]).write_text(json.dumps(outcome))


if __name__ == "__main__":
    main(*sys.argv[1:])
