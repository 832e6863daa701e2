"""Shards built from sources: read back by webdataset, and built again after interruptions and kills."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import fsspec
import pytest
import webdataset
from buckets import bucket_root, gcs_bucket, s3_bucket
from PIL import Image

from ul_scale.data import progress
from ul_scale.data.index import Index, open_index
from ul_scale.data.writing import shards
from ul_scale.data.writing.recode import Encoding
from ul_scale.data.writing.shard_writer import ShardWriter
from ul_scale.data.writing.shards import describe_build, write_shards
from ul_scale.data.writing.sources import SourceOptions, find_source

from ..conftest import image_bytes, images, tar_bytes

__all__ = ["bucket_root", "gcs_bucket", "s3_bucket"]  # fixtures
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
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in dest.glob("*.tar")}


def write(source: Path | str, dest: Path | str, encoding: Encoding | None = None, **options) -> Index:
    """Write a source; how it is read and encoded is told apart by the options' names."""

    def some(section: type) -> dict[str, Any]:
        return {field.name: options.pop(field.name) for field in fields(section) if field.name in options}

    found = find_source(str(source), SourceOptions(**some(SourceOptions)))
    return write_shards(found, str(dest), encoding or Encoding(**some(Encoding)), **options)


def bad_files(dest: Path) -> dict[str, str]:
    lines = (dest / "_bad.jsonl").read_text().splitlines()
    return {line["file"]: line["reason"] for line in map(json.loads, lines)}


def test_files_are_kept_as_they_are(source: Path, tmp_path: Path) -> None:
    dest = tmp_path / "dest"
    index = write(source, dest, samples_per_shard=8)
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
        write(source, tmp_path / name, samples_per_shard=10, workers=3, dataset="set")
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    for shard in (tmp_path / "one").glob("*.tar"):
        labels = [sample["cls"] for sample in webdataset.WebDataset(str(shard), shardshuffle=False)]
        assert len(Counter(labels)) == 3


def test_a_second_run_rewrites_nothing(source: Path, tmp_path: Path) -> None:
    dest = tmp_path / "dest"
    write(source, dest, samples_per_shard=8)
    before = {path: path.stat().st_mtime_ns for path in dest.rglob("*")}
    index = write(source, dest, samples_per_shard=8)
    assert {path: path.stat().st_mtime_ns for path in dest.rglob("*")} == before and len(index) == 30


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_run_is_finished_by_the_next(
    source: Path, tmp_path: Path, monkeypatch, workers: int
) -> None:
    whole, dest = tmp_path / "whole", tmp_path / "dest"
    write(source, whole, samples_per_shard=4)
    encode, encoded = shards._encode, []

    def fail_at_the_20th(*args):
        encoded.append(args)
        if len(encoded) == 20:
            raise KeyboardInterrupt
        return encode(*args)

    monkeypatch.setattr(shards, "_encode", fail_at_the_20th)
    with pytest.raises(KeyboardInterrupt):
        write(source, dest, samples_per_shard=4, workers=workers)
    finished = {path.name: path.stat().st_mtime_ns for path in dest.glob("*.tar")}
    assert 0 < len(finished) < 8 and not list(dest.glob("*.partial")) and not (dest / "_index").exists()

    encoded.clear()
    monkeypatch.setattr(shards, "_encode", lambda *args: encoded.append(args) or encode(*args))
    write(source, dest, samples_per_shard=4)
    assert len(encoded) == 30 - 4 * len(finished)
    assert digests(dest) == digests(whole)


KILLED = """
import sys
from ul_scale.data.writing import shards
from ul_scale.data.writing.sources import SourceOptions, find_source

encode, count = shards._encode, 0

def announced(*args):
    global count
    count += 1
    if count == 19:
        print("now", flush=True)
        sys.stdin.read()  # until the kill
    return encode(*args)

shards._encode = announced
source = find_source(sys.argv[1], SourceOptions())
shards.write_shards(source, sys.argv[2], samples_per_shard=4, workers=1)
"""


def test_a_killed_run_is_finished_by_the_next(source: Path, tmp_path: Path) -> None:
    whole, dest = tmp_path / "whole", tmp_path / "dest"
    write(source, whole, samples_per_shard=4)
    command = [sys.executable, "-c", KILLED, str(source), str(dest)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:
        assert process.stdout is not None and process.stdout.readline() == "now\n"
        os.kill(process.pid, signal.SIGKILL)
    recorded = json.loads((dest / "_build.json").read_text())["shards"]
    finished = {name: (dest / name).stat().st_mtime_ns for name in recorded}
    assert 0 < len(finished) < 8 and list(dest.glob("*.partial")) and not (dest / "_index").exists()
    assert len(write(source, dest, samples_per_shard=4)) == 30
    assert digests(dest) == digests(whole) and not list(dest.glob("*.partial"))
    assert {name: (dest / name).stat().st_mtime_ns for name in finished} == finished


def test_a_shard_that_was_lost_or_cut_is_written_again(source: Path, tmp_path: Path) -> None:
    dest = tmp_path / "dest"
    write(source, dest, samples_per_shard=8)
    before = digests(dest)
    (dest / "shard-000001.tar").unlink()
    cut = dest / "shard-000002.tar"
    cut.write_bytes(cut.read_bytes()[:2000])
    kept = (dest / "shard-000000.tar").stat().st_mtime_ns
    write(source, dest, samples_per_shard=8)
    assert digests(dest) == before and (dest / "shard-000000.tar").stat().st_mtime_ns == kept
    shutil.rmtree(dest / "_index")
    write(source, dest, samples_per_shard=8)
    assert digests(dest) == before


def test_other_files_or_options_do_not_mix_with_what_is_there(source: Path, tmp_path: Path) -> None:
    dest = tmp_path / "dest"
    write(source, dest)
    with pytest.raises(
        ValueError, match="dest holds shards of other files or options; choose an empty folder"
    ):
        write(source, dest, shortest_side=4)
    (source / "bag" / "new.png").write_bytes(image_bytes(images(1)[0]))
    with pytest.raises(ValueError, match="dest holds shards of other files or options"):
        write(source, dest)
    (dest / "_build.json").write_text("{")
    with pytest.raises(ValueError, match=r"_build\.json is damaged; choose an empty folder or delete it"):
        write(source, dest)
    (dest / "_build.json").unlink()
    with pytest.raises(ValueError, match="dest holds shards that are not from this build"):
        write(source, dest)


def test_a_mended_file_rewrites_its_shard_alone(source: Path, tmp_path: Path) -> None:
    dest = tmp_path / "dest"
    broken = min((source / "bag").glob("[0-9]*"))
    whole = broken.read_bytes()
    broken.write_bytes(whole[:30])
    with pytest.raises(ValueError, match="1 of 30 files cannot be used"):
        write(source, dest, samples_per_shard=8)
    before = {path.name: path.stat().st_mtime_ns for path in dest.glob("*.tar")}
    broken.write_bytes(whole)
    index = write(source, dest, samples_per_shard=8)
    after = {path.name: path.stat().st_mtime_ns for path in dest.glob("*.tar")}
    assert len(index) == 30 and len(before) == 3 and before.items() < after.items()
    assert digests(dest) == digests_of_a_build(source, tmp_path / "other")


def digests_of_a_build(source: Path, dest: Path) -> dict[str, str]:
    write(source, dest, samples_per_shard=8)
    return digests(dest)


def test_buckets(source: Path, memory_url: str, tmp_path: Path) -> None:
    fs, root = fsspec.core.url_to_fs(memory_url)
    fs.put(str(source), f"{root}/source", recursive=True)
    remote = write(f"{memory_url}/source", f"{memory_url}/dest", samples_per_shard=8)
    local = write(source, tmp_path / "dest", samples_per_shard=8)
    assert remote.fingerprint == local.fingerprint == open_index(f"{memory_url}/dest").fingerprint


def test_from_bucket_to_bucket(source: Path, bucket_root: str, tmp_path: Path) -> None:
    fs, root = fsspec.core.url_to_fs(bucket_root)
    fs.put(str(source), f"{root}/source", recursive=True)
    found = find_source(f"{bucket_root}/source", SourceOptions())
    remote = write_shards(found, f"{bucket_root}/dest", samples_per_shard=8)
    local = write(source, tmp_path / "dest", samples_per_shard=8)
    assert remote.fingerprint == local.fingerprint
    assert write_shards(found, f"{bucket_root}/dest", samples_per_shard=8).fingerprint == local.fingerprint


def test_an_empty_folder_is_a_class(source: Path, tmp_path: Path) -> None:
    (source / "aaa").mkdir()
    index = write(source, tmp_path / "dest")
    assert index.classes == ("aaa", *NAMES)
    assert read(tmp_path / "dest")["bag/0"]["cls"] == b"1"


def test_bad_files_are_all_named_and_the_rest_is_kept(source: Path, tmp_path: Path, caplog) -> None:
    dest = tmp_path / "dest"
    good = image_bytes(images(1)[0])
    for name in ("bag/b.png", "coat/c.png"):
        (source / name).write_bytes(good[:60])
    with pytest.raises(
        ValueError, match=r"2 of 32 files cannot be used, such as bag/b.png \(not a readable im"
    ):
        write(source, dest, samples_per_shard=2)
    assert bad_files(dest).keys() == {"bag/b.png", "coat/c.png"}
    assert "coat/c.png: not a readable image" in caplog.text
    kept = {path.name: path.stat().st_mtime_ns for path in dest.glob("*.tar")}
    assert 14 <= len(kept) < 16 and not list(dest.glob("*.partial"))

    index = write(source, dest, samples_per_shard=2, skip_bad=True)
    assert len(index) == len(read(dest)) == 30 and index.extra == {"skipped": 2}
    assert bad_files(dest).keys() == {"bag/b.png", "coat/c.png"}
    assert {name: (dest / name).stat().st_mtime_ns for name in kept} == kept
    assert len(write(source, dest, samples_per_shard=2, skip_bad=True)) == 30


def test_what_was_skipped_before_an_interruption_is_not_forgotten(source: Path, tmp_path: Path) -> None:
    (source / "bag" / "b.png").write_bytes(b"")
    write(source, tmp_path / "dest", samples_per_shard=2, skip_bad=True)
    (tmp_path / "dest" / "_bad.jsonl").unlink()
    shutil.rmtree(tmp_path / "dest" / "_index")
    good = next(s for s in (tmp_path / "dest").glob("*.tar") if len(webdataset_keys(s)) == 2)
    good.unlink()
    index = write(source, tmp_path / "dest", samples_per_shard=2, skip_bad=True)
    assert index.extra == {"skipped": 1} and bad_files(tmp_path / "dest").keys() == {"bag/b.png"}


def webdataset_keys(shard: Path) -> list[str]:
    return [sample["__key__"] for sample in webdataset.WebDataset(str(shard), shardshuffle=False)]


def test_most_files_are_not_skipped(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / "source" / "a").mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / "a" / f"{number}.png").write_bytes(
            b"" if number else image_bytes(images(1)[0])
        )
    with pytest.raises(
        ValueError, match="2 of 3 files cannot be used, such as .*; mend them. All are listed"
    ):
        write(tmp_path / "source", tmp_path / "dest", skip_bad=True)


def test_a_file_that_is_gone_is_no_bad_file(source: Path, tmp_path: Path, no_waits) -> None:
    found = find_source(str(source), SourceOptions())
    (source / "bag" / "0.png").unlink()
    with pytest.raises(OSError, match=r"bag/0\.png"):
        write_shards(found, str(tmp_path / "dest"), skip_bad=True)
    assert not list((tmp_path / "dest").glob("*.partial"))


def test_archives_are_written_as_the_folders_they_hold(source: Path, tmp_path: Path) -> None:
    inner = {
        f"{name}.tar": tar_bytes({path.name: path.read_bytes() for path in (source / name).glob("[0-9]*")})
        for name in NAMES
    }
    (tmp_path / "train.tar").write_bytes(tar_bytes(inner))
    write(source, tmp_path / "folders", samples_per_shard=8)
    index = write(tmp_path / "train.tar", tmp_path / "archive", samples_per_shard=8)
    assert digests(tmp_path / "archive") == digests(tmp_path / "folders") and index.classes == NAMES


def test_captions(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.png").write_bytes(image_bytes(images(4)[number]))
    for number, text in enumerate((" ein Fuchs\n", "日本", "")):
        (folder / f"{number}.txt").write_text(text)
    with pytest.raises(ValueError, match="2 of 4 files cannot be used"):
        write(folder, tmp_path / "dest")
    assert bad_files(tmp_path / "dest") == {
        "2.png": "its caption 2.txt is empty",
        "3.png": "has no .txt file with a caption beside it",
    }
    write(folder, tmp_path / "dest", skip_bad=True)
    samples = read(tmp_path / "dest")
    assert {key: sample["txt"].decode() for key, sample in samples.items()} == {"0": "ein Fuchs", "1": "日本"}
    assert not any("cls" in sample for sample in samples.values())
    table = [{"image": f"{n}.png", "captions": texts} for n, texts in enumerate((["a"], ["b", "ç"]))]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, table)))
    write(folder, tmp_path / "several", captions=str(tmp_path / "t.jsonl"))
    samples = read(tmp_path / "several")
    assert {key: sample["txt"].decode() for key, sample in samples.items()} == {"0": "a", "1": "b"}
    assert "json" not in samples["0"] and json.loads(samples["1"]["json"]) == {"captions": ["b", "ç"]}


def test_videos_by_a_table(tmp_path: Path) -> None:
    pytest.importorskip("av")
    from .test_recode import shown, video

    folder = tmp_path / "clips"
    folder.mkdir()
    for name, count in (("aa_000001_000002", 20), ("bb_000000_000010", 30)):
        (folder / f"{name}.mp4").write_bytes(video(count))
    damaged = video(30)
    (folder / "cc_000000_000010.mp4").write_bytes(damaged[: len(damaged) // 2])
    (tmp_path / "t.csv").write_text(
        "label,youtube_id,time_start,time_end,split\nski,aa,1,2,train\nrun,bb,0,10,train\n"
        "ski,cc,0,10,train\nrun,gone,3,13,train\n"
    )
    options = {"labels": str(tmp_path / "t.csv"), "skip_bad": True}
    index = write(folder, tmp_path / "dest", Encoding(shortest_side=32, frame_rate=10), **options)
    samples = read(tmp_path / "dest")
    assert index.classes == ("run", "ski") and index.extra == {"skipped": 1, "missing": 1}
    assert {key: sample["cls"] for key, sample in samples.items()} == {
        "aa_000001_000002": b"1",
        "bb_000000_000010": b"0",
    }
    numbers, _, shape = shown(samples["bb_000000_000010"]["mp4"])
    assert numbers == list(range(0, 30, 3)) and shape == (32, 42, 3)
    bad = bad_files(tmp_path / "dest")
    assert bad["gone_000003_000013"] == "in the table, but not in the source"
    assert bad.keys() == {"cc_000000_000010.mp4", "gone_000003_000013"}
    with pytest.raises(ValueError, match="dest holds shards of other files or options"):
        write(folder, tmp_path / "dest", Encoding(shortest_side=32), **options)


def test_animations_are_stored_as_they_are(tmp_path: Path) -> None:
    from .test_recode import animation

    folder = tmp_path / "source"
    folder.mkdir()
    for form in ("webp", "gif"):
        (folder / f"{form}.{form}").write_bytes(animation(form.upper()))
    write(folder, tmp_path / "dest", kind="videos", labels="none")
    samples = read(tmp_path / "dest")
    assert all(samples[form][form] == (folder / f"{form}.{form}").read_bytes() for form in ("webp", "gif"))


def test_what_would_be_written(source: Path, tmp_path: Path) -> None:
    found = find_source(str(source), SourceOptions())
    lines = describe_build(found, Encoding(), 8).splitlines()
    size = sum(path.stat().st_size for path in source.rglob("[0-9]*"))
    assert lines[:3] == [
        f"{source}: 30 images; 3 classes",
        f"4 shards of 8; {size:,} bytes in the source",
        "classes: bag, coat, shirt; 10 to 10 samples each",
    ]
    with pytest.raises(ValueError, match="a frame rate is given, and the source holds images"):
        describe_build(found, Encoding(frame_rate=5), 8)
    write_shards(found, str(tmp_path / "dest"), samples_per_shard=8)
    first = webdataset_keys(tmp_path / "dest" / "shard-000000.tar")
    assert lines[3] == f"first samples: {', '.join(first[:5])}, …"


def test_progress_without_a_terminal_is_lines(source: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_S", -1.0)
    write(source, tmp_path / "dest")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 30 and lines[-1].startswith("Writing shards: 30 of 30 samples, ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "nowhere"}, "nowhere: no such folder"),
        ({"source": "empty"}, "empty: no images or videos found; expected <class>/<file>"),
        ({"source": "source/bag"}, "is in no class folder"),
        ({"image_format": "tiff"}, "image format 'tiff'; expected one of keep, webp, png, jpg"),
        ({"samples_per_shard": 0}, "0 samples per shard"),
        ({"shortest_side": 0}, "shortest side 0"),
    ],
)
def test_bad_input(source: Path, tmp_path: Path, monkeypatch, options: dict, message: str) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        write(**({"source": "source", "dest": "dest"} | options))


@pytest.mark.parametrize("key", ["../a", "/a", "a/../../b", "a.b", "a/.b", "a\n", ""])
def test_keys_that_a_shard_cannot_hold(tmp_path: Path, key: str) -> None:
    writer = ShardWriter(fsspec.filesystem("file"), str(tmp_path / "0.tar"))
    with pytest.raises(
        ValueError, match=r"member .* has an absolute path|is not a name that a shard can hold"
    ):
        writer.write(key, {"txt": b""})
    writer.discard()
    assert not list(tmp_path.iterdir())


def test_animations_are_videos_where_asked_for_and_stills_are_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "source" / "face"
    folder.mkdir(parents=True)
    frames = [Image.fromarray(frame) for frame in images(4, channels=3)]
    for name, form in (("a.webp", "WEBP"), ("b.gif", "GIF")):
        frames[0].save(folder / name, form, save_all=True, append_images=frames[1:], duration=40)
    frames[0].save(folder / "c.webp", "WEBP")
    index = write(tmp_path / "source", tmp_path / "videos", kind="videos")
    assert len(index) == 2 and set(index.parts) == {"cls", "gif", "webp"}
    stored = read(tmp_path / "videos")
    assert stored["face/a"]["webp"] == (folder / "a.webp").read_bytes()
    with pytest.raises(ValueError, match="is an animated GIF, and images are stills"):
        write(tmp_path / "source", tmp_path / "images")
    assert not (tmp_path / "videos" / "_bad.jsonl").exists() and index.extra == {"stills": 1}
    with pytest.raises(ValueError, match="animated images, which keep their bytes"):
        write(tmp_path / "source", tmp_path / "small", kind="videos", frame_rate=10)
    (folder / "b.gif").unlink()
