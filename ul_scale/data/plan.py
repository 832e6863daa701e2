"""Which sample goes to which lane at which step: arithmetic on counts, no I/O.

The samples of a set are cut into chunks (consecutive samples of one tar, one range request each). Each
epoch permutes the chunks and cuts the resulting sequence of N samples into L contiguous pieces, one per
lane. A lane goes through its piece window by window, a window being `window_chunks` consecutive chunks
of the piece, and permutes the samples within each. So the position of a lane at any step is a division,
and neither the number of ranks nor the past has any part in it.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ul_scale.keyed import permutation

Ints = npt.NDArray[np.int64]

MAX_DEFAULT_LANES = 64
# A lane gets at least this many chunks (data permitting), or it would be permuted as one block.
CHUNKS_PER_LANE = 8
_CUT_SAMPLES = 1_000_000


def cut_chunks(
    shard: npt.ArrayLike, offset: npt.ArrayLike, size: npt.ArrayLike, chunk_bytes: int, max_samples: int
) -> Ints:
    """Cut samples into runs that one range request reads.

    Args:
        shard: number of each sample's shard, ascending, [N].
        offset: byte at which each sample starts in its shard, ascending within a shard, [N].
        size: bytes of each sample, [N].
        chunk_bytes: longest byte range of a chunk, unless a single sample is longer.
        max_samples: most samples in a chunk.

    Returns:
        Chunk c holds the samples bounds[c] to bounds[c + 1], [chunks + 1].
    """
    shard, offset, size = np.asarray(shard), np.asarray(offset), np.asarray(size)
    num_samples, first = len(shard), 0
    bounds = []
    # Whole shards, some at a time: the arrays may be mapped files larger than memory.
    while first < num_samples:
        last = min(first + _CUT_SAMPLES, num_samples)
        if last < num_samples:
            last = int(np.searchsorted(shard, shard[last]))
        if last <= first:
            last = int(np.searchsorted(shard, shard[first], side="right"))
        block = slice(first, last)
        bounds.append(first + _cut_shards(shard[block], offset[block], size[block], chunk_bytes, max_samples))
        first = last
    return np.concatenate([*bounds, [num_samples]]).astype(np.int64)


def _cut_shards(shard: np.ndarray, offset: np.ndarray, size: np.ndarray, chunk_bytes: int, most: int) -> Ints:
    """Return the first sample of each chunk, at most `most` samples long, of some shards."""
    offset = offset.astype(np.int64)
    end = offset + size.astype(np.int64)
    # The shards laid end to end, so that one ascending coordinate serves them all.
    start = np.flatnonzero(np.append(True, shard[1:] != shard[:-1]))
    stop = np.append(start[1:], len(shard))
    base = np.cumsum(end[stop - 1]) - end[stop - 1]
    begin, end = offset + np.repeat(base, stop - start), end + np.repeat(base, stop - start)
    cuts = [start]
    while start.size:  # one round cuts one chunk off every shard
        cut = np.searchsorted(end, begin[start] + chunk_bytes, side="right")
        cut = np.clip(cut, start + 1, np.minimum(start + most, stop))
        start, stop = cut[cut < stop], stop[cut < stop]
        cuts.append(start)
    return np.sort(np.concatenate(cuts))


def default_lanes(batch_size: int, num_samples: int) -> int:
    """Return the largest divisor of the global batch that is at most 64 and at most the set's size."""
    top = min(MAX_DEFAULT_LANES, num_samples, batch_size)
    return next((lanes for lanes in range(top, 0, -1) if batch_size % lanes == 0), 1)


class LaneSlot(NamedTuple):
    """A place in a rank's batch: the lane that fills it and the weight of its loss."""

    lane: int
    weight: float


def lane_slots(lanes: int, rank: int, world_size: int) -> list[LaneSlot]:
    """Return the ⌈lanes / world_size⌉ slots of a data-parallel rank.

    Lanes are dealt in contiguous runs whose lengths differ by at most one; a rank that is one short
    repeats a lane of its own, which costs no reading, with weight 0.

    Raises:
        ValueError: if there are more ranks than lanes.
    """
    if world_size > lanes:
        raise ValueError(
            f"{world_size} data-parallel ranks for {lanes} lanes: use at most {lanes} ranks, or start a run "
            f"with data.lanes of at least {world_size} (it must divide the batch)"
        )
    own = range(rank * lanes // world_size, (rank + 1) * lanes // world_size)
    surplus = -(-lanes // world_size) - len(own)
    return [LaneSlot(lane, 1.0) for lane in own] + [LaneSlot(own[0], 0.0)] * surplus


@dataclass(frozen=True, eq=False)
class Window:
    """A run of a lane's epoch that is read as a whole and permuted within itself.

    Attributes:
        start: place of its first sample in the lane's epoch.
        segments: the first and one past the last sample of each byte range to read, in index order.
        order: the permutation, as positions in the concatenated segments.
        samples: the samples of the concatenated segments.
    """

    lane: int
    epoch: int
    start: int
    segments: list[tuple[int, int]]
    order: Ints
    samples: Ints

    @property
    def stop(self) -> int:
        return self.start + len(self.order)


class LanePlan:
    """The order of a data set for one run: a pure function of its arguments.

    Args:
        shard, offset, size: the index's arrays, one entry per sample.
        seed: the run's seed.
        lanes: number of lanes L; divides the batch and is at most the number of samples.
        batch_size: global batch B; a lane batch has B / L samples.
        chunk_bytes: longest byte range that is read at once.
        window_chunks: chunks over which a lane's samples are permuted.

    Raises:
        ValueError: if the numbers do not go together; the message names the nearest that do.
    """

    def __init__(
        self,
        shard: npt.ArrayLike,
        offset: npt.ArrayLike,
        size: npt.ArrayLike,
        *,
        seed: int,
        lanes: int,
        batch_size: int,
        chunk_bytes: int,
        window_chunks: int,
    ) -> None:
        self.num_samples = len(np.asarray(shard))
        _check_lanes(lanes, batch_size, self.num_samples)
        self.seed, self.lanes, self.batch_size, self.window_chunks = seed, lanes, batch_size, window_chunks
        self.lane_batch_size = batch_size // lanes
        max_samples = max(1, self.num_samples // (CHUNKS_PER_LANE * lanes))
        self.chunk_bounds = cut_chunks(shard, offset, size, chunk_bytes, max_samples)
        self._forget()

    def _forget(self) -> None:
        # Lanes drift apart by a sample an epoch and windows are read ahead: a few epochs are live at once.
        self._chunk_sequence = lru_cache(maxsize=4)(self._permute_chunks)
        self._recent: list[Window | None] = [None] * self.lanes

    def __getstate__(self) -> dict[str, Any]:
        """For worker processes: what it holds ready stays behind."""
        return {name: value for name, value in vars(self).items() if name[0] != "_"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    def lane_bounds(self, lane: int) -> tuple[int, int]:
        """Return the piece of every epoch's sample sequence that is the lane's."""
        return lane * self.num_samples // self.lanes, (lane + 1) * self.num_samples // self.lanes

    def lane_batch(self, step: int, lane: int) -> tuple[Ints, Ints]:
        """Return the lane epoch and the number of each sample of a lane batch, [b] and [b]."""
        pieces = self.pieces(step, lane)
        epoch = np.concatenate([np.full(stop - start, window.epoch) for window, start, stop in pieces])
        sample = np.concatenate([window.samples[window.order[start:stop]] for window, start, stop in pieces])
        return epoch, sample

    def pieces(self, step: int, lane: int) -> list[tuple[Window, int, int]]:
        """Return a lane batch as stretches (window, start, stop) of windows; it may straddle epochs."""
        first, last = self.lane_bounds(lane)
        epoch, place = divmod(step * self.lane_batch_size, last - first)
        wanted, pieces = self.lane_batch_size, []
        while wanted:
            window = self._recent[lane]
            if window is None or window.epoch != epoch or not window.start <= place < window.stop:
                window = self._recent[lane] = self.window_at(epoch, lane, place)
            taken = min(wanted, window.stop - place)
            pieces.append((window, place - window.start, place - window.start + taken))
            wanted, place = wanted - taken, place + taken
            if place == last - first:
                epoch, place = epoch + 1, 0
        return pieces

    def window_after(self, window: Window) -> Window:
        """Return the window that the lane reads next."""
        first, last = self.lane_bounds(window.lane)
        if window.stop == last - first:
            return self.window_at(window.epoch + 1, window.lane, 0)
        return self.window_at(window.epoch, window.lane, window.stop)

    def window_at(self, epoch: int, lane: int, place: int) -> Window:
        """Return the window that holds the sample at a place of the lane's epoch."""
        first, last = self.lane_bounds(lane)
        chunks, ends = self._chunk_sequence(epoch)
        # Numbers in the epoch's sequence of chunks: the lane's first, the sample's, the lane's last.
        lane_begin, here, lane_end = np.searchsorted(ends, [first, first + place, last - 1], side="right")
        number = int(here - lane_begin) // self.window_chunks
        begin = int(lane_begin) + number * self.window_chunks
        stop = min(begin + self.window_chunks, int(lane_end) + 1)

        chunk, chunk_end = chunks[begin:stop], ends[begin:stop]
        chunk_begin = chunk_end - (self.chunk_bounds[chunk + 1] - self.chunk_bounds[chunk])
        # The first and last chunk of a lane may belong to it only in part.
        from_ = self.chunk_bounds[chunk] + np.maximum(chunk_begin, first) - chunk_begin
        to = self.chunk_bounds[chunk] + np.minimum(chunk_end, last) - chunk_begin
        samples = np.concatenate([np.arange(a, b) for a, b in zip(from_, to)])
        return Window(
            lane=lane,
            epoch=epoch,
            start=max(int(chunk_begin[0]), first) - first,
            segments=list(zip(from_.tolist(), to.tolist())),
            order=permutation(len(samples), self.seed, "window", epoch, lane, number),
            samples=samples,
        )

    def _permute_chunks(self, epoch: int) -> tuple[Ints, Ints]:
        """Return an epoch's sequence of chunks, and the samples up to the end of each."""
        chunks = permutation(len(self.chunk_bounds) - 1, self.seed, "chunks", epoch)
        return chunks, np.cumsum(np.diff(self.chunk_bounds)[chunks])


def _check_lanes(lanes: int, batch_size: int, num_samples: int) -> None:
    if num_samples < 1 or batch_size < 1 or lanes < 1:
        raise ValueError(
            f"{lanes} lanes, a batch of {batch_size} and {num_samples} samples: each must be at least 1"
        )
    fitting = [n for n in range(1, min(batch_size, num_samples) + 1) if batch_size % n == 0]
    below, above = [n for n in fitting if n <= lanes], [n for n in fitting if n > lanes]
    remedy = "set data.lanes to " + " or ".join(str(n) for n in below[-1:] + above[:1])
    if lanes > num_samples:
        raise ValueError(f"data.lanes is {lanes} but the set has {num_samples} samples: {remedy}")
    if batch_size % lanes:
        raise ValueError(f"data.lanes is {lanes}, which does not divide the batch of {batch_size}: {remedy}")
