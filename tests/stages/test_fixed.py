import pytest
import torch

from ul_scale.stages.fixed import WEIGHTS_FILE, FixedAutoencoder, FixedLoss, FixedModel, weights_sha256


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    diffusers = pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    ).save_pretrained(folder)
    return folder


def images(count=2, size=16):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_pixels_come_back_as_they_were():
    stage = FixedAutoencoder(FixedModel(source="pixels", patch=4), FixedLoss(), image_size=16, channels=3)
    x = images()
    z_clean = stage.encode(x)
    assert z_clean.shape == (2, 48, 4, 4) and stage.latent_shape == (48, 4, 4)
    z_0 = stage.add_encoder_noise(z_clean, torch.zeros_like(z_clean))
    torch.testing.assert_close(stage.decode(z_0, num_steps=3, generators=[]), x)


def test_vae_encodes_and_decodes_as_diffusers_does(vae):
    from diffusers import AutoencoderKL

    model = FixedModel(source="diffusers", weights=str(vae))
    stage = FixedAutoencoder(model, FixedLoss(log_snr_max=30.0), image_size=16, channels=3)
    peer = AutoencoderKL.from_pretrained(vae, local_files_only=True)
    x = images()
    z_clean = stage.encode(x)
    assert z_clean.shape == (2, *stage.latent_shape) == (2, 4, 8, 8)
    torch.testing.assert_close(z_clean, peer.encode(x).latent_dist.mean * peer.config.scaling_factor)
    z_0 = stage.add_encoder_noise(z_clean, torch.zeros_like(z_clean))
    torch.testing.assert_close(
        stage.decode(z_0), peer.decode(z_clean / peer.config.scaling_factor).sample, rtol=1e-4, atol=1e-4
    )
    assert stage.forward_flops()["encoder"] > 0 and stage.forward_flops()["decoder"] > 0


def test_other_weights_than_those_that_were_named_are_refused(vae):
    found = weights_sha256(FixedModel(source="diffusers", weights=str(vae)))
    assert len(found) == 64
    with pytest.raises(ValueError, match=f"{WEIGHTS_FILE} has sha256 {found}; model.weights_sha256 is other"):
        weights_sha256(FixedModel(source="diffusers", weights=str(vae), weights_sha256="other"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"source": "pixel"}, "model.source is 'pixel'; expected one of pixels, diffusers"),
        ({"source": "diffusers"}, "expected a folder of weights for diffusers"),
        ({"source": "pixels", "weights": "x"}, "and none for pixels"),
    ],
)
def test_bad_settings_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        FixedModel(**values)


def test_weights_that_are_not_there_are_named(tmp_path):
    model = FixedModel(source="diffusers", weights=str(tmp_path / "none"))
    with pytest.raises(ValueError, match="expected a folder with config.json and diffusion_pytorch_model"):
        FixedAutoencoder(model, FixedLoss(), image_size=16, channels=3)


def test_images_that_do_not_divide_are_named():
    with pytest.raises(ValueError, match="data.image_size is 18; the autoencoder needs a multiple of 4"):
        FixedAutoencoder(FixedModel(source="pixels", patch=4), FixedLoss(), image_size=18, channels=3)
