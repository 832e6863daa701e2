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


class TestVideo:
    CONFIG = UViTConfig(patch=2, levels=[CONV, CONV, VIT], head_dim=8, time_strides=[2, 1])

    def test_kinetics_shapes(self):
        encoder = EncoderConfig(patch=2, channels=[8, 8, 8], blocks=[1, 1, 1], time_strides=[2, 2])
        assert (encoder.downsampling, encoder.time_downsampling) == (8, 4)
        with torch.device("meta"):
            x = torch.zeros(1, 3, 16, 128, 128)
            z = Encoder(encoder, 3, 5, video=True)(x)
            assert z.shape == (1, 5, 4, 16, 16)
            config = UViTConfig(patch=2, levels=[CONV, CONV, VIT], head_dim=8, time_strides=[2, 2])
            decoder = UViT(config, 3, video=True, z_channels=5, z_downsampling=8, z_time_downsampling=4)
            assert decoder.z_level == 2
            assert decoder(x, torch.zeros(1), z=z).shape == x.shape

    def test_zero_at_first_then_every_input_matters_everywhere(self):
        net = UViT(
            self.CONFIG,
            1,
            video=True,
            z_channels=2,
            z_downsampling=8,
            z_time_downsampling=2,
            extra_channels=2,
        )
        x_t, z, extra = torch.randn(1, 1, 4, 16, 16), torch.randn(1, 2, 2, 2, 2), torch.randn(1, 2, 4, 16, 16)
        assert (net(x_t, torch.zeros(1), z=z, extra=extra) == 0).all()
        randomise(net)
        out = net(x_t, torch.zeros(1), z=z, extra=extra)
        for name, value in {"z": z + 1, "extra": extra.roll(1, 2)}.items():
            moved = net(x_t, torch.zeros(1), **({"z": z, "extra": extra} | {name: value}))
            assert ((moved - out).abs().amax((0, 1, 3, 4)) > 1e-4).all(), name

    def test_every_parameter_gets_a_gradient(self):
        net = randomise(
            UViT(self.CONFIG, 1, video=True, z_channels=2, z_downsampling=8, z_time_downsampling=2)
        )
        net(
            torch.randn(1, 1, 4, 16, 16), torch.zeros(1), z=torch.randn(1, 2, 2, 2, 2)
        ).square().sum().backward()
        assert [name for name, p in net.named_parameters() if p.grad is None or (p.grad == 0).all()] == []

    def test_a_clip_of_equal_frames_under_kernels_without_time_is_images(self):
        """3 × 3 × 3 kernels whose outer frames are zero act on each frame alone, as 3 × 3 ones."""
        config = EncoderConfig(patch=2, channels=[8, 16], blocks=[1, 1])
        image, video = Encoder(config, 3, 4), Encoder(config, 3, 4, video=True)
        for flat, deep in zip(image.parameters(), video.parameters()):
            if deep.ndim == 5:
                deep.data.zero_()
                deep.data[:, :, deep.shape[2] // 2] = flat.data
            else:
                deep.data.copy_(flat.data)
        x = torch.randn(2, 3, 1, 16, 16).expand(-1, -1, 3, -1, -1)
        z = video(x)
        for frame in z.unbind(2):
            torch.testing.assert_close(frame, image(x[:, :, 0]), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(
        "space,time,level", [(2, 1, 0), (4, 2, 1), (8, 2, 2), (16, 2, 2), (8, 4, 2), (32, 8, 2)]
    )
    def test_a_latent_enters_at_its_own_grid_or_at_the_coarsest(self, space, time, level):
        net = UViT(self.CONFIG, 1, video=True, z_channels=2, z_downsampling=space, z_time_downsampling=time)
        assert net.z_level == level

    @pytest.mark.parametrize("space,time", [(4, 1), (2, 2), (8, 1), (1, 1)])
    def test_a_latent_that_meets_no_level_is_refused(self, space, time):
        with pytest.raises(ValueError, match=f"downsampled {space}× in space and {time}× in time meets none"):
            UViT(self.CONFIG, 1, video=True, z_channels=2, z_downsampling=space, z_time_downsampling=time)

    @pytest.mark.parametrize(
        "strides,levels", [([2], [CONV, CONV, VIT]), ([3, 1], [CONV, CONV, VIT]), ([2], [VIT])]
    )
    def test_time_strides_must_match_the_levels(self, strides, levels):
        with pytest.raises(ValueError, match=r"expected 1 or 2, once for each of the \d steps between"):
            UViTConfig(patch=1, levels=levels, time_strides=strides)

    def test_heads_that_three_axes_cannot_share_are_refused(self):
        with pytest.raises(ValueError, match="head_dim is 4; expected a multiple of 8 for a 3-D grid"):
            UViT(UViTConfig(patch=1, levels=[VIT], head_dim=4), 1, video=True)


class TestText:
    def net(self):
        return UViT(UViTConfig(patch=1, levels=[CONV, VIT], head_dim=8), 1, text_width=6, num_classes=2)

    def inputs(self):
        g = torch.Generator().manual_seed(1)
        return {
            "x_t": torch.randn(2, 1, 8, 8, generator=g),
            "log_snr": torch.zeros(2),
            "label": torch.tensor([0, 2]),
            "text": torch.randn(2, 5, 6, generator=g),
            "text_mask": torch.tensor([[True, True, True, False, False], [True, True, False, False, False]]),
        }

    def test_tokens_matter_and_padding_does_not(self):
        net, given = randomise(self.net()), self.inputs()
        out, text, mask = net(**given), given["text"], given["text_mask"]
        changed = text.masked_fill(~mask[..., None], torch.nan)
        assert torch.equal(net(**given | {"text": changed}), out)
        for token in range(2):
            changed = text.clone()
            changed[:, token, 0] += 1
            moved = net(**given | {"text": changed})
            assert (moved != out).flatten(1).any(1).all()
        torch.testing.assert_close(net(**given | {"text": text[:, :3], "text_mask": mask[:, :3]}), out)

    def test_an_empty_mask_is_no_text_whatever_stands_there(self):
        net, given = randomise(self.net()), self.inputs()
        given["text_mask"] = torch.zeros(2, 5, dtype=torch.bool)
        out = net(**given)
        assert out.isfinite().all()
        assert torch.equal(net(**given | {"text": 7 * given["text"]}), out)
        none = {"text": torch.zeros(2, 0, 6), "text_mask": torch.zeros(2, 0, dtype=torch.bool)}
        torch.testing.assert_close(net(**given | none), out)

    def test_examples_do_not_mix(self):
        net, given = randomise(self.net()), self.inputs()
        alone = net(**{name: value[1:] for name, value in given.items()})
        torch.testing.assert_close(net(**given)[1:], alone, rtol=1e-4, atol=1e-4)

    def test_every_parameter_gets_a_gradient(self):
        net = randomise(self.net())
        net(**self.inputs()).square().sum().backward()
        assert [name for name, p in net.named_parameters() if p.grad is None or (p.grad == 0).all()] == []

    def test_half_precision_embeddings_and_autocast(self):
        net, given = randomise(self.net()), self.inputs()
        out = net(**given)
        half = net(**given | {"text": given["text"].half()})
        torch.testing.assert_close(half, out, rtol=2e-2, atol=2e-2)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = net(**given)
        assert mixed.dtype == torch.float32
        assert (mixed - out).square().mean() < 0.01 * out.square().mean()


def test_initial_weights_of_image_models_stay_as_they_were():
    """Runs are told apart by config and seed alone: the same seed must give the same weights."""
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(patch=2, channels=[8, 16], blocks=[1, 2]), 3, 5)
    net = UViT(UViTConfig(patch=2, levels=[CONV, VIT], head_dim=8), 3, z_channels=5, z_downsampling=4)
    last = {
        name: p.flatten()[-2:].tolist() for name, p in [*encoder.named_parameters(), *net.named_parameters()]
    }
    expected = {
        "blocks.3.conv1.weight": [-0.0766709372, 0.0512198322],
        "down_levels.0.blocks.1.conv1.weight": [-0.0606485270, 0.0115628336],
        "middle.blocks.1.mlp.2.weight": [-0.0495190471, -0.1046775728],
        "z_projection.weight": [0.3086703718, -0.2371106148],
    }
    assert {name: last[name] for name in expected} == {
        name: pytest.approx(values, rel=1e-5) for name, values in expected.items()
    }
