"""What holds for the batches of any set, any settings and any number of ranks, down to the pixels."""

import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import fsspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ul_scale.data.config import DataConfig
from ul_scale.data.index import Index
from ul_scale.data.indexing import build_index
from ul_scale.data.plan import lane_slots
from ul_scale.data.stream import Batch, LaneStream, make_plan
from ul_scale.data.transforms import is_flipped
from ul_scale.keyed import uniform

from .conftest import image_bytes, tar_bytes

FEW = settings(max_examples=120, deadline=None, derandomize=True, database=None)
MANY = settings(FEW, max_examples=3000, suppress_health_check=list(HealthCheck))


@dataclass(frozen=True)
class Case:
    """A set of tars and the run on it; `padding` gives the samples unequal lengths."""

    shard_sizes: list[int]
    padding: list[int]
    lanes: int
    per_lane: int
    chunk_bytes: int
    window_chunks: int
    threads: int
    prefetch_steps: int
    seed: int
    flip: bool

    @property
    def num_samples(self) -> int:
        return sum(self.shard_sizes)

    @property
    def num_lanes(self) -> int:
        return min(self.lanes, self.num_samples)

    @property
    def batch_size(self) -> int:
        return self.num_lanes * self.per_lane

    @property
    def config(self) -> DataConfig:
        return DataConfig(
            image_size=2,
            channels=1,
            horizontal_flip=self.flip,
            lanes=self.num_lanes,
            chunk_bytes=self.chunk_bytes,
            window_chunks=self.window_chunks,
            workers=0,
            threads=self.threads,
            prefetch_steps=self.prefetch_steps,
        )

    def lane_length(self, lane: int) -> int:
        return (lane + 1) * self.num_samples // self.num_lanes - lane * self.num_samples // self.num_lanes

    def epoch_steps(self, epochs: int) -> int:
        """Steps after which every lane has gone through so many epochs of its own."""
        longest = -(-self.num_samples // self.num_lanes)
        return -(-epochs * longest // self.per_lane)


cases = st.builds(
    Case,
    shard_sizes=st.lists(st.sampled_from([0, 1, 1, 2, 5, 9, 17]), min_size=1, max_size=5).filter(any),
    padding=st.lists(st.sampled_from([0, 100, 700, 3000]), min_size=1, max_size=4),
    lanes=st.integers(1, 6),
    per_lane=st.integers(1, 5),
    chunk_bytes=st.sampled_from([1, 3000, 8000, 10**6]),
    window_chunks=st.integers(1, 4),
    threads=st.integers(1, 2),
    prefetch_steps=st.integers(1, 3),
    seed=st.integers(0, 3),
    flip=st.booleans(),
)


def pixels_of(number: int) -> np.ndarray:
    return np.array([[number, 200], [0, number]], np.uint8)


def write_set(url: str, case: Case) -> Index:
    fs, root = fsspec.core.url_to_fs(url)
    fs.makedirs(root, exist_ok=True)
    number = 0
    for shard, count in enumerate(case.shard_sizes):
        members = {}
        for _ in range(count):
            members[f"{number:03d}.png"] = image_bytes(pixels_of(number))
            members[f"{number:03d}.cls"] = str(number).encode()
            members[f"{number:03d}.json"] = bytes(case.padding[number % len(case.padding)])
            number += 1
        fs.pipe_file(f"{root}/{shard:03d}.tar", tar_bytes(members))
    return build_index(url, dataset="set", threads=1)


@contextmanager
def in_memory(case: Case) -> Iterator[Index]:
    url = f"memory://{uuid.uuid4().hex}/train"
    try:
        yield write_set(url, case)
    finally:
        fs, root = fsspec.core.url_to_fs(url)
        fs.rm(root, recursive=True)


def take(
    index: Index, case: Case, config: DataConfig, start: int, steps: int, rank: int = 0, world_size: int = 1
) -> list[Batch]:
    """Return a rank's batches, as a process of its own would make them."""
    plan = make_plan(index, config, seed=case.seed, batch_size=case.batch_size)
    slots = lane_slots(plan.lanes, rank, world_size)
    with closing(LaneStream(index, plan, config, slots).batches(start)) as batches:
        return list(islice(batches, steps))


def rows(batch: Batch) -> list[tuple]:
    """Return the rows that count: key, label, the number that decides label dropout, and pixels."""
    columns = (batch["label"].tolist(), batch["uniform"].tolist(), batch["x"], batch["weight"].tolist())
    return [
        (key, label, drawn, tuple(x.flatten().tolist()))
        for key, label, drawn, x, weight in zip(batch["keys"], *columns)
        if weight
    ]


def check_epochs(case: Case, whole: list[list[tuple]]) -> None:
    """Each lane's batches, cut into epochs of its own, hold every sample once over all lanes."""
    seen = [Counter[str]() for _ in range(3)]
    for lane in range(case.num_lanes):
        mine = slice(lane * case.per_lane, (lane + 1) * case.per_lane)
        keys = [key for batch in whole for key, *_ in batch[mine]]
        length = case.lane_length(lane)
        for epoch in range(2):
            seen[epoch].update(keys[epoch * length : (epoch + 1) * length])
    shard = np.repeat(range(len(case.shard_sizes)), case.shard_sizes).tolist()
    everything = Counter(f"set/{number:03d}/{sample:03d}" for sample, number in enumerate(shard))
    assert seen[0] == seen[1] == everything


def check_rows(case: Case, whole: list[list[tuple]]) -> None:
    """A row is what was written under its key, drawn for its lane's epoch."""
    for step, batch in enumerate(whole):
        for place, (key, label, drawn, x) in enumerate(batch):
            lane, offset = divmod(place, case.per_lane)
            epoch = (step * case.per_lane + offset) // case.lane_length(lane)
            number = int(key.rpartition("/")[2])
            pixels = pixels_of(number).astype(np.float64) / 127.5 - 1
            if case.flip and is_flipped(case.seed, epoch, key):
                pixels = pixels[:, ::-1]
            assert label == number and np.allclose(x, pixels.flatten(), atol=1e-6)
            assert drawn == uniform(case.seed, "training", epoch, key)


def check(case: Case, index: Index, start: int, world_size: int) -> None:
    steps = max(case.epoch_steps(2), start + 2)
    batches = take(index, case, case.config, 0, steps)
    whole = [rows(batch) for batch in batches]
    assert len(whole) == steps and {len(batch) for batch in whole} == {case.batch_size}
    check_epochs(case, whole)
    check_rows(case, whole)

    assert [rows(batch) for batch in take(index, case, case.config, start, 2)] == whole[start : start + 2]

    # Another process arrangement, which also starts in the middle and may read and decode differently.
    config = replace(case.config, threads=3 - case.threads, prefetch_steps=4 - case.prefetch_steps)
    ranks = [take(index, case, config, start, 2, rank, world_size) for rank in range(world_size)]
    for step in range(2):
        parts = [rank[step] for rank in ranks]
        assert {len(part["keys"]) for part in parts} == {-(-case.num_lanes // world_size) * case.per_lane}
        assert [row for part in parts for row in rows(part)] == whole[start + step]


@FEW
@given(cases, st.integers(0, 20), st.integers(1, 6))
def test_any_ranks_and_any_start_give_the_uninterrupted_runs_batches(
    case: Case, start: int, world_size: int
) -> None:
    with in_memory(case) as index:
        check(case, index, start, min(world_size, case.num_lanes))


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
@MANY
@given(cases, st.integers(0, 60), st.integers(1, 6))
def test_the_same_of_thousands_of_sets(case: Case, start: int, world_size: int) -> None:
    with in_memory(case) as index:
        check(case, index, start, min(world_size, case.num_lanes))


def check_workers(case: Case, start: int, workers: int) -> None:
    with TemporaryDirectory() as folder:  # processes do not share memory://
        index = write_set(str(Path(folder) / "train"), case)
        alone = take(index, case, case.config, start, 4)
        shared = take(index, case, replace(case.config, workers=workers), start, 4)
    assert len(alone) == len(shared) == 4
    for one, two in zip(alone, shared):
        assert one["keys"] == two["keys"] and rows(one) == rows(two)
        assert torch.equal(one["weight"], two["weight"])


@pytest.mark.parametrize("workers", [1, 2])
@settings(FEW, max_examples=3)
@given(cases, st.integers(0, 20))
def test_worker_processes_give_the_same_batches(workers: int, case: Case, start: int) -> None:
    check_workers(case, start, workers)


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
@settings(MANY, max_examples=100)
@given(cases, st.integers(0, 60), st.integers(1, 4))
def test_the_same_of_many_sets_and_workers(case: Case, start: int, workers: int) -> None:
    check_workers(case, start, workers)
