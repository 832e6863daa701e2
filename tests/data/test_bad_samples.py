"""Samples that cannot be used: replaced in training, left out elsewhere, and named."""

from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from ul_scale.data import produce
from ul_scale.data.config import DataConfig
from ul_scale.data.index import Index
from ul_scale.data.indexing import build_index
from ul_scale.data.plan import lane_slots
from ul_scale.data.sample import BadSample
from ul_scale.data.stream import LaneStream, iterate, make_plan

from .conftest import image_bytes, images, tar_bytes

COUNT, BAD = 24, {3: b"no image", 7: None, 8: b"cut", 23: b""}
"""Sample 7 has a label that is none; the last one's neighbour is the first."""


def config(**options) -> DataConfig:
    return DataConfig(image_size=8, channels=1, lanes=4, chunk_bytes=4096, window_chunks=2, **options)


@pytest.fixture
def pixels() -> np.ndarray:
    return images(COUNT)


@pytest.fixture
def index(tmp_path: Path, pixels: np.ndarray) -> Index:
    for shard in range(2):
        members = {}
        for number in range(12 * shard, 12 * shard + 12):
            good = image_bytes(pixels[number])
            content = BAD.get(number, good)
            members[f"{number:02d}.png"] = (
                good if content is None else good[:40] if content == b"cut" else content
            )
            members[f"{number:02d}.cls"] = b"cat" if number in BAD and content is None else b"%d" % number
        (tmp_path / f"{shard}.tar").write_bytes(tar_bytes(members))
    return build_index(str(tmp_path), dataset="set")


def stream(
    index: Index, settings: DataConfig, told: Counter[str], rank: int = 0, size: int = 1
) -> LaneStream:
    plan = make_plan(index, settings, seed=0, batch_size=8)
    slots = lane_slots(plan.lanes, rank, size)
    return LaneStream(index, plan, settings, slots, on_bad=lambda name, reason: told.update([name]))


def take(of: LaneStream, start: int, stop: int) -> list:
    batches = of.batches(start)
    taken = list(islice(batches, stop - start))
    batches.close()
    return taken


@pytest.mark.parametrize("workers", [0, 2])
def test_the_next_good_sample_takes_the_place(index: Index, pixels: np.ndarray, workers: int) -> None:
    told = Counter[str]()
    neighbour = {3: 4, 7: 9, 8: 9, 23: 0}
    seen = Counter[int]()
    for batch in take(stream(index, config(workers=workers), told), 0, 9):  # 3 epochs
        for row, key in enumerate(batch["keys"]):
            number = int(key[-2:])
            shown = neighbour.get(number, number)
            assert np.allclose(batch["x"][row, 0].numpy(), pixels[shown] / 127.5 - 1, atol=1e-6)
            assert batch["label"][row] == shown and batch["replaced"][row] == (number in neighbour)
            seen[number] += 1
    assert set(seen.values()) == {3} and len(seen) == COUNT
    assert told == {f"set/0/{n:02d}" if n < 12 else f"set/1/{n:02d}": 1 for n in BAD}


@pytest.mark.parametrize("size", [2, 3, 4])
def test_neighbours_do_not_depend_on_ranks(index: Index, size: int) -> None:
    settings = config(workers=0, horizontal_flip=True)
    alone = take(stream(index, settings, Counter()), 1, 4)
    ranks = [take(stream(index, settings, Counter(), rank, size), 1, 4) for rank in range(size)]
    for step, batch in enumerate(alone):
        parts = [rank[step] for rank in ranks]
        for name in ("x", "label", "uniform", "replaced"):
            assert torch.equal(torch.cat([part[name][part["weight"] > 0] for part in parts]), batch[name])


def test_a_set_without_good_samples_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(produce, "NEIGHBOURS", 5)
    (tmp_path / "0.tar").write_bytes(tar_bytes({f"{n}.png": b"no image" for n in range(9)}))
    index = build_index(str(tmp_path), dataset="set")
    plan = make_plan(index, config(workers=0), seed=0, batch_size=4)
    batches = LaneStream(index, plan, config(workers=0), lane_slots(4, 0, 1)).batches()
    with pytest.raises(BadSample, match=r"set/0/\d\.png: .*; nor can any of the 5 samples after it be used"):
        next(batches)


def test_a_failed_read_is_no_bad_sample(index: Index) -> None:
    told = Counter[str]()
    (Path(index.url) / "1.tar").unlink()
    with pytest.raises(OSError, match=r"1\.tar: cannot read bytes"):
        take(stream(index, config(workers=0, read_attempts=1), told), 0, 3)
    assert not [name for name in told if name.startswith("set/1")]


def test_iterate_leaves_them_out_where_it_may(index: Index) -> None:
    told = list[tuple[str, str]]()
    settings = config(workers=0)
    batches = list(iterate(index, settings, batch_size=6, on_bad=lambda *bad: told.append(bad)))
    assert [int(key[-2:]) for batch in batches for key in batch["keys"]] == sorted(
        set(range(COUNT)) - set(BAD)
    )
    assert [len(batch["keys"]) for batch in batches] == [5, 4, 6, 5]
    assert [name for name, _ in told] == ["set/0/03", "set/0/07", "set/0/08", "set/1/23"]
    assert [name in reason for name, reason in told] == [True] * 4
    with pytest.raises(BadSample, match=r"set/0/03\.png: not a readable image"):
        list(iterate(index, settings, batch_size=6))
