"""From shards to batches: a rank's rows, made in worker processes or in threads, collated ahead of time.

The order comes from `plan.LanePlan`; this module does the work of a rank's lane slots. A batch depends on
(index, config, seed, step, slots) only, so a stream can be started at any step.
"""

import sys
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import NotRequired, TypedDict

import numpy as np
import torch

from ul_scale.data.ahead import ahead
from ul_scale.data.config import DataConfig
from ul_scale.data.decode import make_decoder
from ul_scale.data.index import Index
from ul_scale.data.plan import LanePlan, LaneSlot, default_lanes
from ul_scale.data.produce import Job, LaneJob, OrderJob, Rows
from ul_scale.data.sample import BadSample
from ul_scale.data.worker import Worker, memory_bytes


class Batch(TypedDict):
    """A rank's batch: the lane batches of its slots, one after the other. It has either x or z_clean.

    x: images, float32 in [-1, 1], (B, C, H, W), or clips, (B, C, T, H, W).
    z_clean: latents, float32, (B, C, h, w) or (B, C, t, h, w).
    label: class ids, int64, -1 where a sample has none, (B,).
    uniform: a number in [0, 1) per sample and epoch that decides label dropout, float64, (B,).
    weight: weight of each sample's loss, float32, (B,): 0 for the samples of a surplus slot.
    replaced: 1 where another sample took the place of one that cannot be used, else 0, float32, (B,).
    keys: names of the samples as planned, `dataset/shard/key`.
    text: captions, where they are asked for.
    text_embedding: of the captions' tokens, where they are asked for, float32, (B, n, width); n is that of
        the longest, and zeros follow the shorter ones.
    text_mask: True where there is a token, (B, n).
    z_given: latents of given frames, encoded alone, where the set has them, float32, (B, C, t, h, w).
    """

    x: NotRequired[torch.Tensor]
    z_clean: NotRequired[torch.Tensor]
    label: torch.Tensor
    uniform: torch.Tensor
    weight: torch.Tensor
    replaced: torch.Tensor
    keys: list[str]
    text: NotRequired[list[str]]
    text_embedding: NotRequired[torch.Tensor]
    text_mask: NotRequired[torch.Tensor]
    z_given: NotRequired[torch.Tensor]


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


def tell(name: str, reason: str) -> None:
    """Write a line about a sample that cannot be used to standard error."""
    print(f"bad sample {reason if reason.startswith(name) else f'{name}: {reason}'}", file=sys.stderr)


class LaneStream:
    """The batches of a rank's lane slots.

    Args:
        index: the set, as opened by `open_index`.
        plan: its order, as made by `make_plan`.
        config: how samples are read and transformed.
        slots: the rank's slots, as dealt by `lane_slots`.
        on_bad: told once of each sample that cannot be used, its name and the reason.

    Raises:
        ValueError: if the set does not fit the config, or its windows the memory they may take.
    """

    def __init__(
        self,
        index: Index,
        plan: LanePlan,
        config: DataConfig,
        slots: list[LaneSlot],
        on_bad: Callable[[str, str], object] = tell,
    ) -> None:
        self.index, self.plan, self.config, self.slots, self.on_bad = index, plan, config, slots, on_bad
        self._crew: _Crew | None = None
        self._told = set[str]()
        make_decoder(index.parts, config, index.url)
        lanes = len({slot.lane for slot in slots})
        needed = self._window_bytes(lanes)
        if needed > config.max_window_bytes:
            raise ValueError(
                f"{lanes} lanes with windows of {plan.window_chunks} chunks take up to {needed:,} bytes, "
                f"data.max_window_bytes is {config.max_window_bytes:,}: raise it, use more ranks, or start a "
                "run with smaller data.window_chunks or data.chunk_bytes"
            )

    def batches(self, start_step: int = 0) -> Generator[Batch, None, None]:
        """Yield the batches of `start_step` and all later steps, made ahead in the background.

        What fails in the background is raised here. Closing or dropping the iterator ends threads and
        processes.

        Raises:
            OSError: if a range cannot be read after several tries, naming URL, range and cause.
            ValueError: naming dataset, shard and key, if no sample can take the place of a bad one.
            WorkerDied: if a worker process dies again and again.
        """
        # Each lane's rows are made once, also where it fills several slots.
        lanes = list(dict.fromkeys(slot.lane for slot in self.slots))
        size = self.plan.lane_batch_size
        order = np.concatenate([lanes.index(slot.lane) * size + np.arange(size) for slot in self.slots])
        weight = np.repeat(np.array([slot.weight for slot in self.slots], np.float32), size)
        # Contiguous runs of lanes, so that the workers' rows one after the other are the lanes'.
        processes = _processes(self.index, self.config, len(lanes))
        count = processes or 1
        runs = [lanes[k * len(lanes) // count : (k + 1) * len(lanes) // count] for k in range(count)]
        jobs = [LaneJob(self.index, self.config, self.plan, tuple(run)) for run in runs]
        crew = self._crew = _Crew(jobs, processes)

        def make() -> Generator[Batch, None, None]:
            for parts in crew.steps(start_step, self.config.prefetch_steps):
                for name, reason in [bad for part in parts for bad in part.bad]:
                    if name not in self._told:
                        self._told.add(name)
                        self.on_bad(name, reason)
                yield _collate(parts, order, weight)

        def end() -> None:
            crew.end()
            self._crew = None

        # Processes hold ready what they make.
        return ahead(make(), 1 if processes else self.config.prefetch_steps, end)

    def memory_bytes(self) -> int:
        """Return what the worker processes hold in memory now, bytes."""
        crew = self._crew
        return memory_bytes(crew.workers) if crew else 0

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
    index: Index,
    config: DataConfig,
    start: int = 0,
    stop: int | None = None,
    *,
    batch_size: int,
    on_bad: Callable[[str, str], object] | None = None,
) -> Iterator[Batch]:
    """Yield the samples `start` to `stop` in the index's order, once and unaugmented.

    A batch may be short: the last one, and one with samples that cannot be used, which are left out.
    `uniform` is 1, so that no label is dropped, and `weight` is 1.

    Args:
        index: the set.
        config: how samples are read and decoded.
        start: number of the first sample.
        stop: one past the last; by default, of the set.
        batch_size: samples per batch.
        on_bad: told of each sample that cannot be used, its name and the reason; without it, the first ends
            the iteration.

    Raises:
        BadSample: without `on_bad`.
        OSError, WorkerDied: as `LaneStream.batches`.
    """
    make_decoder(index.parts, config, index.url)
    end = len(index) if stop is None else min(stop, len(index))
    processes = _processes(index, config, -(-(end - start) // batch_size))
    count = processes or 1
    jobs = [OrderJob(index, config, start, end, batch_size, first, count) for first in range(count)]
    crew = _Crew(jobs, processes)

    def make() -> Generator[Batch, None, None]:
        for parts in crew.steps(0, config.prefetch_steps):
            for rows in parts:
                for name, reason in rows.bad:
                    if on_bad is None:
                        raise BadSample(reason)
                    on_bad(name, reason)
                if rows.names:
                    every = np.arange(len(rows.names))
                    yield _collate([rows], every, np.ones(len(every), np.float32))

    return ahead(make(), 1 if processes else config.prefetch_steps, crew.end)


def _processes(index: Index, config: DataConfig, most: int) -> int:
    """Return how many worker processes there are to be; 0 for a thread of this one."""
    return 0 if index.url.startswith("memory:") else min(config.workers, max(most, 0))


class _Crew:
    """Who does the jobs: a worker process each, or, with none, the calling thread."""

    def __init__(self, jobs: Sequence[Job], processes: int) -> None:
        self.workers: list[Worker] = []
        self._jobs, self._processes, self._stop = jobs, processes, threading.Event()

    def steps(self, first: int, depth: int) -> Generator[list[Rows], None, None]:
        """Yield each step's rows of all jobs, until one has no more."""
        if not self._processes:
            yield from ([rows] for rows in self._jobs[0].rows(first, self._stop))
            return
        try:
            for job in self._jobs:
                self.workers.append(Worker(job, first, depth))
                if self._stop.is_set():  # `end` may have missed it
                    return
            while True:
                parts = []
                for worker in self.workers:
                    if (rows := worker.next()) is None:
                        break
                    parts.append(rows)
                yield parts
                if len(parts) < len(self.workers):
                    return
        finally:
            self.end()

    def end(self) -> None:
        """End the processes; reads that fail are not tried again."""
        self._stop.set()
        for worker in self.workers:
            worker.close()


def _collate(parts: list[Rows], order: np.ndarray, weight: np.ndarray) -> Batch:
    """Lay workers' rows one after the other and deal them to slots.

    All is numpy's: torch would start threads of its own here.
    """
    names = [name for part in parts for name in part.names]
    dealt = len(order) != len(names)

    def joined(arrays: list[np.ndarray]) -> torch.Tensor:
        array = np.concatenate(arrays)
        return torch.from_numpy(array[order] if dealt else array)

    batch = Batch(
        label=joined([part.label for part in parts]),
        uniform=joined([part.uniform for part in parts]),
        weight=torch.from_numpy(weight.copy()),
        replaced=joined([part.replaced.astype(np.float32) for part in parts]),
        keys=[names[row] for row in order],
    )
    if parts[0].text is not None:
        text = [line for part in parts for line in part.text or ()]
        batch["text"] = [text[row] for row in order]
    if parts[0].embedding is not None:
        tokens = [array for part in parts for array in part.embedding or ()]
        padded, mask = _pad([tokens[row] for row in order], names[0])
        batch["text_embedding"], batch["text_mask"] = torch.from_numpy(padded), torch.from_numpy(mask)
    if parts[0].z_given is not None:
        given = [part.z_given for part in parts if part.z_given is not None]
        batch["z_given"] = joined(_alike([array.astype(np.float32, copy=False) for array in given], names[0]))
    arrays = _alike([part.array for part in parts], names[0])
    if arrays[0].dtype == np.uint8:
        batch["x"] = joined([to_unit_range(array) for array in arrays])
    else:
        batch["z_clean"] = joined([array.astype(np.float32, copy=False) for array in arrays])
    return batch


def _alike(arrays: list[np.ndarray], name: str) -> list[np.ndarray]:
    """Return workers' arrays, if their rows have one shape."""
    shapes = {array.shape[1:] for array in arrays}
    if len(shapes) > 1:
        raise ValueError(f"{name} and others differ in shape: {', '.join(map(str, sorted(shapes)))}")
    return arrays


def _pad(tokens: list[np.ndarray], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return embeddings (n, width) as one array (B, longest n, width), float32, and where tokens are."""
    widths = {array.shape[1] for array in tokens}
    if len(widths) > 1:
        raise ValueError(f"{name} and others have embeddings of widths {', '.join(map(str, sorted(widths)))}")
    counts = np.array([len(array) for array in tokens])
    mask = np.arange(max(counts.max(), 1)) < counts[:, None]
    padded = np.zeros((*mask.shape, *widths), np.float32)
    for row, array in zip(padded, tokens):
        row[: len(array)] = array
    return padded, mask


def to_unit_range(pixels: np.ndarray) -> np.ndarray:
    """Return uint8 images (B, H, W, C), or clips (B, T, H, W, C), as float32 in [-1, 1], channels second."""
    out: np.ndarray = np.divide(np.moveaxis(pixels, -1, 1), np.float32(127.5), dtype=np.float32, order="C")
    out -= 1
    return out
