"""A shard of latents: read back with tarfile and numpy; sums against numpy's own."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from ul_scale.data.index import open_index
from ul_scale.data.indexing import build_index
from ul_scale.data.latents import LatentShard, is_complete, statistics

LATENTS = np.random.default_rng(0).normal(size=(10, 2, 3, 3)).astype(np.float32)


def members(data: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return {info.name: tar.extractfile(info).read() for info in tar}


def shard_of(latents: np.ndarray, dtype: str = "fp32", **options) -> LatentShard:
    shard = LatentShard(dtype)
    for number, z_clean in enumerate(latents):
        shard.write(f"a/{number}", z_clean, **options)
    return shard


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("shape", [(2, 3, 3), (2, 4, 3, 3)])
def test_latents_come_back(dtype: str, shape: tuple[int, ...]) -> None:
    latents = np.random.default_rng(1).normal(size=(5, *shape)).astype(np.float32)
    data, summary = shard_of(latents, dtype).finish()
    stored = np.stack([np.load(io.BytesIO(content)) for content in members(data).values()])
    assert stored.dtype == {"fp32": np.float32, "fp16": np.float16}[dtype]
    assert np.array_equal(stored, latents.astype(stored.dtype))
    assert (summary.size, summary.samples, summary.entries) == (len(data), 5, latents.size)


def test_what_a_sample_has_beside_its_latent_is_optional() -> None:
    shard = LatentShard()
    shard.write("a", LATENTS[0])
    shard.write("b", LATENTS[1], label=3, text="a red bag, naïve", flipped=LATENTS[2])
    data, summary = shard.finish()
    found = members(data)
    assert list(found) == ["a.z_clean.npy", "b.cls", "b.txt", "b.z_clean.npy", "b.z_clean_flipped.npy"]
    assert found["b.cls"] == b"3" and found["b.txt"].decode() == "a red bag, naïve"
    assert np.array_equal(np.load(io.BytesIO(found["b.z_clean_flipped.npy"])), LATENTS[2])
    assert summary.last_class == 3 and summary.entries == 2 * LATENTS[0].size


def test_what_conditions_a_sample_lies_beside_its_latent() -> None:
    z = np.random.default_rng(3).normal(size=(4, 2, 4, 3, 3)).astype(np.float32)
    tokens = np.random.default_rng(4).normal(size=(5, 6)).astype(np.float32)
    shard = LatentShard()
    shard.write("a", z[0], flipped=z[1], given=z[2, :, :2], flipped_given=z[3, :, :2], embedding=tokens)
    shard.write("b", z[1], embedding=tokens[:2])
    data, summary = shard.finish()
    found = {name: np.load(io.BytesIO(content)) for name, content in members(data).items()}
    assert np.array_equal(found["a.z_given.npy"], z[2, :, :2])
    assert np.array_equal(found["a.z_given_flipped.npy"], z[3, :, :2])
    assert np.array_equal(found["a.text.npy"], tokens.astype(np.float16))
    assert found["b.text.npy"].shape == (2, 6) and "b.z_given.npy" not in found
    assert summary.entries == 2 * z[0].size  # of z_clean alone


def test_the_same_latents_give_the_same_bytes() -> None:
    assert shard_of(LATENTS, label=1).finish() == shard_of(LATENTS, label=1).finish()


def test_statistics_are_those_of_all_shards_in_any_order() -> None:
    # Far from 0 and many, so that sums in single precision would show.
    latents = (100 + np.random.default_rng(2).normal(size=(300, 2, 8, 8))).astype(np.float32)
    summaries = [shard_of(latents[i : i + 70], label=i // 70).finish()[1] for i in range(0, 300, 70)]
    found = statistics(summaries)
    exact = latents.astype(np.float64)
    assert found["mean"] == pytest.approx(exact.mean(), rel=1e-12)
    assert found["std"] == pytest.approx(exact.std(), rel=1e-9)
    assert found["num_classes"] == 5
    assert statistics(reversed(summaries)) == found
    assert statistics([LatentShard().finish()[1], *summaries]) == found


def test_statistics_are_of_what_is_stored() -> None:
    latents = (1000 + LATENTS).astype(np.float32)  # fp16 has steps of 0.5 there
    stored = latents.astype(np.float16).astype(np.float64)
    found = statistics([shard_of(latents, "fp16").finish()[1]])
    assert found["mean"] == pytest.approx(stored.mean(), rel=1e-12)
    assert found["std"] == pytest.approx(stored.std(), rel=1e-6) != pytest.approx(latents.std(), rel=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.3, -1e4])
def test_a_constant_has_no_std(value: float) -> None:
    summary = shard_of(np.full((7, 2, 3, 3), value, np.float32)).finish()[1]
    with pytest.raises(ValueError, match="every latent is the same: the autoencoder has collapsed"):
        statistics([summary, summary])


def test_nothing_has_no_statistics() -> None:
    with pytest.raises(ValueError, match="there are no latents"):
        statistics([LatentShard().finish()[1]])


def test_a_set_is_complete_with_its_index(tmp_path: Path) -> None:
    (tmp_path / "latents-000000.tar").write_bytes(shard_of(LATENTS).finish()[0])
    assert not is_complete(str(tmp_path)) and not is_complete(str(tmp_path / "nowhere"))
    build_index(str(tmp_path), dataset="set")
    assert is_complete(str(tmp_path))
    assert open_index(str(tmp_path)).names(9, 10) == ["set/latents-000000/a/9"]
    meta = tmp_path / "_index" / "meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"complete": False}))
    assert not is_complete(str(tmp_path))


@pytest.mark.parametrize(
    ("key", "z_clean", "message"),
    [
        (
            "b",
            np.zeros((2, 3, 4), np.float32),
            r"latent of 'b' has shape \(2, 3, 4\); the first had \(2, 3, 3\)",
        ),
        ("b", np.full((2, 3, 3), np.nan, np.float32), "latent of 'b' is not all finite floats"),
        ("b", np.zeros((2, 3, 3), np.int64), "latent of 'b' is not all finite floats"),
        ("b", np.full((2, 3, 3), 7e4, np.float32), "latent of 'b' is too large for fp16; expected fp32"),
        ("a", LATENTS[1], "key 'a' comes twice"),
        ("b.c", LATENTS[1], "'b.c' is not a key that a shard can hold"),
        ("../b", LATENTS[1], "has an absolute path"),
    ],
)
def test_what_cannot_be_written(key: str, z_clean: np.ndarray, message: str) -> None:
    shard = LatentShard("fp16")
    shard.write("a", LATENTS[0])
    with pytest.raises(ValueError, match=message):
        shard.write(key, z_clean)
    assert shard.finish()[1].samples == 1


def test_what_conditions_a_sample_is_checked_as_well() -> None:
    shard = LatentShard()
    z = np.zeros((2, 4, 3, 3), np.float32)
    shard.write("a", z, given=z[:, :2])
    with pytest.raises(ValueError, match=r"latent of given frames of 'b' has shape \(2, 1, 3, 3\)"):
        shard.write("b", z, given=z[:, :1])
    with pytest.raises(ValueError, match="the embedding of 'b' is too large for fp16"):
        shard.write("b", z, embedding=np.full((1, 2), 7e4, np.float32))
    with pytest.raises(ValueError, match="the embedding of 'b' is not all finite floats"):
        shard.write("b", z, embedding=np.full((1, 2), np.nan, np.float32))
    assert shard.finish()[1].samples == 1


def test_the_flipped_latent_is_checked_as_well() -> None:
    shard = LatentShard()
    with pytest.raises(ValueError, match="latent of 'a' is not all finite floats"):
        shard.write("a", LATENTS[0], flipped=np.full((2, 3, 3), np.inf, np.float32))
    assert shard.finish()[1].samples == 0
