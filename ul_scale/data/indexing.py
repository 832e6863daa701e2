"""Index tar shards: read the headers of those that are new or have changed, and write the set's index.

An index is written in passes of some minutes, each of which takes over what the one before knew and adds
what it has read. So an interrupted indexing goes on where it was, and adding shards to a set costs reading
those alone.
"""

import contextlib
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from ul_scale.data import storage
from ul_scale.data.index import (
    ARRAYS,
    FORMAT_VERSION,
    INDEX_FOLDER,
    KEYS,
    UNREADABLE,
    Index,
    Shard,
    content_tag,
    open_files,
    open_index,
    read_meta,
    remedy,
)
from ul_scale.data.index_cache import digest_file
from ul_scale.data.index_writer import IndexWriter
from ul_scale.data.tar import ABSENT, ShardScan, scan_shard

# A pass ends after this time, or after so many times what taking over and writing cost in the one before.
PASS_S, PASS_OVERHEADS = 600.0, 4.0
# What has been read for less time is not worth writing down when a shard turns out to be damaged.
_WORTH_KEEPING_S = 60.0
_LEFT_S = 86_400.0  # no pass takes so long
_log = logging.getLogger(__name__)


def build_index(
    url: str,
    *,
    dataset: str | None = None,
    classes: Sequence[str] | None = None,
    extra: dict[str, Any] | None = None,
    threads: int = 8,
    full: bool = False,
) -> Index:
    """Bring the index beside the shards up to date, or make it, and open it.

    Read are the headers of shards that the index does not have with the same size, etag (in buckets) and
    modification time (locally). A sample's name, place and hence the fingerprint do not depend on what was
    known before.

    Args:
        url: folder of `*.tar` shards on any fsspec filesystem.
        dataset: first part of every sample's name. Like `classes` and `extra` it is kept from an earlier
            index when not given; else it is the folder's base name.
        classes: names of the classes, in the order of their ids.
        extra: anything JSON that the set should carry.
        threads: shards that are read at a time. Remotely each takes some 16 MB.
        full: read all shards again.

    Raises:
        ValueError: if there are no shards or no samples, if a shard is damaged or refused, or if the set has
            an index of latents and `extra` is not given.
        OSError: if a shard cannot be read.
    """
    if "::" in url:
        raise ValueError(f"{url}: a chained URL cannot be written to; expected the folder itself")
    files = {name: info for name, info in storage.list_files(url).items() if name.endswith(".tar")}
    if not files:
        raise ValueError(f"{url}: no .tar shards in this folder")
    noted_extra = read_meta(url)[1].get("extra") or {}
    if extra is None and "autoencoder" in noted_extra:
        raise ValueError(
            f"{url}: holds latents, which are indexed as they are encoded; {remedy(url, noted_extra)}"
        )
    fs, root = storage.open_folder(url)
    local = storage.is_local(fs)
    shards = [
        Shard(name, info["size"], 0, content_tag(info), info.get("mtime") if local else None)
        for name, info in files.items()
    ]
    given = {"dataset": dataset, "classes": list(classes) if classes else None, "extra": extra}
    defaults: dict[str, Any] = {"dataset": root.rsplit("/", 1)[-1] or "data", "classes": None, "extra": {}}
    progress = Progress(
        *Progress.get_default_columns(),
        MofNCompleteColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
        transient=True,
    )
    task, unread, pass_s = progress.add_task(f"Indexing {url}", total=len(shards)), len(shards), PASS_S
    with progress:
        while unread:
            content, before = read_meta(url)
            old = None if full else _open_old(url, content, before)
            full = False  # what this pass reads, the next need not read again
            kept = _kept(old, shards)
            progress.update(task, completed=len(kept))
            notes = {key: given[key] or before.get(key) or defaults[key] for key in given}
            noted = before.get("complete") and all(before[key] == note for key, note in notes.items())
            if old is not None and len(kept) == len(shards) == len(old.shards) and noted:
                break
            began = time.monotonic()
            unread, waited_s = _run_pass(
                url, shards, old, kept, notes, pass_s, threads, advance=lambda: progress.advance(task)
            )
            pass_s = max(PASS_S, PASS_OVERHEADS * (time.monotonic() - began - waited_s))
    return open_index(url)


def _open_old(url: str, content: bytes, meta: dict[str, Any]) -> Index | None:
    """Open an index whose rows may be taken over; None if it has another format or is damaged."""
    if meta.get("format_version") != FORMAT_VERSION:
        return None
    try:
        old = open_files(url, content, meta)
        if old.location.folder is not None:
            for name, expected in meta["files"].items():
                if digest_file(Path(old.location.folder) / name) != expected["digest"]:
                    raise ValueError(f"{name} is damaged")
    except UNREADABLE as error:
        _log.warning("%s: the index cannot be read (%s); all shards are read again", url, error)
        return None
    return old


def _kept(old: Index | None, shards: list[Shard]) -> dict[str, tuple[int, int]]:
    """Return the first and one past the last sample, in `old`, of each shard that it knows as it is now."""
    if old is None:
        return {}
    known = set(shards)
    stops = np.cumsum([shard.samples for shard in old.shards]).tolist()
    return {
        shard.name: (stop - shard.samples, stop)
        for shard, stop in zip(old.shards, stops)
        if shard._replace(samples=0) in known
    }


def _run_pass(
    url: str,
    shards: list[Shard],
    old: Index | None,
    kept: dict[str, tuple[int, int]],
    notes: dict[str, Any],
    pass_s: float,
    threads: int,
    advance: Callable[[], object],
) -> tuple[int, float]:
    """Write an index of what is kept of the old one, and of what shards can be read in `pass_s` seconds.

    Returns:
        The number of shards that were left unread, and the seconds spent waiting for those that were read.
    """
    fs, root = storage.open_folder(url)
    folder, unread = f"{root}/{INDEX_FOLDER}", 0
    to_read = (shard for shard in shards if shard.name not in kept)
    with _spool(fs, folder) as spool, _Scans(fs, root, to_read, pass_s, threads) as scans:
        writer = IndexWriter(Path(spool))
        for shard in shards:
            if old is not None and shard.name in kept:
                writer.add(shard, _rows(old, *kept[shard.name]))
            elif (rows := scans.take()) is not None:
                writer.add(shard, rows)
                advance()
            else:
                unread += 1
        if not unread and not writer.num_samples:
            raise ValueError(f"{url}: the shards hold no samples (files named KEY.PART)")
        meta = {"format_version": FORMAT_VERSION, "complete": not unread, **notes, **writer.finish()}
        _publish(fs, folder, Path(spool), meta)
    if scans.failure is not None:
        raise scans.failure
    return unread, scans.waited_s


class _Scans:
    """Scans shards in threads, a few ahead of who takes them, and begins no more after some time.

    Attributes:
        failure: what a scan raised after so long that the others are worth keeping.
        waited_s: seconds that were spent waiting in `take`.
    """

    def __init__(self, fs: Any, root: str, shards: Iterator[Shard], pass_s: float, threads: int) -> None:
        self.failure: BaseException | None = None
        self.waited_s = 0.0
        self._fs, self._root, self._shards = fs, root, shards
        self._began, self._pass_s = time.monotonic(), pass_s
        self._pool = ThreadPoolExecutor(threads, "ul-scale-index")
        self._pending = deque[Future[ShardScan]]()
        self._begin(4 * threads)

    def __enter__(self) -> "_Scans":
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def take(self) -> ShardScan | None:
        """Return what the next shard holds; None if it and all later ones are left to another pass.

        Raises:
            ValueError: as `scan_shard`, and like it OSError, if little would be lost.
        """
        if not self._pending:
            return None
        waiting = time.monotonic()
        try:
            scan = self._pending.popleft().result()
        except BaseException as error:
            if time.monotonic() < self._began + _WORTH_KEEPING_S:
                raise
            self.failure = error
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pending.clear()
            return None
        self.waited_s += time.monotonic() - waiting
        self._begin(1)
        return scan

    def _begin(self, count: int) -> None:
        if time.monotonic() < self._began + self._pass_s:
            for shard in islice(self._shards, count):
                path = f"{self._root}/{shard.name}"
                self._pending.append(self._pool.submit(scan_shard, self._fs, path, shard.size))


def _rows(index: Index, start: int, stop: int) -> ShardScan:
    """Return what an index knows of the samples `start` to `stop`, of one shard."""
    members = index.members[start:stop]
    has = (members[:, :, 0] != ABSENT).any(0)
    parts = [part for part, own in zip(index.parts, has) if own]
    offset, size = index.offset[start:stop], index.size[start:stop]
    return ShardScan(index.keys(start, stop), offset, size, parts, members[:, has])


@contextlib.contextmanager
def _spool(fs: Any, folder: str) -> Iterator[str]:
    """Make a temporary folder for an index's files: on the same disk, where the index is local."""
    local = storage.is_local(fs)
    if local:
        os.makedirs(folder, exist_ok=True)
        for leftover in Path(folder).glob("pass-*"):
            if time.time() - leftover.stat().st_mtime > _LEFT_S:  # of a process that was killed
                shutil.rmtree(leftover, ignore_errors=True)
    try:
        with tempfile.TemporaryDirectory(prefix="pass-", dir=folder if local else None) as spool:
            yield spool
    finally:
        if local and not os.listdir(folder):
            os.rmdir(folder)


def _publish(fs: Any, folder: str, spool: Path, meta: dict[str, Any]) -> None:
    """Put an index's files into place; what takes long comes before the old index is touched."""
    names = (*ARRAYS, KEYS)
    try:
        if not storage.is_local(fs):
            fs.makedirs(folder, exist_ok=True)
            for name in names:
                fs.put_file(str(spool / name), f"{folder}/{name}.partial")
        # Without it, an old meta.json could be taken for one of the new files.
        with contextlib.suppress(FileNotFoundError):
            fs.rm_file(f"{folder}/meta.json")
        for name in names:
            if storage.is_local(fs):
                os.replace(spool / name, f"{folder}/{name}")
            else:
                fs.mv(f"{folder}/{name}.partial", f"{folder}/{name}")
    except Exception as error:  # each filesystem raises classes of its own
        cause = " ".join(storage.without_query(str(error)).split())
        raise OSError(
            f"{fs.unstrip_protocol(folder)}: cannot write the index ({type(error).__name__}: {cause})"
        ) from None
    storage.write_file(fs, f"{folder}/meta.json", json.dumps(meta, separators=(",", ":")).encode())
