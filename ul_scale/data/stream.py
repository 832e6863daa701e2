"""From shards to batches: read whole windows by range requests, decode, collate, all in the background.

The order comes from `plan.LanePlan`; this module does the work of a rank's lane slots. A batch depends on
(index, config, seed, step, slots) only, so a stream can be started at any step.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import NamedTuple, NotRequired, TypedDict

import numpy as np
import torch

from ul_scale.data import storage
from ul_scale.data.decode import IMAGE_PARTS, LATENT_PART, Buffer, decode_image, decode_npy
from ul_scale.data.index import ABSENT, Index
from ul_scale.data.plan import LanePlan, LaneSlot, cut_chunks, default_lanes
from ul_scale.data.transforms import center_crop, is_flipped, to_unit_range
from ul_scale.keyed import uniform

# Range requests under way at a time; a bucket answers each in tens of milliseconds.
READS_IN_FLIGHT = 8
_NO_IDENTITY = {"identity": False}


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, and in which order."""

    train: str | None = field(default=None, metadata=_NO_IDENTITY)
    """URL of the folder of training shards; enters a run's identity by its fingerprint."""
    val: str | None = field(default=None, metadata=_NO_IDENTITY)
    """URL of the folder of held-out shards."""
    image_size: int | None = None
    """Height and width of images, pixels; none for latents."""
    channels: int = 3
    """Channels of images: 1 (grey) or 3 (RGB)."""
    horizontal_flip: bool = False
    """Mirror half of the training images, chosen anew each epoch."""
    lanes: int | None = None
    """Lanes that the order is made of; by default the largest divisor of the batch that is at most 64."""
    chunk_bytes: int = 4_000_000
    """Longest run of samples that is read by one request, bytes."""
    window_chunks: int = 8
    """Chunks over which a lane's samples are shuffled."""
    threads: int = field(default=1, metadata=_NO_IDENTITY)
    """Decoding threads of a rank."""
    prefetch_steps: int = field(default=4, metadata=_NO_IDENTITY)
    """Batches that are held ready."""
    max_window_bytes: int = field(default=5_000_000_000, metadata=_NO_IDENTITY)
    """Memory for the windows of a rank's lanes, those in use and those read ahead, bytes."""

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise ValueError(f"data.channels is {self.channels}; expected 1 (grey) or 3 (RGB)")
        for name in ("image_size", "lanes"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"data.{name} is {getattr(self, name)}; expected at least 1, or none")
        for name in ("chunk_bytes", "window_chunks", "threads", "prefetch_steps", "max_window_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name} is {getattr(self, name)}; expected at least 1")


class Batch(TypedDict):
    """A rank's batch: the lane batches of its slots, one after the other. It has either x or z_clean.

    x: images, float32 in [-1, 1], (B, C, H, W).  z_clean: latents, float32, (B, C, h, w) or (B, C, t, h, w).
    label: class ids, int64, -1 where a sample has none, (B,).
    uniform: a number in [0, 1) per sample and epoch that decides label dropout, float64, (B,).
    weight: weight of each sample's loss, float32, (B,): 0 for the samples of a surplus slot.
    keys: names of the samples, `dataset/shard/key`.
    """

    x: NotRequired[torch.Tensor]
    z_clean: NotRequired[torch.Tensor]
    label: torch.Tensor
    uniform: torch.Tensor
    weight: torch.Tensor
    keys: list[str]


class Sample(NamedTuple):
    """A sample's name and the bytes of its parts."""

    name: str
    parts: Mapping[str, Buffer]


Decode = Callable[[Sample, bool], np.ndarray]
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
        self._decode = _decoder(index, config)
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
        seed, flip = self.plan.seed, self.config.horizontal_flip
        with _Workers(self.index, self.config.threads) as workers:
            readers = [_LaneReader(self.plan, lane, step, workers.read) for lane in lanes]
            while True:
                taken = [item for reader in readers for item in reader.take(step)]
                samples = [sample for _, sample in taken]
                flips = [flip and is_flipped(seed, epoch, sample.name) for epoch, sample in taken]
                uniforms = np.array([uniform(seed, "training", epoch, name) for epoch, (name, _) in taken])
                arrays = workers.decode(self._decode, samples, flips)
                yield _collate([samples[i] for i in rows], [arrays[i] for i in rows], uniforms[rows], weight)
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
    source = _make_in_order(index, _decoder(index, config), chunks, batch_size, config.threads)
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
            arrays = workers.decode(decode, samples, [False] * len(samples))
            yield _collate(samples, arrays, np.ones(len(samples)), np.ones(len(samples), np.float32))


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

    def decode(self, decode: Decode, samples: list[Sample], flips: list[bool]) -> list[np.ndarray]:
        """Decode samples, dealt evenly to the decoding threads."""
        if self._threads == 1:
            return [decode(sample, flip) for sample, flip in zip(samples, flips)]

        def every(first: int) -> list[np.ndarray]:
            own = slice(first, None, self._threads)
            return [decode(sample, flip) for sample, flip in zip(samples[own], flips[own])]

        arrays: list[np.ndarray] = [np.empty(0)] * len(samples)
        for first, decoded in enumerate(self._decoders.map(every, range(self._threads))):
            arrays[first :: self._threads] = decoded
        return arrays


def _decoder(index: Index, config: DataConfig) -> Decode:
    """Return the function that decodes this set's samples, (sample, mirrored) → array."""
    if LATENT_PART in index.parts:
        if config.horizontal_flip:
            raise ValueError(f"data.horizontal_flip is set, but {index.url} holds latents, not images")
        return _decode_latent
    if not set(IMAGE_PARTS) & set(index.parts):
        expected = ", ".join([*IMAGE_PARTS, LATENT_PART])
        found = ", ".join(index.parts)
        raise ValueError(f"{index.url}: the samples have {found}; expected one of {expected}")
    size, channels = config.image_size, config.channels
    if size is None:
        raise ValueError(f"data.image_size is not set, and {index.url} holds images")

    def decode(sample: Sample, flip: bool) -> np.ndarray:
        part = next((part for part in IMAGE_PARTS if part in sample.parts), None)
        if part is None:
            raise ValueError(f"{sample.name}: has no image, only {', '.join(sample.parts)}")
        try:
            pixels = center_crop(decode_image(sample.parts[part], channels), size)
        except ValueError as error:
            raise ValueError(f"{sample.name}.{part}: {error}") from error
        return pixels[:, ::-1] if flip else pixels

    return decode


def _decode_latent(sample: Sample, flip: bool) -> np.ndarray:
    if LATENT_PART not in sample.parts:
        raise ValueError(f"{sample.name}: has no {LATENT_PART}, only {', '.join(sample.parts)}")
    try:
        return decode_npy(sample.parts[LATENT_PART])
    except ValueError as error:
        raise ValueError(f"{sample.name}.{LATENT_PART}: {error}") from error


def _label(sample: Sample) -> int:
    text = bytes(sample.parts.get("cls", b"-1"))
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{sample.name}.cls: {text[:40]!r} is not a class id") from None


def _collate(
    samples: list[Sample], arrays: list[np.ndarray], uniforms: np.ndarray, weight: np.ndarray
) -> Batch:
    """Stack decoded samples. All is numpy's: torch would start threads of its own here."""
    for sample, array in zip(samples, arrays):
        if array.shape != arrays[0].shape:
            first = samples[0].name
            raise ValueError(f"{sample.name} has shape {array.shape}, {first} has {arrays[0].shape}")
    batch = Batch(
        label=torch.from_numpy(np.array([_label(sample) for sample in samples], np.int64)),
        uniform=torch.from_numpy(uniforms),
        weight=torch.from_numpy(weight.copy()),
        keys=[sample.name for sample in samples],
    )
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
