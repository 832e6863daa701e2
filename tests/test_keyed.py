import numpy as np
import torch

from ul_scale import keyed


def test_seeds_are_the_documented_hash_and_never_change():
    # printf '[0,"t/prior",5]' | b2sum -l 64, read little-endian
    assert keyed.seed_of(0, "t/prior", 5) == int.from_bytes(bytes.fromhex(GOLDEN), "little")


GOLDEN = "28d10e3da7855493"


def test_permutation_is_a_permutation_and_golden():
    assert sorted(keyed.permutation(100, 1, "x")) == list(range(100))
    assert keyed.permutation(6, 1, "x").tolist() == [3, 5, 1, 4, 2, 0]
    assert len(keyed.permutation(0, 1)) == 0


def test_uniform_is_uniform():
    draws = np.array([keyed.uniform(0, "u", i) for i in range(2000)])
    assert 0 <= draws.min() and draws.max() < 1
    assert abs(draws.mean() - 0.5) < 4 / (12 * 2000) ** 0.5


def test_generators_depend_on_the_key_alone():
    draw = [torch.randn(3, generator=keyed.generator("cpu", 0, "eps", lane)) for lane in (0, 0, 1)]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])
