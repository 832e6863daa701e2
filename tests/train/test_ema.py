import pytest
import torch

from ul_scale.train.ema import Ema, EmaConfig


def test_averages_follow_the_closed_form():
    linear = torch.nn.Linear(1, 1, bias=False).double()
    ema = Ema(EmaConfig(half_lives_samples=[8, 1000]), linear)
    expected = {8: linear.weight.item(), 1000: linear.weight.item()}
    for step in range(50):
        linear.weight.data.fill_(step + 1.0)
        ema.update(step, batch_size=4)
        for half_life in expected:
            decay = min(0.5 ** (4 / half_life), (1 + step) / (10 + step))
            expected[half_life] = decay * expected[half_life] + (1 - decay) * (step + 1.0)
    for half_life, value in expected.items():
        assert ema.state_dict()[str(half_life)]["weight"].item() == pytest.approx(value, rel=1e-9)


def test_half_life_is_in_samples():
    linear = torch.nn.Linear(1, 1, bias=False).double()
    ema = Ema(EmaConfig(half_lives_samples=[640]), linear)
    before = ema.state_dict()["640"]["weight"].clone()
    linear.weight.data.add_(1)
    for _ in range(10):  # 10 × 64 samples, long after the warm-up
        ema.update(100_000, batch_size=64)
    torch.testing.assert_close(ema.state_dict()["640"]["weight"], before + 0.5)
