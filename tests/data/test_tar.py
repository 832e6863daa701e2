"""What is found in tars, against tarfile and webdataset, and what is refused."""

import io
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pytest
import webdataset

from ul_scale.data import tar as tar_module
from ul_scale.data.index import Index, open_index
from ul_scale.data.indexing import build_index
from ul_scale.data.tar import ABSENT

from .conftest import tar_bytes

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


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("UL_SCALE_CACHE", str(cache))
    return cache


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


def changed(header: bytes, field: slice, content: bytes, signed: bool = False) -> bytes:
    """Return a header with another content of a field, and the checksum that belongs to it."""
    data = bytearray(header)
    data[field], data[148:156] = content.ljust(field.stop - field.start, b"\0"), b" " * 8
    total = sum(byte - 256 if signed and byte > 127 else byte for byte in data)
    data[148:156] = b"%06o\0 " % total
    return bytes(data)


WHOLE = tar_bytes({"a.png": b"1" * 600, "b.png": b"2" * 600})
FIELDS = {"name": slice(0, 100), "size": slice(124, 136), "type": slice(156, 157), "magic": slice(257, 265)}


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(
    "fields",
    [
        {"name": b"n" * 96 + b".png"},  # fills its field, without an end
        {"size": b"\x80" + (5).to_bytes(11, "big")},
        {"size": b"        5 "},
        {"type": b"\0", "magic": b""},
        {"type": b"7"},
        {"name": "é.png".encode()},
    ],
)
def test_headers_of_other_writers(tmp_path: Path, fields: dict[str, bytes], signed: bool) -> None:
    header, rest = tar_bytes({"a.png": b"12345"})[:512], tar_bytes({"a.png": b"12345", "b.png": b""})[512:]
    for field, content in fields.items():
        header = changed(header, FIELDS[field], content, signed)
    (tmp_path / "0.tar").write_bytes(header + rest)
    check(build_index(str(tmp_path)), {"0.tar": header + rest})


def test_a_name_that_is_split_over_two_fields(tmp_path: Path) -> None:
    data = tar_bytes({"folder/" * 20 + "a.png": b"1"}, format=tarfile.USTAR_FORMAT)
    (tmp_path / "0.tar").write_bytes(data)
    index = build_index(str(tmp_path))
    check(index, {"0.tar": data})
    assert index.keys(0, 1) == ["folder/" * 20 + "a"]


def test_the_oldest_form_of_a_folder_is_none_of_the_samples(tmp_path: Path) -> None:
    folder = changed(tar_bytes({"a": b""})[:512], FIELDS["name"], b"folder.x/")
    folder = changed(folder, FIELDS["type"], b"\0")
    data = folder + tar_bytes({"a.png": b"1"})
    (tmp_path / "0.tar").write_bytes(data)
    check(build_index(str(tmp_path)), {"0.tar": data})


@pytest.mark.parametrize("byte", [0, 124, 148, 300, 511])
def test_a_flipped_bit_in_a_header_is_noticed(tmp_path: Path, byte: int) -> None:
    data = bytearray(WHOLE)
    data[byte] ^= 4
    (tmp_path / "0.tar").write_bytes(data)
    with pytest.raises(ValueError, match=r"0\.tar: no readable tar header at byte 0 "):
        build_index(str(tmp_path))


def test_dots_in_keys_are_explained(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(tar_bytes({f"photo.{i}.jpg": b"" for i in range(65)}))
    with pytest.raises(ValueError, match=r"0\.tar: more than 64 kinds of parts, such as 0\.jpg"):
        build_index(str(tmp_path))


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
    monkeypatch.setattr(tar_module, "_AHEAD_BYTES", 100_000)
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
