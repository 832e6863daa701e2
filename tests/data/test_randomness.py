"""How far an order is from a full shuffle, at the scale of ImageNet, and that broken orders are noticed.

The set is the worst one: 1,000 classes, one after the other in tars of 1,000 samples. For a batch, the
measure is Pearson's chi-square of its classes over its degrees of freedom: 1 for a full shuffle, and the
factor by which the variance of any class-dependent mean of a batch is larger than a full shuffle's.
"""

from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import spearmanr

from ul_scale.data import plan as plan_module
from ul_scale.data.plan import LanePlan
from ul_scale.keyed import permutation

NUM_SAMPLES, NUM_CLASSES, PER_SHARD, SAMPLE_BYTES = 1_280_000, 1000, 1000, 110_000


def plan_of(
    batch_size: int = 256,
    lanes: int = 64,
    chunk_bytes: int = 4_000_000,
    window_chunks: int = 8,
    num_samples: int = NUM_SAMPLES,
) -> LanePlan:
    number = np.arange(num_samples, dtype=np.uint64)
    return LanePlan(
        number // PER_SHARD,
        number % PER_SHARD * SAMPLE_BYTES,
        np.full(num_samples, SAMPLE_BYTES, np.uint32),
        seed=0,
        lanes=lanes,
        batch_size=batch_size,
        chunk_bytes=chunk_bytes,
        window_chunks=window_chunks,
    )


def batches_of(plan: LanePlan, epoch: int = 0) -> np.ndarray:
    """Return the samples of each step of an epoch, [steps, batch], lane by lane in a row."""
    lanes = []
    for lane in range(plan.lanes):
        window, order = plan.window_at(epoch, lane, 0), []
        while window.epoch == epoch:
            order.append(window.samples[window.order])
            window = plan.window_after(window)
        lanes.append(np.concatenate(order))
    steps = min(len(order) for order in lanes) // plan.lane_batch_size
    batches = [order[: steps * plan.lane_batch_size].reshape(steps, -1) for order in lanes]
    return np.concatenate(batches, axis=1)


def excess(batches: np.ndarray, num_samples: int = NUM_SAMPLES) -> float:
    """Return the mean of chi-square over its degrees of freedom, 1 for batches of a full shuffle."""
    expected = batches.shape[1] / NUM_CLASSES
    chi_squares = [
        np.sum((np.bincount(batch * NUM_CLASSES // num_samples, minlength=NUM_CLASSES) - expected) ** 2)
        for batch in batches[:: max(1, len(batches) // 300)]
    ]
    without_return = 1 - batches.shape[1] / num_samples
    return float(np.mean(chi_squares) / expected / (NUM_CLASSES - 1) / without_return)


def distinct_shards(batches: np.ndarray) -> float:
    return float(np.mean([len(np.unique(batch // PER_SHARD)) for batch in batches[::25]]))


def full_shuffle(batch_size: int) -> np.ndarray:
    return np.random.default_rng(0).permutation(NUM_SAMPLES).reshape(-1, batch_size)


def step_of(batches: np.ndarray) -> np.ndarray:
    """Return the step at which each sample comes, -1 for those after the last whole step."""
    steps = np.full(NUM_SAMPLES, -1)
    steps[batches] = np.arange(len(batches))[:, None]
    return steps


def lane_correlation(batches: np.ndarray, lanes: int = 64) -> float:
    """Return the rank correlation of a lane's order with the tars', the mean over lanes."""
    by_lane = batches.reshape(len(batches), lanes, -1).swapaxes(0, 1).reshape(lanes, -1)
    return float(np.mean([spearmanr(np.arange(len(order)), order).statistic for order in by_lane]))


def neighbour_gaps(batches: np.ndarray) -> np.ndarray:
    """Return how many steps apart the samples are that lie next to each other in a tar."""
    step = step_of(batches)
    first = np.arange(NUM_SAMPLES - 1)
    kept = (first % PER_SHARD != PER_SHARD - 1) & (step[:-1] >= 0) & (step[1:] >= 0)
    return np.abs(np.diff(step))[kept]


def largest_bias(plan: LanePlan) -> float:
    """Return how far a place in a window is from coming in its middle, on average, in standard errors."""
    orders = []
    for lane in range(plan.lanes):
        window = plan.window_at(0, lane, 0)
        while window.epoch == 0 and window.start < 10_000:
            orders.append(window.order)
            window = plan.window_after(window)
    size = int(np.median([len(order) for order in orders]))
    ranks = np.array([np.argsort(order[order < size]) for order in orders if len(order) >= size])
    return float(np.max(np.abs(ranks.mean(0) - (size - 1) / 2)) / (size / np.sqrt(12 * len(ranks))))


def flaws(plan: LanePlan) -> list[str]:
    """Return what is wrong with an order of B = 256, 64 lanes, windows of 8 chunks of 36 samples."""
    batches, number = batches_of(plan), np.arange(0, NUM_SAMPLES, 7)
    step, step_after = step_of(batches)[number], step_of(batches_of(plan, epoch=1))[number]
    gaps = neighbour_gaps(batches)
    # Chunks land independently: 5 standard errors of a rank correlation of 35,840 of them.
    uncorrelated = 5 / np.sqrt(35_840)
    found = {
        "lanes follow the tars": abs(lane_correlation(batches)) > uncorrelated,
        "epochs are alike": abs(spearmanr(step, step_after).statistic) > uncorrelated,
        # A window lasts 72 steps: two of its samples are 21 apart in the median, and meet at 1 step in 72.
        "neighbours stay near": np.median(gaps) < 18,
        "neighbours meet": np.mean(gaps == 0) > 1.3 / 72,
        "places in a window are favoured": largest_bias(plan) > 5,
        # A lane's 4 samples come from its 8 chunks: 1 + 3 · 35/287 is expected, whatever the classes are.
        "classes come together": excess(batches) > 1.45,
        "shards come together": distinct_shards(batches) < 0.8 * distinct_shards(full_shuffle(256)),
    }
    return [flaw for flaw, is_so in found.items() if is_so]


def test_the_default_order_has_no_flaw() -> None:
    assert flaws(plan_of()) == []


def test_the_measures_of_a_full_shuffle() -> None:
    batches = full_shuffle(256)
    assert excess(batches) == pytest.approx(1, abs=0.02)
    assert distinct_shards(batches) == pytest.approx(1280 * (1 - (1 - 1 / 1280) ** 256), rel=0.01)
    assert np.median(neighbour_gaps(batches)) == pytest.approx(5000 * (1 - np.sqrt(0.5)), rel=0.01)


def unpermuted(purpose: str) -> Callable[..., np.ndarray]:
    return lambda size, *key: np.arange(size) if key[1] == purpose else permutation(size, *key)


def without(purpose: str, place: int) -> Callable[..., np.ndarray]:
    """Leave a part of the key out, so that what differs in nothing else is permuted alike."""

    def alike(size: int, *key: int | str) -> np.ndarray:
        return permutation(size, *(key[:place] + key[place + 1 :] if key[1] == purpose else key))

    return alike


def rotated(size: int, *key: int | str) -> np.ndarray:
    return np.roll(np.arange(size), permutation(size, *key)[0])


@pytest.mark.parametrize(
    ("broken", "expected"),
    [
        (unpermuted("chunks"), {"lanes follow the tars", "epochs are alike", "classes come together"}),
        (unpermuted("window"), {"neighbours meet", "classes come together", "shards come together"}),
        (without("chunks", 2), {"epochs are alike"}),
        (without("window", 3), {"places in a window are favoured"}),
        (without("window", 4), {"places in a window are favoured"}),
        (rotated, {"neighbours stay near", "classes come together"}),
    ],
    ids=["chunks in order", "samples in order", "no epoch", "no lane", "no window number", "rotated"],
)
def test_a_broken_order_is_noticed(
    broken: Callable[..., np.ndarray], expected: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "permutation", broken)
    assert expected <= set(flaws(plan_of()))


def test_a_narrow_window_is_noticed() -> None:
    expected = {"neighbours stay near", "neighbours meet", "classes come together", "shards come together"}
    assert set(flaws(plan_of(window_chunks=2))) == expected


@pytest.mark.parametrize(
    ("batch_size", "lanes", "chunk_bytes", "window_chunks"),
    [
        (256, 64, 4_000_000, 8),
        (256, 16, 4_000_000, 32),
        (256, 256, 4_000_000, 2),
        (1024, 64, 4_000_000, 8),
        (2048, 64, 4_000_000, 8),
        (2048, 64, 4_000_000, 64),
        (2048, 64, 1_000_000, 32),
        (2048, 256, 1_000_000, 64),
    ],
)
def test_the_excess_follows_from_the_chunks_in_a_lanes_window(
    batch_size: int, lanes: int, chunk_bytes: int, window_chunks: int
) -> None:
    plan = plan_of(batch_size, lanes, chunk_bytes, window_chunks)
    samples = chunk_bytes // SAMPLE_BYTES  # of a chunk, but for the last of each tar
    b = batch_size // lanes
    expected = 1 + (b - 1) * (samples - 1) / (samples * window_chunks - 1)
    assert excess(batches_of(plan)) == pytest.approx(expected, rel=0.08)


def test_ten_chunks_per_sample_of_the_batch_come_near_a_full_shuffle() -> None:
    """The advice of docs/data_order.md: lanes × window_chunks ≥ 10 × batch."""
    plan = plan_of(256, 64, 1_000_000, 40)
    batches = batches_of(plan)
    assert excess(batches) < 1.1
    assert distinct_shards(batches) > 0.96 * distinct_shards(full_shuffle(256))


def test_tars_in_a_shuffled_order_need_no_window() -> None:
    """As `data build` writes them: a chunk is as mixed as the set."""
    shuffled = np.random.default_rng(0).permutation(NUM_SAMPLES)
    assert excess(shuffled[batches_of(plan_of(2048))]) == pytest.approx(1, abs=0.02)


def test_a_small_set_is_spread_over_its_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    """10,000 samples: a lane's window is nearly all of its epoch, and the lanes together hold every class."""
    assert len(plan_of(num_samples=10_000).window_at(0, 0, 0).order) > 100
    assert excess(batches_of(plan_of(num_samples=10_000)), 10_000) < 1.15
    monkeypatch.setattr(plan_module, "permutation", unpermuted("window"))
    assert excess(batches_of(plan_of(num_samples=10_000)), 10_000) > 1.5
