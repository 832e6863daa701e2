"""Shards made with the standard library alone, so that what the package reads has another origin."""

import io
import tarfile
import uuid
from collections.abc import Iterator

import fsspec
import numpy as np
import pytest
from PIL import Image

from ul_scale.data import storage
from ul_scale.data.index import Index
from ul_scale.data.indexing import build_index


def tar_bytes(members: dict[str, bytes], **options) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", **options) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def image_bytes(pixels: np.ndarray, form: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, form, **options)
    return stream.getvalue()


def images(count: int, size: int = 8, channels: int = 1, seed: int = 0) -> np.ndarray:
    shape = (count, size, size) if channels == 1 else (count, size, size, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_shards(url: str, counts: list[int], **options) -> np.ndarray:
    """Write shards of grey images with labels (number mod 10); return all images."""
    pixels = images(sum(counts), **options)
    fs, root = fsspec.core.url_to_fs(url)
    fs.makedirs(root, exist_ok=True)
    number = 0
    for shard, count in enumerate(counts):
        members = {}
        for _ in range(count):
            members[f"{number:04d}.png"] = image_bytes(pixels[number])
            members[f"{number:04d}.cls"] = str(number % 10).encode()
            number += 1
        fs.pipe_file(f"{root}/{shard:03d}.tar", tar_bytes(members))
    return pixels


@pytest.fixture
def memory_url() -> Iterator[str]:
    url = f"memory://{uuid.uuid4().hex}/train"
    yield url
    fs, root = fsspec.core.url_to_fs(url)
    if fs.exists(root):
        fs.rm(root, recursive=True)


@pytest.fixture
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "RETRY_WAITS_S", (0.0, 0.0, 0.0))


def write_latents(url: str, latents: np.ndarray, samples_per_shard: int, classes: int = 0) -> Index:
    """Write shards of latents, with labels (number mod classes) if there are classes; return their index."""
    fs, root = fsspec.core.url_to_fs(url)
    fs.makedirs(root, exist_ok=True)
    for first in range(0, len(latents), samples_per_shard):
        members = {}
        for number in range(first, min(first + samples_per_shard, len(latents))):
            stream = io.BytesIO()
            np.save(stream, latents[number])
            members[f"{number:03d}.z_clean.npy"] = stream.getvalue()
            if classes:
                members[f"{number:03d}.cls"] = str(number % classes).encode()
        fs.pipe_file(f"{root}/latents-{first // samples_per_shard:06d}.tar", tar_bytes(members))
    return build_index(url, dataset="latents")
