import torch

from ul_scale.stages.noise import NoiseSpec, draw_noise

SPEC = NoiseSpec(times={"prior": None, "decoder": None}, eps={"z_0": (2, 3)})


def draw(lanes, **change):
    args = {"seed": 0, "step": 5, "lane_size": 4, "batch_size": 32}
    return draw_noise(SPEC, lanes=lanes, **(args | change))


def test_a_lane_draws_the_same_wherever_it_is_held():
    whole = draw(range(8))
    for lanes in ([0, 1, 2], [3, 4, 5], [6, 7]):
        part = draw(lanes)
        rows = slice(lanes[0] * 4, lanes[-1] * 4 + 4)
        assert all(torch.equal(part[name], whole[name][rows]) for name in whole)


def test_times_are_stratified_over_the_global_batch():
    noise = draw(range(8))
    for purpose in ("t/prior", "t/decoder"):
        assert sorted((noise[purpose] * 32).floor().int().tolist()) == list(range(32))
    assert not torch.equal(noise["t/prior"], noise["t/decoder"])


def test_steps_seeds_and_lanes_draw_anew():
    noise = draw([0])
    for other in (draw([1]), draw([0], step=6), draw([0], seed=1)):
        assert not torch.equal(other["eps/z_0"], noise["eps/z_0"])
    assert noise["eps/z_0"].shape == (4, 2, 3)
