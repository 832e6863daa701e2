import math

import pytest
import torch
from templates import AUTOENCODER, BASE

from ul_scale import config as configs
from ul_scale.data.index import open_index
from ul_scale.data.stream import iterate
from ul_scale.evaluate.bitrate import measure_bitrate
from ul_scale.evaluate.encode import encode
from ul_scale.evaluate.metrics import EvaluationConfig, held_out_bits
from ul_scale.evaluate.restore import restore_autoencoder, restore_base
from ul_scale.train import worker

FEW = {"samples": 6, "times_per_image": 2}


@pytest.fixture
def autoencoder(write_config):
    config = configs.load(write_config(AUTOENCODER, train={"steps": 3}))
    assert worker.run(config) == 0
    return worker.prepare(config).run_dir


def one_by_one(stage, inputs):
    """Return each input's bits per pixel, measured alone."""
    config = EvaluationConfig(**FEW)
    with torch.no_grad():
        return torch.cat([held_out_bits(stage, x[None], i, config) for i, x in enumerate(inputs)]).double()


def test_of_an_autoencoder_with_its_parts(autoencoder):
    result = measure_bitrate(autoencoder, **FEW)
    run, stage = restore_autoencoder(autoencoder, 3)
    (batch,) = iterate(open_index(run.data.val), run.data, stop=6, batch_size=6)
    bits = one_by_one(stage, batch["x"])
    assert result["bits_per_pixel"] == pytest.approx(bits.mean().item(), rel=1e-5)
    assert result["bits_per_pixel_ci95"] == pytest.approx(1.96 * bits.std().item() / 6**0.5, rel=1e-4)
    assert result["bits_per_dim"] == pytest.approx(result["bits_per_pixel"] * 16 * 16 / (2 * 4 * 4))
    # KL of N(α z, σ²) to N(0, 1) at λ = −10, in float64.
    alpha2 = torch.sigmoid(torch.tensor(-10.0, dtype=torch.float64)).item()
    z = stage.encode(batch["x"]).detach().double()
    nats = 0.5 * (alpha2 * z**2 - alpha2 - math.log(1 - alpha2)).flatten(1).sum(1).mean().item()
    assert result["kl"] == pytest.approx(nats / (256 * math.log(2)), rel=1e-3)
    assert result["diffusion"] + result["kl"] == pytest.approx(result["bits_per_pixel"])
    assert result["kl_share"] == pytest.approx(result["kl"] / result["bits_per_pixel"])
    assert (result["n"], result["step"], result["split"], result["loss_factor"]) == (6, 3, "val", 3.0)


def test_batches_change_nothing_and_the_training_split_is_another(autoencoder):
    whole, cut = measure_bitrate(autoencoder, **FEW), measure_bitrate(autoencoder, **FEW, batch_size=4)
    assert cut["bits_per_pixel"] == pytest.approx(whole["bits_per_pixel"], rel=1e-5)
    train = measure_bitrate(autoencoder, split="train", **FEW)
    assert train["split"] == "train" and train["bits_per_pixel"] != whole["bits_per_pixel"]


@pytest.mark.parametrize("split", ["val", "train"])
def test_of_a_base_model(autoencoder, write_config, split):
    encode(autoencoder, 3)
    values = BASE | {"autoencoder": {"run": autoencoder.name, "step": 3}}
    config = configs.load(write_config(values, "base.yaml", train={"steps": 2}))
    assert worker.run(config) == 0
    run_dir = worker.prepare(config).run_dir
    result = measure_bitrate(run_dir, split=split, **FEW)
    run, base = restore_base(run_dir, 2)
    latents = open_index(str(autoencoder / "latents" / "step_00000003" / split))
    (batch,) = iterate(latents, run.data, stop=6, batch_size=6)
    config = EvaluationConfig(**FEW)
    with torch.no_grad():
        from ul_scale.stages.conditions import Conditions

        bits = held_out_bits(base, batch["z_clean"], 0, config, Conditions(label=batch["label"]))
    assert result["bits_per_pixel"] == pytest.approx(bits.mean().item(), rel=1e-4)
    assert "loss_factor" not in result and 0 < result["kl_share"] < 1


@pytest.mark.parametrize(
    "asked,message",
    [
        ({"samples": 99}, "--samples is 99, but .* has 16 samples"),
        ({"samples": 1}, "--samples is 1; expected 2 or more"),
        ({"split": "test"}, "--data is 'test'; expected one of val, train"),
        ({"step": 2}, r"no complete checkpoint at step 2; complete: \[3\]"),
    ],
)
def test_bad_requests_are_named(autoencoder, asked, message):
    with pytest.raises(ValueError, match=message):
        measure_bitrate(autoencoder, **(FEW | asked))


def test_a_run_without_held_out_data_says_so(write_config):
    config = configs.load(write_config(AUTOENCODER, train={"steps": 1}), ["data.val=null"])
    assert worker.run(config) == 0
    with pytest.raises(ValueError, match=r"data\.val is not set"):
        measure_bitrate(worker.prepare(config).run_dir, **FEW)
