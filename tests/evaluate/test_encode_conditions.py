"""What base models are conditioned on, as encoded beside latents: given frames of clips, and captions."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from templates import AUTOENCODER, write_template
from text_models import POSITIONS, WIDTH, save_text_model

from ul_scale import config as configs
from ul_scale.data.config import DataConfig
from ul_scale.data.index import open_index
from ul_scale.data.indexing import build_index
from ul_scale.data.plan import lane_slots
from ul_scale.data.stream import LaneStream, make_plan
from ul_scale.evaluate import encode as subject
from ul_scale.evaluate.encode import EncodeConfig, encode
from ul_scale.models.text import TextConfig, load_text_encoder, text_identity
from ul_scale.train.prepare import build_autoencoder

STEP, COUNT, FRAMES, GIVEN_FRAMES, STRIDE = 3, 7, 8, 5, 4
SMALL = {"samples_per_shard": 3, "batch_size": 2}
CAPTIONS = ["a red cat", "the dog", "the green dog on the moon", "on the moon", "cat", "a a a a", "red"]
CLIPS = np.random.default_rng(5).integers(0, 256, (COUNT, FRAMES + 4, 16, 16), dtype=np.uint8)


@pytest.fixture
def run_dir(tmp_path, monkeypatch) -> Path:
    """Return a run of a video autoencoder with its initial weights, whose clips have captions."""
    shards = tmp_path / "clips"
    shards.mkdir()
    with tarfile.open(shards / "a.tar", "w") as tar:
        for number, (clip, caption) in enumerate(zip(CLIPS, CAPTIONS)):
            stream = io.BytesIO()
            first, *later = (Image.fromarray(np.stack([frame] * 3, -1)) for frame in clip)
            first.save(stream, "WEBP", save_all=True, append_images=later, duration=100, lossless=True)
            for part, content in {"webp": stream.getvalue(), "txt": caption.encode()}.items():
                info = tarfile.TarInfo(f"{number}.{part}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    build_index(str(shards), dataset="clips")
    strides = [2, 2]
    encoder = {"patch": 2, "channels": [8, 8, 8], "blocks": [1, 1, 1], "time_strides": strides}
    vit, conv = ({"kind": kind, "channels": 16, "blocks": 2} for kind in ("transformer", "conv"))
    model = {
        "latent_channels": 2,
        "encoder": encoder,
        "prior": {"patch": 1, "levels": [vit], "head_dim": 16},
        "decoder": {"patch": 2, "levels": [conv, conv, vit], "head_dim": 16, "time_strides": strides},
    }
    path = write_template(
        tmp_path, {"train": str(shards)}, AUTOENCODER, "config.yaml", data={"frames": FRAMES}, model=model
    )
    config = configs.load(path)
    torch.manual_seed(0)
    stage = build_autoencoder(config).eval().requires_grad_(False)
    monkeypatch.setattr(subject, "restore_autoencoder", lambda *_: (config, stage))
    run_dir = tmp_path / "runs" / "tiny-0123456789"
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(configs.to_yaml(config))
    return run_dir


@pytest.fixture
def text(tmp_path) -> str:
    pytest.importorskip("transformers", reason="text encoders need transformers")
    return str(save_text_model(tmp_path / "bert"))


def stored(folder: Path, part: str) -> list[np.ndarray]:
    """Return a part of all samples, in order."""
    arrays = {}
    for path in folder.glob("*.tar"):
        with tarfile.open(path) as tar:
            for info in tar:
                key, suffix = info.name.split(".", 1)
                if suffix == part:
                    arrays[key] = np.load(io.BytesIO(tar.extractfile(info).read()))
    return [arrays[key] for key in sorted(arrays)]


def encoded(run_dir: Path, pixels: np.ndarray) -> np.ndarray:
    """Return the stage's latents of grey clips, one by one."""
    stage = subject.restore_autoencoder(run_dir, STEP)[1]
    x = torch.from_numpy(pixels[:, None] / np.float32(127.5) - 1)
    return np.concatenate([stage.encode(clip[None]).numpy() for clip in x])


def test_given_frames_are_encoded_alone(run_dir):
    [folder] = encode(run_dir, STEP, config=EncodeConfig(given_frames=GIVEN_FRAMES, flipped=True, **SMALL))
    centre = CLIPS[:, 2 : 2 + FRAMES]
    alone = centre[:, [0, 1, 2, 3, 4, 4, 4, 4]]
    for part, pixels in (
        ("z_clean.npy", centre),
        ("z_given.npy", alone),
        ("z_clean_flipped.npy", centre[..., ::-1]),
        ("z_given_flipped.npy", alone[..., ::-1]),
    ):
        z = np.stack(stored(folder, part))
        assert z.shape == (COUNT, 2, FRAMES // STRIDE, 2, 2)
        np.testing.assert_allclose(z, encoded(run_dir, pixels), rtol=1e-4, atol=1e-5)
    # What comes later is to be seen in the whole clip's latent alone.
    assert not np.allclose(stored(folder, "z_given.npy")[0], stored(folder, "z_clean.npy")[0], atol=1e-3)
    extra = open_index(str(folder)).extra
    assert extra["given_frames"] == GIVEN_FRAMES and extra["shape"] == [2, 2, 2, 2] and "text" not in extra
    exact = np.stack(stored(folder, "z_clean.npy")).astype(np.float64)
    assert extra["std"] == pytest.approx(exact.std(), rel=1e-9)


def test_captions_are_embedded_token_by_token(run_dir, text):
    options = {"text_encoder": text, "max_tokens": 6, **SMALL}
    [folder] = encode(run_dir, STEP, config=EncodeConfig(**options))
    config = TextConfig(encoder=text, width=WIDTH, max_tokens=6)
    encoder = load_text_encoder(config)
    tokens = stored(folder, "text.npy")
    assert [len(array) for array in tokens] == [min(6, 2 + len(caption.split())) for caption in CAPTIONS]
    for array, caption in zip(tokens, CAPTIONS):
        assert array.dtype == np.float16
        np.testing.assert_allclose(array, encoder.encode([caption])[0][0].numpy(), rtol=2e-3, atol=2e-3)
    facts = {"encoder": text_identity(config), "width": WIDTH, "max_tokens": 6, "precision": "fp32"}
    assert open_index(str(folder)).extra["text"] == facts


def test_stage_2_reads_what_was_encoded(run_dir, text):
    options = {"text_encoder": text, "max_tokens": POSITIONS, "given_frames": GIVEN_FRAMES, **SMALL}
    [folder] = encode(run_dir, STEP, config=EncodeConfig(**options))
    index, config = open_index(str(folder)), DataConfig(workers=0, embeddings=True, captions=True)
    plan = make_plan(index, config, seed=0, batch_size=COUNT)
    batches = LaneStream(index, plan, config, lane_slots(plan.lanes, 0, 1)).batches(0)
    batch = next(batches)
    batches.close()
    z_given, tokens = stored(folder, "z_given.npy"), stored(folder, "text.npy")
    numbers = [int(key[-1]) for key in batch["keys"]]
    assert sorted(numbers) == list(range(COUNT))
    for row, number in enumerate(numbers):
        assert batch["text"][row] == CAPTIONS[number]
        assert np.array_equal(batch["z_given"][row].numpy(), z_given[number])
        real = batch["text_mask"][row]
        assert np.array_equal(batch["text_embedding"][row][real].numpy(), tokens[number].astype(np.float32))


def test_an_interrupted_encoding_goes_on_with_the_same_bytes(run_dir, text, tmp_path):
    options = EncodeConfig(text_encoder=text, max_tokens=8, given_frames=GIVEN_FRAMES, **SMALL)
    [folder] = encode(run_dir, STEP, config=options)
    before = {path.name: path.read_bytes() for path in folder.glob("*.tar")}
    (folder / "latents-000001.tar").unlink()
    encode(run_dir, STEP, config=options)
    assert {path.name: path.read_bytes() for path in folder.glob("*.tar")} == before and len(before) == 3


def test_other_conditions_are_not_mixed_in(run_dir, text):
    encode(run_dir, STEP, config=EncodeConfig(given_frames=GIVEN_FRAMES, **SMALL))
    with pytest.raises(ValueError, match="holds latents with given_frames 5, and None is asked for; delete"):
        encode(run_dir, STEP, config=EncodeConfig(**SMALL))
    with pytest.raises(ValueError, match="holds latents with given_frames 5, and 2 is asked for; delete"):
        encode(run_dir, STEP, config=EncodeConfig(given_frames=2, **SMALL))
    with pytest.raises(ValueError, match="holds latents with text None, and {'encoder': 'bert-"):
        encode(
            run_dir,
            STEP,
            config=EncodeConfig(text_encoder=text, max_tokens=8, given_frames=GIVEN_FRAMES, **SMALL),
        )


def test_what_does_not_fit_is_named(run_dir, text):
    with pytest.raises(ValueError, match=r"given_frames is 8, but .* encodes clips of 8 frames"):
        encode(run_dir, STEP, config=EncodeConfig(given_frames=8))
    with pytest.raises(ValueError, match="max_tokens is 77 .*, but .*bert takes 16"):
        encode(run_dir, STEP, config=EncodeConfig(text_encoder=text))
    with pytest.raises(ValueError, match="text_encoder is set and captions are left out"):
        EncodeConfig(text_encoder=text, captions=False)
    with pytest.raises(ValueError, match="text_precision is fp16; expected one of fp32, bf16"):
        EncodeConfig(text_encoder=text, text_precision="fp16")
    with pytest.raises(ValueError, match="given_frames is 0; expected 1 or more"):
        EncodeConfig(given_frames=0)
    assert not list(run_dir.glob("latents/*/*/_index"))
