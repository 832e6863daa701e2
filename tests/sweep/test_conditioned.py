"""A sweep over clips with captions: what stands beside latents is asked for once, and reaches every part."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from templates import AUTOENCODER, BASE, write_template
from text_models import WIDTH, save_text_model
from typer.testing import CliRunner

from ul_scale import config as configs
from ul_scale.cli import app
from ul_scale.data.indexing import build_index
from ul_scale.sweep.ledger import read_rows
from ul_scale.sweep.plan import config_path, load_sweep, plan_sweep
from ul_scale.train.prepare import prepare

pytest.importorskip("transformers", reason="text encoders need transformers")
FRAMES, GIVEN_FRAMES, TOKENS = 8, 5, 6


def write_clips(folder: Path, count: int, seed: int) -> str:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    with tarfile.open(folder / "a.tar", "w") as tar:
        for number in range(count):
            stream = io.BytesIO()
            frames = rng.integers(0, 256, (FRAMES, 16, 16, 3), dtype=np.uint8)
            first, *later = map(Image.fromarray, frames)
            first.save(stream, "WEBP", save_all=True, append_images=later, duration=100, lossless=True)
            for part, content in {"webp": stream.getvalue(), "txt": b"the red dog"}.items():
                info = tarfile.TarInfo(f"{number}.{part}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    build_index(str(folder), dataset=folder.name)
    return str(folder)


@pytest.fixture
def sweep_path(tmp_path) -> Path:
    text = str(save_text_model(tmp_path / "bert"))
    model = dict(AUTOENCODER["model"])
    for part in ("encoder", "decoder"):
        model[part] = model[part] | {"time_strides": [2]}
    data = {"channels": 3, "frames": FRAMES}
    write_template(tmp_path, {}, AUTOENCODER, "autoencoder.yaml", train={"steps": 2}, data=data, model=model)
    given = {"given_frames": GIVEN_FRAMES, "text": {"width": WIDTH, "max_tokens": TOKENS}}
    write_template(tmp_path, {}, BASE | {"model": given}, "base.yaml", train={"steps": 2})
    sweep = {
        "kind": "sweep",
        "name": "clips",
        "root": str(tmp_path / "runs"),
        "autoencoder": "autoencoder.yaml",
        "base": "base.yaml",
        "autoencoder_overrides": [
            f"data.train={write_clips(tmp_path / 'train', 12, 0)}",
            f"data.val={write_clips(tmp_path / 'val', 4, 1)}",
        ],
        "base_overrides": ["optim.lr=3e-3"],
        "encoding": {
            "given_frames": GIVEN_FRAMES,
            "text_encoder": text,
            "max_tokens": TOKENS,
            "dtype": "fp16",
            "captions": True,
            "samples_per_shard": 5,
        },
        "loss_factors": [3.0],
        "sizes": ["tiny-s"],
        "evaluation_points": 1,
        "evaluation": {"samples": 4, "base_steps": 2, "decoder_steps": 2, "batch_size": 4},
    }
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(sweep))
    return path


def test_every_part_runs_as_planned(sweep_path):
    plan = plan_sweep(*load_sweep(sweep_path))
    for run_id, config in plan.runs.items():
        path = config_path(plan.directory, run_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(configs.to_yaml(config))
    for node in plan.nodes:
        assert not node.done(), node.id
        result = CliRunner().invoke(app, list(node.command))
        assert result.exit_code == 0, (node.id, result.output, result.exception)
        assert node.done(), node.id
    [cell] = plan.cells
    assert cell.base.optim.lr == 3e-3
    # The run id counts the encoder of embeddings and how latents are stored, before there are any.
    assert prepare(cell.base).run_id == cell.base_dir.name
    [row] = read_rows(plan)
    assert plan.metric.startswith("frames_") and np.isfinite(row[plan.metric])
    with pytest.raises(ValueError, match="holds latents with dtype fp16, and fp32 is asked for"):
        plan_sweep(*load_sweep(sweep_path, ["encoding.dtype=fp32"]))


@pytest.mark.parametrize("how", ["dtype=fp32", "samples_per_shard=1000", "flipped=true"])
def test_base_models_are_told_apart_by_how_their_latents_are_stored(sweep_path, how):
    ids = [cell.base_dir.name for cell in plan_sweep(*load_sweep(sweep_path)).cells]
    others = [cell.base_dir.name for cell in plan_sweep(*load_sweep(sweep_path, [f"encoding.{how}"])).cells]
    assert not {*ids} & {*others}


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("encoding.given_frames=null", "given_frames is 5, but the latents were encoded with none"),
        ("encoding={given_frames: 5}", "has no embeddings of captions"),
        ("encoding.text_encoder=null", "max_tokens is 6 and text_encoder is not set"),
        ("encoding.max_tokens=9", "max_tokens 6, but the embeddings"),
        ("base_overrides=[autoencoder.on_the_fly=true]", "on_the_fly is true; expected false"),
        ("encoding.given_frames=8", "given_frames is 8, but .* encodes clips of 8 frames"),
        ("base_overrides=[model.num_classes=2]", "num_classes is 2, but the data have no classes"),
        ("base_overrides=[data.horizontal_flip=true]", "horizontal_flip is set.* z_clean_flipped.npy"),
    ],
)
def test_what_does_not_fit_is_found_before_anything_is_trained(sweep_path, override, line):
    with pytest.raises(ValueError, match=line):
        plan_sweep(*load_sweep(sweep_path, [override]))
