"""The order against its definition, written a second time with lists, and its properties."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ul_scale.data import plan as plan_module
from ul_scale.data.plan import LanePlan, LaneSlot, cut_chunks, default_lanes, lane_slots
from ul_scale.keyed import permutation


class Case:
    """A set and the settings of a run on it."""

    def __init__(self, shard_sizes, sample_sizes, gap, lanes, per_lane, chunk_bytes, window_chunks, seed):
        self.shard = np.repeat(np.arange(len(shard_sizes)), shard_sizes).astype(np.uint32)
        self.size = np.resize(sample_sizes, len(self.shard)).astype(np.uint32)
        self.offset = np.zeros(len(self.shard), np.uint64)
        for number in range(len(shard_sizes)):
            own = np.flatnonzero(self.shard == number)
            spans = np.concatenate([[0], self.size[own][:-1] + gap]) if len(own) else []
            self.offset[own] = np.cumsum(spans)
        self.lanes, self.batch_size = min(lanes, len(self.shard)), min(lanes, len(self.shard)) * per_lane
        self.chunk_bytes, self.window_chunks, self.seed = chunk_bytes, window_chunks, seed

    def plan(self) -> LanePlan:
        return LanePlan(
            self.shard,
            self.offset,
            self.size,
            seed=self.seed,
            lanes=self.lanes,
            batch_size=self.batch_size,
            chunk_bytes=self.chunk_bytes,
            window_chunks=self.window_chunks,
        )

    def chunks(self) -> list[list[int]]:
        """Cut greedily, a sample at a time."""
        most = max(1, len(self.shard) // (8 * self.lanes))
        chunks: list[list[int]] = []
        for i in range(len(self.shard)):
            chunk = chunks[-1] if chunks else []
            fits = (
                chunk
                and self.shard[i] == self.shard[chunk[0]]
                and len(chunk) < most
                and int(self.offset[i]) + int(self.size[i]) - int(self.offset[chunk[0]]) <= self.chunk_bytes
            )
            chunk.append(i) if fits else chunks.append([i])
        return chunks

    def lane_epoch(self, lane: int, epoch: int) -> list[int]:
        """The lane's samples of one epoch, from the definition."""
        chunks = self.chunks()
        sequence = [(c, i) for c in permutation(len(chunks), self.seed, "chunks", epoch) for i in chunks[c]]
        total = len(sequence)
        piece = sequence[lane * total // self.lanes : (lane + 1) * total // self.lanes]
        order = list(dict.fromkeys(c for c, _ in piece))
        result = []
        for number, first in enumerate(range(0, len(order), self.window_chunks)):
            window = [i for c, i in piece if c in order[first : first + self.window_chunks]]
            keys = (self.seed, "window", epoch, lane, number)
            result += [window[k] for k in permutation(len(window), *keys)]
        return result


cases = st.builds(
    Case,
    shard_sizes=st.lists(st.sampled_from([0, 1, 2, 3, 7, 20]), min_size=1, max_size=6).filter(any),
    sample_sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    gap=st.sampled_from([0, 0, 4]),
    lanes=st.integers(1, 8),
    per_lane=st.integers(1, 5),
    chunk_bytes=st.sampled_from([1, 10, 25, 1000]),
    window_chunks=st.integers(1, 4),
    seed=st.integers(0, 3),
)
few = settings(max_examples=100, deadline=None, derandomize=True)


@few
@given(cases)
def test_chunks_are_the_greedy_runs_of_one_shard(case: Case) -> None:
    bounds = case.plan().chunk_bounds
    assert [list(range(a, b)) for a, b in pairwise(bounds)] == case.chunks()


@few
@given(cases)
def test_lane_batches_follow_the_definition(case: Case) -> None:
    plan, b = case.plan(), case.batch_size // case.lanes
    for lane in range(case.lanes):
        order = case.lane_epoch(lane, 0) + case.lane_epoch(lane, 1) + case.lane_epoch(lane, 2)
        first, last = plan.lane_bounds(lane)
        for step in range(len(order) // b):
            epoch, sample = plan.lane_batch(step, lane)
            assert sample.tolist() == order[step * b : (step + 1) * b]
            assert epoch.tolist() == [i // (last - first) for i in range(step * b, (step + 1) * b)]


@few
@given(cases)
def test_each_sample_comes_once_per_epoch_over_all_lanes(case: Case) -> None:
    plan, seen = case.plan(), Counter()
    for lane in range(case.lanes):
        first, last = plan.lane_bounds(lane)
        for step in range(-(-3 * (last - first) // plan.lane_batch_size)):
            epoch, sample = plan.lane_batch(step, lane)
            seen.update(zip(epoch.tolist(), sample.tolist()))
    for epoch in range(3):
        assert [seen[epoch, sample] for sample in range(len(case.shard))] == [1] * len(case.shard)


@few
@given(cases, st.integers(0, 60))
def test_starting_at_a_step_gives_what_the_uninterrupted_order_gives(case: Case, start: int) -> None:
    walked, started = case.plan(), case.plan()
    for step in range(start):
        for lane in range(case.lanes):
            walked.lane_batch(step, lane)
    for lane in range(case.lanes):
        for a, b in zip(walked.lane_batch(start, lane), started.lane_batch(start, lane)):
            assert a.tolist() == b.tolist()


@few
@given(cases, st.integers(0, 50))
def test_every_world_size_reads_the_same_batch(case: Case, step: int) -> None:
    def union(world_size: int) -> Counter:
        plan, union = case.plan(), Counter()
        for rank in range(world_size):
            slots = lane_slots(case.lanes, rank, world_size)
            assert len(slots) == -(-case.lanes // world_size)
            for lane, weight in slots:
                assert weight in (0.0, 1.0)
                epoch, sample = plan.lane_batch(step, lane)
                union.update(zip(epoch.tolist(), sample.tolist()) if weight else ())
        return union

    alone = union(1)
    assert alone.total() == case.batch_size
    for world_size in range(2, case.lanes + 1):
        assert union(world_size) == alone


@few
@given(cases)
def test_segments_hold_the_windows_samples_and_stay_in_one_shard(case: Case) -> None:
    plan = case.plan()
    window = plan.window_at(0, case.lanes - 1, 0)
    for _ in range(12):
        assert [i for a, b in window.segments for i in range(a, b)] == window.samples.tolist()
        assert sorted(window.order.tolist()) == list(range(len(window.samples)))
        assert all(case.shard[a] == case.shard[b - 1] for a, b in window.segments)
        after = plan.window_after(window)
        assert (after.epoch, after.start) in [(window.epoch, window.stop), (window.epoch + 1, 0)]
        window = after


def big_plan(**changes) -> LanePlan:
    sizes = np.full(40_000, 100_000, np.uint32)
    offset = np.tile(np.arange(1000, dtype=np.uint64) * 100_000, 40)
    settings = {"seed": 0, "lanes": 16, "batch_size": 64, "chunk_bytes": 4_000_000, "window_chunks": 8}
    return LanePlan(np.repeat(np.arange(40), 1000), offset, sizes, **(settings | changes))


def test_a_far_step_costs_no_more_than_a_near_one(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(plan_module, "permutation", lambda *args: drawn.append(args[0]) or permutation(*args))
    for step in (0, 10**6, 10**12):
        drawn.clear()
        big_plan().lane_batch(step, 5)
        # One permutation of all chunks and one of a window, or two of each if the batch straddles epochs.
        assert len(drawn) <= 4 and max(drawn) <= 1000


def test_neighbours_in_a_tar_end_apart() -> None:
    plan = big_plan()
    step_of = np.empty(40_000, np.int64)
    lane_of = np.empty(40_000, np.int64)
    for lane in range(16):
        for step in range(2500 // 4):
            _, sample = plan.lane_batch(step, lane)
            step_of[sample], lane_of[sample] = step, lane
    together = np.mean(step_of[1:] == step_of[:-1])
    assert together < 0.03  # 1/625 if all samples were permuted, 1/80 within a window of 320
    # A chunk's 40 samples spread over their window of 80 steps, and chunks over all epochs and lanes.
    chunks = step_of.reshape(-1, 40)
    assert np.median(chunks.max(1) - chunks.min(1)) > 60
    assert abs(np.corrcoef(step_of[::40], np.arange(1000))[0, 1]) < 0.1
    assert abs(np.corrcoef(lane_of[::40], np.arange(1000))[0, 1]) < 0.1


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    def order(plan: LanePlan, epoch: int) -> list[int]:
        steps = range(epoch * 625, (epoch + 1) * 625)
        return [i for step in steps for i in plan.lane_batch(step, 0)[1].tolist()]

    one, two, other = order(big_plan(), 0), order(big_plan(), 1), order(big_plan(seed=1), 0)
    assert len({tuple(one), tuple(two), tuple(other)}) == 3
    assert set(one) != set(two)  # another lane's chunks come to this lane


def test_a_sample_longer_than_a_chunk_is_a_chunk_of_its_own() -> None:
    bounds = cut_chunks([0, 0, 0, 0], [0, 10, 500, 510], [10, 490, 10, 10], chunk_bytes=100, max_samples=9)
    assert bounds.tolist() == [0, 1, 2, 4]


@pytest.mark.parametrize(
    ("batch_size", "num_samples", "lanes"),
    [
        (64, 10**6, 64),
        (2048, 10**6, 64),
        (96, 10**6, 48),
        (100, 10**6, 50),
        (7, 10**6, 7),
        (64, 10, 8),
        (67, 50, 1),
    ],
)
def test_default_lanes(batch_size: int, num_samples: int, lanes: int) -> None:
    assert default_lanes(batch_size, num_samples) == lanes


def test_lane_slots_of_a_size_that_does_not_divide_the_lanes() -> None:
    assert lane_slots(4, 0, 1) == [LaneSlot(0, 1.0), LaneSlot(1, 1.0), LaneSlot(2, 1.0), LaneSlot(3, 1.0)]
    assert [lane_slots(4, rank, 3) for rank in range(3)] == [
        [LaneSlot(0, 1.0), LaneSlot(0, 0.0)],
        [LaneSlot(1, 1.0), LaneSlot(1, 0.0)],
        [LaneSlot(2, 1.0), LaneSlot(3, 1.0)],
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lanes": 6}, "data.lanes is 6, which does not divide the batch of 64: set data.lanes to 4 or 8"),
        ({"lanes": 128}, "data.lanes is 128, which does not divide the batch of 64: set data.lanes to 64"),
        ({"lanes": 0}, "0 lanes, a batch of 64 and 40000 samples: each must be at least 1"),
        (
            {"lanes": 50_000, "batch_size": 50_000},
            "data.lanes is 50000 but the set has 40000 samples: set data.lanes to 25000",
        ),
    ],
)
def test_numbers_that_do_not_go_together(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        big_plan(**changes)


def test_more_ranks_than_lanes() -> None:
    with pytest.raises(ValueError, match="16 data-parallel ranks for 8 lanes: use at most 8 ranks"):
        lane_slots(8, 0, 16)
