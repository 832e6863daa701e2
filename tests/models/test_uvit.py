import pytest
import torch

from ul_scale.models.encoder import Encoder, EncoderConfig
from ul_scale.models.uvit import LevelConfig, UViT, UViTConfig

CONV, VIT = (
    LevelConfig(kind="conv", channels=8, blocks=3),
    LevelConfig(kind="transformer", channels=16, blocks=2),
)


def randomise(module):
    """Leave the zero-initialised state, in which a network ignores its inputs."""
    g = torch.Generator().manual_seed(0)
    for p in module.parameters():
        p.data = 0.3 * torch.randn(p.shape, generator=g)
    return module


@pytest.mark.parametrize("levels", [[VIT], [VIT, VIT], [CONV, VIT], [CONV, CONV, VIT]])
def test_prediction_has_the_inputs_shape_and_is_zero_at_first(levels):
    net = UViT(UViTConfig(patch=2, levels=levels, head_dim=8), 3)
    x_t = torch.randn(2, 3, 16, 16)
    out = net(x_t, torch.zeros(2))
    assert out.shape == x_t.shape and (out == 0).all()


@pytest.mark.parametrize("z_grid", [2, 4, 8])
def test_every_input_matters(z_grid):
    net = randomise(
        UViT(
            UViTConfig(patch=2, levels=[CONV, VIT], head_dim=8),
            1,
            num_classes=3,
            z_channels=2,
            z_downsampling=16 // z_grid,
        )
    )
    x_t, z = torch.randn(2, 1, 16, 16), torch.randn(2, 2, z_grid, z_grid)
    args = {"log_snr": torch.zeros(2), "label": torch.tensor([0, 1]), "z": z}
    out = net(x_t, **args)
    changes = {"log_snr": torch.ones(2), "label": torch.tensor([2, 3]), "z": z + 1}
    for name, value in changes.items():
        assert not torch.allclose(net(x_t, **(args | {name: value})), out), name


def test_every_parameter_gets_a_gradient():
    net = randomise(
        UViT(UViTConfig(patch=1, levels=[CONV, VIT], head_dim=8), 1, z_channels=2, z_downsampling=2)
    )
    net(torch.randn(2, 1, 8, 8), torch.zeros(2), z=torch.randn(2, 2, 4, 4)).square().sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None] == []


def test_examples_do_not_mix():
    net = randomise(UViT(UViTConfig(patch=1, levels=[CONV, VIT], head_dim=8), 1))
    x_t, log_snr = torch.randn(3, 1, 8, 8), torch.tensor([-3.0, 0.0, 3.0])
    torch.testing.assert_close(net(x_t, log_snr)[1:2], net(x_t[1:2], log_snr[1:2]), rtol=1e-4, atol=1e-4)


def test_attention_knows_positions():
    net = randomise(UViT(UViTConfig(patch=1, levels=[VIT], head_dim=8), 1))
    x_t = torch.randn(1, 1, 4, 4)
    moved = net(x_t.roll(1, dims=3), torch.zeros(1)).roll(-1, dims=3)
    assert not torch.allclose(moved, net(x_t, torch.zeros(1)), atol=1e-3)


def test_a_latent_finer_than_every_level_is_refused():
    with pytest.raises(ValueError, match="downsampled 1× meets none of the levels"):
        UViT(UViTConfig(patch=2, levels=[VIT]), 1, z_channels=2, z_downsampling=1)


def test_encoder_downsamples_and_is_deterministic():
    config = EncoderConfig(patch=2, channels=[8, 16], blocks=[1, 2])
    encoder = Encoder(config, 3, 5)
    x = torch.randn(2, 3, 32, 32)
    assert encoder(x).shape == (2, 5, 32 // config.downsampling, 8)
    assert torch.equal(encoder(x), encoder(x))


def test_encoder_levels_must_match():
    with pytest.raises(ValueError, match="2 channels but 1 blocks"):
        EncoderConfig(patch=2, channels=[8, 16], blocks=[1])
