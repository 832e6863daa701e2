"""Cutting in blocks of samples changes no chunk and takes little memory."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ul_scale.data import plan
from ul_scale.data.plan import cut_chunks


def shards_of(counts: list[int], seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return shard, offset and size of samples, [N] each; a count of 0 leaves a shard's number out."""
    shard = np.repeat(np.arange(len(counts), dtype=np.uint32), counts)
    size = np.random.default_rng(seed).integers(1, 200, len(shard)).astype(np.uint32)
    offset = np.concatenate([np.cumsum(part) - part for part in np.split(size, np.cumsum(counts)[:-1])])
    return shard, offset.astype(np.uint64), size


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from([0, 1, 2, 5, 17, 60]), min_size=1, max_size=12).filter(any),
    st.sampled_from([1, 2, 7, 50]),
    st.sampled_from([1, 300, 2000]),
    st.integers(1, 9),
)
def test_the_chunks_do_not_depend_on_the_blocks(
    counts: list[int], block: int, chunk_bytes: int, most: int
) -> None:
    arrays = shards_of(counts, len(counts))
    whole = cut_chunks(*arrays, chunk_bytes, most)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "_CUT_SAMPLES", block)
        blocks = cut_chunks(*arrays, chunk_bytes, most)
    assert blocks.dtype == np.int64 and blocks.tolist() == whole.tolist()


def test_memory_is_that_of_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = shards_of([1000] * 1000, 0)
    monkeypatch.setattr(plan, "_CUT_SAMPLES", 10_000)
    tracemalloc.start()
    cut_chunks(*arrays, 4000, 1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * len(arrays[0])  # less than one array of all samples
