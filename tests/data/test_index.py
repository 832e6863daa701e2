"""The index against tarfile and webdataset, and what it refuses."""

import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pytest
import webdataset

from ul_scale.data import index as index_module
from ul_scale.data import storage
from ul_scale.data.index import ABSENT, Index, build_index, open_index

from .conftest import tar_bytes, write_shards

CONTENT = {
    "0001.png": b"p" * 700,
    "0001.cls": b"3",
    "folder.with.dots/0002.png": b"",
    "folder.with.dots/0002.txt": b"caption" * 200,
    "./0003.PNG": b"upper case",
    "0004.z_clean.npy": b"n" * 512,
    "é" * 20 + ".png": b"needs a PAX header",
    "long/" * 60 + "name.png": b"needs one too",
    "long/" * 60 + "name.cls": b"7",
    "9999.png": b"plain again",
}


def check(index: Index, shards: dict[str, bytes]) -> None:
    """Compare every sample with what tarfile and webdataset's grouping say of it."""
    expected, seen = [], 0
    for number, (name, data) in enumerate(sorted(shards.items())):
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            groups: dict[str, list[tuple[str, tarfile.TarInfo]]] = {}
            for info in tar:
                key, part = webdataset.tariterators.base_plus_ext(info.name)
                if info.isreg() and key is not None:
                    groups.setdefault(key, []).append((part.lower(), info))
            expected += [(number, name, data, key, group) for key, group in groups.items()]
    assert len(index) == len(expected)
    for i, (number, name, data, key, group) in enumerate(expected):
        assert index.shard[i] == number and index.keys(i, i + 1) == [key]
        assert index.names(i, i + 1) == [f"{index.dataset}/{name[:-4]}/{key}"]
        start, end = int(index.offset[i]), int(index.offset[i]) + int(index.size[i])
        assert start == group[0][1].offset
        assert end == group[-1][1].offset_data + -(-group[-1][1].size // 512) * 512
        parts = {
            part: data[start + int(offset) :][: int(length)]
            for part, (offset, length) in zip(index.parts, index.members[i])
            if offset != ABSENT
        }
        assert parts == {part: data[info.offset_data :][: info.size] for part, info in group}
        absent = index.members[i][index.members[i][:, 0] == ABSENT]
        assert not absent[:, 1].any()
        seen += len(parts)
    assert seen == sum(len(group) for *_, group in expected)


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_samples_lie_where_tarfile_finds_them(tmp_path: Path, memory_url: str, form: int) -> None:
    shards = {
        "b.tar": tar_bytes(CONTENT, format=form),
        "a.tar": tar_bytes({}),
        "c.tar": tar_bytes({"x.jpg": b"j"}),
    }
    memory, root = fsspec.core.url_to_fs(memory_url)
    memory.makedirs(root)
    for name, data in shards.items():
        (tmp_path / name).write_bytes(data)
        memory.pipe_file(f"{root}/{name}", data)
    local, remote = build_index(str(tmp_path)), build_index(memory_url)
    for index in (local, remote, open_index(str(tmp_path)), open_index(memory_url)):
        check(index, shards)
    assert local.fingerprint == remote.fingerprint
    assert (local.dataset, remote.dataset) == (tmp_path.name, "train")
    assert isinstance(local.members, np.memmap)
    assert [shard.samples for shard in local.shards] == [0, 7, 1]
    assert not list(tmp_path.rglob("*.partial"))


def test_members_that_are_no_samples_lie_between(tmp_path: Path) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", pax_headers={"comment": "global"}) as tar:
        for name, kind in [
            ("folder", tarfile.DIRTYPE),
            ("README", b"0"),
            ("a.png", b"0"),
            (".hidden.png", b"0"),
            ("b.png", b"0"),
        ]:
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, 5 if kind == b"0" else 0
            tar.addfile(info, io.BytesIO(b"12345"))
    (tmp_path / "0.tar").write_bytes(stream.getvalue())
    index = build_index(str(tmp_path))
    check(index, {"0.tar": stream.getvalue()})
    assert index.keys(0, 2) == ["a", "b"]


def test_a_tar_with_pax_headers_before_every_member(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "0.tar")) as writer:  # its fractional times need them
        for i in range(5):
            writer.write({"__key__": f"s{i}", "png": b"x" * i * 300, "cls": str(i).encode()})
    data = (tmp_path / "0.tar").read_bytes()
    assert b"mtime=" in data
    check(build_index(str(tmp_path)), {"0.tar": data})


def test_remote_headers_are_read_in_long_ranges(memory_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fs, root = fsspec.core.url_to_fs(memory_url)
    fs.makedirs(root)
    data = tar_bytes({f"{i:04d}.bin": bytes(5000) for i in range(200)})
    fs.pipe_file(f"{root}/0.tar", data)
    monkeypatch.setattr(index_module, "_READ_AHEAD_BYTES", 100_000)
    ranges = []
    cat = type(fs).cat_file
    monkeypatch.setattr(
        type(fs),
        "cat_file",
        lambda self, path, start=None, end=None: ranges.append((path, start)) or cat(self, path, start, end),
    )
    index = build_index(memory_url)
    check(index, {"0.tar": data})
    assert 10 <= sum(path.endswith("0.tar") for path, _ in ranges) <= 14


def test_keys_are_found_across_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "_KEYS_PER_GROUP", 7)
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
    assert meta["format_version"] == 1 and meta["parts"] == ["cls", "png"]
    assert [(s["name"], s["size"], s["samples"]) for s in meta["shards"]] == [
        ("000.tar", (tmp_path / "000.tar").stat().st_size, 3),
        ("001.tar", (tmp_path / "001.tar").stat().st_size, 2),
    ]
    assert (built.dataset, built.classes, built.extra) == ("set", ("a", "b"), {"std": 0.5})
    again = build_index(str(tmp_path))  # what only the writer knew is kept
    assert (again.dataset, again.classes, again.extra) == ("set", ("a", "b"), {"std": 0.5})


@pytest.mark.parametrize(
    "name",
    [
        *["../x.png", "/x.png", "a/../../x.png", "a\\b.png", "a\n.png"],
        *["x.pkl", "x.pickle", "x.pt", "x.pth", "x.pyd", "x.weights.PTH", "x.pkl.gz"],
    ],
)
def test_members_that_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "0.tar").write_bytes(tar_bytes({"ok.png": b"", name: b""}))
    with pytest.raises(
        ValueError, match=r"0\.tar: member '.*(x|a|b).*' (has an absolute path|holds pickled)"
    ):
        build_index(str(tmp_path))
    assert not (tmp_path / "_index").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        info = tarfile.TarInfo("a.png")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(ValueError, match=r"0\.tar: member 'a\.png' is a link, device or sparse file"):
        build_index(str(tmp_path))


WHOLE = tar_bytes({"a.png": b"1" * 600, "b.png": b"2" * 600})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (WHOLE[:3072], "the tar ends at byte 3072 without an end mark; it is cut short"),
        (WHOLE[:3000], "the tar ends at byte 3000 without an end mark"),
        (WHOLE[:2600], r"no readable tar header at byte 1536 \(its content would end at byte 2648 of 2600\)"),
        (WHOLE[:1700], "the tar ends at byte 1700 without an end mark"),
        (WHOLE[:1536] + b"x" * 512 + WHOLE[2048:], "no readable tar header at byte 1536 "),
        (b"", "the tar ends at byte 0 without an end mark"),
        (b"not a tar" * 200, "no readable tar header at byte 0"),
    ],
)
def test_damaged_tars(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "0.tar").write_bytes(data)
    with pytest.raises(ValueError, match=rf"0\.tar: {message}"):
        build_index(str(tmp_path))


def test_a_sample_that_comes_twice(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(tar_bytes({"a.png": b"", "b.png": b"", "a.cls": b""}))
    with pytest.raises(ValueError, match=r"0\.tar: the parts of 'a' do not lie next to each other"):
        build_index(str(tmp_path))
    (tmp_path / "0.tar").write_bytes(tar_bytes({"a.png": b"", "a.PNG": b""}))
    with pytest.raises(ValueError, match=r"0\.tar: two members are named a\.png"):
        build_index(str(tmp_path))


def test_nothing_to_index(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no \.tar shards in this folder"):
        build_index(str(tmp_path))
    (tmp_path / "0.tar").write_bytes(tar_bytes({"README": b""}))
    with pytest.raises(ValueError, match="the shards hold no samples"):
        build_index(str(tmp_path))


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


def test_another_etag_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    write_shards(str(tmp_path), [2])
    files, etag = storage.list_files, "one"

    def list_with_etags(url: str) -> dict:
        return {name: {**info, "etag": etag} for name, info in files(url).items()}

    monkeypatch.setattr(storage, "list_files", list_with_etags)
    build_index(str(tmp_path))
    assert not caplog.records
    etag = "two"
    open_index(str(tmp_path))
    assert "000.tar has another etag" in caplog.text


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
    (folder / "meta.json").write_text(meta.replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(ValueError, match="the index has format 2, this version reads 1; run: ul-scale"):
        open_index(str(tmp_path))
    (folder / "meta.json").write_text(meta)
    np.save(folder / "size.npy", np.zeros(3, np.uint32))
    with pytest.raises(ValueError, match="the index's files disagree about the number of samples"):
        open_index(str(tmp_path))
    (folder / "size.npy").write_bytes(b"")
    with pytest.raises(ValueError, match="the index cannot be read"):
        open_index(str(tmp_path))
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
