"""Every config in the repository builds at its full size, and trains at a reduced one."""

import dataclasses
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from ul_scale import config as configs
from ul_scale.config import AutoencoderRun, BaseRun, FixedRun
from ul_scale.models import zoo
from ul_scale.stages.base import BaseStage
from ul_scale.stages.noise import draw_noise
from ul_scale.sweep.plan import SweepConfig
from ul_scale.train.optim import build_optimizer
from ul_scale.train.prepare import build_autoencoder, build_stage, latent_facts

ROOT = Path(__file__).parent.parent / "configs"
PATHS = {str(path.relative_to(ROOT)): path for path in sorted(ROOT.rglob("*.yaml"))}
KINDS = {name: configs.read_yaml(path).kind for name, path in PATHS.items()}
NAMED = {kind: [name for name in PATHS if KINDS[name] == kind] for kind in set(KINDS.values())}
PARENTS = {"ablations/grid_64_base.yaml": "ablations/grid_64.yaml"}
"""Of base configs: their autoencoder's config, where it is not autoencoder.yaml beside them."""
SD_VAE_512 = {"shape": [4, 64, 64], "num_pixels": 512**2, "log_snr_max": 10.0}
BATCH, TOKENS = 2, 4


def load(name):
    overrides = ["autoencoder.run=none", "autoencoder.step=0"] if KINDS[name] == "base" else []
    return configs.load_any(PATHS[name], overrides)


def latents_of(name, config, shrink=lambda config: config):
    """Return what a base config's latents are like."""
    parent = PARENTS.get(name, f"{Path(name).parent}/autoencoder.yaml")
    if name.startswith("baselines/"):
        parent = name.replace("_base", "")
    facts = SD_VAE_512
    if parent != "baselines/sd_vae.yaml":
        with torch.device("meta"):
            facts = latent_facts(build_autoencoder(shrink(load(parent))))
    given = config.model.given_frames
    return {**facts, "std": 0.5, "num_classes": config.model.num_classes or 0, "given_frames": given}


def reduced(value):
    """Return a config section with narrow, shallow networks and small data."""
    if isinstance(value, list):
        return [reduced(each) for each in value]
    if not dataclasses.is_dataclass(value):
        return value
    fields = {entry.name: reduced(getattr(value, entry.name)) for entry in dataclasses.fields(value)}
    match type(value).__name__:
        case "EncoderConfig":
            fields |= {"channels": [8] * len(value.channels), "blocks": [1] * len(value.blocks)}
        case "LevelConfig":
            fields |= {"channels": 16, "blocks": 1}
        case "UViTConfig":
            fields |= {"head_dim": 8}
        case "AutoencoderModel":
            fields |= {"latent_channels": 4}
        case "DataConfig":
            size = value.image_size and min(value.image_size, 64)
            fields |= {"image_size": size, "frames": value.frames and 8}
    return type(value)(**fields)


def trained_two_steps(stage, config, batch):
    optimizer = build_optimizer(stage, config.optim)
    before = {name: p.detach().clone() for name, p in stage.named_parameters()}
    for step in range(2):
        noise = draw_noise(stage.noise_spec, seed=0, step=step, lanes=[0], lane_size=BATCH, batch_size=BATCH)
        loss = stage(batch, noise, step)["loss"]
        assert loss.shape == (BATCH,) and loss.isfinite().all()
        loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {name for name, p in stage.named_parameters() if not torch.equal(p, before[name])}
    # Heads and gates begin at zero: the first step moves heads, the second what lies behind them.
    heads = {name for name in before if name.endswith("head.weight")}
    assert heads <= changed and len(changed) > 2 * len(heads)


@pytest.mark.parametrize("name", NAMED["autoencoder"])
def test_autoencoder(name):
    config = load(name)
    with torch.device("meta"):
        stage = build_autoencoder(config)
    assert stage.forward_flops()["decoder"] > 0
    small = reduced(config)
    stage = build_autoencoder(small)
    x = torch.rand(BATCH, *stage.image_shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    trained_two_steps(stage, small, {"x": x})


@pytest.mark.parametrize("name", NAMED["base"])
def test_base(name):
    config = load(name)
    with torch.device("meta"):
        stage = build_stage(config, latents_of(name, config))
    assert stage.forward_flops()["base"] > 0
    small = reduced(config)
    stage = build_stage(small, latents_of(name, small, reduced))
    assert isinstance(stage, BaseStage)
    generator = torch.Generator().manual_seed(0)
    z = 0.5 * torch.randn(BATCH, *stage.latent_shape, generator=generator)
    batch = {"z_clean": z, "label": torch.zeros(BATCH, dtype=torch.long), "uniform": torch.ones(BATCH)}
    if stage.text is not None:
        batch["text_embedding"] = torch.randn(BATCH, TOKENS, stage.text.width, generator=generator)
        batch["text_mask"] = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    if stage.given_frames is not None:
        batch["z_given"] = z[:, :, :1]
    trained_two_steps(stage, small, batch)


@pytest.mark.parametrize("name", NAMED["fixed_autoencoder"])
def test_fixed_autoencoder(name):
    config = load(name)
    assert isinstance(config, FixedRun)
    if config.model.source == "pixels":
        stage = build_autoencoder(config)
        base = load(name.replace(".yaml", "_base.yaml"))
        assert base.loss.log_snr_max == stage.loss.log_snr_max
        x = torch.rand(1, *stage.image_shape)
        assert stage.encode(x).shape == (1, *stage.latent_shape)


@pytest.mark.parametrize("name", NAMED["sweep"])
def test_sweep(name):
    values = OmegaConf.merge(configs.read_yaml(PATHS[name]))
    sweep = configs.structure(SweepConfig, values, name)
    assert set(sweep.sizes) <= zoo.BASES.keys()
    for template, kind in ((sweep.autoencoder, AutoencoderRun), (sweep.base, BaseRun)):
        assert isinstance(load(f"{Path(name).parent}/{template}"), kind)
    base = load(f"{Path(name).parent}/{sweep.base}").model
    assert sweep.encoding.given_frames == base.given_frames
    stored = base.text is not None and base.text.encoder is None
    assert (sweep.encoding.text_encoder is not None) == stored


def test_configs_say_how_they_are_run():
    for name, path in PATHS.items():
        header = [line for line in path.read_text().splitlines() if line.startswith("#")]
        assert any("ul-scale " in line or "launch/submit.py" in line for line in header), name
