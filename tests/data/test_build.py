"""Shards built from class folders: read back by webdataset, and built again after interruptions."""

import hashlib
import io
import shutil
from collections import Counter
from pathlib import Path

import fsspec
import numpy as np
import pytest
import webdataset
from PIL import Image

from ul_scale.data import build
from ul_scale.data.build import ShardWriter, build_class_folders
from ul_scale.data.index import open_index

from .conftest import image_bytes, images

NAMES = ("bag", "coat", "shirt")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three classes of ten grey images, in three formats, with files that are no images."""
    for label, name in enumerate(NAMES):
        folder = tmp_path / "source" / name
        folder.mkdir(parents=True)
        for number, pixels in enumerate(images(10, size=12, seed=label)):
            suffix = ("png", "JPEG", "webp")[number % 3]
            form = {"png": "PNG", "JPEG": "JPEG", "webp": "WEBP"}[suffix]
            (folder / f"{number}.{suffix}").write_bytes(image_bytes(pixels, form))
    (tmp_path / "source" / "bag" / ".hidden.png").write_bytes(b"")
    return tmp_path / "source"


def read(dest: Path) -> dict[str, dict]:
    urls = sorted(str(path) for path in dest.glob("*.tar"))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert len({sample["__key__"] for sample in samples}) == len(samples)
    return {sample["__key__"]: sample for sample in samples}


def digests(dest: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in dest.rglob("*") if path.is_file()
    }


def test_files_are_kept_as_they_are(source: Path, tmp_path: Path) -> None:
    dest = tmp_path / "dest"
    index = build_class_folders(str(source), str(dest), samples_per_shard=8)
    samples = read(dest)
    assert len(samples) == len(index) == 30 and [shard.samples for shard in index.shards] == [8, 8, 8, 6]
    assert index.classes == NAMES and index.parts == ("cls", "jpg", "png", "webp")
    for path in source.rglob("[0-9]*"):
        sample = samples[f"{path.parent.name}/{path.stem}"]
        assert sample[path.suffix[1:].lower().replace("jpeg", "jpg")] == path.read_bytes()
        assert sample["cls"] == str(NAMES.index(path.parent.name)).encode()
    assert b"mtime=" not in (dest / "shard-000000.tar").read_bytes()


def test_shards_are_mixed_and_always_the_same(source: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        build_class_folders(str(source), str(tmp_path / name), samples_per_shard=10, threads=3, dataset="set")
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    for shard in (tmp_path / "one").glob("*.tar"):
        labels = [sample["cls"] for sample in webdataset.WebDataset(str(shard), shardshuffle=False)]
        assert len(Counter(labels)) == 3


@pytest.mark.parametrize("image_format", ["webp", "png", "jpg"])
def test_images_are_stored_in_another_format(source: Path, tmp_path: Path, image_format: str) -> None:
    build_class_folders(str(source), str(tmp_path / "dest"), image_format=image_format)
    samples = read(tmp_path / "dest")
    for path in source.rglob("[0-9]*"):
        data = samples[f"{path.parent.name}/{path.stem}"][image_format]
        stored, original = (np.asarray(Image.open(file).convert("RGB")) for file in (io.BytesIO(data), path))
        error = np.abs(stored.astype(int) - original).mean()
        assert error < 3 if image_format == "jpg" else error == 0


def test_larger_images_are_reduced(tmp_path: Path) -> None:
    folder = tmp_path / "source" / "only"
    folder.mkdir(parents=True)
    for name, shape in [("tall", (50, 20, 3)), ("small", (8, 30, 3))]:
        Image.fromarray(np.zeros(shape, np.uint8)).save(folder / f"{name}.png")
    build_class_folders(str(tmp_path / "source"), str(tmp_path / "dest"), shortest_side=10)
    samples = read(tmp_path / "dest")
    assert Image.open(io.BytesIO(samples["only/tall"]["png"])).size == (10, 25)
    assert samples["only/small"]["png"] == (folder / "small.png").read_bytes()


def test_a_second_run_rewrites_nothing(source: Path, tmp_path: Path) -> None:
    dest = tmp_path / "dest"
    build_class_folders(str(source), str(dest), samples_per_shard=8)
    before = {path: path.stat().st_mtime_ns for path in dest.rglob("*")}
    index = build_class_folders(str(source), str(dest), samples_per_shard=8)
    assert {path: path.stat().st_mtime_ns for path in dest.rglob("*")} == before and len(index) == 30


@pytest.mark.parametrize("threads", [1, 2])
def test_an_interrupted_run_is_finished_by_the_next(
    source: Path, tmp_path: Path, monkeypatch, threads: int
) -> None:
    whole, dest = tmp_path / "whole", tmp_path / "dest"
    build_class_folders(str(source), str(whole), samples_per_shard=4, dataset="set")
    encode, encoded = build._encode, []

    def fail_at_the_20th(*args):
        encoded.append(args)
        if len(encoded) == 20:
            raise KeyboardInterrupt
        return encode(*args)

    monkeypatch.setattr(build, "_encode", fail_at_the_20th)
    with pytest.raises(KeyboardInterrupt):
        build_class_folders(str(source), str(dest), samples_per_shard=4, dataset="set", threads=threads)
    finished = {path.name: path.stat().st_mtime_ns for path in dest.glob("*.tar")}
    assert 0 < len(finished) < 8 and not list(dest.glob("*.partial")) and not (dest / "_index").exists()

    encoded.clear()
    monkeypatch.setattr(build, "_encode", lambda *args: encoded.append(args) or encode(*args))
    build_class_folders(str(source), str(dest), samples_per_shard=4, dataset="set")
    assert len(encoded) <= 30 - 4 * len(finished) + 2  # the last shard has two
    assert digests(dest) == digests(whole)


def test_a_shard_that_was_lost_or_cut_is_written_again(source: Path, tmp_path: Path) -> None:
    dest = tmp_path / "dest"
    build_class_folders(str(source), str(dest), samples_per_shard=8)
    before = digests(dest)
    (dest / "shard-000001.tar").unlink()
    cut = dest / "shard-000002.tar"
    cut.write_bytes(cut.read_bytes()[:2000])
    kept = (dest / "shard-000000.tar").stat().st_mtime_ns
    build_class_folders(str(source), str(dest), samples_per_shard=8)
    assert digests(dest) == before and (dest / "shard-000000.tar").stat().st_mtime_ns == kept
    shutil.rmtree(dest / "_index")
    build_class_folders(str(source), str(dest), samples_per_shard=8)
    assert digests(dest) == before


def test_other_files_or_options_do_not_mix_with_what_is_there(source: Path, tmp_path: Path) -> None:
    dest = tmp_path / "dest"
    build_class_folders(str(source), str(dest))
    with pytest.raises(
        ValueError, match="dest holds shards of other files or options; choose an empty folder"
    ):
        build_class_folders(str(source), str(dest), shortest_side=4)
    (source / "bag" / "new.png").write_bytes(image_bytes(images(1)[0]))
    with pytest.raises(ValueError, match="dest holds shards of other files or options"):
        build_class_folders(str(source), str(dest))
    (dest / "_build.json").unlink()
    with pytest.raises(ValueError, match="dest holds shards that are not from this build"):
        build_class_folders(str(source), str(dest))


def test_buckets(source: Path, memory_url: str, tmp_path: Path) -> None:
    fs, root = fsspec.core.url_to_fs(memory_url)
    fs.put(str(source), f"{root}/source", recursive=True)
    remote = build_class_folders(f"{memory_url}/source", f"{memory_url}/dest", samples_per_shard=8)
    local = build_class_folders(str(source), str(tmp_path / "dest"), samples_per_shard=8)
    assert remote.fingerprint == local.fingerprint == open_index(f"{memory_url}/dest").fingerprint


def test_an_empty_folder_is_a_class(source: Path, tmp_path: Path) -> None:
    (source / "aaa").mkdir()
    index = build_class_folders(str(source), str(tmp_path / "dest"))
    assert index.classes == ("aaa", *NAMES)
    assert read(tmp_path / "dest")["bag/0"]["cls"] == b"1"


def test_dots_in_names_do_not_cut_the_key(tmp_path: Path) -> None:
    folder = tmp_path / "source" / "st.bernard"
    folder.mkdir(parents=True)
    (folder / "a.b.png").write_bytes(image_bytes(images(1)[0]))
    build_class_folders(str(tmp_path / "source"), str(tmp_path / "dest"))
    assert list(read(tmp_path / "dest")) == ["st.bernard/a_b"]


@pytest.mark.parametrize("names", [("a.png", "a.jpg"), ("a.b.png", "a_b.png")])
def test_two_files_of_one_key_are_named(source: Path, tmp_path: Path, names: tuple[str, str]) -> None:
    for name in names:
        (source / "bag" / name).write_bytes(image_bytes(images(1)[0]))
    one, two = sorted(names)
    with pytest.raises(ValueError, match=rf"bag/{one} and .*bag/{two} would both be the sample bag/a"):
        build_class_folders(str(source), str(tmp_path / "dest"))
    assert not (tmp_path / "dest").exists()


def test_an_image_that_cannot_be_decoded_is_named(source: Path, tmp_path: Path) -> None:
    (source / "coat" / "broken.png").write_bytes(image_bytes(images(1)[0])[:60])
    with pytest.raises(ValueError, match=r"source/coat/broken\.png: not a readable image") as caught:
        build_class_folders(str(source), str(tmp_path / "dest"))
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "dest").glob("*.partial"))


def test_files_that_are_left_out_are_reported(source: Path, tmp_path: Path, caplog) -> None:
    (source / "list.txt").write_text("")
    (source / "bag" / "deeper").mkdir()
    (source / "bag" / "deeper" / "x.png").write_bytes(b"")
    assert len(build_class_folders(str(source), str(tmp_path / "dest"))) == 30
    assert "left out 2 other files, such as bag/deeper/x.png" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "nowhere"}, "nowhere: no such folder"),
        ({"source": "empty"}, "empty: no images found; expected <class>/<image>"),
        ({"source": "source/bag"}, "bag: no images found"),
        ({"image_format": "tiff"}, "image format 'tiff'; expected one of keep, webp, png, jpg"),
        ({"samples_per_shard": 0}, "0 samples per shard"),
        ({"shortest_side": 0}, "shortest side 0"),
    ],
)
def test_bad_input(source: Path, tmp_path: Path, monkeypatch, options: dict, message: str) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        build_class_folders(**({"source": "source", "dest": "dest"} | options))


@pytest.mark.parametrize("key", ["../a", "/a", "a/../../b", "a.b", "a/.b", "a\n", ""])
def test_keys_that_a_shard_cannot_hold(tmp_path: Path, key: str) -> None:
    writer = ShardWriter(fsspec.filesystem("file"), str(tmp_path / "0.tar"))
    with pytest.raises(
        ValueError, match=r"member .* has an absolute path|is not a name that a shard can hold"
    ):
        writer.write(key, {"txt": b""})
    writer.discard()
    assert not list(tmp_path.iterdir())
