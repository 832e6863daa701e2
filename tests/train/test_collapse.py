import dataclasses
import math

import pytest
import torch
from omegaconf import OmegaConf
from templates import AUTOENCODER

from ul_scale import config as configs
from ul_scale.stages.autoencoder import AutoencoderLoss, AutoencoderModel
from ul_scale.train import collapse, worker
from ul_scale.train.collapse import CollapseWatch, warn_of_loss_factor


def terms(bits, kl=0.0):
    return {"bits_per_pixel": torch.tensor(bits), "bits_per_pixel/kl": torch.tensor(kl)}


def told(events, steps=100):
    """Return what a watch says of (step, terms); 64 pixels, 8 latent dimensions."""
    watch, lines = CollapseWatch(num_pixels=64, latent_dims=8, steps=steps), []
    for completed, logged in events:
        watch.judge(completed, logged, lines.append)
    return lines


def test_a_collapsing_latent_is_told_of_once_with_step_value_and_remedy():
    bits = 8 * 0.005 / (64 * math.log(2))  # 0.005 nats per dimension
    (line,) = told([(step, terms(bits)) for step in (20, 30, 40)])
    assert "step 20:" in line and "0.005 nats" in line
    assert "loss.loss_factor_start" in line and "loss.loss_bias" in line and "\n" not in line


def test_information_is_what_lies_above_the_kl():
    enough = 8 * 0.1 / (64 * math.log(2))
    assert not told([(20, terms(enough))])
    assert told([(20, terms(enough, kl=0.9 * enough))])


def test_the_first_tenth_of_a_run_is_not_judged():
    assert not told([(10, terms(0.0))])
    assert told([(11, terms(0.0))])


def build_model(values):
    return configs.structure(AutoencoderModel, OmegaConf.create(values), "test")


@pytest.mark.parametrize("factor,warned", [(0.5, True), (1.0, True), (1.01, False)])
def test_a_loss_factor_that_carries_no_information_is_told_of(factor, warned):
    loss = AutoencoderLoss(loss_factor=factor, loss_bias=0.0)
    model = build_model(AUTOENCODER["model"])
    warning = warn_of_loss_factor(loss, model)
    assert (warning is not None) == warned
    if warned:
        assert f"loss.loss_factor is {factor:g}" in warning and "\n" not in warning
    # A target sets c_lf itself; a warm start does not change where it ends.
    assert warn_of_loss_factor(dataclasses.replace(loss, target_bits_per_pixel=0.1), model) is None
    warm = dataclasses.replace(loss, loss_factor_start=6.0, loss_factor_warmup_steps=5)
    assert (warn_of_loss_factor(warm, model) is not None) == warned
    # Squared error pays for information at any factor.
    assert warn_of_loss_factor(loss, build_model(AUTOENCODER["model"] | {"decoder_kind": "mse"})) is None


def test_a_run_warns_at_its_start_and_once_of_its_latent(write_config, capsys, monkeypatch):
    monkeypatch.setattr(collapse, "MIN_NATS_PER_DIM", 1e9)
    assert worker.run(configs.load(write_config(AUTOENCODER, loss={"loss_factor": 0.9}))) == 0
    lines = capsys.readouterr().out.splitlines()
    first = next(i for i, line in enumerate(lines) if "loss.loss_factor is 0.9" in line)
    assert first < next(i for i, line in enumerate(lines) if line.startswith("step 1/"))
    assert ["step 2:" in line for line in lines if "the latent is collapsing" in line] == [True]
