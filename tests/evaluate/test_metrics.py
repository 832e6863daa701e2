import json
import math
from dataclasses import replace

import pytest
import torch
from templates import AUTOENCODER, BASE

from ul_scale import config as configs
from ul_scale.checkpoint import state, store
from ul_scale.data.index import open_index
from ul_scale.evaluate.bitrate import measure_bitrate
from ul_scale.evaluate.encode import encode
from ul_scale.evaluate.features import load_network
from ul_scale.evaluate.metrics import (
    EvaluationConfig,
    evaluate,
    held_out_bits,
    picture_path,
    read_evaluation,
    reference_features,
)
from ul_scale.evaluate.restore import restore_autoencoder
from ul_scale.models.uvit import LevelConfig, UViTConfig
from ul_scale.stages.base import BaseLoss, BaseModel, BaseStage
from ul_scale.train import worker
from ul_scale.train.prepare import read_autoencoder

TINY = EvaluationConfig(samples=6, base_steps=2, decoder_steps=2, batch_size=4, times_per_image=2)


def gaussian_stage(std):
    """A base model whose network is zero: the exact denoiser of N(0, std²)."""
    net = UViTConfig(patch=1, levels=[LevelConfig(kind="transformer", channels=8, blocks=1)], head_dim=8)
    return BaseStage(BaseModel(net=net), BaseLoss(), latent_shape=(2, 4, 4), num_pixels=64, z_std=std)


def test_held_out_bits_of_a_gaussian_are_the_closed_form():
    std, n = 0.5, 400
    z = std * torch.randn(n, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        bits = held_out_bits(gaussian_stage(std), z, 0, EvaluationConfig(times_per_image=8))
    nats = 0.5 * math.log((1 + math.exp(5) * std**2) / (1 + math.exp(-10) * std**2))
    expected = 32 * nats / (64 * math.log(2))
    assert bits.shape == (n,)
    assert bits.mean().item() == pytest.approx(expected, abs=4 * bits.std().item() / n**0.5)


def test_bits_of_an_image_do_not_depend_on_its_batch():
    z, stage = torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(0)), gaussian_stage(1.0)
    with torch.no_grad():
        whole = held_out_bits(stage, z, 10, TINY)
        parts = [held_out_bits(stage, z[i : i + 1], 10 + i, TINY) for i in range(5)]
    torch.testing.assert_close(torch.cat(parts), whole)


@pytest.mark.parametrize(
    "settings",
    [
        {"guidance": math.nan},
        {"guidance": -1.0},
        {"guidance_interval": [1.0, -5.0]},
        {"guidance_interval": [-5.0, 1.0]},  # without guidance
        {"base_sampler": "x"},
        {"samples": 1},
    ],
)
def test_settings_that_mean_nothing_are_named(settings):
    with pytest.raises(ValueError, match=f"evaluation.{next(iter(settings))} is"):
        EvaluationConfig(**settings)


@pytest.fixture
def autoencoder(write_config):
    path = write_config(AUTOENCODER, train={"steps": 3})
    config = configs.load(path)
    assert worker.run(config) == 0
    return worker.prepare(config).run_dir


def test_evaluations_are_measured_once_and_again_when_asked_otherwise(autoencoder):
    first = evaluate(autoencoder, 3, TINY)
    assert first["n"] == 6 and 0 < first["bits_per_pixel"] < 10 and 0 < first["psnr"] < 40
    assert first["rfd_effnet_lite0"] > 0 and first["bits_per_pixel_ci95"] > 0
    folder = autoencoder / "evals" / "step_00000003"
    assert json.loads((folder / "metrics.json").read_text()) == first
    newest, own = folder / "reconstructions.png", picture_path(autoencoder, 3, TINY, "reconstructions")
    assert newest.read_bytes() == own.read_bytes() and own.stat().st_size > 100
    assert evaluate(autoencoder, 3, TINY) == first  # the seconds it took included: not measured again
    other = EvaluationConfig(**(vars(TINY) | {"seed": 1}))
    assert read_evaluation(autoencoder, 3, other) is None
    picture = own.read_bytes()
    evaluate(autoencoder, 3, other)
    # Another evaluation's pictures take no other's place.
    assert own.read_bytes() == picture != newest.read_bytes()


def test_evaluations_do_not_depend_on_the_batch_size(autoencoder):
    values = [
        evaluate(autoencoder, 3, EvaluationConfig(**(vars(TINY) | {"batch_size": size}))) for size in (2, 6)
    ]
    for name in ("bits_per_pixel", "psnr", "rfd_effnet_lite0"):
        assert values[0][name] == pytest.approx(values[1][name], rel=1e-4)


def test_evaluation_uses_the_average_and_not_the_last_weights(autoencoder):
    _, stage = restore_autoencoder(autoencoder, 3)
    average, last = ({name: torch.empty_like(p) for name, p in stage.named_parameters()} for _ in range(2))
    state.load({"ema": {"40": average}, "model": last}, store.shard_dir(autoencoder, 3))
    assert all(torch.equal(p, average[name]) for name, p in stage.named_parameters())
    assert any(not torch.equal(p, last[name]) for name, p in stage.named_parameters())


def test_base_model_is_evaluated_through_its_autoencoder(autoencoder, write_config):
    encode(autoencoder, 3)
    values = BASE | {"autoencoder": {"run": autoencoder.name, "step": 3}}
    config = configs.load(write_config(values, "base.yaml", train={"steps": 2}))
    assert worker.run(config) == 0
    run_dir = worker.prepare(config).run_dir
    result = evaluate(run_dir, 2, TINY)
    assert result["fd_effnet_lite0"] > 0 and 0 < result["base_bits_per_pixel"] < 10
    assert (run_dir / "evals" / "step_00000002" / "samples.png").is_file()


def test_a_base_model_on_the_fly_is_measured_on_its_own_held_out_data(autoencoder, write_config, shards):
    values = BASE | {"autoencoder": {"run": autoencoder.name, "step": 3, "on_the_fly": True}}
    swapped = {"train": shards["val"], "val": shards["train"], "image_size": 16, "channels": 1}
    config = configs.load(write_config(values, "base.yaml", data=swapped, train={"steps": 2}))
    assert worker.run(config) == 0
    run_dir = worker.prepare(config).run_dir
    # The autoencoder's own held-out data are 16.
    assert evaluate(run_dir, 2, replace(TINY, samples=20))["held_out"].startswith("train/")
    assert measure_bitrate(run_dir, split="train", samples=16, times_per_image=1)["n"] == 16
    with pytest.raises(ValueError, match="--samples is 17, but .*val has 16 samples"):
        measure_bitrate(run_dir, split="train", samples=17)


def test_other_held_out_data_are_measured_anew(autoencoder, shards):
    first = evaluate(autoencoder, 3, TINY)
    path = autoencoder / "config.yaml"
    path.write_text(path.read_text().replace(shards["val"], shards["train"]))
    other = evaluate(autoencoder, 3, TINY)
    assert other["held_out"] != first["held_out"] and other["psnr"] != first["psnr"]


def test_reference_features_are_kept_by_how_images_are_decoded(autoencoder):
    run, network = read_autoencoder(autoencoder), load_network(TINY.features)
    for fast_jpeg in (True, False, True):
        as_read = replace(run, data=replace(run.data, fast_jpeg=fast_jpeg))
        reference_features(autoencoder.parent, open_index(run.data.val), as_read, TINY, network)
    kept = [path for path in (autoencoder.parent / "features").rglob("*") if path.is_file()]
    assert len(kept) == 2


def test_guidance_needs_something_to_be_left_out(autoencoder, write_config):
    encode(autoencoder, 3)
    for model, loss, why in (
        ({"num_classes": None}, {}, "is told nothing"),
        ({}, {"label_dropout": 0.0}, "was trained with loss.label_dropout=0"),
    ):
        values = BASE | {"autoencoder": {"run": autoencoder.name, "step": 3}}
        values |= {"model": BASE["model"] | model, "loss": loss}
        config = configs.load(write_config(values, "base.yaml", train={"steps": 1}))
        assert worker.run(config) == 0
        with pytest.raises(ValueError, match=f"guidance is 2.0, but .* {why}; expected 1"):
            evaluate(worker.prepare(config).run_dir, 1, replace(TINY, guidance=2.0))


def test_bad_requests_are_named(autoencoder, tmp_path):
    with pytest.raises(ValueError, match="no complete checkpoint at step 7; complete: \\[3\\]"):
        evaluate(autoencoder, 7, TINY)
    assert not (autoencoder / "evals").exists()
    with pytest.raises(ValueError, match="evaluation.samples is 99, but .* has 16 held-out samples"):
        evaluate(autoencoder, 3, EvaluationConfig(samples=99))
    with pytest.raises(ValueError, match="not a run directory"):
        evaluate(tmp_path / "nowhere", 3, TINY)


def test_latents_say_what_they_are(autoencoder):
    from ul_scale.data.config import DataConfig
    from ul_scale.data.stream import iterate

    folder = encode(autoencoder, 3)[0]
    index = open_index(str(folder))
    (batch,) = iterate(index, DataConfig(), batch_size=100)
    z = batch["z_clean"].double()
    assert index.extra["shape"] == [2, 4, 4] and index.extra["num_pixels"] == 256
    assert index.extra["std"] == pytest.approx(z.std(correction=0).item(), rel=1e-5)
    assert len(index) == 48 and set(batch["label"].tolist()) == {0, 1}
    # In the images' order, so that a latent can be compared with its image.
    config, stage = restore_autoencoder(autoencoder, 3)
    (images,) = iterate(open_index(config.data.train), config.data, batch_size=100)
    torch.testing.assert_close(stage.encode(images["x"]), batch["z_clean"], rtol=1e-4, atol=1e-5)
