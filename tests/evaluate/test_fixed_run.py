"""Base models on autoencoders that are not trained here, from the config to samples."""

import json
import re
import shutil

import pytest
import torch
from templates import BASE
from typer.testing import CliRunner

from ul_scale import config as configs
from ul_scale.cli import app
from ul_scale.data.index import open_index
from ul_scale.data.indexing import build_index
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.val={train}"], "is the training set"),
        (["data.val={other}"], "its classes are not those of"),
        (["data.val=/nowhere"], "/nowhere: no such folder"),
        (["--step", "3"], "--step is 3, but .*pixels.yaml is not trained; expected none, or 0"),
        (["--dtype", "bf16"], "dtype is bf16; expected one of fp32, fp16"),
    ],
)
def test_what_is_refused_writes_nothing(write_config, shards, tmp_path, arguments, message):
    other = shutil.copytree(shards["val"], tmp_path / "other")
    build_index(str(other), classes=["up", "down"])
    path = str(write_config(PIXELS, "pixels.yaml", data={"train": shards["train"]}))
    given = [each.format(train=shards["train"], other=other) for each in arguments]
    before = sorted(tmp_path.rglob("*"))
    result = CliRunner().invoke(app, ["encode", path, *given])
    assert isinstance(result.exception, ValueError) and re.search(message, str(result.exception))
    assert sorted(tmp_path.rglob("*")) == before


def test_held_out_data_stay_unless_others_are_given(write_config, shards, tmp_path):
    def val_after(val=None):
        path = write_config(PIXELS, data={"train": shards["train"], "val": val})
        run_dir = fixed_run(str(path), [])
        return run_dir, configs.loads((run_dir / "config.yaml").read_text(), "x").data.val

    run_dir, val = val_after()
    assert val is None
    assert val_after(val=shards["val"]) == val_after() == (run_dir, shards["val"])
    moved = str(shutil.copytree(shards["val"], tmp_path / "moved"))
    assert val_after(val=moved) == val_after() == (run_dir, moved)


def test_a_run_is_encoded_at_step_0_alone(pixels):
    result = CliRunner().invoke(app, ["encode", str(pixels), "--step", "3"])
    assert "is not trained here; step is 3, expected 0" in str(result.exception)
    assert [path.name for path in (pixels / "latents").iterdir()] == ["step_00000000"]


def test_a_lost_shard_is_encoded_again_as_it_was(pixels):
    folder = pixels / "latents/step_00000000/train"
    [shard] = folder.glob("*.tar")
    content, fingerprint = shard.read_bytes(), open_index(str(folder)).fingerprint
    shard.unlink()
    with pytest.raises(ValueError, match=f"put it back, or run: ul-scale encode {pixels} --step 0$"):
        open_index(str(folder))
    result = CliRunner().invoke(app, ["encode", str(pixels), "--step", "0"])
    assert result.exit_code == 0, result.output
    assert shard.read_bytes() == content and open_index(str(folder)).fingerprint == fingerprint


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
