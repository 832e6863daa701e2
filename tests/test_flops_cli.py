import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from ul_scale.flops_cli import flops, make_plan, parse_latent, read_plan_config, totals

STAGE_1, STAGE_2 = "configs/quickstart/autoencoder.yaml", "configs/quickstart/base.yaml"
app = typer.Typer()
app.command()(flops)


def run(*args):
    return CliRunner().invoke(app, [*map(str, args)], catch_exceptions=False)


def plan(path, *overrides, **options):
    return make_plan(read_plan_config(path, [*overrides]), path, **options)


def test_an_autoencoder_is_planned_without_its_data(tmp_path):
    out = run(STAGE_1, "data.train=gs://nowhere/train", "--json", tmp_path / "plan.json")
    assert out.exit_code == 0
    assert [line.split()[0] for line in out.output.splitlines()[2:6]] == [
        "encoder",
        "prior",
        "decoder",
        "all",
    ]
    figures = json.loads((tmp_path / "plan.json").read_text())
    networks = figures["networks"].values()
    assert figures["parameters"] == sum(network["parameters"] for network in networks) == 1_130_712
    assert figures["run_flops"] == 800 * 32 * 3 * sum(network["forward_flops"] for network in networks)


def test_hours_are_flops_over_what_the_gpus_reach():
    medium = plan(
        STAGE_2,
        "model.size=medium",
        "model.num_classes=1000",
        "train.precision=bf16",
        "train.batch_size=256",
        "train.steps=1000",
        latent="32x32x32",
        gpus=4,
        gpu="A100",
        mfu=0.5,
    )
    base = medium.networks["base"]
    assert base.transformer_blocks == {1024: 6, 256: 16}
    assert base.training_flops == 3 * base.forward_flops == pytest.approx(3 * 161.4e9, rel=1e-3)
    assert medium.hours == pytest.approx(256_000 * base.training_flops / (4 * 312e12 * 0.5) / 3600)
    # Weights, gradients, two moments and one average, 4 bytes each.
    assert medium.state_bytes == 20 * base.parameters
    assert "4 A100 at 50% of 312 TFLOP/s (bf16)" in totals(medium)


def test_latents_are_found_by_shape_by_config_and_by_run(tmp_path):
    run_dir = tmp_path / "a-0123456789"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(Path(STAGE_1).read_text())
    found = [
        plan(STAGE_2, latent="4x8x8"),
        plan(STAGE_2, autoencoder=STAGE_1),
        plan(STAGE_2, f"root={tmp_path}", "autoencoder.run=a-0123456789", "autoencoder.step=1"),
    ]
    assert [one.latent_shape for one in found] == [(4, 8, 8)] * 3
    assert found[0] == found[1] == found[2]


def test_latents_of_videos():
    assert parse_latent("32x4x16x16") == (32, 4, 16, 16)
    assert plan(STAGE_2, latent="4x2x8x8").networks["base"].transformer_blocks == {128: 1, 32: 2}


@pytest.mark.parametrize(
    "options,message",
    [
        (
            {},
            "autoencoder.run is '', of which runs has no run; expected it, --autoencoder CONFIG or --latent",
        ),
        ({"latent": "32x32"}, "--latent is '32x32'; expected CxHxW or CxTxHxW, such as 32x32x32"),
        ({"latent": "4x0x8"}, "--latent is '4x0x8'"),
        ({"latent": "4x9x9"}, "latents of 9 × 9 do not divide by the base model's 2×"),
        ({"latent": "4x8x8", "autoencoder": STAGE_1}, "--latent and --autoencoder are both given"),
        (
            {"autoencoder": STAGE_2},
            "base.yaml: kind is base; expected an autoencoder's, or --latent",
        ),
        ({"latent": "4x8x8", "gpu": "x9"}, "--gpu is 'x9'; expected one of gb300, b300"),
        ({"latent": "4x8x8", "mfu": 40.0}, "--mfu is 40; expected a share above 0, up to 1"),
    ],
)
def test_bad_input_is_one_line(options, message):
    with pytest.raises(ValueError) as caught:
        plan(STAGE_2, **options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_options_of_base_models_are_refused_for_autoencoders():
    with pytest.raises(ValueError, match="is an autoencoder; --latent and --autoencoder are for base models"):
        plan(STAGE_1, latent="4x8x8")
    with pytest.raises(ValueError, match="pixels.yaml: kind is fixed_autoencoder, which is not trained"):
        plan("configs/baselines/pixels.yaml")
    with pytest.raises(ValueError, match="--gpu is 'v100', which has no bf16 arithmetic"):
        plan(STAGE_1, "train.precision=bf16", gpu="v100")
