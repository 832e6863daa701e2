"""Base models on autoencoders that are not trained here, from the config to samples."""

import json

import pytest
import torch
from templates import BASE
from typer.testing import CliRunner

from ul_scale import config as configs
from ul_scale.cli import app
from ul_scale.data.index import open_index
from ul_scale.evaluate.fixed_run import fixed_run
from ul_scale.evaluate.metrics import EvaluationConfig, evaluate
from ul_scale.exported import load_exported
from ul_scale.train import worker

PIXELS = {
    "kind": "fixed_autoencoder",
    "name": "pixels",
    "data": {"image_size": 16, "channels": 1, "workers": 0},
    "model": {"source": "pixels", "patch": 4},
    "loss": {"log_snr_max": 10.0},
}
TINY = EvaluationConfig(samples=6, base_steps=2, decoder_steps=2, batch_size=4, times_per_image=2)


@pytest.fixture
def pixels(write_config, shards):
    """Run directory of pixels whose latents the command has written."""
    path = write_config(PIXELS, "pixels.yaml", data=shards)
    result = CliRunner().invoke(app, ["encode", str(path), "model.patch=4"])
    assert result.exit_code == 0, result.output
    return fixed_run(str(path), [])


def base_config(write_config, pixels, **sections):
    autoencoder = {"run": pixels.name, "step": 0} | sections.pop("autoencoder", {})
    loss = {"log_snr_max": 10.0, "log_snr_shift": -1.0}
    return configs.load(write_config(BASE | {"autoencoder": autoencoder, "loss": loss}, **sections))


def test_pixels_are_encoded_by_one_command_and_trained_on(write_config, pixels):
    facts = open_index(str(pixels / "latents/step_00000000/train")).extra
    assert facts["shape"] == [16, 4, 4] and facts["num_pixels"] == 256 and facts["log_snr_max"] == 10.0
    config = base_config(write_config, pixels)
    assert worker.run(config) == 0
    values = evaluate(worker.prepare(config).run_dir, 8, TINY)
    assert values["fd_effnet_lite0"] > 0 and values["base_bits_per_pixel"] > 0
    out = pixels.parent / "exported"
    result = CliRunner().invoke(app, ["checkpoint", "export", str(worker.prepare(config).run_dir), str(out)])
    assert result.exit_code == 0, result.output
    assert load_exported(out).latent_shape == (16, 4, 4)
    refused = CliRunner().invoke(app, ["checkpoint", "export", str(pixels), str(out)])
    assert "there are no weights to export" in str(refused.exception)
    own = evaluate(pixels, 0, TINY)
    assert "bits_per_pixel" not in own and own["psnr"] > 40  # what noise at λ = 10 leaves


def test_on_the_fly_the_same_latents_are_trained_on(write_config, pixels, shards):
    stored = base_config(write_config, pixels, train={"steps": 2})
    data = {**shards, "image_size": 16, "channels": 1}
    direct = base_config(
        write_config, pixels, train={"steps": 2}, data=data, autoencoder={"on_the_fly": True}
    )
    losses = []
    for config in (stored, direct):
        assert worker.run(config) == 0
        metrics = worker.prepare(config).run_dir / "metrics" / "1.jsonl"
        losses.append(json.loads(metrics.read_text().splitlines()[-1])["loss"])
    # Other orders of the same few images: alike, not the same.
    assert losses[0] == pytest.approx(losses[1], rel=0.5)


def test_a_base_model_at_another_noise_is_refused(write_config, pixels):
    config = base_config(write_config, pixels, loss={"log_snr_max": 5.0})
    with pytest.raises(ValueError, match="loss.log_snr_max is 5.0, but the autoencoder's is 10.0"):
        worker.run(config)


def test_there_is_nothing_to_train(write_config, shards):
    path = write_config(PIXELS, "pixels.yaml", data=shards)
    with pytest.raises(ValueError, match="there is nothing to train; expected: ul-scale encode"):
        configs.load(path)
    trained = write_config(BASE | {"autoencoder": {"run": "x", "step": 0}}, "base.yaml")
    with pytest.raises(ValueError, match="kind is base; expected a run directory, or a fixed_autoencoder"):
        fixed_run(str(trained), [])


def test_a_diffusers_autoencoder_is_found_again_by_its_weights(write_config, shards, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=4, latent_channels=2
    ).save_pretrained(tmp_path / "vae")
    values = PIXELS | {"model": {"source": "diffusers", "weights": str(tmp_path / "vae")}}
    path = str(write_config(values, "vae.yaml", data=shards))
    run_dir = fixed_run(path, [])
    assert configs.loads((run_dir / "config.yaml").read_text(), "x").model.weights_sha256
    (tmp_path / "vae").rename(tmp_path / "elsewhere")
    assert fixed_run(path, [f"model.weights={tmp_path / 'elsewhere'}"]) == run_dir
    result = CliRunner().invoke(app, ["encode", path, f"model.weights={tmp_path / 'elsewhere'}"])
    assert result.exit_code == 0, result.output
