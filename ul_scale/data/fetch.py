"""From numbers of samples to their bytes: range requests, several in flight, sliced by the index."""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from ul_scale.data import storage
from ul_scale.data.index import Index
from ul_scale.data.plan import LanePlan
from ul_scale.data.sample import Sample
from ul_scale.data.tar import ABSENT

READS_IN_FLIGHT = 8
"""Of each worker; a bucket answers each in tens of milliseconds. Of a local disk, no more than cores."""


class Taken(NamedTuple):
    """A sample's bytes, its number in the index, and the epoch that it is taken in (None: in none)."""

    number: int
    epoch: int | None
    sample: Sample


class Fetcher:
    """Reads consecutive samples with one request each. Filesystems are opened here, never before a fork.

    Args:
        index: of the set.
        policy: of each request.
        ending: once set, reads that fail are not tried again: a process would wait for them when it exits.
    """

    def __init__(
        self, index: Index, policy: storage.ReadPolicy, ending: threading.Event | None = None
    ) -> None:
        self._index, self._policy, self._ending = index, policy, ending or threading.Event()
        self._fs, self._root = storage.open_folder(index.url)
        at_once = min(READS_IN_FLIGHT, os.cpu_count() or 1) if storage.is_local(self._fs) else READS_IN_FLIGHT
        self._pool = ThreadPoolExecutor(at_once, thread_name_prefix="ul-scale-read")

    def close(self) -> None:
        self._ending.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def begin(self, start: int, stop: int) -> Future[list[Sample]]:
        """Begin to read the samples `start` to `stop` of one shard."""
        return self._pool.submit(self.read, start, stop)

    def read(self, start: int, stop: int) -> list[Sample]:
        """Return the samples `start` to `stop` of one shard.

        Raises:
            OSError: naming URL, range and cause.
        """
        index = self._index
        path = f"{self._root}/{index.shards[int(index.shard[start])].name}"
        begin = index.offset[start:stop].astype(np.int64)
        end = int(begin[-1]) + int(index.size[stop - 1])
        data = storage.read_range(self._fs, path, int(begin[0]), end, self._policy, self._ending)
        view = memoryview(data)
        samples = []
        for name, at, members in zip(
            index.names(start, stop), (begin - begin[0]).tolist(), index.members[start:stop].tolist()
        ):
            parts = {
                part: view[at + offset : at + offset + length]
                for part, (offset, length) in zip(index.parts, members)
                if offset != ABSENT
            }
            samples.append(Sample(name, parts))
        return samples


class LaneReader:
    """Hands out a lane's samples; holds its current window and as much of the next as is due."""

    def __init__(self, plan: LanePlan, lane: int, step: int, fetcher: Fetcher) -> None:
        self._plan, self._lane, self._fetcher = plan, lane, fetcher
        self._current: tuple[int, int] | None = None
        self._samples: list[Sample] = []
        self._next, self._reads = plan.pieces(step, lane)[0][0], list[Future[list[Sample]]]()
        self._request(self._next.segments)

    def take(self, step: int) -> Iterator[Taken]:
        """Give the samples of the lane's batch at a step; steps come one after the other."""
        for window, start, stop in self._plan.pieces(step, self._lane):
            if self._current != (window.epoch, window.start):
                self._request(window.segments)
                self._samples = [sample for read in self._reads for sample in read.result()]
                self._current = window.epoch, window.start
                self._next, self._reads = self._plan.window_after(window), []
            places = window.order[start:stop]
            for number, place in zip(window.samples[places].tolist(), places.tolist()):
                yield Taken(number, window.epoch, self._samples[place])
            # The next window arrives as this one is used up, not sooner: it takes memory.
            due = -(-len(self._next.segments) * stop // len(window.order))
            if due > len(self._reads):
                self._request(self._next.segments[:due])

    def _request(self, segments: list[tuple[int, int]]) -> None:
        """Begin to read those of the next window's segments that have not been asked for."""
        self._reads += [self._fetcher.begin(*segment) for segment in segments[len(self._reads) :]]
