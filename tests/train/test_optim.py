import math

import pytest

from ul_scale.train.optim import OptimConfig, learning_rate


def rates(config, steps=100):
    return [learning_rate(config, step, steps) for step in range(steps)]


def test_warm_up_then_constant():
    values = rates(OptimConfig(lr=2.0, warmup_steps=10))
    assert values[0] == pytest.approx(0.2) and values[9] == 2.0
    assert set(values[10:]) == {2.0}


def test_decay_starts_where_its_share_does_and_ends_near_zero():
    values = rates(OptimConfig(lr=2.0, warmup_steps=0, decay_fraction=0.5))
    assert set(values[:51]) == {2.0}
    assert values[75] == pytest.approx(1.0)
    assert 0 < values[99] < 0.01
    assert all(a > b for a, b in zip(values[50:], values[51:]))


def test_cosine_over_everything():
    values = rates(OptimConfig(lr=1.0, warmup_steps=0, decay_fraction=1.0))
    assert values[50] == pytest.approx(0.5)


@pytest.mark.parametrize(
    "name,values",
    [
        ("lr", (0, math.inf)),
        ("decay_fraction", (1.5, math.nan)),
        ("clip_norm", (0, math.nan)),
        ("eps", (0, -1e-8, math.nan)),
        ("weight_decay", (-0.1, math.nan, math.inf)),
    ],
)
def test_bad_values_are_refused(name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"optim.{name} is {value}; expected"):
            OptimConfig(**{name: value})


def test_warm_up_stable_decay_shapes():
    linear = rates(OptimConfig(lr=1.0, warmup_steps=0, decay_fraction=0.2, decay_shape="linear"))
    assert (
        set(linear[:81]) == {1.0} and linear[90] == pytest.approx(0.5) and linear[99] == pytest.approx(0.05)
    )
    sqrt = rates(OptimConfig(lr=1.0, warmup_steps=0, decay_fraction=0.2, decay_shape="sqrt"))
    assert sqrt[85] == pytest.approx(0.5)
    with pytest.raises(ValueError, match="decay_shape is 'exp'; expected one of cosine, linear, sqrt"):
        OptimConfig(decay_shape="exp")
