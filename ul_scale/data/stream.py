"""From shards to batches: read whole windows by range requests, decode, collate, all in the background.

The order comes from `plan.LanePlan`; this module does the work of a rank's lane slots. A batch depends on
(index, config, seed, step, slots) only, so a stream can be started at any step.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice, pairwise
from typing import NotRequired, TypedDict

import numpy as np
import torch

from ul_scale.data import storage
from ul_scale.data.config import DataConfig
from ul_scale.data.decode import make_decoder
from ul_scale.data.index import ABSENT, Index
from ul_scale.data.plan import LanePlan, LaneSlot, cut_chunks, default_lanes
from ul_scale.data.sample import Decode, Draw, Example, Sample
from ul_scale.data.transforms import to_unit_range
from ul_scale.keyed import uniform

# Range requests under way at a time; a bucket answers each in tens of milliseconds.
READS_IN_FLIGHT = 8


class Batch(TypedDict):
    """A rank's batch: the lane batches of its slots, one after the other. It has either x or z_clean.

    x: images, float32 in [-1, 1], (B, C, H, W), or clips, (B, C, T, H, W).
    z_clean: latents, float32, (B, C, h, w) or (B, C, t, h, w).
    label: class ids, int64, -1 where a sample has none, (B,).
    uniform: a number in [0, 1) per sample and epoch that decides label dropout, float64, (B,).
    weight: weight of each sample's loss, float32, (B,): 0 for the samples of a surplus slot.
    keys: names of the samples, `dataset/shard/key`.
    text: captions, where they are asked for.
    """

    x: NotRequired[torch.Tensor]
    z_clean: NotRequired[torch.Tensor]
    label: torch.Tensor
    uniform: torch.Tensor
    weight: torch.Tensor
    keys: list[str]
    text: NotRequired[list[str]]


Reads = list[Future[list[Sample]]]


def make_plan(index: Index, config: DataConfig, *, seed: int, batch_size: int) -> LanePlan:
    """Return the order of a set for a run with a global batch of `batch_size`."""
    return LanePlan(
        index.shard,
        index.offset,
        index.size,
        seed=seed,
        lanes=config.lanes or default_lanes(batch_size, len(index)),
        batch_size=batch_size,
        chunk_bytes=config.chunk_bytes,
        window_chunks=config.window_chunks,
    )


class LaneStream:
    """The batches of a rank's lane slots.

    Args:
        index: the set, as opened by `open_index`.
        plan: its order, as made by `make_plan`.
        config: how samples are read and transformed.
        slots: the rank's slots, as dealt by `lane_slots`.

    Raises:
        ValueError: if the set does not fit the config, or its windows the memory they may take.
    """

    def __init__(self, index: Index, plan: LanePlan, config: DataConfig, slots: list[LaneSlot]) -> None:
        self.index, self.plan, self.config, self.slots = index, plan, config, slots
        self._decode = make_decoder(index.parts, config, index.url)
        lanes = len({slot.lane for slot in slots})
        needed = self._window_bytes(lanes)
        if needed > config.max_window_bytes:
            raise ValueError(
                f"{lanes} lanes with windows of {plan.window_chunks} chunks take up to {needed:,} bytes, "
                f"data.max_window_bytes is {config.max_window_bytes:,}: raise it, use more ranks, or start a "
                "run with smaller data.window_chunks or data.chunk_bytes"
            )

    def batches(self, start_step: int = 0) -> Generator[Batch, None, None]:
        """Yield the batches of `start_step` and all later steps, made ahead in background threads.

        What fails in the background is raised here. Closing or dropping the iterator ends the threads.

        Raises:
            OSError: if a range cannot be read after several tries.
            ValueError: naming dataset, shard and key, if a sample cannot be decoded.
        """
        return _in_background(self._make_batches(start_step), self.config.prefetch_steps)

    def _make_batches(self, step: int) -> Generator[Batch, None, None]:
        lane_batch = np.arange(self.plan.lane_batch_size)
        # Each slot's rows in what its lane decoded: a lane that fills several slots is decoded once.
        lanes = list(dict.fromkeys(slot.lane for slot in self.slots))
        rows = np.concatenate([lanes.index(slot.lane) * len(lane_batch) + lane_batch for slot in self.slots])
        weight = np.repeat(np.array([slot.weight for slot in self.slots], np.float32), len(lane_batch))
        seed = self.plan.seed
        with _Workers(self.index, self.config.threads) as workers:
            readers = [_LaneReader(self.plan, lane, step, workers.read) for lane in lanes]
            while True:
                taken = [item for reader in readers for item in reader.take(step)]
                samples = [sample for _, sample in taken]
                draws = [Draw(seed, epoch) for epoch, _ in taken]
                uniforms = np.array([uniform(seed, "training", epoch, name) for epoch, (name, _) in taken])
                examples = workers.decode(self._decode, samples, draws)
                names = [samples[i].name for i in rows]
                yield _collate(names, [examples[i] for i in rows], uniforms[rows], weight)
                step += 1

    def _window_bytes(self, lanes: int) -> int:
        """Return the most bytes that this rank's windows, current and next, can take together."""
        bounds = self.plan.chunk_bounds
        first, last = bounds[:-1], bounds[1:] - 1
        ends = self.index.offset[last].astype(np.int64) + self.index.size[last].astype(np.int64)
        spans = np.sort(ends - self.index.offset[first].astype(np.int64))[::-1]
        wanted = 2 * lanes * self.plan.window_chunks
        # In a small set the same chunks come round again in the next epoch.
        repeats, rest = divmod(wanted, len(spans))
        return int(repeats * spans.sum() + spans[:rest].sum())


def iterate(
    index: Index, config: DataConfig, start: int = 0, stop: int | None = None, *, batch_size: int
) -> Iterator[Batch]:
    """Yield the samples `start` to `stop` in the index's order, once and unaugmented.

    The last batch may be short. `uniform` is 1, so that no label is dropped, and `weight` is 1. Errors are
    those of `LaneStream.batches`.
    """
    part = slice(start, len(index) if stop is None else min(stop, len(index)))
    shard, offset, size = index.shard[part], index.offset[part], index.size[part]
    chunks = (start + cut_chunks(shard, offset, size, config.chunk_bytes, max_samples=len(index))).tolist()
    source = _make_in_order(
        index, make_decoder(index.parts, config, index.url), chunks, batch_size, config.threads
    )
    return _in_background(source, config.prefetch_steps)


def _make_in_order(
    index: Index, decode: Decode, chunks: list[int], batch_size: int, threads: int
) -> Generator[Batch, None, None]:
    ranges = pairwise(chunks)
    with _Workers(index, threads) as workers:
        reads = deque(workers.read(*range_) for range_ in islice(ranges, READS_IN_FLIGHT))
        ready: list[Sample] = []
        while reads or ready:
            while reads and len(ready) < batch_size:
                ready += reads.popleft().result()
                reads.extend(workers.read(*range_) for range_ in islice(ranges, 1))
            samples, ready = ready[:batch_size], ready[batch_size:]
            examples = workers.decode(decode, samples, [None] * len(samples))
            names = [sample.name for sample in samples]
            yield _collate(names, examples, np.ones(len(samples)), np.ones(len(samples), np.float32))


class _LaneReader:
    """Hands out a lane's samples; holds its current window and as much of the next as is due."""

    def __init__(
        self, plan: LanePlan, lane: int, step: int, read: Callable[[int, int], Future[list[Sample]]]
    ) -> None:
        self._plan, self._lane, self._read = plan, lane, read
        self._current: tuple[int, int] | None = None
        self._samples: list[Sample] = []
        self._next, self._reads = plan.pieces(step, lane)[0][0], Reads()
        self._request(self._next.segments)

    def take(self, step: int) -> list[tuple[int, Sample]]:
        """Return the epoch and the bytes of each sample of the lane's batch."""
        taken = []
        for window, start, stop in self._plan.pieces(step, self._lane):
            if self._current != (window.epoch, window.start):
                self._request(window.segments)
                self._samples = [sample for read in self._reads for sample in read.result()]
                self._current = window.epoch, window.start
                self._next, self._reads = self._plan.window_after(window), Reads()
            taken += [(window.epoch, self._samples[i]) for i in window.order[start:stop].tolist()]
            # The next window arrives as this one is used up, not sooner: it takes memory.
            due = -(-len(self._next.segments) * stop // len(window.order))
            if due > len(self._reads):
                self._request(self._next.segments[:due])
        return taken

    def _request(self, segments: list[tuple[int, int]]) -> None:
        """Begin to read those of the next window's segments that have not been asked for."""
        self._reads += [self._read(*segment) for segment in segments[len(self._reads) :]]


class _Workers:
    """The threads that read and decode for one iterator; filesystems are opened here, after any fork."""

    def __init__(self, index: Index, threads: int) -> None:
        self._index, self._threads = index, threads
        self._fs, self._root = storage.open_folder(index.url)
        self._readers = ThreadPoolExecutor(READS_IN_FLIGHT, thread_name_prefix="ul-scale-read")
        self._decoders = ThreadPoolExecutor(threads, thread_name_prefix="ul-scale-decode")

    def __enter__(self) -> "_Workers":
        return self

    def __exit__(self, *exc: object) -> None:
        self._readers.shutdown(wait=False, cancel_futures=True)
        self._decoders.shutdown(wait=False, cancel_futures=True)

    def read(self, start: int, stop: int) -> Future[list[Sample]]:
        """Begin to read consecutive samples of one shard."""
        return self._readers.submit(self._read, start, stop)

    def _read(self, start: int, stop: int) -> list[Sample]:
        index = self._index
        path = f"{self._root}/{index.shards[int(index.shard[start])].name}"
        begin = index.offset[start:stop].astype(np.int64)
        end = int(begin[-1]) + int(index.size[stop - 1])
        data = memoryview(storage.read_range(self._fs, path, int(begin[0]), end))
        samples = []
        for name, at, members in zip(
            index.names(start, stop), (begin - begin[0]).tolist(), index.members[start:stop].tolist()
        ):
            parts = {
                part: data[at + offset : at + offset + length]
                for part, (offset, length) in zip(index.parts, members)
                if offset != ABSENT
            }
            samples.append(Sample(name, parts))
        return samples

    def decode(self, decode: Decode, samples: list[Sample], draws: Sequence[Draw | None]) -> list[Example]:
        """Decode samples, dealt evenly to the decoding threads."""
        if self._threads == 1:
            return [decode(sample, draw) for sample, draw in zip(samples, draws)]
        return list(self._decoders.map(decode, samples, draws))


def _collate(names: list[str], examples: list[Example], uniforms: np.ndarray, weight: np.ndarray) -> Batch:
    """Stack decoded samples. All is numpy's: torch would start threads of its own here."""
    arrays = [example.array for example in examples]
    for name, array in zip(names, arrays):
        if array.shape != arrays[0].shape:
            raise ValueError(f"{name} has shape {array.shape}, {names[0]} has {arrays[0].shape}")
    batch = Batch(
        label=torch.from_numpy(np.array([example.label for example in examples], np.int64)),
        uniform=torch.from_numpy(uniforms),
        weight=torch.from_numpy(weight.copy()),
        keys=names,
    )
    if examples[0].text is not None:
        batch["text"] = [example.text or "" for example in examples]
    if arrays[0].dtype == np.uint8:
        batch["x"] = torch.from_numpy(to_unit_range(arrays))
    else:
        batch["z_clean"] = torch.from_numpy(np.stack(arrays).astype(np.float32, copy=False))
    return batch


def _in_background(source: Generator[Batch, None, None], depth: int) -> Generator[Batch, None, None]:
    """Yield what `source` yields, made up to `depth` items ahead in a thread that ends with this iterator."""
    items: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(item: Batch | BaseException | None) -> None:
        while not stop.is_set():
            try:
                return items.put(item, timeout=0.1)
            except queue.Full:
                pass

    def work() -> None:
        try:
            for batch in source:
                put(batch)
                if stop.is_set():
                    break
            source.close()
            put(None)
        except BaseException as error:  # it belongs to whoever waits for the batch
            put(error)

    thread = threading.Thread(target=work, name="ul-scale-batches", daemon=True)
    thread.start()
    try:
        while (item := items.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        if thread is not threading.current_thread():
            thread.join(timeout=10)
