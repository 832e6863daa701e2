"""Base models on captions, through the worker: embedded on the way, or stored beside the latents."""

import io
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from templates import AUTOENCODER, BASE, write_template
from text_models import POSITIONS, WIDTH, save_text_model

from ul_scale import config as configs
from ul_scale.data.indexing import build_index
from ul_scale.evaluate.encode import EncodeConfig, encode
from ul_scale.train import worker
from ul_scale.train.metrics import read_metrics
from ul_scale.train.prepare import prepare

pytest.importorskip("transformers", reason="text encoders need transformers")
CAPTIONS = ("a red cat", "the green dog on the moon", "the moon")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a folder with a text encoder and a run whose latents have captions and embeddings."""
    folder = tmp_path_factory.mktemp("text")
    shards, rng = folder / "shards", np.random.default_rng(0)
    shards.mkdir()
    with tarfile.open(shards / "a.tar", "w") as tar:
        for number in range(24):
            stream = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (16, 16), dtype=np.uint8)).save(stream, "PNG")
            for part, content in (("png", stream.getvalue()), ("txt", CAPTIONS[number % 3].encode())):
                info = tarfile.TarInfo(f"{number:02d}.{part}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    build_index(str(shards), dataset="captioned")
    encoder = save_text_model(folder / "bert")
    values = AUTOENCODER | {"name": "stage1"}
    path = write_template(folder, {"train": str(shards)}, values, "stage1.yaml", train={"steps": 2})
    config = configs.load(path)
    assert worker.run(config) == 0
    encode(prepare(config).run_dir, 2, config=EncodeConfig(text_encoder=str(encoder), max_tokens=POSITIONS))
    return folder


def base_run(folder: Path, name: str, text: dict | None, **sections) -> configs.RunConfig:
    [parent] = (folder / "runs").glob("stage1-*")
    model = BASE["model"] | {"num_classes": None, "text": text}
    values = BASE | {"autoencoder": {"run": parent.name, "step": 2}, "model": model}
    return configs.load(write_template(folder, {}, values, f"{name}.yaml", **sections))


def losses(config: configs.RunConfig) -> np.ndarray:
    assert worker.run(config) == 0
    return np.array([[row["loss"], row["grad_norm"]] for row in read_metrics(prepare(config).run_dir)])


def named(folder: Path, **options) -> dict:
    return {"encoder": str(folder / "bert"), "width": WIDTH, "max_tokens": POSITIONS, **options}


def test_stored_embeddings_train_as_those_made_on_the_way(folder):
    stored = base_run(folder, "stored", {"width": WIDTH, "max_tokens": POSITIONS})
    made = base_run(folder, "made", named(folder))
    nothing = base_run(folder, "nothing", None)
    on_the_way, from_disk, without = losses(made), losses(stored), losses(nothing)
    assert on_the_way.shape == (8, 2)
    np.testing.assert_allclose(from_disk, on_the_way, rtol=1e-3)  # fp16
    assert not np.array_equal(from_disk, on_the_way)
    # Not the first losses: outputs of fresh networks are zero, whatever they are told.
    assert not np.allclose(on_the_way[-1], without[-1], rtol=1e-3)
    assert len({prepare(config).run_id for config in (stored, made, nothing)}) == 3


def test_another_encoder_is_another_run_wherever_it_lies(folder, tmp_path):
    here = base_run(folder, "here", named(folder))
    moved = save_text_model(tmp_path / "bert")
    there = base_run(folder, "there", named(folder, encoder=str(moved)))
    other = save_text_model(tmp_path / "other" / "bert", "t5")
    another = base_run(folder, "another", named(folder, encoder=str(other)))
    ids = [prepare(config).run_id for config in (here, there, another)]
    assert ids[0] == ids[1] != ids[2]


def test_a_resumed_run_is_told_the_same_texts(folder):
    uninterrupted = base_run(folder, "whole", named(folder), seed=5)
    whole = losses(uninterrupted)
    shutil.rmtree(prepare(uninterrupted).run_dir)
    half = base_run(folder, "half", named(folder), seed=5, train={"stop_at_step": 4})
    losses(half)
    rest = base_run(folder, "rest", named(folder), seed=5)
    assert prepare(rest).run_dir == prepare(half).run_dir
    assert np.array_equal(losses(rest), whole)


def test_embeddings_that_do_not_fit_are_refused(folder):
    with pytest.raises(ValueError, match=r"model\.text has width 8 and max_tokens 4, but the embeddings of"):
        prepare(base_run(folder, "short", {"width": WIDTH, "max_tokens": 4}))
