"""Opening an index: what no longer fits is named, and remote ones are downloaded once."""

import pickle
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest
from buckets import bucket_root, gcs_bucket, s3_bucket  # noqa: F401

from ul_scale.data import index_cache, storage
from ul_scale.data.index import Index, open_index
from ul_scale.data.indexing import build_index

from .conftest import tar_bytes, write_shards


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("UL_SCALE_CACHE", str(cache))
    return cache


@pytest.mark.parametrize("place", ["local", "memory"])
def test_a_shard_that_is_not_what_was_indexed(tmp_path: Path, memory_url: str, place: str) -> None:
    url = str(tmp_path) if place == "local" else memory_url
    write_shards(url, [3, 2])
    build_index(url)
    fs, root = fsspec.core.url_to_fs(url)
    data = fs.cat_file(f"{root}/001.tar")
    remedy = f"run: ul-scale data index {url}"

    fs.pipe_file(f"{root}/001.tar", data + bytes(512))
    sizes = f"{len(data) + 512} bytes, index says {len(data)}"
    with pytest.raises(ValueError, match=f"{url}/001.tar changed since it was indexed: {sizes}; {remedy}"):
        open_index(url)
    fs.rm_file(f"{root}/001.tar")
    with pytest.raises(ValueError, match=r"001\.tar is in the index but not in the folder"):
        open_index(url)
    fs.pipe_file(f"{root}/001.tar", data)
    fs.pipe_file(f"{root}/002.tar", data)
    with pytest.raises(ValueError, match=rf"002\.tar was added since the set was indexed; {remedy}"):
        open_index(url)
    assert len(build_index(url)) == 7


LATENTS = {"autoencoder": {"run": "ae-1", "step": 40}}


def lengthen(folder: Path) -> None:
    (folder / "001.tar").write_bytes(tar_bytes({f"{i}.z_clean.npy": b"1" for i in range(30)}))


def remove(folder: Path) -> None:
    (folder / "001.tar").unlink()


def add(folder: Path) -> None:
    (folder / "002.tar").write_bytes(tar_bytes({"a.z_clean.npy": b"1"}))


def age(folder: Path) -> None:
    meta = folder / "_index/meta.json"
    meta.write_text(meta.read_text().replace('"format_version":2', '"format_version":1'))


def interrupt(folder: Path) -> None:
    meta = folder / "_index/meta.json"
    meta.write_text(meta.read_text().replace('"complete":true', '"complete":false'))


@pytest.mark.parametrize(
    ("change", "advice"),
    [
        (remove, "put it back, or run: {encode}"),
        (interrupt, "to continue it, run: {encode}"),
        # These, encoding would take for whole, or not look at.
        (lengthen, "delete it and run: {encode}"),
        (add, "delete it and run: {encode}"),
        (age, "delete {folder}/_index and run: {encode}"),
    ],
)
def test_latents_are_mended_by_encoding(tmp_path: Path, change: Callable[[Path], None], advice: str) -> None:
    folder = tmp_path / "runs/ae-1/latents/step_00000040/train"
    write_shards(str(folder), [2, 3])
    build_index(str(folder), extra=LATENTS)
    change(folder)
    before = (folder / "_index/meta.json").read_bytes()
    encode = f"ul-scale encode {tmp_path}/runs/ae-1 --step 40"
    with pytest.raises(ValueError, match=f"{re.escape(advice.format(encode=encode, folder=folder))}$"):
        open_index(str(folder))
    for full in (False, True):
        with pytest.raises(ValueError, match=f"holds latents, .*; run: {encode}$"):
            build_index(str(folder), full=full)
    assert (folder / "_index/meta.json").read_bytes() == before
    assert len(build_index(str(folder), extra=LATENTS)) > 0  # as encoding does


def test_latents_elsewhere_and_of_other_options(tmp_path: Path) -> None:
    write_shards(str(tmp_path), [2])
    build_index(str(tmp_path), extra={**LATENTS, "stored": {"dtype": "fp16"}})
    (tmp_path / "000.tar").unlink()
    advice = "run: ul-scale encode ROOT/ae-1 --step 40, and the options that they were encoded with"
    with pytest.raises(ValueError, match=f"put it back, or {advice}$"):
        open_index(str(tmp_path))


def test_another_etag_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(str(tmp_path), [2])
    files, etag = storage.list_files, "one"

    def list_with_etags(url: str) -> dict:
        return {name: {**info, "etag": etag} for name, info in files(url).items()}

    monkeypatch.setattr(storage, "list_files", list_with_etags)
    build_index(str(tmp_path))
    etag = "two"
    with pytest.raises(
        ValueError, match=r"000\.tar changed since it was indexed: etag two, index says one; run: "
    ):
        open_index(str(tmp_path))
    etag = None
    open_index(str(tmp_path))


def test_an_index_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere: no such folder$"):
        open_index(str(tmp_path / "nowhere"))
    write_shards(str(tmp_path), [2])
    with pytest.raises(ValueError, match=f"the shards have no index.*; run: ul-scale data index {tmp_path}$"):
        open_index(str(tmp_path))


def test_an_index_that_cannot_be_read(tmp_path: Path) -> None:
    write_shards(str(tmp_path), [2])
    build_index(str(tmp_path))
    folder = tmp_path / "_index"
    meta = (folder / "meta.json").read_text()
    for changed, message in [
        (
            meta.replace('"format_version":2', '"format_version":1'),
            "the index has format 1, this version reads 2",
        ),
        (
            meta.replace('"samples":2', '"samples":3'),
            r"cannot be read \(offset.npy is uint64 \[2\], expected uint64 \[3\]",
        ),
        (
            meta.replace('"size.npy"', '"../size.npy"'),
            r"cannot be read \(it lists the files .*\.\./size\.npy",
        ),
        (meta.replace('"parts"', '"pieces"'), r"cannot be read \('parts'\)"),
    ]:
        (folder / "meta.json").write_text(changed)
        with pytest.raises(ValueError, match=f"{message}.*; run: ul-scale data index {tmp_path}"):
            open_index(str(tmp_path))
    (folder / "meta.json").write_text(meta)
    for name in ("size.npy", "keys.parquet"):
        data = (folder / name).read_bytes()
        for content, message in [
            (data + b"1", f"{name} has {len(data) + 1} bytes, expected {len(data)}"),
            (b"x" * len(data), "the index cannot be read"),
            (None, "the index cannot be read"),
        ]:
            (folder / name).unlink()
            if content is not None:
                (folder / name).write_bytes(content)
            with pytest.raises(ValueError, match=message):
                open_index(str(tmp_path))
            (folder / name).write_bytes(data)
    assert len(open_index(str(tmp_path))) == 2
    (folder / "meta.json").write_text("{")
    with pytest.raises(ValueError, match=r"no index, or its meta\.json is damaged"):
        open_index(str(tmp_path))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("pipe:cat secrets", "data is never read from a program"),
        ("nosuch://bucket/x", "nosuch://bucket/x: Protocol not known"),
    ],
)
def test_urls_that_are_refused(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_index(url)


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note what is read from where the shards are."""
    paths, lock, read_range = list[str](), threading.Lock(), storage.read_range

    def read(fs, path: str, start: int, end: int, *policy) -> bytes:
        with lock:
            paths.append(path.rsplit("/", 1)[-1])
        return read_range(fs, path, start, end, *policy)

    monkeypatch.setattr(storage, "read_range", read)
    return paths


FILES = ["keys.parquet", "members.npy", "offset.npy", "shard.npy", "size.npy"]


def same(one: Index, two: Index) -> bool:
    arrays = all(
        np.array_equal(getattr(one, name), getattr(two, name))
        for name in ("offset", "size", "shard", "members")
    )
    names = one.names(0, len(one)) == two.names(0, len(two))
    return arrays and names and one.identity == two.identity and one.shards == two.shards


def test_an_index_is_downloaded_once(
    bucket_root: str,  # noqa: F811
    requests: list[str],
    own_cache: Path,
) -> None:
    write_shards(bucket_root, [3, 2])
    built = build_index(bucket_root)
    assert sorted(name for name in requests if name in FILES) == FILES
    requests.clear()
    opened = open_index(bucket_root)
    assert requests == ["meta.json"]
    requests.clear()
    again = pickle.loads(pickle.dumps(opened))
    assert not requests and same(again, built) and same(opened, built)
    assert isinstance(again.members, np.memmap) and len(pickle.dumps(opened)) < 1000
    assert Path(str(again.location.folder)).is_relative_to(own_cache)


def test_it_is_downloaded_in_ranges_that_fit_together(
    memory_url: str, requests: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_cache, "_RANGE_BYTES", 7)
    write_shards(memory_url, [30])
    index = build_index(memory_url)
    assert requests.count("offset.npy") == -(-(128 + 30 * 8) // 7)
    assert index.keys(0, 30) == [f"{i:04d}" for i in range(30)]


def test_many_at_once_download_it_once(memory_url: str, requests: list[str], own_cache: Path) -> None:
    write_shards(memory_url, [3, 2])
    build_index(memory_url)
    for path in own_cache.rglob("*.npy"):
        path.unlink()
    requests.clear()
    with ThreadPoolExecutor(8) as pool:
        indexes = list(pool.map(open_index, [memory_url] * 8))
    assert sorted(name for name in requests if name in FILES) == FILES
    assert all(same(index, indexes[0]) for index in indexes)


@pytest.mark.parametrize("damage", ["cut short", "missing", "a leftover"])
def test_a_damaged_cache_is_replaced(memory_url: str, own_cache: Path, damage: str) -> None:
    write_shards(memory_url, [3, 2])
    built = build_index(memory_url)
    (path,) = own_cache.rglob("offset.npy")
    if damage == "cut short":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "missing":
        path.unlink()
    else:  # of a process that was killed
        path.parent.rename(path.parent.with_suffix(".partial"))
    assert same(open_index(memory_url), built)
    assert not list(own_cache.rglob("*.partial"))


def test_files_that_are_not_those_of_meta_json(memory_url: str, own_cache: Path) -> None:
    write_shards(memory_url, [3, 2])
    build_index(memory_url)
    for folder in (own_cache / "index").iterdir():
        folder.rename(own_cache / folder.name)
    fs, root = fsspec.core.url_to_fs(f"{memory_url}/_index/size.npy")
    data = fs.cat_file(root)
    fs.pipe_file(root, data[:-1] + bytes([data[-1] ^ 1]))
    message = (
        r"cannot be read \(size\.npy is not the file that meta\.json is about.*; run: ul-scale data index"
    )
    with pytest.raises(ValueError, match=message):
        open_index(memory_url)
    assert [path.suffix for path in (own_cache / "index").iterdir()] == [".lock"]


def test_where_nothing_can_be_written_memory_is_used(
    memory_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    write_shards(memory_url, [3, 2])
    built = build_index(memory_url)
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("UL_SCALE_CACHE", str(tmp_path / "file"))
    index_cache._warn_of_memory.cache_clear()
    opened = [open_index(memory_url), open_index(memory_url)]
    assert caplog.text.count("set UL_SCALE_CACHE to a folder that can be written") == 1
    opened.append(pickle.loads(pickle.dumps(opened[0])))
    for index in opened:
        assert same(index, built) and not isinstance(index.members, np.memmap)


def test_a_full_disk_is_no_reason_to_stop(memory_url: str, monkeypatch, own_cache: Path, caplog) -> None:
    write_shards(memory_url, [3, 2])
    build_index(memory_url)
    next(own_cache.rglob("size.npy")).unlink()

    def full(*args) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(index_cache.os, "pwrite", full)
    index_cache._warn_of_memory.cache_clear()
    assert len(open_index(memory_url)) == 5
    assert "No space left on device" in caplog.text and not list(own_cache.rglob("*.partial"))


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"UL_SCALE_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"UL_SCALE_CACHE": "", "XDG_CACHE_HOME": "/b"}, "/b/ul_scale"),
        ({"UL_SCALE_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/c"}, "/c/.cache/ul_scale"),
    ],
)
def test_where_the_cache_is(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert index_cache.cache_folder() == Path(expected)


def test_a_worker_process_maps_it_without_torch(tmp_path: Path) -> None:
    write_shards(str(tmp_path), [3, 2])
    index = build_index(str(tmp_path))
    for path in tmp_path.glob("*.tar"):
        path.unlink()  # the shards are not looked at
    script = (
        "import pickle, sys; index = pickle.load(sys.stdin.buffer); "
        "print(index.names(4, 5)[0], len(index), 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, input=pickle.dumps(index), capture_output=True, check=True)
    assert done.stdout.decode().split() == [f"{tmp_path.name}/001/0004", "5", "False"]


def test_a_location_whose_index_was_replaced(tmp_path: Path) -> None:
    write_shards(str(tmp_path), [3])
    location = build_index(str(tmp_path)).location
    assert len(Index.at(location)) == 3
    build_index(str(tmp_path), dataset="other")
    with pytest.raises(ValueError, match="the index was removed or replaced since it was opened"):
        Index.at(location)
    (tmp_path / "_index/meta.json").unlink()
    with pytest.raises(ValueError, match="the index was removed or replaced since it was opened"):
        Index.at(location)
