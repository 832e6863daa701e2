"""What a stream gives while its bucket fails: the very same batches, or one clear error."""

import functools
import re
import threading
import time
from dataclasses import replace

import fsspec
import numpy as np
import pytest
from buckets import bucket_root, gcs_bucket, s3_bucket

from data.conftest import write_shards
from data.faults import FaultProxy, proxy
from ul_scale.data import storage
from ul_scale.data.config import DataConfig
from ul_scale.data.index import Index
from ul_scale.data.indexing import build_index
from ul_scale.data.plan import lane_slots
from ul_scale.data.storage import ReadPolicy
from ul_scale.data.stream import Batch, LaneStream, make_plan

__all__ = ["bucket_root", "gcs_bucket", "proxy", "s3_bucket"]

# Chunks of a sample or two, so that a batch takes several requests.
CONFIG = DataConfig(
    image_size=8,
    channels=1,
    lanes=2,
    chunk_bytes=5000,
    window_chunks=2,
    workers=0,
    read_timeout_s=1.0,
    read_attempts=8,
    read_budget_s=30.0,
)
COUNTS = [5, 7, 4]
STEPS = 6
PASSING = ["503", "429", "reset", "close", "short", "whole", "elsewhere"]


def take(index: Index, config: DataConfig = CONFIG) -> list[Batch]:
    plan = make_plan(index, config, seed=3, batch_size=4)
    batches = LaneStream(index, plan, config, lane_slots(2, 0, 1)).batches()
    try:
        return [next(batches) for _ in range(STEPS)]
    finally:
        batches.close()
        # Reads under way would meet the next test's faults.
        for thread in threading.enumerate():
            if thread.name.startswith("ul-scale-read"):
                thread.join(timeout=10)


@functools.cache
def reference() -> list[Batch]:
    """Return the batches of the undisturbed set, from memory."""
    write_shards("memory://faults/set", COUNTS)
    return take(build_index("memory://faults/set"))


@functools.cache
def uploaded(bucket: str) -> Index:
    """Return the index of the set in a bucket; both outlast the test."""
    write_shards(f"{bucket}/faults/set", COUNTS)
    return build_index(f"{bucket}/faults/set")


@pytest.fixture
def index(bucket_root: str, proxy: FaultProxy, no_waits: None) -> Index:
    return uploaded(bucket_root.rpartition("/")[0])


def assert_same(batches: list[Batch]) -> None:
    assert len(batches) == len(reference()) == STEPS
    for batch, expected in zip(batches, reference()):
        assert batch["keys"] == expected["keys"]
        for name in ("x", "label", "uniform", "weight"):
            np.testing.assert_array_equal(batch[name], expected[name])


def path_of(index: Index) -> str:
    return f"{index.url.partition('://')[2]}/000.tar"


# It passes -----------------------------------------------------------------------------------------


def test_undisturbed(index: Index, proxy: FaultProxy) -> None:
    assert_same(take(index))
    assert len(proxy.ranges) > STEPS


@pytest.mark.parametrize("fault", PASSING)
def test_a_burst_changes_nothing(index: Index, proxy: FaultProxy, fault: str) -> None:
    proxy.inject(fault, times=5)
    assert_same(take(index))
    assert proxy.injected == {fault: 5}


@pytest.mark.parametrize("fault", ["stall", "stall_body"])
def test_a_stall_changes_nothing(index: Index, proxy: FaultProxy, fault: str) -> None:
    proxy.inject(fault, times=2)
    assert_same(take(index))
    assert proxy.injected == {fault: 2}
    assert proxy.hung_up.acquire(timeout=5) and proxy.hung_up.acquire(timeout=5)


@pytest.mark.exhaustive
@pytest.mark.parametrize("timeout_s", [5.0, 30.0])
@pytest.mark.parametrize("fault", ["stall", "stall_body"])
def test_stalls_of_twenty_seconds(index: Index, proxy: FaultProxy, fault: str, timeout_s: float) -> None:
    """A request may be given up, or waited for: the batches are the same."""
    proxy.stall_s = 20.0
    proxy.inject(fault, times=3)
    began = time.monotonic()
    assert_same(take(index, replace(CONFIG, read_timeout_s=timeout_s, read_budget_s=90.0)))
    assert min(timeout_s, proxy.stall_s) <= time.monotonic() - began < min(timeout_s, proxy.stall_s) + 10
    assert proxy.injected == {fault: 3}


# It does not ---------------------------------------------------------------------------------------

CAUSES = {
    "503": "status 503|SlowDown",
    "429": "status 429|TooManyRequests",
    "reset": "ClientPayloadError|ResponseStreamingError",
    "close": "ClientPayloadError|ResponseStreamingError",
    "short": r"\d+ bytes came instead of \d+",
    "whole": "the server ignored the range",
    "elsewhere": r"bytes \d+-\d+/\d+ came instead of bytes \d+-\d+",
    "stall": r"no answer within 0\.5 s",
    "stall_body": r"no answer within 0\.5 s",
}


def test_lasting_faults_are_named(index: Index, proxy: FaultProxy) -> None:
    fs, root = storage.open_folder(index.url)
    storage.read_range(fs, f"{root}/000.tar", 0, 512)  # Making the client takes its time.
    for fault, cause in CAUSES.items():
        proxy.ranges.clear()
        proxy.inject(fault)
        with pytest.raises(OSError) as caught:
            storage.read_range(
                fs, f"{root}/000.tar", 512, 2048, ReadPolicy(0.5 if "stall" in fault else 5.0, 2, 20.0)
            )
        line = rf"{index.url}/000\.tar: cannot read bytes 512 to 2048 \(.*({cause}).*\); 2 tries in \d\.\d s"
        assert re.fullmatch(line, str(caught.value)), (fault, str(caught.value))
        # The filesystems make no tries of their own within ours.
        assert proxy.ranges == ["bytes=512-2047"] * 2, fault


@pytest.mark.parametrize("fault", ["503", "short", "stall"])
def test_a_stream_ends_with_the_one_error(index: Index, proxy: FaultProxy, fault: str) -> None:
    proxy.inject(fault)
    config = replace(CONFIG, read_timeout_s=0.3, read_attempts=2)
    with pytest.raises(OSError, match=rf"{index.url}/\d+\.tar: cannot read bytes \d+ to \d+ \(.*\); 2 tries"):
        take(index, config)


def test_a_deleted_shard_is_named_at_once(
    bucket_root: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "RETRY_WAITS_S", (60.0,))
    url = f"{bucket_root}/set"
    write_shards(url, COUNTS)
    index = build_index(url)
    fs, root = fsspec.core.url_to_fs(url)
    fs.rm_file(f"{root}/001.tar")
    with pytest.raises(FileNotFoundError, match=rf"{url}/001\.tar: cannot read bytes \d+ to \d+ \(.*\)$"):
        take(index)


def test_refusals_are_not_tried_again(index: Index, proxy: FaultProxy) -> None:
    fs, root = storage.open_folder(index.url)
    for status, kind in (("403", PermissionError), ("404", FileNotFoundError)):
        proxy.ranges.clear()
        proxy.inject(status)
        with pytest.raises(kind):
            storage.read_range(fs, f"{root}/000.tar", 0, 512)
        assert len(proxy.ranges) == 1, status


# What is left behind -------------------------------------------------------------------------------


def test_late_requests_are_cancelled(index: Index, proxy: FaultProxy) -> None:
    fs, root = storage.open_folder(index.url)
    storage.read_range(fs, f"{root}/000.tar", 0, 512)
    for fault in ("stall", "stall_body"):
        proxy.inject(fault)
        began = time.monotonic()
        with pytest.raises(OSError, match="no answer"):
            storage.read_range(fs, f"{root}/000.tar", 0, 2048, ReadPolicy(0.3, 1, 5.0))
        assert proxy.hung_up.acquire(timeout=5), fault
        assert time.monotonic() - began < proxy.stall_s / 2, fault


def test_a_whole_object_is_not_read(bucket_root: str, proxy: FaultProxy, no_waits: None) -> None:
    fs, root = storage.open_folder(bucket_root)
    size = 40_000_000
    fs.pipe_file(f"{root}/big.tar", bytes(size))
    proxy.inject("whole")
    with pytest.raises(OSError, match="whole object"):
        storage.read_range(fs, f"{root}/big.tar", 10, 1000, ReadPolicy(5.0, 2, 20.0))
    assert proxy.injected["whole"] == 2
    # What the sockets between took before the client hung up, twice.
    assert proxy.body_bytes < size
