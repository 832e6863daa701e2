import pytest

from ul_scale.parallel.build import check_layout, nearest
from ul_scale.parallel.engine import ParallelConfig


@pytest.mark.parametrize(
    "config,world_size,samples,message",
    [
        ({}, 2, 8, "engine is none, which is one process, but there are 2; set parallel.engine=fsdp"),
        ({"engine": "fsdp", "dp_replicate": 4}, 6, 8, "does not divide 6 processes; expected 3 or 6"),
        ({"accumulation_steps": 5}, 1, 12, "a rank has 12 samples per step; expected 4 or 6"),
        ({"accumulation_steps": 20}, 1, 12, "expected 12"),
    ],
)
def test_what_does_not_fit_is_named_with_the_nearest_that_does(config, world_size, samples, message):
    with pytest.raises(ValueError) as caught:
        check_layout(ParallelConfig(**config), world_size, samples)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_what_fits_passes():
    check_layout(ParallelConfig(engine="fsdp", dp_replicate=2, accumulation_steps=3), 4, 6)


def test_nearest():
    assert nearest([1, 2, 4], 3) == "2 or 4" and nearest([1, 2, 4], 9) == "4"
