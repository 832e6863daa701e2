"""Index the samples of tar shards: where each lies, what it is called, and one fingerprint of the set.

The index is a folder `_index/` beside the shards: arrays that can be memory-mapped (`offset.npy`,
`size.npy`, `shard.npy`, `members.npy`), `keys.parquet`, and `meta.json`, which is written last, so that
its presence means that the set is complete.
"""

import hashlib
import io
import json
import logging
import os
import re
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.progress import track

from ul_scale.data import storage

FORMAT_VERSION = 1
INDEX_FOLDER = "_index"
# The offset of a part that a sample does not have.
ABSENT = 0xFFFFFFFF
# Parts that only unpickling could decode, which would run whatever code they carry.
PICKLED = {"pyd", "pkl", "pth", "pickle", "pt"}

_BLOCK = tarfile.BLOCKSIZE
# The convention of webdataset: the key ends at the first dot of the last path component.
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")
_UNSAFE = re.compile(r"[\x00-\x1f\x7f\\]")
_KEYS_PER_GROUP = 8192
_READ_AHEAD_BYTES = 16_000_000
_log = logging.getLogger(__name__)

ReadAt = Callable[[int, int], bytes]


@dataclass(frozen=True)
class Shard:
    """A tar file: its base name, its size in bytes, its number of samples, and the store's etag, if any."""

    name: str
    size: int
    samples: int
    etag: str | None = None


class Index:
    """An opened index. Arrays have an entry per sample, in the order of the shards' names.

    Attributes:
        url: the folder of shards.
        dataset: the first part of every sample's name.
        offset: byte at which a sample starts in its shard: its first header, PAX headers included.
        size: bytes up to the end of its last part, padding included.
        shard: number of its shard in `shards`.
        members: for each of `parts`, its offset from the sample's start (ABSENT if it has none) and length.
        classes: names of the classes in the order of their ids, where known.
        fingerprint: hash of the shards' names and sizes and of the samples' keys and offsets.
        extra: what the writer of the set noted, such as statistics of latents.
    """

    def __init__(
        self, url: str, meta: dict[str, Any], arrays: dict[str, np.ndarray], keys: pa.NativeFile
    ) -> None:
        self.url = url
        self.dataset: str = meta["dataset"]
        self.shards = tuple(Shard(**shard) for shard in meta["shards"])
        self.parts: tuple[str, ...] = tuple(meta["parts"])
        self.classes: tuple[str, ...] | None = tuple(meta["classes"]) if meta["classes"] else None
        self.fingerprint: str = meta["fingerprint"]
        self.extra: dict[str, Any] = meta["extra"]
        self.offset, self.size, self.shard, self.members = (arrays[name] for name in _ARRAYS)
        self._key_file, self._key_lock = pq.ParquetFile(keys), threading.Lock()
        # Keys are decoded a group at a time, when a sample of it is read: all of them may not fit in memory.
        self._key_group = lru_cache(maxsize=256)(self._read_key_group)

    def __len__(self) -> int:
        return len(self.offset)

    @property
    def identity(self) -> str:
        """What a run on this set depends on: the samples, and the dataset id that keys their draws."""
        return f"{self.dataset}/{self.fingerprint}"

    def keys(self, start: int, stop: int) -> list[str]:
        """Return the keys of the samples `start` to `stop`."""
        keys: list[str] = []
        for group in range(start // _KEYS_PER_GROUP, -(-stop // _KEYS_PER_GROUP)):
            first = group * _KEYS_PER_GROUP
            begin, end = max(start - first, 0), min(stop - first, _KEYS_PER_GROUP)
            with self._key_lock:
                keys += self._key_group(group).slice(begin, end - begin).to_pylist()
        return keys

    def names(self, start: int, stop: int) -> list[str]:
        """Return the samples' names, `dataset/shard/key`, as they are printed and as they key draws."""
        shards = [self.shards[number].name.removesuffix(".tar") for number in self.shard[start:stop].tolist()]
        return [f"{self.dataset}/{shard}/{key}" for shard, key in zip(shards, self.keys(start, stop))]

    def _read_key_group(self, group: int) -> pa.Array:
        return self._key_file.read_row_group(group, columns=["key"]).column("key").combine_chunks()


_ARRAYS = {"offset": np.uint64, "size": np.uint32, "shard": np.uint32, "members": np.uint32}


def open_index(url: str) -> Index:
    """Open the index of a folder of shards, after checking it against the shards as they are now.

    Raises:
        ValueError: if the folder or its index is missing or unreadable, or if a shard was changed, added
            or removed since.
    """
    files = storage.list_files(url)
    fs, root = storage.open_folder(url)
    folder = f"{root}/{INDEX_FOLDER}"
    rerun = f"run: ul-scale data index {url}"
    meta = _read_meta(fs, folder)
    if not meta:
        raise ValueError(f"{url}: the shards have no index, or its meta.json is damaged; {rerun}")
    if meta.get("format_version") != FORMAT_VERSION:
        found = meta.get("format_version")
        raise ValueError(f"{url}: the index has format {found}, this version reads {FORMAT_VERSION}; {rerun}")
    _check_shards(url, meta["shards"], files, rerun)
    try:
        arrays = {name: _load(fs, f"{folder}/{name}.npy") for name in _ARRAYS}
        keys = f"{folder}/keys.parquet"
        keys = pa.memory_map(keys) if storage.is_local(fs) else pa.BufferReader(fs.cat_file(keys))
        index = Index(url, meta, arrays, keys)
    except (OSError, EOFError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise ValueError(f"{url}: the index cannot be read ({error}); {rerun}") from error
    lengths = {len(array) for array in arrays.values()} | {index._key_file.metadata.num_rows}
    if lengths != {sum(shard.samples for shard in index.shards)}:
        raise ValueError(f"{url}: the index's files disagree about the number of samples; {rerun}")
    return index


def build_index(
    url: str,
    *,
    dataset: str | None = None,
    classes: Sequence[str] | None = None,
    extra: dict[str, Any] | None = None,
    threads: int = 8,
) -> Index:
    """Read every shard's headers once, write the index beside the shards, and open it.

    Args:
        url: folder of `*.tar` shards on any fsspec filesystem.
        dataset: first part of every sample's name. Like `classes` and `extra` it is kept from an earlier
            index when not given; else it is the folder's base name.
        classes: names of the classes, in the order of their ids.
        extra: anything JSON that the set should carry.
        threads: shards that are read at a time.

    Raises:
        ValueError: if there are no shards or no samples, or if a shard is damaged or refused.
    """
    files = {name: info for name, info in storage.list_files(url).items() if name.endswith(".tar")}
    if not files:
        raise ValueError(f"{url}: no .tar shards in this folder")
    fs, root = storage.open_folder(url)

    def scan(name: str) -> "ShardScan":
        return scan_shard(fs, f"{root}/{name}", files[name]["size"])

    with ThreadPoolExecutor(threads) as pool:
        scans = pool.map(scan, files)
        hide = not sys.stderr.isatty()
        scanned = list(track(scans, f"Indexing {url}", total=len(files), disable=hide, transient=True))
    arrays, parts = _join(scanned)
    if not len(arrays["offset"]):
        raise ValueError(f"{url}: the shards hold no samples (files named KEY.PART)")
    shards = [
        Shard(name, info["size"], len(scan.keys), info.get("etag") or info.get("ETag"))
        for (name, info), scan in zip(files.items(), scanned)
    ]
    before = _read_meta(fs, f"{root}/{INDEX_FOLDER}")
    meta = {
        "format_version": FORMAT_VERSION,
        "dataset": dataset or before.get("dataset") or root.rsplit("/", 1)[-1] or "data",
        "fingerprint": _fingerprint(shards, scanned),
        "parts": parts,
        "classes": list(classes) if classes else before.get("classes"),
        "extra": extra or before.get("extra") or {},
        "shards": [asdict(shard) for shard in shards],
    }
    _write(fs, f"{root}/{INDEX_FOLDER}", meta, arrays, [scan.keys for scan in scanned])
    return open_index(url)


class ShardScan(NamedTuple):
    """What one shard holds: its samples' keys and arrays as in `Index`, for the parts that it has."""

    keys: list[str]
    offset: np.ndarray
    size: np.ndarray
    parts: list[str]
    members: np.ndarray


def scan_shard(fs: Any, path: str, size: int) -> ShardScan:
    """Read the headers of one tar and group its members into samples.

    Raises:
        ValueError: if the tar is damaged, names a part twice, or has members that are refused.
    """
    where = fs.unstrip_protocol(path)
    if storage.is_local(fs):
        with open(path, "rb", buffering=0) as file:
            fd = file.fileno()
            return _group(_members(lambda at, length: os.pread(fd, length, at), size, where), where)
    return _group(_members(_ahead(fs, path, size), size, where), where)


def split_name(name: str) -> tuple[str, str] | None:
    """Split a member's name into key and part; None if it is no part of a sample (hidden, or without suffix).

    Raises:
        ValueError: if the name leads out of the folder it is unpacked to, or the part holds pickled content.
    """
    if name.startswith("/") or ".." in name.split("/") or _UNSAFE.search(name):
        raise ValueError(f"member {name!r} has an absolute path, '..', a backslash or a control character")
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    key, part = match[1], match[2].lower()
    if PICKLED & set(part.split(".")):
        raise ValueError(f"member {name!r} holds pickled content, which can run code; store plain formats")
    return key, part


def _members(read_at: ReadAt, size: int, where: str) -> Iterator[tuple[str, int, int, int]]:
    """Yield name, offset of the first header, offset of the content, and length of each regular file."""
    at = start = 0
    long_name, pax = None, dict[str, str]()
    while True:
        block = read_at(at, _BLOCK)
        if len(block) < _BLOCK:
            raise ValueError(f"{where}: the tar ends at byte {size} without an end mark; it is cut short")
        if not any(block):
            return
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
            describes_next = info.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME)
            length = info.size if describes_next else int(pax.get("size", info.size))
            content = at + _BLOCK
            if not 0 <= length <= size - content:
                raise ValueError(f"its content would end at byte {content + length} of {size}")
            if info.type == tarfile.GNUTYPE_LONGNAME:
                long_name = read_at(content, length).rstrip(b"\0").decode()
            elif describes_next:
                pax = _pax_records(read_at(content, length))
        except (tarfile.HeaderError, ValueError) as error:
            raise ValueError(f"{where}: no readable tar header at byte {at} ({error})") from error
        at = _padded(content + length)
        if describes_next:
            continue
        name = pax.get("path") or long_name or info.name
        if info.type in tarfile.REGULAR_TYPES and info.type != tarfile.GNUTYPE_SPARSE and not _sparse(pax):
            yield name, start, content, length
        elif info.type not in (tarfile.DIRTYPE, tarfile.XGLTYPE):
            raise ValueError(
                f"{where}: member {name!r} is a link, device or sparse file, expected plain files"
            )
        start, long_name, pax = at, None, {}


def _padded(at: int) -> int:
    return -(-at // _BLOCK) * _BLOCK


def _pax_records(data: bytes) -> dict[str, str]:
    """Parse records `LENGTH KEYWORD=VALUE` that end with a newline; LENGTH counts the whole record."""
    records = {}
    while data:
        digits, _, _ = data.partition(b" ")
        record, data = data[: int(digits)], data[int(digits) :]
        keyword, found, value = record[len(digits) + 1 : -1].partition(b"=")
        if not found or int(digits) <= len(digits):
            raise ValueError("a malformed PAX record")
        if keyword in (b"path", b"size") or keyword.startswith(b"GNU.sparse"):
            records[keyword.decode()] = value.decode()
    return records


def _sparse(pax: dict[str, str]) -> bool:
    return any(keyword.startswith("GNU.sparse") for keyword in pax)


def _ahead(fs: Any, path: str, size: int) -> ReadAt:
    """Return a reader that goes through a remote file in long ranges, skipping what lies between headers."""
    first, held = 0, b""

    def read_at(at: int, length: int) -> bytes:
        nonlocal first, held
        end = min(at + length, size)
        if at < first or end > first + len(held):
            first = at
            held = storage.read_range(fs, path, at, min(max(end, at + _READ_AHEAD_BYTES), size))
        return held[at - first : end - first]

    return read_at


def _group(members: Iterator[tuple[str, int, int, int]], where: str) -> ShardScan:
    """Group adjacent members of one key into samples."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    spans: list[tuple[int, int]] = []
    current = None
    for name, start, content, length in members:
        try:
            split = split_name(name)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if split is None:
            continue
        key, part = split
        if key != current:
            if key in samples:
                raise ValueError(f"{where}: the parts of {key!r} do not lie next to each other")
            current, samples[key] = key, {}
            spans.append((start, start))
        if part in samples[key]:
            raise ValueError(f"{where}: two members are named {key}.{part}")
        offset = spans[-1][0]
        samples[key][part] = (content - offset, length)
        spans[-1] = (offset, _padded(content + length))
        if spans[-1][1] - offset >= ABSENT:
            raise ValueError(f"{where}: sample {key!r} is longer than 4 GiB")
    parts = sorted({part for sample in samples.values() for part in sample})
    table = [[sample.get(part, (ABSENT, 0)) for part in parts] for sample in samples.values()]
    span = np.array(spans, np.uint64).reshape(-1, 2)
    size = (span[:, 1] - span[:, 0]).astype(np.uint32)
    places = np.array(table, np.uint32).reshape(len(samples), len(parts), 2)
    return ShardScan(list(samples), span[:, 0], size, parts, places)


def _join(scans: list[ShardScan]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Lay the shards' arrays end to end, over the union of their parts."""
    parts = sorted({part for scan in scans for part in scan.parts})
    counts = [len(scan.keys) for scan in scans]
    members = np.zeros((sum(counts), len(parts), 2), np.uint32)
    members[:, :, 0] = ABSENT
    for scan, stop in zip(scans, np.cumsum(counts)):
        columns = [parts.index(part) for part in scan.parts]
        members[stop - len(scan.keys) : stop, columns] = scan.members
    return {
        "offset": np.concatenate([scan.offset for scan in scans]),
        "size": np.concatenate([scan.size for scan in scans]),
        "shard": np.repeat(np.arange(len(scans), dtype=np.uint32), counts),
        "members": members,
    }, parts


def _fingerprint(shards: list[Shard], scans: list[ShardScan]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for shard, scan in zip(shards, scans):
        digest.update(json.dumps([shard.name, shard.size, shard.samples]).encode())
        digest.update(scan.offset.astype("<u8").tobytes())
        digest.update("".join(f"{key}\0" for key in scan.keys).encode())
    return digest.hexdigest()


def _write(
    fs: Any, folder: str, meta: dict[str, Any], arrays: dict[str, np.ndarray], keys: list[list[str]]
) -> None:
    fs.makedirs(folder, exist_ok=True)
    for name, array in arrays.items():
        stream = io.BytesIO()
        np.save(stream, array, allow_pickle=False)
        storage.write_file(fs, f"{folder}/{name}.npy", stream.getvalue())
    stream = io.BytesIO()
    table = pa.table({"key": pa.chunked_array([pa.array(part, pa.string()) for part in keys])})
    pq.write_table(table, stream, row_group_size=_KEYS_PER_GROUP, compression="zstd")
    storage.write_file(fs, f"{folder}/keys.parquet", stream.getvalue())
    storage.write_file(fs, f"{folder}/meta.json", json.dumps(meta, indent=1).encode())


def _read_meta(fs: Any, folder: str) -> dict[str, Any]:
    """Return the index's meta.json, {} where there is none that can be read."""
    try:
        meta = json.loads(fs.cat_file(f"{folder}/meta.json"))
    except (FileNotFoundError, ValueError):
        return {}
    return meta if isinstance(meta, dict) else {}


def _load(fs: Any, path: str) -> np.ndarray:
    if storage.is_local(fs):
        return np.load(path, mmap_mode="r", allow_pickle=False)
    return np.load(io.BytesIO(fs.cat_file(path)), allow_pickle=False)


def _check_shards(
    url: str, shards: list[dict[str, Any]], files: dict[str, dict[str, Any]], rerun: str
) -> None:
    """Compare the shards in the folder with those in the index."""
    known = {shard["name"]: shard for shard in shards}
    for name in [name for name in files if name.endswith(".tar")] + list(known):
        if name not in known:
            raise ValueError(f"{url}/{name} was added since the set was indexed; {rerun}")
        if name not in files:
            raise ValueError(f"{url}/{name} is in the index but not in the folder; put it back, or {rerun}")
        size, indexed = files[name]["size"], known[name]["size"]
        if size != indexed:
            raise ValueError(
                f"{url}/{name} changed since it was indexed: {size} bytes, index says {indexed}; {rerun}"
            )
        etag = files[name].get("etag") or files[name].get("ETag")
        if etag and known[name]["etag"] and etag != known[name]["etag"]:
            _log.warning(
                "%s/%s has another etag than when it was indexed; if rewritten, %s", url, name, rerun
            )
