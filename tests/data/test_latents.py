"""Latent shards: read back with tarfile and numpy; complete or recognisably not."""

import io
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pytest

from ul_scale.data.index import open_index
from ul_scale.data.latents import LatentWriter

LATENTS = np.random.default_rng(0).normal(size=(10, 2, 3, 3)).astype(np.float32)


def write(dest: str, latents: np.ndarray = LATENTS, **options) -> LatentWriter:
    with LatentWriter(dest, dataset="set", **options) as writer:
        for number, z_clean in enumerate(latents):
            writer.write(f"shard-0/{number}", z_clean, label=number)
        writer.extra = {"mean": 0.25, "std": [1.0, 2.0]}
    return writer


@pytest.mark.parametrize("place", ["local", "memory"])
def test_latents_come_back_with_their_statistics(tmp_path: Path, memory_url: str, place: str) -> None:
    url = str(tmp_path / "z") if place == "local" else memory_url
    index = write(url, samples_per_shard=4).index
    assert [shard.samples for shard in index.shards] == [4, 4, 2]
    assert index.extra == open_index(url).extra == {"mean": 0.25, "std": [1.0, 2.0]}
    assert index.names(9, 10) == ["set/latents-000002/shard-0/9"]
    fs, root = fsspec.core.url_to_fs(url)
    found = {}
    for shard in index.shards:
        with tarfile.open(fileobj=io.BytesIO(fs.cat_file(f"{root}/{shard.name}"))) as tar:
            found |= {info.name: tar.extractfile(info).read() for info in tar}
    assert len(found) == 20
    for number, z_clean in enumerate(LATENTS):
        assert np.array_equal(np.load(io.BytesIO(found[f"shard-0/{number}.z_clean.npy"])), z_clean)
        assert found[f"shard-0/{number}.cls"] == str(number).encode()


def test_labels_and_captions_are_optional(tmp_path: Path) -> None:
    with LatentWriter(str(tmp_path), dataset="set") as writer:
        writer.write("a", LATENTS[0])
        writer.write("b", LATENTS[1], text="a red bag, naïve")
    with tarfile.open(tmp_path / "latents-000000.tar") as tar:
        assert tar.getnames() == ["a.z_clean.npy", "b.txt", "b.z_clean.npy"]
        assert tar.extractfile("b.txt").read().decode() == "a red bag, naïve"


def test_an_interrupted_set_is_not_complete_and_is_written_over(tmp_path: Path) -> None:
    def interrupt() -> None:
        with LatentWriter(str(tmp_path), dataset="set", samples_per_shard=2) as writer:
            for number in range(7):
                writer.write(str(number), LATENTS[number])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"latents-00000{n}.tar" for n in range(3)]
    assert not LatentWriter.is_complete(str(tmp_path))
    assert len(write(str(tmp_path), LATENTS[:3], samples_per_shard=2).index) == 3
    assert LatentWriter.is_complete(str(tmp_path))


def test_a_complete_set_is_not_written_over(tmp_path: Path) -> None:
    write(str(tmp_path))
    with pytest.raises(ValueError, match="holds a complete set of latents; delete it to encode again"):
        write(str(tmp_path))
    assert len(open_index(str(tmp_path))) == 10


def test_other_shards_are_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "mine.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"mine\.tar is not from encoding"):
        write(str(tmp_path))
    assert (tmp_path / "mine.tar").exists()


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
        ("a", LATENTS[1], "key 'a' comes twice"),
        ("../b", LATENTS[1], "has an absolute path"),
    ],
)
def test_what_cannot_be_written(tmp_path: Path, key: str, z_clean: np.ndarray, message: str) -> None:
    def attempt() -> None:
        with LatentWriter(str(tmp_path), dataset="set") as writer:
            writer.write("a", LATENTS[0])
            writer.write(key, z_clean)

    with pytest.raises(ValueError, match=message):
        attempt()
    assert not list(tmp_path.iterdir())
