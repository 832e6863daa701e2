import math

import pytest

from ul_scale.sweep.summary import (
    best_per_size,
    caveats,
    distance_text,
    final_points,
    finding,
    frontier,
    latents_of,
    points_of,
    si,
    sizes_of,
    summarise,
    swept,
)

FORWARD = {"S": 1e6, "M": 5e6, "L": 25e6}


def row(bits=0.1, size="S", distance=100.0, *, step=100, seed=0, final=True, **other):
    return {
        "run_id": f"{bits}-{size}-{seed}",
        "autoencoder_run": f"ae-{bits}",
        "bits_per_pixel": bits,
        "size": size,
        "forward_flops": FORWARD[size],
        "train_flops": 3 * FORWARD[size] * step,
        "samples_seen": step,
        "seed": seed,
        "final": final,
        "n": 1000,
        "fd_effnet_lite0": distance,
    } | other


def grid(distances):
    """Return final rows from {bits: (S, M, L)}; None leaves one out."""
    return [
        row(bits, size, distance)
        for bits, line in distances.items()
        for size, distance in zip(FORWARD, line)
        if distance is not None
    ]


def say(distances):
    return finding(summarise(grid(distances)))


def test_latents_and_sizes_are_ordered_and_take_what_any_row_knows():
    rows = [
        row(0.28, "L"),
        row(0.036, "S", psnr=None, rfd=math.nan),
        row(0.036, "M", psnr=16.1, loss_factor=1.7),
    ]
    low, high = latents_of(rows)
    assert (low.label, high.label) == ("0.036", "0.28")
    assert (low.psnr, low.rfd, low.loss_factor, high.psnr) == (16.1, None, 1.7, None)
    assert [size.name for size in sizes_of(rows)] == ["S", "M", "L"]
    assert sizes_of(rows)[1].label == "M · 5 MFLOPs"


def test_labels_take_as_many_digits_as_tell_bitrates_apart():
    assert [x.label for x in latents_of([row(0.1501), row(0.1502), row(0.2)])] == [
        "0.1501",
        "0.1502",
        "0.2000",
    ]


def test_latents_without_a_bitrate_are_named_by_what_is_known():
    rows = [row(None, autoencoder_run=None, loss_factor=1.7), row(None, autoencoder_run="ae-1"), row(0.1)]
    latents = latents_of(rows)
    assert [x.text for x in latents] == ["0.10 bits/pixel", "c_lf 1.7", "ae-1"]


def test_seeds_are_averaged_at_equal_training_only():
    rows = [row(distance=90, seed=0), row(distance=110, seed=1), row(distance=50, step=200, seed=0)]
    first, second = points_of(rows)
    assert (first.mean, first.spread, second.mean, second.spread) == (100, (90, 110), 50, None)


def test_missing_distances_are_left_out_and_never_zero():
    rows = [row(distance=math.nan), row(distance=None, seed=1), row(distance="bad", seed=2)]
    assert points_of(rows) == [] and frontier([]) == []
    rows[0].pop("fd_effnet_lite0")
    assert points_of(rows) == []
    assert [point.mean for point in points_of([*rows, row(distance=0.0, seed=3)])] == [0.0]


def test_the_frontier_is_the_lower_envelope_over_compute():
    rows = [
        row(0.1, "S", 100, step=1),
        row(0.1, "S", 80, step=2),
        row(0.2, "S", 70, step=2),
        row(0.1, "M", 75, step=1),  # dearer and worse than the 70
        row(0.1, "M", 70, step=2),  # as good, but dearer
        row(0.1, "L", 60, step=1),
        row(0.2, "L", 10, step=1, train_flops=None),  # no place on the axis
    ]
    assert [(p.size.name, p.mean) for p in frontier(points_of(rows))] == [("S", 100), ("S", 70), ("L", 60)]


def test_the_frontier_takes_means_over_seeds_not_the_luckiest():
    rows = [row(0.1, distance=50, seed=0), row(0.1, distance=150, seed=1), row(0.2, distance=90)]
    assert [point.mean for point in frontier(points_of(rows))] == [90]


def test_finals_are_the_longest_budget_that_is_finished():
    rows = [row(distance=9, step=100), row(distance=7, step=200), row(distance=5, step=300, final=False)]
    (final,) = final_points(points_of(rows))
    assert (final.mean, final.samples_seen) == (7, 200)


def test_best_per_size_needs_two_bitrates():
    rows = [row(0.1, "S", 10), row(0.2, "S", 20), row(0.1, "M", 5)]
    best = best_per_size(final_points(points_of(rows)))
    assert {name: point.latents.label for name, point in best.items()} == {"S": "0.10"}


@pytest.mark.parametrize(
    ("distances", "expected"),
    [
        (
            {0.036: (972, 943, 939), 0.15: (1204, 1019, 923), 0.28: (1313, 1046, 938)},
            "The best bitrate rises with model size: 0.036 bits/pixel for S and M, 0.15 for L.",
        ),
        (
            {0.1: (2, 2, 1), 0.2: (1, 1, 2)},
            "The best bitrate falls with model size: 0.20 bits/pixel for S and M,",
        ),
        ({0.1: (1, 2, 1), 0.2: (2, 1, 2)}, "without a trend: 0.10 bits/pixel for S and L, 0.20 for M."),
        ({0.1: (1, 1, 1), 0.2: (2, 2, 2)}, "0.10 bits/pixel is best for S, M and L alike."),
        ({0.1: (1, None, None), 0.2: (2, None, None)}, "0.10 bits/pixel is best for S."),
        ({0.1: (1, 2, None), 0.2: (2, 1, None)}, "rises"),
        ({0.1: (1, 2, 3), 0.2: (2, 1, None)}, "1 of 6 combinations have no final evaluation yet."),
        ({0.1: (1, 2, 3)}, "No size has final evaluations at two bitrates yet: there is nothing to compare."),
        ({}, "No run has a final evaluation yet."),
    ],
)
def test_the_finding_says_what_the_rows_say(distances, expected):
    assert expected in say(distances)


def test_the_finding_names_what_seeds_cannot_tell_apart():
    rows = [row(0.1, "S", d, seed=i) for i, d in enumerate((10, 14))]
    near = [row(0.2, "S", d, seed=i) for i, d in enumerate((13, 15))]
    far = [row(0.3, "S", d, seed=i) for i, d in enumerate((19, 21))]
    assert finding(summarise(rows + near + far)).endswith("As good within the spread of seeds: 0.20 at S.")


def test_what_was_swept_in_one_sentence():
    rows = [row(bits, size, step=s, final=s == 2) for bits in (0.036, 0.28) for size in "SML" for s in (1, 2)]
    assert swept(summarise(rows)) == (
        "2 latent bitrates (0.036 to 0.28 bits per pixel) × 3 base-model sizes (1 MFLOPs to 25 MFLOPs per "
        "forward pass) × 1 seed: 6 runs, 12 evaluations."
    )
    assert swept(summarise([])) == "Nothing has been evaluated yet."
    assert "1 latent bitrate × 1 base-model size (1 MFLOPs per" in swept(summarise([row(None)]))


def test_caveats_name_unequal_n_single_seeds_edges_and_lengths():
    rows = [row(0.1, "S", 1), row(0.2, "S", 2, n=500), row(0.1, "L", 2), row(0.2, "L", 1, step=7)]
    notes = " ".join(caveats(summarise(rows)))
    assert "n = 500 and 1,000" in notes and "single seed" in notes and "training length" in notes
    assert "At S the best bitrate is the lowest one swept" in notes
    assert "At L the best bitrate is the highest one swept: the optimum may lie above it" in notes
    middle = [row(bits, "S", d, seed=seed) for bits, d in ((0.1, 2), (0.2, 1), (0.3, 2)) for seed in (0, 1)]
    assert caveats(summarise(middle)) == []


def test_numbers_for_people():
    assert [si(v, "FLOPs") for v in (0.85e6, 999.9e6, 3e12, 12, 4e30)] == [
        "850 kFLOPs",
        "1 GFLOPs",
        "3 TFLOPs",
        "12 FLOPs",
        "4e+06 YFLOPs",
    ]
    assert (si(60_000, ""), si(None, "FLOPs")) == ("60 k", "")
    assert [distance_text(v) for v in (1204.4, 26.18, 1.5, None)] == ["1,204", "26.2", "1.50", ""]
