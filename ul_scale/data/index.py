"""The index of a set of tar shards: where each sample lies, what it is called, and one fingerprint of all.

The index is a folder `_index/` beside the shards, as `indexing.build_index` writes it: arrays that are
memory-mapped (`offset.npy`, `size.npy`, `shard.npy`, `members.npy`), `keys.parquet`, and `meta.json`, which
is written last and names the sizes and digests of the others. That of a remote set is downloaded once, see
`index_cache`.
"""

import json
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ul_scale.data import index_cache, storage

FORMAT_VERSION = 2
INDEX_FOLDER = "_index"
ARRAYS = {"offset.npy": "<u8", "size.npy": "<u4", "shard.npy": "<u4", "members.npy": "<u4"}
KEYS = "keys.parquet"
UNREADABLE = (FileNotFoundError, EOFError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException)


class Shard(NamedTuple):
    """A tar file as it was indexed.

    Attributes:
        name: its base name.
        size: bytes.
        samples: how many it holds.
        etag: what the store says of its content (MD5, CRC32C or etag), where it does.
        mtime: of a local file, seconds. Copies have another, so only re-indexing looks at it.
    """

    name: str
    size: int
    samples: int
    etag: str | None = None
    mtime: float | None = None


class Location(NamedTuple):
    """Where an opened index can be mapped again, in any process of this machine.

    Attributes:
        url: the folder of shards.
        folder: local folder with the index's files; None if they could only be kept in memory.
        digest: of its meta.json.
    """

    url: str
    folder: str | None
    digest: str


class Index:
    """An opened index. Arrays have an entry per sample, in the order of the shards' names.

    It is pickled as its `location`, and so unpickled without looking at the shards again.

    Attributes:
        url: the folder of shards.
        location: from where `Index.at` opens it again.
        dataset: the first part of every sample's name.
        offset: byte at which a sample starts in its shard: its first header, PAX headers included, [N].
        size: bytes up to the end of its last part, padding included, [N].
        shard: number of its shard in `shards`, [N].
        members: for each of `parts`, its offset from the sample's start (ABSENT if it has none) and
            length, [N, parts, 2].
        classes: names of the classes in the order of their ids, where known.
        fingerprint: hash of the shards' names and sizes and of the samples' keys and offsets.
        extra: what the writer of the set noted, such as statistics of latents.
    """

    def __init__(self, location: Location, meta: dict[str, Any]) -> None:
        self.url, self.location = location.url, location
        files = _find(location, meta["files"])
        self.dataset: str = meta["dataset"]
        self.shards = tuple(Shard(**shard) for shard in meta["shards"])
        self.parts: tuple[str, ...] = tuple(meta["parts"])
        self.classes: tuple[str, ...] | None = tuple(meta["classes"]) if meta["classes"] else None
        self.fingerprint: str = meta["fingerprint"]
        self.extra: dict[str, Any] = meta["extra"]
        num_samples = sum(shard.samples for shard in self.shards)
        self.offset, self.size, self.shard = (
            _open_array(files, name, (num_samples,)) for name in ("offset.npy", "size.npy", "shard.npy")
        )
        self.members = _open_array(files, "members.npy", (num_samples, len(self.parts), 2))
        keys = files[KEYS]
        source = pa.memory_map(str(keys)) if isinstance(keys, Path) else pa.BufferReader(keys)
        self._key_lock = threading.Lock()
        with self._damage():
            self._key_file = pq.ParquetFile(source)
        if self._key_file.metadata.num_rows != num_samples:
            raise ValueError(f"{KEYS} has {self._key_file.metadata.num_rows} rows, expected {num_samples}")
        # All groups but the last have as many rows.
        self._group_rows = self._key_file.metadata.row_group(0).num_rows if num_samples else 1
        # Keys are decoded a group at a time, when a sample of it is read: all of them may not fit in memory.
        self._key_group = lru_cache(maxsize=256)(self._read_key_group)

    @classmethod
    def at(cls, location: Location) -> "Index":
        """Open an index that this or another process of this machine has opened, without any check of shards.

        Raises:
            ValueError: if it is no longer there, or has been replaced.
        """
        url, folder, digest = location
        try:
            if folder is None:
                content = read_meta(url)[0]
            else:
                content = (Path(folder) / "meta.json").read_bytes()
        except FileNotFoundError:
            content = b""
        if index_cache.digest_of(content) != digest:
            raise ValueError(f"{url}: the index was removed or replaced since it was opened; start again")
        return cls(location, json.loads(content))

    def __reduce__(self) -> tuple[Callable[[Location], "Index"], tuple[Location]]:
        return Index.at, (self.location,)

    def __len__(self) -> int:
        return len(self.offset)

    @property
    def identity(self) -> str:
        """What a run on this set depends on: the samples, and the dataset id that keys their draws."""
        return f"{self.dataset}/{self.fingerprint}"

    def keys(self, start: int, stop: int) -> list[str]:
        """Return the keys of the samples `start` to `stop`."""
        keys: list[str] = []
        for group in range(start // self._group_rows, -(-stop // self._group_rows)):
            first = group * self._group_rows
            begin, end = max(start - first, 0), min(stop - first, self._group_rows)
            with self._key_lock:
                keys += self._key_group(group).slice(begin, end - begin).to_pylist()
        return keys

    def names(self, start: int, stop: int) -> list[str]:
        """Return the samples' names, `dataset/shard/key`, as they are printed and as they key draws."""
        shards = [self.shards[number].name.removesuffix(".tar") for number in self.shard[start:stop].tolist()]
        return [f"{self.dataset}/{shard}/{key}" for shard, key in zip(shards, self.keys(start, stop))]

    def _read_key_group(self, group: int) -> pa.Array:
        with self._damage():
            return self._key_file.read_row_group(group, columns=["key"]).column("key").combine_chunks()

    @contextmanager
    def _damage(self) -> Iterator[None]:
        try:
            yield
        except (OSError, pa.ArrowException) as error:
            reason = " ".join(str(error).split())
            advice = remedy(self.url, self.extra, delete=f"{self.url}/{INDEX_FOLDER}", full=True)
            raise ValueError(f"{self.url}: {KEYS} of the index is damaged ({reason}); {advice}") from error


def open_index(url: str) -> Index:
    """Open the index of a folder of shards, after checking it against the shards as they are now.

    Raises:
        ValueError: if the folder or its index is missing or unreadable, or if a shard was changed, added
            or removed since.
        OSError: if the store does not deliver it.
    """
    files = storage.list_files(url)
    content, meta = read_meta(url)
    extra = meta.get("extra") or {}
    rerun = remedy(url, extra, delete=f"{url}/{INDEX_FOLDER}")
    if not meta:
        raise ValueError(f"{url}: the shards have no index, or its meta.json is damaged; {rerun}")
    if meta.get("format_version") != FORMAT_VERSION:
        found = meta.get("format_version")
        raise ValueError(f"{url}: the index has format {found}, this version reads {FORMAT_VERSION}; {rerun}")
    try:
        if not meta["complete"]:
            raise _Stale(f"{url}: indexing was interrupted, or goes on; to continue it,")
        index = open_files(url, content, meta)
        _check_shards(index, files)
    except _Stale as error:
        raise ValueError(f"{error} {remedy(url, extra, delete=error.delete)}") from None
    except UNREADABLE as error:
        raise ValueError(f"{url}: the index cannot be read ({error}); {rerun}") from error
    return index


class _Stale(Exception):
    """The index is not of the shards as they are now.

    Attributes:
        delete: as of `remedy`.
    """

    def __init__(self, message: str, delete: str = "") -> None:
        super().__init__(message)
        self.delete = delete


def remedy(url: str, extra: Mapping[str, Any], *, delete: str = "", full: bool = False) -> str:
    """Return the command that mends a set's index, in the words of a message.

    That of latents comes from encoding them: `data index` would take those that are left for all of them.

    Args:
        url: folder of the shards.
        extra: of the index, as far as it can be read.
        delete: what `encode` would find in place and leave as it is.
        full: whether to read all shards again.
    """
    origin = extra.get("autoencoder")
    if origin is None:
        return f"run: ul-scale data index {url}{' --full' if full else ''}"
    run_dir = url.rstrip("/").rsplit("/", 3)[0]  # <root>/<run>/latents/step_…/<split>
    if run_dir.rsplit("/", 1)[-1] != origin["run"]:
        run_dir = f"ROOT/{origin['run']}"
    command = f"run: ul-scale encode {run_dir} --step {origin['step']}"
    if extra.keys() & {"stored", "text", "given_frames"}:
        command += ", and the options that they were encoded with"
    return f"delete {delete} and {command}" if delete else command


def read_meta(url: str) -> tuple[bytes, dict[str, Any]]:
    """Return the content of an index's meta.json, and what it says: {} where none can be read."""
    fs, root = storage.open_folder(url)
    try:
        content = storage.read_file(fs, f"{root}/{INDEX_FOLDER}/meta.json")
        meta = json.loads(content)
    except (FileNotFoundError, ValueError):
        return b"", {}
    return content, meta if isinstance(meta, dict) else {}


def open_files(url: str, content: bytes, meta: dict[str, Any]) -> Index:
    """Open the files of an index whose meta.json was read, at the place that they can be mapped from.

    Raises:
        ValueError: or others of `UNREADABLE`, if they are not those that meta.json is about.
    """
    if set(meta["files"]) != {*ARRAYS, KEYS}:  # the names become paths
        raise ValueError(f"it lists the files {', '.join(meta['files'])}")
    fs, root = storage.open_folder(url)
    if storage.is_local(fs):
        folder: Path | None = (own := Path(root) / INDEX_FOLDER)
        for name, expected in meta["files"].items():
            size = (own / name).stat().st_size
            if size != expected["size"]:
                raise ValueError(f"{name} has {size} bytes, expected {expected['size']}")
    else:
        folder = index_cache.cached(fs, f"{root}/{INDEX_FOLDER}", content, meta["files"])
    location = Location(url, str(folder) if folder else None, index_cache.digest_of(content))
    return Index(location, meta)


def _find(location: Location, files: index_cache.Files) -> dict[str, Path | bytearray]:
    """Return an index's files by their names, or their contents where there is no folder to map them from."""
    if location.folder is not None:
        return {name: Path(location.folder) / name for name in files}
    fs, root = storage.open_folder(location.url)
    return {
        name: index_cache.fetch(fs, f"{root}/{INDEX_FOLDER}/{name}", name, expected)
        for name, expected in files.items()
    }


def content_tag(info: dict[str, Any]) -> str | None:
    """Return what a store says of a file's content, from fsspec's details of it.

    Checksums come first: an object's etag in GCS changes with its metadata and its bucket, too.
    """
    for field in ("md5Hash", "crc32c", "etag", "ETag"):
        if isinstance(tag := info.get(field), str) and tag:
            return tag
    return None


def _check_shards(index: Index, files: dict[str, dict[str, Any]]) -> None:
    """Compare the shards in the folder with those in the index; an etag counts where both know one."""
    known = {shard.name: shard for shard in index.shards}
    for name, info in files.items():
        if not name.endswith(".tar"):
            continue
        was = known.pop(name, None)
        if was is None:
            raise _Stale(f"{index.url}/{name} was added since the set was indexed;", "it")
        changed = f"{index.url}/{name} changed since it was indexed:"
        if info["size"] != was.size:
            raise _Stale(f"{changed} {info['size']} bytes, index says {was.size};", "it")
        if was.etag and (etag := content_tag(info)) and etag != was.etag:
            raise _Stale(f"{changed} etag {etag}, index says {was.etag};", "it")
    for name in known:
        raise _Stale(f"{index.url}/{name} is in the index but not in the folder; put it back, or")


def _open_array(files: Mapping[str, Path | bytearray], name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Map an array, or read it from memory; only its header is looked at."""
    source, dtype = files[name], np.dtype(ARRAYS[name])
    if not isinstance(source, Path):
        count = math.prod(shape)
        return np.frombuffer(source, dtype, count, offset=len(source) - count * dtype.itemsize).reshape(shape)
    array: np.ndarray = np.load(source, mmap_mode="r", allow_pickle=False)
    if array.shape != shape or array.dtype != dtype:
        raise ValueError(f"{name} is {array.dtype} {list(array.shape)}, expected {dtype} {list(shape)}")
    return array
