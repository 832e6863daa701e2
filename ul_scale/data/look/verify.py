"""Decode every sample of a set, in worker processes, and name those that are bad.

A worker reads consecutive samples by one request, compares their tar headers with the index, then decodes
every part in full. A read that fails says nothing about a sample: it ends the whole check as an error.
"""

import io
import os
import signal
import sys
import tarfile
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import islice, pairwise
from json import dumps
from multiprocessing import get_context, parent_process
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from ul_scale.data import storage
from ul_scale.data.config import DataConfig
from ul_scale.data.decode import make_decoder
from ul_scale.data.index import Index, open_index
from ul_scale.data.look.parts import CONTENT, check_part, kind_of
from ul_scale.data.plan import cut_chunks
from ul_scale.data.progress import progress_bar
from ul_scale.data.sample import BadSample, Sample
from ul_scale.data.tar import ABSENT, split_name

_CHUNK_BYTES, _CHUNK_SAMPLES = 4_000_000, 1000
# Chunks that a worker is given, and reads, at a time.
_GROUP = 8


@dataclass(frozen=True)
class Fault:
    """What is wrong with a sample: with one of its parts, or (part: None) as a whole."""

    shard: str
    key: str
    part: str | None
    reason: str


class _Chunk(NamedTuple):
    """Consecutive samples of a shard, and all that a worker needs to know of them.

    Attributes:
        offset, size: of each sample in the shard, bytes.
        members: offset from the sample's start and length of each part, [samples, parts, 2].
    """

    shard: str
    keys: list[str]
    offset: np.ndarray
    size: np.ndarray
    members: np.ndarray


class Checker:
    """Checks samples of one set; lives in a worker process.

    Args:
        url: folder of the shards.
        dataset: first part of the samples' names.
        parts: that the set's samples have.
        num_classes: labels must be less; None if that is not known.
        config: if given, samples are decoded as in training too.
        policy: of the reads.
    """

    def __init__(
        self,
        url: str,
        dataset: str,
        parts: tuple[str, ...],
        num_classes: int | None,
        config: DataConfig | None,
        policy: storage.ReadPolicy,
    ) -> None:
        self.url, self.dataset, self.parts, self.num_classes = url, dataset, parts, num_classes
        self._fs, self._root = storage.open_folder(url)
        self._policy = policy
        self._decode = make_decoder(parts, config, url) if config else None
        self._has_content = any(kind_of(part) in CONTENT for part in parts)
        self._readers = ThreadPoolExecutor(_GROUP, thread_name_prefix="ul-scale-read")

    def check(self, chunks: list[_Chunk]) -> list[Fault]:
        """Read and check chunks.

        Raises:
            OSError: if a read fails.
        """
        reads = deque(self._readers.submit(self._read, chunk) for chunk in chunks)
        faults: list[Fault] = []
        for chunk in chunks:
            faults += self._check_chunk(chunk, reads.popleft().result())
        return faults

    def _read(self, chunk: _Chunk) -> bytes:
        end = int(chunk.offset[-1]) + int(chunk.size[-1])
        path = f"{self._root}/{chunk.shard}"
        return storage.read_range(self._fs, path, int(chunk.offset[0]), end, self._policy)

    def _check_chunk(self, chunk: _Chunk, data: bytes) -> Iterator[Fault]:
        starts = (chunk.offset - chunk.offset[0]).tolist()
        rows = zip(chunk.keys, starts, chunk.size.tolist(), chunk.members.tolist())
        for key, start, size, members in rows:
            content = memoryview(data)[start : start + size]
            placed = {part: tuple(row) for part, row in zip(self.parts, members) if row[0] != ABSENT}
            difference = compare_headers(content, key, placed)
            if difference:
                reason = (
                    f"the index does not fit the shard: {difference}; run: ul-scale data index {self.url}"
                )
                yield Fault(chunk.shard, key, None, reason)
                continue
            parts = {part: content[at : at + length] for part, (at, length) in placed.items()}
            name = f"{self.dataset}/{chunk.shard.removesuffix('.tar')}/{key}"
            for part, reason in self._faults(Sample(name, parts)):
                yield Fault(chunk.shard, key, part, reason)

    def _faults(self, sample: Sample) -> Iterator[tuple[str | None, str]]:
        good = True
        if self._has_content and not any(kind_of(part) in CONTENT for part in sample.parts):
            good = False
            yield None, f"has no image, video or array, only {', '.join(sample.parts)}"
        for part, data in sample.parts.items():
            try:
                check_part(part, data, self.num_classes)
            except ValueError as error:
                good = False
                yield part, str(error)
        if good and self._decode is not None:
            try:
                self._decode(sample, None)
            except BadSample as error:
                yield None, str(error).removeprefix(sample.name).lstrip(":. ")


def compare_headers(content: memoryview, key: str, placed: dict[str, Any]) -> str:
    """Compare the tar headers of a sample with where the index places its parts.

    Args:
        content: the sample's bytes in the shard, from its first header.
        key: of the sample.
        placed: offset and length of each part.

    Returns:
        What differs, "" if nothing does.
    """
    found = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
            for member in tar:
                name = split_name(member.name) if member.isfile() else None
                if name is not None:
                    found[name] = (member.offset_data, member.size)
    except (tarfile.TarError, ValueError) as error:
        return f"its tar headers cannot be read ({error})"
    if found == {(key, part): place for part, place in placed.items()}:
        return ""
    if found.keys() == {(key, part) for part in placed}:
        return "its parts are at other places, or of other lengths"
    return f"the shard holds {', '.join(f'{other}.{part}' for other, part in found) or 'nothing'} there"


_checker: Checker


def _start(*args: Any) -> None:
    """Make a worker's checker."""
    global _checker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends the workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _checker = Checker(*args)


def _end_with_parent() -> None:
    """End a worker whose parent was killed: it would wait for work for ever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def _check(chunks: list[_Chunk]) -> list[Fault]:
    return _checker.check(chunks)


def find_faults(
    index: Index,
    *,
    config: DataConfig | None = None,
    workers: int | None = None,
    policy: storage.ReadPolicy | None = None,
    advance: Callable[[int], None] = lambda samples: None,
) -> Iterator[Fault]:
    """Yield what is wrong with the samples of a set, in their order, whatever the number of workers.

    Args:
        index: the set.
        config: if given, each sample is also decoded as training would.
        workers: processes; by default one per core, 0: this process.
        policy: of the reads.
        advance: called with the number of samples that were checked since the last call.

    Raises:
        OSError: if a read fails, or a worker process dies.
        ValueError: if the set does not fit the config.
    """
    classes = len(index.classes) if index.classes else None
    settings = (index.url, index.dataset, index.parts, classes, config, policy or storage.ReadPolicy())
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if workers < 0:
        raise ValueError(f"{workers} workers; expected 0 or more")
    checker = Checker(*settings)  # here too: what does not fit is said before a process starts
    groups = _groups(index, max(workers, 1))
    if workers == 0:
        for group in groups:
            yield from checker.check(group)
            advance(sum(len(chunk.keys) for chunk in group))
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start, settings)
    at = ""
    try:
        checks = deque((pool.submit(_check, group), group) for group in islice(groups, 2 * workers))
        while checks:
            check, group = checks.popleft()
            at = f"{group[0].shard}, {group[0].keys[0]}"
            yield from check.result()
            advance(sum(len(chunk.keys) for chunk in group))
            checks.extend((pool.submit(_check, group), group) for group in islice(groups, 1))
    except BrokenProcessPool as error:
        raise ChildProcessError(
            f"{index.url}: a worker process died (killed, or out of memory?) near {at}"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _groups(index: Index, workers: int) -> Iterator[list[_Chunk]]:
    """Yield the set's chunks, several at a time, but enough times to keep all workers busy."""
    bounds = cut_chunks(index.shard, index.offset, index.size, _CHUNK_BYTES, _CHUNK_SAMPLES).tolist()
    length = min(max((len(bounds) - 1) // (4 * workers), 1), _GROUP)
    ranges = pairwise(bounds)
    while group := list(islice(ranges, length)):
        yield [
            _Chunk(
                index.shards[int(index.shard[start])].name,
                index.keys(start, stop),
                np.asarray(index.offset[start:stop]).astype(np.int64),
                np.asarray(index.size[start:stop]),
                np.asarray(index.members[start:stop]),
            )
            for start, stop in group
        ]


def verify(
    url: str,
    *,
    config: DataConfig | None = None,
    workers: int | None = None,
    out: Path | None = None,
    fast: bool = False,
) -> int:
    """Check a set; print bad samples as JSON lines on stdout or to `out`, a summary on stderr.

    Args:
        url: folder of the shards.
        config: if given, each sample is also decoded as training would.
        workers: processes; by default one per core, 0: this process.
        out: file for the lines, instead of stdout.
        fast: only compare the index with the listing of the shards, and read none.

    Returns:
        1 if there are bad samples, else 0.

    Raises:
        OSError: if a read fails.
        ValueError: if the index does not fit the shards, or the set the config.
    """
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    index = open_index(url)
    size = f"{len(index):,} samples in {len(index.shards):,} shards"
    if fast:
        console.print(f"{url}: the index fits the shards' sizes, {size}; nothing was decoded", markup=False)
        return 0
    unchecked = [part for part in index.parts if kind_of(part) is None]
    bad, parts, start = set(), Counter[str](), monotonic()
    with (
        open(out, "w") if out else nullcontext(sys.stdout) as lines,
        progress_bar(f"Verifying {index.dataset}", len(index)) as advance,
    ):
        for fault in find_faults(index, config=config, workers=workers, advance=advance):
            print(dumps(asdict(fault), ensure_ascii=False), file=lines, flush=True)
            bad.add((fault.shard, fault.key))
            parts[fault.part or "sample"] += 1
    found = ", ".join(f"{part}: {count:,}" for part, count in sorted(parts.items()))
    console.print(
        f"{url}: {size}, {len(bad):,} bad{f' ({found})' if found else ''}, {monotonic() - start:.1f} s"
        + (f"; parts of no known kind were not decoded: {', '.join(unchecked)}" if unchecked else ""),
        markup=False,
    )
    return int(bool(bad))
