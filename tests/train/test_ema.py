import numpy as np
import pytest
import torch

from ul_scale.train.ema import Ema, EmaConfig


def following(values, **config):
    return Ema(EmaConfig(**config), lambda: values)


def trajectory(steps, size=5, seed=0):
    """Return a random walk in float64, one row a step."""
    return np.random.default_rng(seed).normal(size=(steps, size)).cumsum(0)


def test_averages_follow_the_closed_form():
    values = {"weight": torch.ones(1, dtype=torch.float64)}
    ema = following(values, half_lives_samples=[8, 1000])
    expected = {8: 1.0, 1000: 1.0}
    for step in range(50):
        values["weight"].fill_(step + 1.0)
        ema.update(step, batch_size=4)
        for half_life in expected:
            decay = min(0.5 ** (4 / half_life), (1 + step) / (10 + step))
            expected[half_life] = decay * expected[half_life] + (1 - decay) * (step + 1.0)
    for half_life, value in expected.items():
        assert ema.state_dict()[str(half_life)]["weight"].item() == pytest.approx(value, rel=1e-9)


def test_half_life_is_in_samples():
    values = {"weight": torch.randn(1, dtype=torch.float64)}
    ema = following(values, half_lives_samples=[640])
    before = ema.state_dict()["640"]["weight"].clone()
    values["weight"].add_(1)
    for _ in range(10):  # 10 × 64 samples, long after the warm-up
        ema.update(100_000, batch_size=64)
    torch.testing.assert_close(ema.state_dict()["640"]["weight"], before + 0.5)


def test_half_lives_are_bit_for_bit_a_lerp_beside_power_functions():
    walk = torch.from_numpy(trajectory(40)).float()
    values = {"weight": torch.zeros(5)}
    ema = following(values, half_lives_samples=[40], power_widths=[0.1])
    expected = torch.zeros(5)
    for step, row in enumerate(walk):
        values["weight"].copy_(row)
        ema.update(step, batch_size=8)
        expected.lerp_(row, 1 - min(0.5 ** (8 / 40), (1 + step) / (10 + step)))
    assert torch.equal(ema.state_dict()["40"]["weight"], expected)


@pytest.mark.parametrize("width,gamma", [(0.05, 16.97), (0.10, 6.94)])
def test_power_function_is_the_weighted_sum_of_the_trajectory(width, gamma):
    """Step τ of t weighs ∫ p over that step, with γ as EDM2 gives it for these widths."""
    walk = trajectory(200)
    values = {"weight": torch.full((5,), 1e6, dtype=torch.float64)}  # initial weights must not count
    ema = following(values, half_lives_samples=[1], power_widths=[width])
    for step, row in enumerate(walk):
        values["weight"].copy_(torch.from_numpy(row))
        ema.update(step, batch_size=8)
    edges = (np.arange(201) / 200) ** (gamma + 1)
    expected = np.diff(edges) @ walk
    average = ema.state_dict()[f"power-{width:.3f}"]["weight"].numpy()
    np.testing.assert_allclose(average, expected, atol=2e-3 * walk.std())  # γ is given to two decimals


def test_first_power_function_average_is_the_parameters():
    values = {"weight": torch.randn(3)}
    ema = following(values, half_lives_samples=[10], power_widths=[0.05])
    values["weight"] = torch.randn(3)
    ema.update(0, batch_size=8)
    assert torch.equal(ema.averages["power-0.050"]["weight"], values["weight"])


def test_parameters_are_asked_for_at_every_update():
    values = {"weight": torch.zeros(2)}
    ema = following(values, half_lives_samples=[8])
    values["weight"] = torch.ones(2)  # another tensor, as of an engine that gathers shards anew
    ema.update(1000, batch_size=8)
    assert torch.equal(ema.averages["8"]["weight"], torch.full((2,), 0.5))


def test_resumed_averages_are_bit_for_bit_the_same():
    walk = torch.from_numpy(trajectory(60)).float()
    config = {"half_lives_samples": [40, 400], "power_widths": [0.05, 0.1]}

    def run(ema, values, steps):
        for step in steps:
            values["weight"].copy_(walk[step])
            ema.update(step, batch_size=8)

    values = {"weight": torch.zeros(5)}
    straight = following(values, **config)
    run(straight, values, range(60))

    first = following(values, **config)
    run(first, values, range(25))
    resumed = following(values, **config)
    for name, average in resumed.state_dict().items():
        for key, tensor in average.items():
            tensor.copy_(first.state_dict()[name][key])
    run(resumed, values, range(25, 60))
    for name, average in straight.state_dict().items():
        assert torch.equal(average["weight"], resumed.state_dict()[name]["weight"]), name


def test_a_snapshot_gathers_the_power_functions_only():
    asked = []

    def whole(average):
        asked.append(average)
        return {key: value.float() for key, value in average.items()}

    ema = following({"w": torch.ones(2)}, half_lives_samples=[8], power_widths=[0.05, 0.1])
    averages = ema.power_averages(whole)
    assert list(averages) == ["power-0.050", "power-0.100"] and len(asked) == 2
    assert torch.equal(averages["power-0.050"]["w"], torch.ones(2))
    assert ema.power_averages(lambda average: {}) == {"power-0.050": {}, "power-0.100": {}}  # another rank


def test_snapshots_are_due_at_multiples():
    config = EmaConfig(half_lives_samples=[8], power_widths=[0.05], snapshot_every_steps=4)
    assert [step for step in range(1, 13) if config.snapshot_due(step)] == [4, 8, 12]
    assert not EmaConfig(half_lives_samples=[8]).snapshot_due(4)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"half_lives_samples": []}, "ema.half_lives_samples is"),
        ({"half_lives_samples": [8, 8]}, "expected each once"),
        ({"power_widths": [0.3]}, "below 0.289"),
        ({"power_widths": [0.0]}, "ema.power_widths is"),
        ({"power_widths": [0.0505]}, "at most 3 decimals"),
        ({"power_widths": [0.05, 0.05]}, "expected each once"),
        ({"snapshot_every_steps": 10}, "and widths to keep"),
        ({"power_widths": [0.05], "snapshot_every_steps": 0}, "expected 1 or more"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        EmaConfig(**{"half_lives_samples": [8]} | changes)
