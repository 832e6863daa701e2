import math

import pytest
import torch

from ul_scale.models.uvit import LevelConfig, UViTConfig
from ul_scale.stages.base import BaseLoss, BaseModel, BaseStage
from ul_scale.stages.noise import draw_noise

NET = UViTConfig(patch=1, levels=[LevelConfig(kind="transformer", channels=16, blocks=1)], head_dim=8)


def make_stage(z_std=0.1, **loss):
    torch.manual_seed(0)
    stage = BaseStage(
        BaseModel(num_classes=3, net=NET),
        BaseLoss(**loss),
        latent_shape=(2, 4, 4),
        num_pixels=256,
        z_std=z_std,
    )
    for p in stage.net.parameters():  # away from the zero-initialised gates and head
        torch.nn.init.normal_(p, std=0.3)
    return stage


def batch_and_noise(stage, b=6):
    z = 0.1 * torch.randn(b, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    batch = {
        "z_clean": z,
        "label": torch.arange(b) % 3,
        "uniform": torch.linspace(0, 1, b, dtype=torch.float64),
    }
    return batch, draw_noise(stage.noise_spec, seed=0, step=0, lanes=[0], lane_size=b, batch_size=b)


def test_untrained_network_already_denoises_a_gaussian_of_its_std():
    """With F = 0 the prediction is the best linear one, so the bits are those of a Gaussian of that std."""
    stage = make_stage(z_std=0.1)
    torch.nn.init.zeros_(stage.net.head.weight)
    torch.nn.init.zeros_(stage.net.head.bias)
    n = 4096
    batch, _ = batch_and_noise(stage)
    z = 0.1 * torch.randn(n, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    batch = {"z_clean": z, "label": torch.zeros(n, dtype=torch.long), "uniform": torch.ones(n)}
    noise = draw_noise(stage.noise_spec, seed=0, step=0, lanes=[0], lane_size=n, batch_size=n)
    nats = 0.5 * math.log((1 + math.exp(5) * 0.01) / (1 + math.exp(-10) * 0.01))
    expected = 32 * nats / (256 * math.log(2))
    assert stage(batch, noise, 0)["bits_per_pixel"].mean().item() == pytest.approx(expected, rel=0.03)


def test_labels_are_dropped_by_the_samples_own_number():
    stage = make_stage(label_dropout=0.5)
    batch, noise = batch_and_noise(stage)
    unlabelled = stage({**batch, "label": torch.full((6,), -1)}, noise, 0)["loss"]
    same = stage(batch, noise, 0)["loss"] == unlabelled
    assert same.tolist() == [True, True, True, False, False, False]


def test_label_is_used_and_minus_one_means_none():
    stage = make_stage()
    z_t, log_snr = torch.randn(2, 2, 4, 4), torch.zeros(2)
    none = stage.denoise(z_t, log_snr, torch.tensor([-1, -1]))
    torch.testing.assert_close(none, stage.denoise(z_t, log_snr, torch.tensor([3, 3])))
    assert not torch.allclose(none, stage.denoise(z_t, log_snr, torch.tensor([0, 0])))


def test_samples_end_at_the_encoders_noise_level():
    """Of a point mass at 0 the exact sampler leaves σ_0 ε: noise of std 0.0818, not the clean point."""
    stage = make_stage(z_std=1e-4)
    torch.nn.init.zeros_(stage.net.head.weight)
    torch.nn.init.zeros_(stage.net.head.bias)
    n = 200
    generators = [torch.Generator().manual_seed(i) for i in range(n)]
    z_0 = stage.sample(torch.zeros(n, dtype=torch.long), num_steps=64, generators=generators).detach()
    assert z_0.std().item() == pytest.approx(0.0818, rel=0.05)


def test_latents_that_do_not_fit_are_named():
    net = UViTConfig(patch=2, levels=NET.levels * 2, head_dim=8)
    with pytest.raises(ValueError, match="latents of 6 × 6 do not divide by the base model's 4×"):
        BaseStage(BaseModel(net=net), BaseLoss(), latent_shape=(2, 6, 6), num_pixels=256, z_std=1.0)
