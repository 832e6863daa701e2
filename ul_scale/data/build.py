"""Write shards: WebDataset tars from class folders of images, in a fixed mixed order."""

import hashlib
import io
import json
import logging
import os
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, NamedTuple

import rich.progress
import webdataset
from rich.console import Console

from ul_scale.data import storage
from ul_scale.data.decode import open_image
from ul_scale.data.index import Index, build_index, open_index, split_name
from ul_scale.data.transforms import resize_shortest_side
from ul_scale.keyed import permutation

# Suffixes of source files → the part that they are stored as, where they are kept as they are.
SOURCE_PARTS = {".jpg": "jpg", ".jpeg": "jpg", ".png": "png", ".webp": "webp", ".bmp": "png"}
IMAGE_FORMATS = ("keep", "webp", "png", "jpg")
_SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    "webp": {"format": "WEBP", "lossless": True},
    "png": {"format": "PNG"},
    "jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
}
_RECORD = "_build.json"
_log = logging.getLogger(__name__)


class ShardWriter:
    """A tar that takes its name when it is committed, so that a shard is there whole or not at all."""

    def __init__(self, fs: Any, path: str) -> None:
        self._fs, self._path, self._keys = fs, path, set[str]()
        self._file = fs.open(f"{path}.partial", "wb")
        # A fractional time, webdataset's default, would put a PAX header of 1 KB before every member.
        self._tar = webdataset.TarWriter(self._file, mtime=0, compress=False, encoder=False)

    def __len__(self) -> int:
        return len(self._keys)

    def write(self, key: str, parts: Mapping[str, bytes]) -> None:
        """Append a sample.

        Raises:
            ValueError: if the key is taken, or would not be read back as it is.
        """
        for part in parts:
            if split_name(f"{key}.{part}") != (key, part):
                raise ValueError(f"{key!r} with part {part!r} is not a name that a shard can hold")
        if key in self._keys:
            raise ValueError(f"the key {key!r} comes twice in one shard")
        self._keys.add(key)
        self._tar.write({"__key__": key, **parts})

    def commit(self) -> int:
        """Finish the tar, give it its name and return its size in bytes."""
        self._close()
        self._fs.mv(f"{self._path}.partial", self._path)
        return self._fs.size(self._path)

    def discard(self) -> None:
        """Drop what was written."""
        self._close()
        self._fs.rm_file(f"{self._path}.partial")

    def _close(self) -> None:
        self._tar.close()
        self._file.close()


class _Source(NamedTuple):
    """An image file: its path on the source filesystem, the key it gets, its class and its part."""

    path: str
    size: int
    key: str
    label: int
    part: str


def build_class_folders(
    source: str,
    dest: str,
    *,
    shortest_side: int | None = None,
    image_format: str = "keep",
    samples_per_shard: int = 1000,
    dataset: str | None = None,
    threads: int | None = None,
) -> Index:
    """Write the images `SOURCE/<class>/<file>` as shards with an index, or finish what a former call began.

    A class's id is the rank of its folder's name. The order over shards is a fixed permutation of all
    files, so that no shard is a single class. Every image is decoded once, so a damaged one is met here.

    Args:
        source: folder of class folders, on any fsspec filesystem.
        dest: folder to write to; it may hold what the same call wrote before it was interrupted.
        shortest_side: pixels to which the shorter side of larger images is reduced.
        image_format: keep stores files as they are (reduced ones in their own format); webp is lossless.
        samples_per_shard: samples in every shard but the last.
        dataset: first part of the samples' names, by default dest's base name.
        threads: shards that are written at a time, by default one per core.

    Raises:
        ValueError: if an argument, a file or a name does not fit; the message names it.
    """
    if image_format not in IMAGE_FORMATS:
        raise ValueError(f"image format {image_format!r}; expected one of {', '.join(IMAGE_FORMATS)}")
    if samples_per_shard < 1 or (shortest_side is not None and shortest_side < 1):
        raise ValueError(
            f"{samples_per_shard} samples per shard, shortest side {shortest_side}: expected at least 1 each"
        )
    sources, classes = _find_images(source)
    shuffled = [sources[i] for i in permutation(len(sources), "build")]
    shards = {
        f"shard-{number:06d}.tar": shuffled[first : first + samples_per_shard]
        for number, first in enumerate(range(0, len(shuffled), samples_per_shard))
    }
    record = _Record(dest, [[s[1:] for s in shuffled], shortest_side, image_format, samples_per_shard])
    missing = {name: samples for name, samples in shards.items() if not record.has(name)}
    if not missing:
        try:
            return open_index(dest)
        except ValueError:  # interrupted after the last shard
            return build_index(dest, dataset=dataset, classes=classes)

    fs, stop = storage.open_folder(source)[0], threading.Event()
    progress = rich.progress.Progress(
        *rich.progress.Progress.get_default_columns(),
        rich.progress.MofNCompleteColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
    )
    task = progress.add_task(f"Writing {len(missing)} shards", total=sum(map(len, missing.values())))

    def write_shard(name: str) -> None:
        shard = ShardWriter(record.fs, f"{record.root}/{name}")
        try:
            for sample in missing[name]:
                if stop.is_set():
                    raise InterruptedError(f"{name}: another shard failed")
                part, image = _encode(fs, sample, shortest_side, image_format)
                shard.write(sample.key, {part: image, "cls": str(sample.label).encode()})
                progress.advance(task)
        except BaseException:
            shard.discard()
            raise
        record.add(name, shard.commit())

    with progress, ThreadPoolExecutor(threads or os.cpu_count() or 1) as pool:
        futures = [pool.submit(write_shard, name) for name in missing]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    return build_index(dest, dataset=dataset, classes=classes)


def _find_images(source: str) -> tuple[list[_Source], list[str]]:
    """Return the images in the order of their paths, and the classes' names in the order of their ids."""
    fs, root = storage.open_folder(source)
    if not fs.isdir(root):
        raise ValueError(f"{source}: no such folder")
    listing = fs.find(root, withdirs=True, detail=True)
    found = {path[len(root) :].strip("/"): info for path, info in listing.items()}
    found = {path: info for path, info in found.items() if path and "/." not in f"/{path}"}
    folders = {path for path, info in found.items() if info["type"] == "directory" and "/" not in path}
    files = {path: info for path, info in found.items() if info["type"] != "directory"}
    classes = sorted(folders | {path.split("/")[0] for path in files if "/" in path})
    labels = {name: label for label, name in enumerate(classes)}

    sources: dict[str, _Source] = {}
    others = []
    for path, info in sorted(files.items()):
        stem, suffix = os.path.splitext(path)
        if path.count("/") != 1 or suffix.lower() not in SOURCE_PARTS:
            others.append(path)
            continue
        folder, name = stem.split("/")
        key = f"{folder}/{name.replace('.', '_')}"  # a key ends at its first dot
        if key in sources:
            raise ValueError(f"{sources[key].path} and {info['name']} would both be the sample {key}")
        part = SOURCE_PARTS[suffix.lower()]
        sources[key] = _Source(info["name"], info["size"], key, labels[folder], part)
    if not sources:
        raise ValueError(f"{source}: no images found; expected <class>/<image>{{{','.join(SOURCE_PARTS)}}}")
    if others:
        _log.warning("%s: left out %d other files, such as %s", source, len(others), others[0])
    return list(sources.values()), classes


def _encode(fs: Any, sample: _Source, shortest_side: int | None, image_format: str) -> tuple[str, bytes]:
    """Return the part and the bytes under which an image is stored."""
    data = storage.read_range(fs, sample.path, 0, sample.size)
    try:
        image = open_image(data)
    except ValueError as error:
        raise ValueError(f"{fs.unstrip_protocol(sample.path)}: {error}") from None
    reduce = shortest_side is not None and min(image.size) > shortest_side
    part = sample.part if image_format == "keep" else image_format
    if image_format == "keep" and not reduce and not sample.path.lower().endswith(".bmp"):
        return part, data
    image = image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
    if shortest_side is not None and reduce:
        image = resize_shortest_side(image, shortest_side)
    stream = io.BytesIO()
    image.save(stream, **_SAVE_OPTIONS[part])
    return part, stream.getvalue()


class _Record:
    """What a build was given (a hash) and has finished (the shards' sizes), in a file beside the shards."""

    def __init__(self, dest: str, given: list[Any]) -> None:
        self.fs, self.root = storage.open_folder(dest)
        self.fs.makedirs(self.root, exist_ok=True)
        self._given = hashlib.blake2b(json.dumps(given).encode(), digest_size=16).hexdigest()
        self._present = {name: info["size"] for name, info in storage.list_files(dest).items()}
        self._sizes, self._lock = dict[str, int](), threading.Lock()
        if _RECORD in self._present:
            former = json.loads(self.fs.cat_file(f"{self.root}/{_RECORD}"))
            if former["given"] != self._given:
                raise ValueError(
                    f"{dest} holds shards of other files or options; choose an empty folder or delete it"
                )
            self._sizes = former["shards"]
        elif any(name.endswith(".tar") for name in self._present):
            raise ValueError(f"{dest} holds shards that are not from this build; choose an empty folder")
        else:
            self._write()

    def has(self, name: str) -> bool:
        """Say whether a shard was finished and is still as long as it was."""
        return name in self._sizes and self._present.get(name) == self._sizes[name]

    def add(self, name: str, size: int) -> None:
        with self._lock:
            self._sizes[name] = size
            self._write()

    def _write(self) -> None:
        record = {"given": self._given, "shards": dict(sorted(self._sizes.items()))}
        storage.write_file(self.fs, f"{self.root}/{_RECORD}", json.dumps(record, indent=1).encode())
