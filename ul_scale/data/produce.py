"""From samples to rows of a batch: fetched, decoded in threads, and replaced where they are bad.

A job says which rows, and gives them from any step on. It runs in a thread of the training process, or in a
process of its own (``worker.py``), which is light: torch is imported only where JPEGs are resized.
"""

import threading
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice, pairwise
from types import TracebackType
from typing import TypeVar

import numpy as np

from ul_scale.data.config import DataConfig
from ul_scale.data.decode import make_decoder
from ul_scale.data.fetch import Fetcher, LaneReader, Taken
from ul_scale.data.index import Index
from ul_scale.data.plan import LanePlan, cut_chunks
from ul_scale.data.sample import BadSample, Draw, Example, Sample
from ul_scale.data.storage import ReadPolicy
from ul_scale.keyed import uniform

T = TypeVar("T")
NEIGHBOURS = 64
"""So many samples after a bad one are tried in its place; if none can be used, it is no accident."""


@dataclass
class Rows:
    """Consecutive rows of a batch.

    Attributes:
        names: of the samples that the plan says, also where others took their places.
        array: uint8 (n, H, W, C) or (n, T, H, W, C), or latents, floats.
        label: int64, (n,).
        uniform: in [0, 1), float64, (n,).
        replaced: whether another sample took the place, (n,).
        text: captions, where they are asked for.
        embedding: of the captions' tokens, floats (tokens, width) each, where they are asked for.
        z_given: latents of given frames, floats (n, C, t, h, w), where the set has them.
        bad: of samples that cannot be used: name and reason.
    """

    names: list[str]
    array: np.ndarray
    label: np.ndarray
    uniform: np.ndarray
    replaced: np.ndarray
    text: list[str] | None
    embedding: list[np.ndarray] | None
    z_given: np.ndarray | None
    bad: list[tuple[str, str]]


@dataclass(frozen=True)
class LaneJob:
    """The rows of some lanes, a step at a time."""

    index: Index
    config: DataConfig
    plan: LanePlan
    lanes: tuple[int, ...]

    def rows(self, step: int, ending: threading.Event) -> Generator[Rows, None, None]:
        """Yield the rows of ``step`` and of all later ones; reads end soon once ``ending`` is set."""
        with _Producer(self.index, self.config, self.plan.seed, ending) as producer:
            readers = [LaneReader(self.plan, lane, step, producer.fetcher) for lane in self.lanes]
            while True:
                yield producer.make([taken for reader in readers for taken in reader.take(step)])
                step += 1


@dataclass(frozen=True)
class OrderJob:
    """Every ``stride``-th batch of the samples ``start`` to ``stop`` in the index's order, unaugmented.

    Samples that cannot be used are left out.
    """

    index: Index
    config: DataConfig
    start: int
    stop: int
    batch_size: int
    first: int
    stride: int

    def rows(self, step: int, ending: threading.Event) -> Generator[Rows, None, None]:
        """Yield the batches ``first + step * stride`` and so on to the last, as ``LaneJob.rows``."""
        begin = self.start + (self.first + step * self.stride) * self.batch_size
        batches = [
            (at, min(at + self.batch_size, self.stop))
            for at in range(begin, self.stop, self.stride * self.batch_size)
        ]
        with _Producer(self.index, self.config, None, ending) as producer:
            pending = deque[list[Future[list[Sample]]]]()
            to_read = iter(batches)
            for start, stop in batches:
                wanted = max(1, self.config.prefetch_steps) + 1 - len(pending)
                pending.extend(self._begin(producer.fetcher, *batch) for batch in islice(to_read, wanted))
                samples = [sample for read in pending.popleft() for sample in read.result()]
                yield producer.make(
                    [Taken(number, None, sample) for number, sample in zip(range(start, stop), samples)]
                )

    def _begin(self, fetcher: Fetcher, start: int, stop: int) -> list[Future[list[Sample]]]:
        part, index = slice(start, stop), self.index
        bounds = cut_chunks(
            index.shard[part], index.offset[part], index.size[part], self.config.chunk_bytes, stop - start
        )
        return [fetcher.begin(start + one, start + two) for one, two in pairwise(bounds.tolist())]


Job = LaneJob | OrderJob


class _Producer:
    """Decodes what was fetched; with a seed, augmented, and with neighbours in the places of bad samples."""

    def __init__(self, index: Index, config: DataConfig, seed: int | None, ending: threading.Event) -> None:
        self.fetcher = Fetcher(index, ReadPolicy.of(config), ending)
        self._index, self._seed = index, seed
        self._decode = make_decoder(index.parts, config, index.url)
        self._threads = ThreadPoolExecutor(config.threads, thread_name_prefix="ul-scale-decode")

    def __enter__(self) -> "_Producer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.fetcher.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def make(self, taken: list[Taken]) -> Rows:
        """Return the rows of these samples.

        Raises:
            OSError: if samples cannot be read.
            BadSample: if so many in a row cannot be decoded that there is no neighbour.
        """
        outcomes = list(self._threads.map(self._try, taken))
        bad, rows = list[tuple[str, str]](), list[tuple[Taken, Example, bool]]()
        for one, outcome in zip(taken, outcomes):
            if isinstance(outcome, Example):
                rows.append((one, outcome, False))
                continue
            bad.append((one.sample.name, str(outcome)))
            if self._seed is not None:
                rows.append((one, self._neighbour(one, outcome), True))
        return Rows(
            names=[one.sample.name for one, _, _ in rows],
            array=_stack(rows, [example.array for _, example, _ in rows]),
            label=np.array([example.label for _, example, _ in rows], np.int64),
            uniform=np.array([self._uniform(one) for one, _, _ in rows], np.float64),
            replaced=np.array([replaced for _, _, replaced in rows], bool),
            text=_all([example.text for _, example, _ in rows]),
            embedding=_all([example.embedding for _, example, _ in rows]),
            z_given=_stack(rows, given) if (given := _all([e.z_given for _, e, _ in rows])) else None,
            bad=bad,
        )

    def _draw(self, taken: Taken) -> Draw | None:
        return None if self._seed is None or taken.epoch is None else Draw(self._seed, taken.epoch)

    def _uniform(self, taken: Taken) -> float:
        if self._seed is None or taken.epoch is None:
            return 1.0
        return uniform(self._seed, "training", taken.epoch, taken.sample.name)

    def _try(self, taken: Taken) -> Example | BadSample:
        try:
            return self._decode(taken.sample, self._draw(taken))
        except BadSample as error:
            return error

    def _neighbour(self, taken: Taken, error: BadSample) -> Example:
        """Return the next sample of the index that can be used: a function of the set alone."""
        for distance in range(1, NEIGHBOURS + 1):
            number = (taken.number + distance) % len(self._index)
            [sample] = self.fetcher.read(number, number + 1)
            example = self._try(Taken(number, taken.epoch, sample))
            if isinstance(example, Example):
                return example
        raise BadSample(f"{error}; nor can any of the {NEIGHBOURS} samples after it be used")


def _stack(rows: list[tuple[Taken, Example, bool]], arrays: list[np.ndarray]) -> np.ndarray:
    for (taken, _, _), array in zip(rows, arrays):
        if array.shape != arrays[0].shape:
            first = rows[0][0].sample.name
            raise ValueError(f"{taken.sample.name} has shape {array.shape}, {first} has {arrays[0].shape}")
    return np.stack(arrays) if arrays else np.empty(0, np.uint8)


def _all(values: list[T | None]) -> list[T] | None:
    """Return values that all rows have, None if they have none: a set decides it, not a sample."""
    present = [value for value in values if value is not None]
    return present if present and len(present) == len(values) else None
