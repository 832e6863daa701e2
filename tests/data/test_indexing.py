"""Indexing: the files, and that only what is new or has changed is read again."""

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pytest
from buckets import bucket_root, gcs_bucket, s3_bucket  # noqa: F401

from ul_scale.data import index_writer, indexing
from ul_scale.data.index import Index, open_index
from ul_scale.data.indexing import build_index
from ul_scale.data.tar import ABSENT, scan_shard

from .conftest import tar_bytes, write_shards

Scanned = list[str]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("UL_SCALE_CACHE", str(cache))
    return cache


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> Scanned:
    """Note the shards that are read."""
    names, lock = Scanned(), threading.Lock()

    def scan(fs, path: str, size: int):
        with lock:
            names.append(path.rsplit("/", 1)[-1])
        return scan_shard(fs, path, size)

    monkeypatch.setattr(indexing, "scan_shard", scan)
    return names


def since_last(scanned: Scanned) -> Scanned:
    names = sorted(scanned)
    scanned.clear()
    return names


def rows(index: Index) -> list:
    """Return all that an index says of its samples."""
    table = zip(index.offset.tolist(), index.size.tolist(), index.members.tolist())
    names = index.names(0, len(index))
    shards = [(shard.name, shard.size, shard.samples) for shard in index.shards]
    return [index.fingerprint, index.parts, shards, list(zip(names, table))]


def from_scratch(url: str, folder: Path) -> list:
    """Index a copy of the shards, without their index."""
    fs, root = fsspec.core.url_to_fs(url)
    copy = folder / root.rsplit("/", 1)[-1]
    copy.mkdir(parents=True)
    for path in fs.ls(root, detail=False):
        if path.endswith(".tar"):
            (copy / path.rsplit("/", 1)[-1]).write_bytes(fs.cat_file(path))
    return rows(build_index(str(copy)))


def test_keys_are_found_across_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_writer, "_KEYS_PER_GROUP", 7)
    (tmp_path / "0.tar").write_bytes(tar_bytes({f"k{i}.txt": b"" for i in range(30)}))
    index = build_index(str(tmp_path))
    for start in range(30):
        for stop in range(start, 31):
            assert index.keys(start, stop) == [f"k{i}" for i in range(start, stop)]


def test_the_fingerprint_is_of_the_content_not_of_the_place(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    write_shards(str(one), [3, 2])
    shutil.copytree(one, two)
    for path in two.iterdir():
        os.utime(path, (0, 0))
    fingerprint = build_index(str(one)).fingerprint
    assert build_index(str(two), dataset="other").fingerprint == fingerprint
    (two / "000.tar").rename(two / "0000.tar")
    assert build_index(str(two)).fingerprint != fingerprint


@pytest.mark.parametrize("change", [{"b.txt": b"1"}, {"a.txt": b"1" * 600}, {"a.txt": b"1", "b.txt": b""}])
def test_the_fingerprint_changes_with_keys_and_offsets(tmp_path: Path, change: dict[str, bytes]) -> None:
    fingerprints = []
    for number, members in enumerate([{"a.txt": b"1", "z.txt": b""}, {**change, "z.txt": b""}]):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "0.tar").write_bytes(tar_bytes(members))
        fingerprints.append(build_index(str(tmp_path / str(number))).fingerprint)
    assert fingerprints[0] != fingerprints[1]


def test_the_files_are_those_that_the_format_fixes(tmp_path: Path) -> None:
    write_shards(str(tmp_path), [3, 2])
    built = build_index(str(tmp_path), dataset="set", classes=["a", "b"], extra={"std": 0.5})
    folder = tmp_path / "_index"
    arrays = {name: np.load(folder / f"{name}.npy") for name in ("offset", "size", "shard", "members")}
    assert {name: (a.dtype.str, a.shape) for name, a in arrays.items()} == {
        "offset": ("<u8", (5,)),
        "size": ("<u4", (5,)),
        "shard": ("<u4", (5,)),
        "members": ("<u4", (5, 2, 2)),
    }
    meta = json.loads((folder / "meta.json").read_text())
    for name in ("offset.npy", "size.npy", "shard.npy", "members.npy", "keys.parquet"):
        data = (folder / name).read_bytes()
        digest = hashlib.blake2b(data, digest_size=16).hexdigest()
        assert meta["files"].pop(name) == {"size": len(data), "digest": digest}
    assert not meta["files"]
    assert meta["format_version"] == 2 and meta["parts"] == ["cls", "png"]
    assert [(s["name"], s["size"], s["samples"]) for s in meta["shards"]] == [
        ("000.tar", (tmp_path / "000.tar").stat().st_size, 3),
        ("001.tar", (tmp_path / "001.tar").stat().st_size, 2),
    ]
    assert (built.dataset, built.classes, built.extra) == ("set", ("a", "b"), {"std": 0.5})
    again = build_index(str(tmp_path))  # what only the writer knew is kept
    assert (again.dataset, again.classes, again.extra) == ("set", ("a", "b"), {"std": 0.5})


def test_nothing_to_index(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no \.tar shards in this folder"):
        build_index(str(tmp_path))
    (tmp_path / "0.tar").write_bytes(tar_bytes({"README": b""}))
    with pytest.raises(ValueError, match="the shards hold no samples"):
        build_index(str(tmp_path))


def add(folder: Path) -> None:
    (folder / "0015.tar").write_bytes(tar_bytes({"new.png": b"1", "new.txt": b"a caption"}))


def remove(folder: Path) -> None:
    (folder / "002.tar").unlink()


def lengthen(folder: Path) -> None:
    (folder / "001.tar").write_bytes(tar_bytes({f"n{i}.png": b"1" for i in range(9)}))


def rewrite(folder: Path) -> None:
    """Change a shard's keys, not its size."""
    data = (folder / "001.tar").read_bytes()
    (folder / "001.tar").write_bytes(tar_bytes({f"x{i}.png": b"1" for i in range(3)}).ljust(len(data), b"\0"))
    os.utime(folder / "001.tar", (1, 1))


@pytest.mark.parametrize(
    ("change", "read"),
    [(add, ["0015.tar"]), (remove, []), (lengthen, ["001.tar"]), (rewrite, ["001.tar"]), (str, [])],
)
def test_only_what_is_new_or_changed_is_read(
    tmp_path: Path, scanned: Scanned, change: Callable[[Path], object], read: list[str]
) -> None:
    folder = tmp_path / "set"
    write_shards(str(folder), [3, 3, 0, 4])
    # A part that only one shard has; it goes with that shard.
    (folder / "002.tar").write_bytes(tar_bytes({"c.txt": b"caption"}))
    build_index(str(folder))
    assert len(since_last(scanned)) == 4
    change(folder)
    index = build_index(str(folder))
    assert since_last(scanned) == read
    assert rows(index) == from_scratch(str(folder), tmp_path / "copy")
    assert since_last(scanned) == [shard.name for shard in index.shards]
    build_index(str(folder), full=True)
    assert since_last(scanned) == [shard.name for shard in index.shards]


def test_an_index_that_is_up_to_date_is_not_written(tmp_path: Path) -> None:
    write_shards(str(tmp_path), [3, 2])
    build_index(str(tmp_path), classes=["a", "b"])
    written = (tmp_path / "_index/meta.json").stat().st_ino
    build_index(str(tmp_path), classes=["a", "b"])
    assert (tmp_path / "_index/meta.json").stat().st_ino == written
    index = build_index(str(tmp_path), classes=["b", "c"])
    assert index.classes == ("b", "c") == open_index(str(tmp_path)).classes


def test_a_copied_set_keeps_its_index(tmp_path: Path) -> None:
    write_shards(str(tmp_path / "one"), [3, 2])
    index = build_index(str(tmp_path / "one"))
    shutil.copytree(tmp_path / "one", tmp_path / "two", copy_function=shutil.copyfile)
    for path in (tmp_path / "two").glob("*.tar"):
        os.utime(path, (1, 1))
    assert open_index(str(tmp_path / "two")).identity == index.identity


def same_size(content: bytes) -> bytes:
    return tar_bytes({"a.png": content, "b.png": b""})


def test_in_buckets_content_counts(bucket_root: str, scanned: Scanned, tmp_path: Path) -> None:  # noqa: F811
    url = f"{bucket_root}/set"
    fs, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
    for name in ("0.tar", "1.tar"):
        fs.pipe_file(f"{root}/{name}", same_size(b"first"))
    index = build_index(url)
    assert since_last(scanned) == ["0.tar", "1.tar"] and index.shards[0].etag
    build_index(url)
    assert since_last(scanned) == []
    fs.pipe_file(f"{root}/1.tar", same_size(b"other"))
    with pytest.raises(ValueError, match=rf"{url}/1\.tar changed since it was indexed: etag .*; run: "):
        open_index(url)
    index = build_index(url)
    assert since_last(scanned) == ["1.tar"]
    assert rows(index) == from_scratch(url, tmp_path)


def test_shards_indexed_locally_are_known_by_their_sizes_in_a_bucket(
    bucket_root: str,  # noqa: F811
    tmp_path: Path,
    scanned: Scanned,
) -> None:
    write_shards(str(tmp_path / "set"), [3, 2])
    local = build_index(str(tmp_path / "set"))
    fs, root = fsspec.core.url_to_fs(bucket_root, use_listings_cache=False)
    fs.put(str(tmp_path / "set"), f"{root}/set", recursive=True)
    since_last(scanned)
    remote = open_index(f"{bucket_root}/set")
    assert rows(remote) == rows(local) and remote.shards == local.shards
    assert not scanned
    # What the bucket says of them is not what the index does.
    build_index(f"{bucket_root}/set")
    assert since_last(scanned) == ["000.tar", "001.tar"]
    build_index(f"{bucket_root}/set")
    assert since_last(scanned) == []


def test_an_index_of_another_format_or_damaged_is_made_anew(tmp_path: Path, scanned: Scanned, caplog) -> None:
    folder, url = tmp_path / "set/_index", str(tmp_path / "set")
    write_shards(url, [3, 2])
    build_index(url, classes=["a"], extra={"std": 1.0})
    expected = from_scratch(url, tmp_path / "copy")
    meta = (folder / "meta.json").read_text()
    size = (folder / "size.npy").read_bytes()
    damages = {
        "meta.json": [meta.replace('"format_version":2', '"format_version":1').encode()],
        # One of another length, and one that only its content gives away.
        "size.npy": [b"", size[:-1] + bytes([size[-1] ^ 1])],
        "keys.parquet": [None],
    }
    for name, contents in damages.items():
        for content in contents:
            since_last(scanned)
            (folder / name).unlink()
            if content is not None:
                (folder / name).write_bytes(content)
            index = build_index(url)
            assert since_last(scanned) == ["000.tar", "001.tar"]
            assert rows(index) == expected
            assert (index.classes, index.extra) == (("a",), {"std": 1.0})
    assert caplog.text.count("all shards are read again") == 3


def test_passes_change_nothing(tmp_path: Path, scanned: Scanned, monkeypatch: pytest.MonkeyPatch) -> None:
    url = str(tmp_path / "set")
    write_shards(url, [2, 3, 0, 1, 1, 4, 1, 2, 2, 1, 3])
    (tmp_path / "set/008.tar").write_bytes(tar_bytes({"c.txt": b"caption"}))
    monkeypatch.setattr(indexing, "PASS_S", 0.0)
    monkeypatch.setattr(indexing, "PASS_OVERHEADS", 0.0)
    monkeypatch.setattr(indexing._Scans, "_begin", begin_two)
    published = []
    publish = indexing._publish
    monkeypatch.setattr(
        indexing, "_publish", lambda *args: published.append(len(args[3]["shards"])) or publish(*args)
    )
    index = build_index(url)
    assert published == [2, 4, 6, 8, 10, 11]
    assert since_last(scanned) == [shard.name for shard in index.shards]
    monkeypatch.undo()
    assert rows(index) == from_scratch(url, tmp_path / "copy")


def begin_two(scans: indexing._Scans, count: int) -> None:
    """Begin two scans in a pass."""
    if count > 1:
        scans._pass_s = 3600.0
        begin(scans, 2)


begin = indexing._Scans._begin


@pytest.mark.parametrize("place", ["local", "memory"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, ValueError])
def test_an_interrupted_indexing_goes_on(
    tmp_path: Path, memory_url: str, monkeypatch: pytest.MonkeyPatch, place: str, error: type[BaseException]
) -> None:
    url = str(tmp_path / "set") if place == "local" else memory_url
    write_shards(url, [2, 3, 1, 4, 2])
    reads = Scanned()

    def scan(fs, path: str, size: int):
        reads.append(path[-7:])
        if path.endswith("003.tar") and len(reads) < 5:
            raise error("in the middle")
        return scan_shard(fs, path, size)

    monkeypatch.setattr(indexing, "scan_shard", scan)
    monkeypatch.setattr(indexing, "_WORTH_KEEPING_S", 0.0)
    with pytest.raises(error, match="in the middle"):
        build_index(url, dataset="mine", threads=1)
    with pytest.raises(ValueError, match="indexing was interrupted, or goes on; to continue it, run: "):
        open_index(url)
    before = list(reads)
    index = build_index(url)
    assert reads[len(before) :] == ["003.tar", "004.tar"] and before[:3] == ["000.tar", "001.tar", "002.tar"]
    assert index.dataset == "mine"
    monkeypatch.undo()
    assert rows(index)[:3] == from_scratch(url, tmp_path / "copy")[:3]


def test_an_interrupted_indexing_is_complete_without_the_shards_it_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards(str(tmp_path), [2, 3])
    (tmp_path / "002.tar").write_bytes(b"damaged" * 99)
    monkeypatch.setattr(indexing, "_WORTH_KEEPING_S", 0.0)
    with pytest.raises(ValueError, match=r"002\.tar: no readable tar header"):
        build_index(str(tmp_path))
    (tmp_path / "002.tar").unlink()
    assert len(build_index(str(tmp_path))) == 5


def test_what_a_killed_indexing_left_is_cleared(tmp_path: Path) -> None:
    write_shards(str(tmp_path), [2])
    leftover = tmp_path / "_index/pass-abc"
    leftover.mkdir(parents=True)
    (leftover / "size.npy").write_bytes(b"")
    young = tmp_path / "_index/pass-def"  # may be that of another process, which still writes
    young.mkdir()
    os.utime(leftover, (0, 0))
    build_index(str(tmp_path))
    young.rmdir()
    assert sorted(path.name for path in (tmp_path / "_index").iterdir()) == sorted(
        ["keys.parquet", "members.npy", "meta.json", "offset.npy", "shard.npy", "size.npy"]
    )


def test_an_index_that_cannot_be_written(memory_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(memory_url, [2])
    fs, _ = fsspec.core.url_to_fs(memory_url)

    def refuse(*args, **kwargs) -> None:
        raise PermissionError("read-only:\n https://host/x?token=secret")

    monkeypatch.setattr(type(fs), "put_file", refuse)
    with pytest.raises(OSError, match=r"cannot write the index \(PermissionError: read-only: ") as error:
        build_index(memory_url)
    assert "secret" not in str(error.value)


def test_parts_that_come_late_get_columns(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(index_writer, "_WIDEN_ROWS", 2)
    for number, part in enumerate(["png", "cls", "txt", "json"]):
        members = {f"{i}.{name}": b"1" for i in range(5) for name in {"png", part}}
        (tmp_path / f"{number}.tar").write_bytes(tar_bytes(dict(sorted(members.items()))))
    index = build_index(str(tmp_path))
    assert index.parts == ("cls", "json", "png", "txt")
    has = (index.members[:, :, 0] != ABSENT).reshape(4, 5, 4).all(1)
    assert np.array_equal(has, [[0, 0, 1, 0], [1, 0, 1, 0], [0, 0, 1, 1], [0, 1, 1, 0]])
