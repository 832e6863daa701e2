import functools

import pytest
import torch

from ul_scale.models import zoo
from ul_scale.models.flops import forward_flops
from ul_scale.models.uvit import LevelConfig, UViT, UViTConfig


@functools.cache
def gflops(size, text=False):
    """Forward, at 32 × 32 × 32 latents."""
    fields = zoo.BASES[size]["net"]
    config = UViTConfig(**(fields | {"levels": [LevelConfig(**level) for level in fields["levels"]]}))
    given = {"x_t": torch.zeros(1, 32, 32, 32), "log_snr": torch.zeros(1)}
    if text:
        given |= {"text": torch.zeros(1, 77, 768), "text_mask": torch.ones(1, 77, dtype=torch.bool)}
    given = {name: value.to("meta") for name, value in given.items()}
    with torch.device("meta"):
        net = UViT(config, 32, text_width=768 if text else None)
    return forward_flops(net, lambda net: net(**given)) / 1e9


def test_text_to_image_models_cost_what_they_are_called():
    for cost in (100, 300, 970):
        assert gflops(f"t2i-{cost}g", text=True) == pytest.approx(cost, rel=0.03)


def test_named_costs_are_those_of_the_docstring():
    costs = {"small": 68, "medium": 161, "large": 402, "ladder-1": 0.68, "ladder-9": 3070}
    assert {size: gflops(size) for size in costs} == {
        size: pytest.approx(cost, rel=0.01) for size, cost in costs.items()
    }


def test_aliases_are_the_same_models():
    sizes = zoo.BASES
    assert sizes["medium"] == sizes["imagenet512"] == sizes["ladder-6"] == sizes["kinetics600-medium"]
    assert sizes["small"] == sizes["ladder-5"] == sizes["kinetics600-small"]
    assert sizes["large"] == sizes["ladder-7"]


class TestLadder:
    def test_steps_of_cost_are_about_geometric(self):
        costs = [gflops(size) for size in zoo.LADDER]
        steps = [after / before for before, after in zip(costs, costs[1:])]
        assert len(costs) >= 8 and 5 < steps[0] < 6
        assert all(2.2 < step < 3.1 for step in steps[1:])

    def test_rules_of_shape_hold(self):
        for size in zoo.LADDER:
            net = zoo.BASES[size]["net"]
            fine, coarse = net["levels"]
            assert (net["patch"], net["head_dim"], fine["dropout"], coarse["dropout"]) == (1, 64, 0.1, 0.1)
            assert coarse["channels"] == 2 * fine["channels"] == 64 * coarse["blocks"]
            assert abs(fine["blocks"] - coarse["blocks"] * 6 / 16) <= 0.5
            assert fine["channels"] % net["head_dim"] == 0
