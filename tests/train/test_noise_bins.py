import math

import pytest
import torch
from torch.testing import assert_close

from ul_scale.diffusion.schedule import latent_schedule, pixel_schedule
from ul_scale.train.noise_bins import NoiseBins, bin_names

TIMED = {"prior": ("loss/prior", latent_schedule()), "decoder": ("loss/decoder", pixel_schedule(128))}


def examples(count, seed=0):
    """Return terms, noise and weights (some 0) of ``count`` examples."""
    g = torch.Generator().manual_seed(seed)
    terms = {name: torch.rand(count, generator=g) for name in ("loss", "loss/prior", "loss/decoder")}
    noise = {f"t/{purpose}": torch.rand(count, generator=g) for purpose in TIMED}
    weight = torch.tensor([0.0, 0.25, 0.5])[torch.randint(0, 3, (count,), generator=g)]
    return terms, noise, weight


def rows_of(tensors, rows):
    return {name: value[rows] for name, value in tensors.items()}


def test_means_are_those_of_a_plain_loop_over_log_snr():
    terms, noise, weight = examples(200)
    bins = NoiseBins(TIMED, 5)
    means = bins.finish(bins.sums(terms, noise, weight))
    expected = {}
    for purpose, (loss, schedule) in TIMED.items():
        edges = schedule.log_snr(torch.linspace(0, 1, 6, dtype=torch.float64)).tolist()
        levels = schedule.log_snr(noise[f"t/{purpose}"].double()).tolist()
        for name, high, low in zip(bin_names(f"loss_by_noise/{purpose}", schedule, 5), edges, edges[1:]):
            inside = [i for i, level in enumerate(levels) if low < level <= high]
            total = math.fsum(float(weight[i]) * float(terms[loss][i]) for i in inside)
            expected[name] = total / math.fsum(float(weight[i]) for i in inside)
    assert means.keys() == expected.keys() and len(means) == 10
    assert means == pytest.approx(expected, rel=1e-5)


def test_parts_add_up_to_the_whole_batch():
    terms, noise, weight = examples(24)
    bins = NoiseBins(TIMED)
    whole = bins.sums(terms, noise, weight)
    parts = [
        bins.sums(rows_of(terms, rows), rows_of(noise, rows), weight[rows])
        for rows in (slice(0, 7), slice(7, 8), slice(8, 24))
    ]
    for name, value in whole.items():
        assert_close(value, sum(part[name] for part in parts))


def test_empty_bins_are_missing_and_names_do_not_depend_on_the_batch():
    bins = NoiseBins({"base": ("loss", latent_schedule())}, 3)
    terms = {"loss": torch.tensor([2.0, 4.0, 7.0])}
    noise = {"t/base": torch.tensor([0.0, 0.1, 0.9])}
    means = bins.finish(bins.sums(terms, noise, torch.tensor([1.0, 1.0, 0.0])))
    assert list(means.items()) == [("loss_by_noise/base/0_log_snr_5.0_to_0.9", 3.0)]
    assert set(means) < set(bin_names("loss_by_noise/base", latent_schedule(), 3))


def test_the_last_time_below_one_has_a_bin():
    bins = NoiseBins({"base": ("loss", latent_schedule())}, 7)
    t = torch.nextafter(torch.ones(1), torch.zeros(1))
    (name,) = bins.finish(bins.sums({"loss": torch.ones(1)}, {"t/base": t}, torch.ones(1)))
    assert name.startswith("loss_by_noise/base/6_") and name.endswith("_to_-10.0")


def test_a_loss_that_is_not_finite_spoils_its_own_bin_only():
    terms, noise, weight = examples(64)
    terms["loss/prior"][3], noise["t/prior"][3], weight[3] = math.nan, 0.99, 0.5
    bins = NoiseBins(TIMED)
    bad = [name for name, mean in bins.finish(bins.sums(terms, noise, weight)).items() if math.isnan(mean)]
    assert len(bad) == 1 and bad[0].startswith("loss_by_noise/prior/7_")


def test_names_pass_tensorboards_check():
    import re

    names = bin_names("loss_by_noise/decoder", pixel_schedule(512), 8)
    assert names == sorted(names) and all(re.fullmatch(r"[-/\w.]+", name) for name in names)
