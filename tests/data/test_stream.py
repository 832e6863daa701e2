"""Batches against the shards' pixels, and how reading starts, fails and ends."""

import gc
import io
import threading
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from ul_scale.data import storage
from ul_scale.data.config import DataConfig
from ul_scale.data.index import Index, open_index
from ul_scale.data.indexing import build_index
from ul_scale.data.plan import LaneSlot, lane_slots
from ul_scale.data.stream import Batch, LaneStream, iterate, make_plan
from ul_scale.keyed import uniform

from .conftest import image_bytes, images, tar_bytes, write_latents, write_shards

COUNTS = [13, 0, 1, 30, 20]
BATCH_SIZE = 12
CONFIG = DataConfig(image_size=8, channels=1, lanes=4, chunk_bytes=3 * 2048, window_chunks=2)


@pytest.fixture
def shards(memory_url: str) -> tuple[Index, np.ndarray]:
    pixels = write_shards(memory_url, COUNTS)
    return build_index(memory_url), pixels


def stream(
    index: Index, config: DataConfig = CONFIG, *, seed: int = 0, rank: int = 0, size: int = 1
) -> LaneStream:
    plan = make_plan(index, config, seed=seed, batch_size=BATCH_SIZE)
    return LaneStream(index, plan, config, lane_slots(plan.lanes, rank, size))


def take(stream: LaneStream, start: int, stop: int) -> list[Batch]:
    batches = stream.batches(start)
    taken = list(islice(batches, stop - start))
    batches.close()
    return taken


def equal(one: Batch, two: Batch) -> bool:
    tensors = ("x", "label", "uniform", "weight")
    return one["keys"] == two["keys"] and all(torch.equal(one[name], two[name]) for name in tensors)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("ul-scale")]


def wait_for_no_threads() -> None:
    deadline = time.monotonic() + 5
    while threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not threads()


def test_batches_hold_the_plans_samples(shards: tuple[Index, np.ndarray]) -> None:
    index, pixels = shards
    plan = make_plan(index, CONFIG, seed=0, batch_size=BATCH_SIZE)
    for step, batch in enumerate(take(stream(index), 0, 20)):
        places = [plan.lane_batch(step, lane) for lane in range(4)]
        epoch, sample = (np.concatenate(part) for part in zip(*places))
        expected = pixels[sample][:, None].astype(np.float64) / 127.5 - 1
        assert batch["x"].dtype == torch.float32 and batch["x"].shape == (BATCH_SIZE, 1, 8, 8)
        assert np.allclose(batch["x"].numpy(), expected, atol=1e-6)
        assert batch["label"].dtype == torch.int64 and batch["label"].tolist() == (sample % 10).tolist()
        shard = np.repeat(range(5), COUNTS)[sample]
        keys = [f"train/{a:03d}/{b:04d}" for a, b in zip(shard, sample)]
        assert batch["keys"] == keys
        assert batch["uniform"].dtype == torch.float64
        assert batch["uniform"].tolist() == [
            uniform(0, "training", e, k) for e, k in zip(epoch.tolist(), keys)
        ]
        assert batch["weight"].tolist() == [1.0] * BATCH_SIZE


def test_each_sample_comes_once_per_epoch(shards: tuple[Index, np.ndarray]) -> None:
    index, _ = shards
    seen = Counter(key for batch in take(stream(index), 0, 16) for key in batch["keys"])  # 3 epochs of 64
    assert len(seen) == 64 and set(seen.values()) == {3}


@pytest.mark.parametrize("start", [1, 5, 17, 1000])
def test_a_start_at_a_step_is_the_uninterrupted_run(shards: tuple[Index, np.ndarray], start: int) -> None:
    index, _ = shards
    whole = take(stream(index), 0, start + 3) if start < 100 else take(stream(index), start - 2, start + 3)
    assert all(equal(*pair) for pair in zip(whole[-3:], take(stream(index), start, start + 3)))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_share_the_batch_at_any_world_size(shards: tuple[Index, np.ndarray], size: int) -> None:
    index, _ = shards
    config = DataConfig(image_size=8, channels=1, lanes=4, window_chunks=2, horizontal_flip=True)
    alone = take(stream(index, config), 4, 7)
    ranks = [take(stream(index, config, rank=rank, size=size), 4, 7) for rank in range(size)]
    for step, batch in enumerate(alone):
        parts = [rank[step] for rank in ranks]
        assert {part["x"].shape[0] for part in parts} == {-(-4 // size) * 3}
        kept = [part["weight"] > 0 for part in parts]
        for name in ("x", "label", "uniform"):
            assert torch.equal(torch.cat([part[name][k] for part, k in zip(parts, kept)]), batch[name])


def test_a_surplus_slot_repeats_a_lane_without_weight(shards: tuple[Index, np.ndarray]) -> None:
    index, _ = shards
    plan = make_plan(index, CONFIG, seed=0, batch_size=BATCH_SIZE)
    slots = [LaneSlot(2, 1.0), LaneSlot(2, 0.0)]
    (batch,) = take(LaneStream(index, plan, CONFIG, slots), 0, 1)
    assert batch["weight"].tolist() == [1, 1, 1, 0, 0, 0]
    assert torch.equal(batch["x"][:3], batch["x"][3:]) and batch["keys"][:3] == batch["keys"][3:]


def test_threads_and_prefetch_do_not_change_batches(shards: tuple[Index, np.ndarray]) -> None:
    index, _ = shards
    other = DataConfig(
        image_size=8, channels=1, lanes=4, chunk_bytes=3 * 2048, window_chunks=2, threads=3, prefetch_steps=1
    )
    assert all(equal(*pair) for pair in zip(take(stream(index), 0, 12), take(stream(index, other), 0, 12)))


def test_epochs_flip_samples_anew(shards: tuple[Index, np.ndarray]) -> None:
    index, pixels = shards
    config = DataConfig(image_size=8, channels=1, lanes=4, horizontal_flip=True)
    flipped: dict[str, list[bool]] = {}
    for batch in take(stream(index, config), 0, 32):
        for key, x in zip(batch["keys"], batch["x"][:, 0].numpy()):
            stored = pixels[int(key[-4:])].astype(np.float32) / 127.5 - 1
            assert np.allclose(x, stored, atol=1e-6) or np.allclose(x, stored[:, ::-1], atol=1e-6)
            flipped.setdefault(key, []).append(not np.allclose(x, stored, atol=1e-6))
    assert 20 < sum(len(set(flips)) == 2 for flips in flipped.values())  # of 64


def test_local_shards_and_other_sizes(tmp_path: Path) -> None:
    pixels = images(6, size=20, channels=3)
    members = {f"{i}.webp": image_bytes(pixels[i], "WEBP", lossless=True) for i in range(6)}
    (tmp_path / "0.tar").write_bytes(tar_bytes(members))
    (batch,) = iterate(build_index(str(tmp_path)), DataConfig(image_size=16), batch_size=6)
    expected = [np.asarray(Image.fromarray(p).resize((16, 16), Image.Resampling.BICUBIC)) for p in pixels]
    assert np.allclose(batch["x"].numpy(), np.stack(expected).transpose(0, 3, 1, 2) / 127.5 - 1, atol=1e-6)
    assert batch["label"].tolist() == [-1] * 6


def test_iterate_goes_through_the_index_once(shards: tuple[Index, np.ndarray]) -> None:
    index, pixels = shards
    config = DataConfig(image_size=8, channels=1, chunk_bytes=5000, horizontal_flip=True)
    batches = list(iterate(index, config, batch_size=10))
    assert [len(batch["keys"]) for batch in batches] == [10] * 6 + [4]
    x = torch.cat([batch["x"] for batch in batches])[:, 0].numpy()
    assert np.allclose(x, pixels.astype(np.float32) / 127.5 - 1, atol=1e-6)
    assert [key for batch in batches for key in batch["keys"]] == index.names(0, 64)
    assert all(batch["uniform"].eq(1).all() and batch["weight"].eq(1).all() for batch in batches)
    part = list(iterate(index, config, 11, 46, batch_size=30))
    assert [key for batch in part for key in batch["keys"]] == index.names(11, 46)
    assert not list(iterate(index, config, 64, batch_size=30))
    wait_for_no_threads()


def test_latents(tmp_path: Path) -> None:
    z_clean = np.random.default_rng(0).normal(size=(20, 2, 4, 4)).astype(np.float16)
    index = write_latents(str(tmp_path / "z"), z_clean, 7, classes=3)
    config = DataConfig()
    plan = make_plan(index, config, seed=0, batch_size=4)
    batch = next(LaneStream(index, plan, config, lane_slots(4, 0, 1)).batches(3))
    numbers = [int(key[-2:]) for key in batch["keys"]]
    assert "x" not in batch and batch["z_clean"].dtype == torch.float32
    assert np.array_equal(batch["z_clean"].numpy(), z_clean[numbers].astype(np.float32))
    assert batch["label"].tolist() == [number % 3 for number in numbers]


# Reading -------------------------------------------------------------------------------------------


class Reads:
    """Counts the ranges that are read from shards in memory, and damages those that it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ranges: list[tuple[str, int, int]] = []
        self.faults = 0
        self.error: Exception | None = None
        cat = MemoryFileSystem.cat_file

        def cat_file(fs, path, start=None, end=None, **options):
            data = cat(fs, path, start, end, **options)
            if not path.endswith(".tar"):
                return data
            self.ranges.append((path, start, end))
            if self.faults > 0:
                self.faults -= 1
                if self.error:
                    raise self.error
                return data[: len(data) // 2]
            return data

        monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)


def test_a_window_is_read_once_by_one_range_per_chunk(shards, monkeypatch: pytest.MonkeyPatch) -> None:
    index, _ = shards
    reads = Reads(monkeypatch)
    plan = make_plan(index, CONFIG, seed=0, batch_size=BATCH_SIZE)
    steps = 16  # of lane 1: exactly 3 epochs of 16 samples
    take(LaneStream(index, plan, CONFIG, [LaneSlot(1, 1.0)]), 0, steps)
    windows = [plan.window_at(0, 1, 0)]
    while windows[-1].epoch < 3:
        windows.append(plan.window_after(windows[-1]))
    segments = [segment for window in windows[:-1] for segment in window.segments]
    root = fsspec.core.url_to_fs(index.url)[1]
    expected = [
        (
            f"{root}/{index.shards[index.shard[a]].name}",
            index.offset[a],
            index.offset[b - 1] + index.size[b - 1],
        )
        for a, b in segments
    ]
    # What else was read is for steps that were made ahead.
    assert sorted(reads.ranges[: len(expected)]) == sorted(expected)


def test_a_short_body_is_read_again(shards, monkeypatch: pytest.MonkeyPatch, no_waits: None) -> None:
    index, _ = shards
    expected = take(stream(index), 0, 4)
    reads = Reads(monkeypatch)
    reads.faults = 3
    assert all(equal(*pair) for pair in zip(expected, take(stream(index), 0, 4)))
    assert reads.faults == 0


@pytest.mark.parametrize(
    ("error", "cause"),
    [(None, r"\d+ bytes came instead of \d+"), (TimeoutError("too slow"), "TimeoutError: too slow")],
)
def test_a_range_that_cannot_be_read_is_named(shards, monkeypatch, no_waits: None, error, cause: str) -> None:
    index, _ = shards
    reads = Reads(monkeypatch)
    reads.faults, reads.error = 10**6, error
    with pytest.raises(
        OSError, match=rf"memory://.*/train/\d+\.tar: cannot read bytes \d+ to \d+ \({cause}\)"
    ):
        next(stream(index).batches())
    wait_for_no_threads()


def test_a_missing_file_is_not_tried_again(shards, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "RETRY_WAITS_S", (60.0,))
    index, _ = shards
    fs, root = fsspec.core.url_to_fs(index.url)
    for name in ("000.tar", "002.tar", "003.tar", "004.tar"):
        fs.rm_file(f"{root}/{name}")
    with pytest.raises(OSError, match="cannot read bytes .*FileNotFoundError"):
        next(stream(index).batches())


def test_threads_end_with_the_iterator(shards: tuple[Index, np.ndarray]) -> None:
    index, _ = shards
    batches = stream(index).batches()
    next(batches)
    assert threads()
    batches.close()
    wait_for_no_threads()
    batches = stream(index).batches()
    next(batches)
    assert threads()
    del batches
    gc.collect()
    wait_for_no_threads()


def test_no_more_is_made_ahead_than_asked_for(shards, monkeypatch: pytest.MonkeyPatch) -> None:
    index, _ = shards
    reads = Reads(monkeypatch)
    batches = stream(index).batches()
    next(batches)
    time.sleep(0.3)
    batches.close()
    plan = make_plan(index, CONFIG, seed=0, batch_size=BATCH_SIZE)
    due = set()
    for lane in range(4):
        # One batch was taken, four wait, one was ready when those were full; and a window is read ahead.
        windows = [window for step in range(6) for window, _, _ in plan.pieces(step, lane)]
        for window in [*windows, plan.window_after(windows[-1])]:
            due |= {int(index.offset[start]) for start, _ in window.segments}
    assert {start for _, start, _ in reads.ranges} <= due


# What is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.png": b"no image"}, r"train/0/a\.png: not a readable image"),
        ({"a.png": image_bytes(images(1)[0]), "a.cls": b"cat"}, r"train/0/a\.cls: b'cat' is not a class id"),
        ({"a.txt": b"", "b.png": b""}, r"train/0/a: has no image, only txt"),
        ({"a.z_clean.npy": b"no array"}, r"train/0/a\.z_clean\.npy: not an \.npy file"),
    ],
)
def test_a_damaged_sample_is_named(memory_url: str, members: dict[str, bytes], message: str) -> None:
    fs, root = fsspec.core.url_to_fs(memory_url)
    fs.pipe_file(f"{root}/0.tar", tar_bytes(members))
    with pytest.raises(ValueError, match=message):
        list(iterate(build_index(memory_url), DataConfig(image_size=8), batch_size=1))
    wait_for_no_threads()


def npy(array: np.ndarray) -> bytes:
    data = io.BytesIO()
    np.save(data, array)
    return data.getvalue()


def test_latents_of_two_shapes(memory_url: str) -> None:
    fs, root = fsspec.core.url_to_fs(memory_url)
    members = {"a.z_clean.npy": npy(np.zeros((1, 2, 2))), "b.z_clean.npy": npy(np.zeros((1, 2, 3)))}
    fs.pipe_file(f"{root}/0.tar", tar_bytes(members))
    with pytest.raises(ValueError, match=r"train/0/b has shape \(1, 2, 3\), train/0/a has \(1, 2, 2\)"):
        list(iterate(build_index(memory_url), DataConfig(), batch_size=2))


def test_a_config_that_does_not_fit_the_set(shards, memory_url: str, tmp_path: Path) -> None:
    index, _ = shards
    with pytest.raises(ValueError, match=r"data\.image_size is not set, and memory://.* holds images"):
        stream(index, DataConfig(channels=1))
    (tmp_path / "0.tar").write_bytes(tar_bytes({"a.z_clean.npy": b"", "b.z_clean.npy": b""}))
    with pytest.raises(ValueError, match=r"data\.horizontal_flip is set, but .* holds latents"):
        iterate(build_index(str(tmp_path)), DataConfig(horizontal_flip=True), batch_size=1)
    (tmp_path / "0.tar").write_bytes(tar_bytes({"a.txt": b""}))
    with pytest.raises(
        ValueError, match="the samples have txt; expected one of jpg, jpeg, png, webp, .*z_clean"
    ):
        iterate(build_index(str(tmp_path)), DataConfig(image_size=8), batch_size=1)


def test_windows_that_do_not_fit_the_memory(shards: tuple[Index, np.ndarray]) -> None:
    index, _ = shards
    # 4 lanes × 2 chunks, twice, of at most two samples of 2048 bytes.
    stream(index, DataConfig(image_size=8, lanes=4, window_chunks=2, max_window_bytes=16 * 4096))
    small = DataConfig(image_size=8, lanes=4, window_chunks=2, max_window_bytes=16 * 4096 - 1)
    with pytest.raises(
        ValueError, match=r"4 lanes with windows of 2 chunks .* 65,536 .*max_window_bytes is 65,535"
    ):
        stream(index, small)
    stream(index, small, size=2)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("channels", 2),
        ("image_size", 0),
        ("lanes", 0),
        ("chunk_bytes", 0),
        ("window_chunks", 0),
        ("threads", 0),
    ],
)
def test_values_that_a_field_cannot_have(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"data\.{field} is {value}; expected"):
        DataConfig(**{field: value})


def test_an_opened_index_streams_what_a_built_one_does(shards: tuple[Index, np.ndarray]) -> None:
    index, _ = shards
    again = open_index(index.url)
    assert all(equal(*pair) for pair in zip(take(stream(index), 0, 3), take(stream(again), 0, 3)))
