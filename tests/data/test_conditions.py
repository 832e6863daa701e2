"""Embeddings and latents of given frames, from shards of the standard library's making to batches."""

import io
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from ul_scale.data.config import DataConfig
from ul_scale.data.decode import make_decoder
from ul_scale.data.index import Index
from ul_scale.data.indexing import build_index
from ul_scale.data.plan import lane_slots
from ul_scale.data.sample import BadSample, Draw, Sample
from ul_scale.data.stream import Batch, LaneStream, iterate, make_plan
from ul_scale.data.transforms import is_flipped

from .conftest import image_bytes, images, tar_bytes

COUNT, WIDTH = 24, 3
RNG = np.random.default_rng(0)
Z = RNG.normal(size=(COUNT, 2, 4, 2, 2)).astype(np.float32)
GIVEN, FLIPPED, FLIPPED_GIVEN = Z[:, :, :2] + 10, Z + 20, Z[:, :, :2] + 30
TOKENS = [RNG.normal(size=(n % 5, WIDTH)).astype(np.float16) for n in range(COUNT)]
CONFIG = DataConfig(lanes=4, workers=0, chunk_bytes=8000, window_chunks=2, embeddings=True)


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


@pytest.fixture
def index(tmp_path: Path) -> Index:
    for shard in range(3):
        members = {}
        for n in range(shard * 8, shard * 8 + 8):
            members[f"{n:02d}.z_clean.npy"], members[f"{n:02d}.z_given.npy"] = npy(Z[n]), npy(GIVEN[n])
            members[f"{n:02d}.z_clean_flipped.npy"] = npy(FLIPPED[n])
            members[f"{n:02d}.z_given_flipped.npy"] = npy(FLIPPED_GIVEN[n])
            members[f"{n:02d}.text.npy"] = npy(TOKENS[n])
        (tmp_path / f"{shard}.tar").write_bytes(tar_bytes(members))
    return build_index(str(tmp_path))


def check(batch: Batch) -> list[int]:
    """Compare a batch, unflipped, with the arrays; return the numbers of its samples."""
    numbers = [int(key[-2:]) for key in batch["keys"]]
    assert torch.equal(batch["z_clean"], torch.from_numpy(Z[numbers]))
    assert torch.equal(batch["z_given"], torch.from_numpy(GIVEN[numbers]))
    embedding, mask = batch["text_embedding"], batch["text_mask"]
    assert embedding.dtype == torch.float32 and mask.dtype == torch.bool
    assert embedding.shape == (len(numbers), max(1, max(n % 5 for n in numbers)), WIDTH)
    for n, tokens, real in zip(numbers, embedding, mask):
        assert real.tolist() == [place < n % 5 for place in range(len(real))]
        assert np.array_equal(tokens[real].numpy(), TOKENS[n].astype(np.float32)) and not tokens[~real].any()
    return numbers


def test_a_pass_delivers_each_samples_own(index: Index) -> None:
    numbers = [n for batch in iterate(index, CONFIG, batch_size=7) for n in check(batch)]
    assert numbers == list(range(COUNT))
    [batch] = iterate(index, CONFIG, 5, 6, batch_size=1)
    assert batch["text_mask"].tolist() == [[False]]  # a text of no token


@pytest.mark.parametrize("workers", [0, 2])
def test_lanes_deliver_each_samples_own_in_any_number_of_processes(index: Index, workers: int) -> None:
    config = DataConfig(lanes=4, workers=workers, chunk_bytes=8000, window_chunks=2, embeddings=True)
    plan = make_plan(index, config, seed=0, batch_size=8)
    seen = []
    for rank in (0, 1):  # the second rank has surplus slots
        batches = LaneStream(index, plan, config, lane_slots(plan.lanes, rank, 3)).batches(0)
        seen += [check(batch) for batch in islice(batches, 3)]
        batches.close()
    assert len({n for numbers in seen for n in numbers}) > 8


def test_a_flip_takes_both_latents_of_the_mirror_image(index: Index) -> None:
    decode = make_decoder(index.parts, DataConfig(horizontal_flip=True), "set")
    flips = set()
    for n in range(8):
        parts = {
            "z_clean.npy": npy(Z[n]),
            "z_clean_flipped.npy": npy(FLIPPED[n]),
            "z_given.npy": npy(GIVEN[n]),
            "z_given_flipped.npy": npy(FLIPPED_GIVEN[n]),
        }
        example = decode(Sample(f"set/0/{n}", parts), Draw(0, 0))
        flip = is_flipped(0, 0, f"set/0/{n}")
        flips.add(flip)
        assert np.array_equal(example.array, (FLIPPED if flip else Z)[n])
        assert example.z_given is not None and example.embedding is None
        assert np.array_equal(example.z_given, (FLIPPED_GIVEN if flip else GIVEN)[n])
    assert flips == {False, True}


def test_nothing_is_delivered_that_is_not_asked_for_or_not_there(index: Index, tmp_path: Path) -> None:
    [batch] = iterate(index, DataConfig(workers=0), 0, 2, batch_size=2)
    assert "text_embedding" not in batch and "text_mask" not in batch and "z_given" in batch
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "0.tar").write_bytes(tar_bytes({"0.z_clean.npy": npy(Z[0])}))
    [batch] = iterate(build_index(str(tmp_path / "plain")), DataConfig(workers=0), batch_size=2)
    assert "z_given" not in batch


def test_images_may_have_embeddings_too(tmp_path: Path) -> None:
    pixels = images(3)
    members = {}
    for n in range(3):
        members |= {f"{n}.png": image_bytes(pixels[n]), f"{n}.text.npy": npy(TOKENS[n + 1])}
    (tmp_path / "0.tar").write_bytes(tar_bytes(members))
    config = DataConfig(image_size=8, channels=1, workers=0, embeddings=True)
    [batch] = iterate(build_index(str(tmp_path)), config, batch_size=3)
    assert batch["text_mask"].sum(1).tolist() == [1, 2, 3] and batch["x"].shape == (3, 1, 8, 8)


def test_a_set_without_embeddings_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.embeddings is set, but the samples of set have z_clean"):
        make_decoder(["z_clean.npy"], DataConfig(embeddings=True), "set")
    with pytest.raises(ValueError, match=r"data\.horizontal_flip is set, .* and no z_given_flipped\.npy"):
        make_decoder(
            ["z_clean.npy", "z_clean_flipped.npy", "z_given.npy"], DataConfig(horizontal_flip=True), "set"
        )


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"text.npy": None}, r"a/0/1: has no text\.npy, only z_clean\.npy, z_given\.npy"),
        ({"z_given.npy": None}, r"a/0/1: has no z_given\.npy"),
        ({"text.npy": npy(np.zeros(3, np.float16))}, r"a/0/1\.text\.npy: has shape \(3,\), expected 2 dim"),
        ({"text.npy": npy(np.zeros((2, 3), np.int64))}, r"a/0/1\.text\.npy: is int64, expected floats"),
        ({"z_given.npy": npy(Z[0])[:-1]}, r"a/0/1\.z_given\.npy: \.npy data has"),
        ({"z_given.npy": npy(Z[0, 0])}, r"a/0/1\.z_given\.npy: has shape \(4, 2, 2\), expected 4 dim"),
    ],
)
def test_bad_parts_are_bad_samples(parts: dict[str, bytes | None], message: str) -> None:
    whole = {"z_clean.npy": npy(Z[0]), "z_given.npy": npy(GIVEN[0]), "text.npy": npy(TOKENS[2])}
    decode = make_decoder(list(whole), DataConfig(embeddings=True), "set")
    assert decode(Sample("a/0/1", whole), None).label == -1
    left = {name: data for name, data in (whole | parts).items() if data is not None}
    with pytest.raises(BadSample, match=f"^{message}"):
        decode(Sample("a/0/1", left), None)


def test_embeddings_of_several_widths_are_not_one_batch(tmp_path: Path) -> None:
    members = {}
    for n, width in enumerate((3, 4)):
        members |= {f"{n}.z_clean.npy": npy(Z[n]), f"{n}.text.npy": npy(np.zeros((2, width), np.float16))}
    (tmp_path / "0.tar").write_bytes(tar_bytes(members))
    with pytest.raises(ValueError, match="embeddings of widths 3, 4"):
        list(iterate(build_index(str(tmp_path)), CONFIG, batch_size=2))
