"""Sets with known faults, checked in this process and in workers."""

import io
import json
import multiprocessing
import subprocess
import sys
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pytest
from buckets import bucket_root, gcs_bucket
from PIL import Image

from ul_scale.data import storage
from ul_scale.data.config import DataConfig
from ul_scale.data.index import open_index
from ul_scale.data.indexing import build_index
from ul_scale.data.look import verify
from ul_scale.data.look.parts import check_part
from ul_scale.data.look.verify import Fault, find_faults

from ..conftest import image_bytes, images, tar_bytes, write_shards

__all__ = ["bucket_root", "gcs_bucket"]


def npy_bytes(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def animation_bytes(form: str, size: int = 32) -> bytes:
    frames = [Image.fromarray(pixels) for pixels in images(4, size, 3)]
    stream = io.BytesIO()
    frames[0].save(stream, form, save_all=True, append_images=frames[1:], duration=100)
    return stream.getvalue()


PIXELS = images(1, 32, 3)[0]
JPEG, PNG = image_bytes(PIXELS, "JPEG"), image_bytes(PIXELS)
LATENT = npy_bytes(np.ones((4, 2, 2), np.float32))
GOOD = {"jpg": JPEG, "cls": b"2", "txt": "ein Fuß".encode()}
BROKEN_LATENT = np.ones((4, 2, 2), np.float32)
BROKEN_LATENT[1, 0, 1] = np.nan
# Part, its bytes, words of the reason (none: it is good). Classes are 0, 1 and 2.
PARTS = [
    ("jpg", JPEG, None),
    ("png", PNG, None),
    ("webp", image_bytes(PIXELS, "WEBP"), None),
    ("webp", animation_bytes("WEBP"), None),
    ("gif", animation_bytes("GIF"), None),
    ("cls", b"0", None),
    ("cls", b" 2\n", None),
    ("txt", "été".encode(), None),
    ("json", b'{"caption": "a"}', None),
    ("z_clean.npy", LATENT, None),
    ("ids.npy", npy_bytes(np.arange(3)), None),
    ("flac", b"of no kind known here", None),
    ("jpg", JPEG[: len(JPEG) // 2], "not a readable image"),
    ("jpg", b"", "not a readable image"),
    ("jpg", b"<html>404</html>", "no known format"),
    ("png", PNG[: len(PNG) // 2], "not a readable image"),
    ("webp", animation_bytes("WEBP")[:-300], "not a readable image"),
    ("cls", b"dog", "b'dog' is not a class id"),
    ("cls", b"1.0", "not a class id"),
    ("cls", b"", "not a class id"),
    ("cls", b"3", "class 3; expected 0 to 2"),
    ("cls", b"-1", "class -1; expected 0 to 2"),
    ("txt", b"", "caption is empty"),
    ("txt", b" \n", "caption is empty"),
    ("txt", b"caf\xe9", "not UTF-8 (byte 3)"),
    ("json", b"{", "not JSON"),
    ("z_clean.npy", LATENT[:-1], "its header says (4, 2, 2)"),
    ("z_clean.npy", b"PK\x03\x04 a zip", "not an .npy file"),
    ("z_clean.npy", npy_bytes(BROKEN_LATENT), "1 of 16 values are not finite"),
]


@pytest.mark.parametrize(("part", "data", "reason"), PARTS)
def test_each_kind_of_part(part: str, data: bytes, reason: str | None) -> None:
    if reason is None:
        check_part(part, memoryview(data), 3)
    else:
        with pytest.raises(ValueError) as caught:
            check_part(part, memoryview(data), 3)
        assert reason in str(caught.value)
        assert "\n" not in str(caught.value) and "0x" not in str(caught.value)


def test_labels_have_no_upper_end_where_classes_are_not_named() -> None:
    check_part("cls", b"12345", None)
    with pytest.raises(ValueError, match="class -1; expected at least 0"):
        check_part("cls", b"-1", None)


def write_video(path: Path) -> bytes:
    """Write a video of 30 frames; an MP4's index of frames comes first, so that a cut loses frames alone."""
    av = pytest.importorskip("av")
    options = {"movflags": "faststart"} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", options=options) as container:
        video = container.add_stream("mpeg4", rate=10)
        video.width, video.height, video.pix_fmt = 48, 48, "yuv420p"
        for pixels in images(30, 48, 3):
            container.mux(video.encode(av.VideoFrame.from_ndarray(pixels)))
        container.mux(video.encode())
    return path.read_bytes()


def test_videos_are_decoded_to_their_last_frame(tmp_path: Path) -> None:
    mp4, avi = write_video(tmp_path / "whole.mp4"), write_video(tmp_path / "whole.avi")
    check_part("mp4", mp4, None)
    check_part("avi", avi, None)
    for length in (len(mp4) - 1, len(mp4) * 9 // 10, len(mp4) // 3):
        with pytest.raises(ValueError, match=f"has {length:,} of {len(mp4):,} bytes"):
            check_part("mp4", mp4[:length], None)
    for other in (mp4[:40], b"", JPEG):
        with pytest.raises(ValueError, match="video|bytes"):
            check_part("mp4", other, None)
    middle = len(avi) // 2
    noise = images(1, 14)[0].tobytes()
    with pytest.raises(ValueError, match="of the video is damaged|not a readable video"):
        check_part("avi", avi[:middle] + noise + avi[middle + len(noise) :], None)


def write_faulty(root: Path) -> list[tuple[str, str, str | None]]:
    """Write two shards of 20 samples, 7 of which are bad; return the faults' shard, key and part."""
    bad: dict[int, dict[str, bytes]] = {
        3: {"jpg": JPEG[:300]},
        5: {"txt": b""},
        12: {"cls": b"cat"},
        20: {"cls": b"3"},
        21: {"jpg": b"", "txt": b"\xff"},
        38: {"jpg": JPEG[:-40]},
    }
    root.mkdir()
    for shard in (0, 1):
        members: dict[str, bytes] = {}
        for number in range(shard * 20, shard * 20 + 20):
            parts = {"cls": b"1", "json": b"{}"} if number == 30 else GOOD | bad.get(number, {})
            members |= {f"a/{number:03d}.{part}": data for part, data in parts.items()}
        (root / f"{shard}.tar").write_bytes(tar_bytes(members))
    build_index(str(root), classes=["x", "y", "z"])
    rows = [(number, part) for number, parts in bad.items() for part in parts] + [(30, None)]
    # Parts of a sample come in the index's order, by name.
    return [(f"{number // 20}.tar", f"a/{number:03d}", part) for number, part in sorted(rows, key=str_number)]


def str_number(row: tuple[int, str | None]) -> tuple[int, str]:
    return row[0], row[1] or ""


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_listed_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(verify, "_CHUNK_SAMPLES", 3)
    expected = write_faulty(tmp_path / "set")
    advanced: list[int] = []
    faults = list(find_faults(open_index(str(tmp_path / "set")), workers=workers, advance=advanced.append))
    assert [(fault.shard, fault.key, fault.part) for fault in faults] == expected
    assert sum(advanced) == 40 and len(advanced) > 3


def test_lines_go_to_stdout_and_the_summary_to_stderr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = str(tmp_path / "set")
    expected = write_faulty(tmp_path / "set")
    assert verify.verify(url, workers=0) == 1
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert [(line["shard"], line["key"], line["part"]) for line in lines] == expected
    assert lines[1]["reason"] == "the caption is empty"
    assert "40 samples in 2 shards, 7 bad (cls: 2, jpg: 3, sample: 1, txt: 2)" in err

    assert verify.verify(url, workers=0, out=tmp_path / "bad.jsonl") == 1
    assert capsys.readouterr().out == ""
    assert (tmp_path / "bad.jsonl").read_text() == out


def test_a_good_set_is_good(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = str(tmp_path / "set")
    write_shards(url, [7, 1, 0, 4])
    build_index(url)
    assert verify.verify(url, workers=0, config=DataConfig(image_size=8, channels=1)) == 0
    out, err = capsys.readouterr()
    assert out == "" and "12 samples in 4 shards, 0 bad, " in err


def test_with_a_config_samples_are_decoded_as_in_training(tmp_path: Path) -> None:
    members = {
        f"{n}.{part}": data for n in range(3) for part, data in GOOD.items() if (n, part) != (1, "txt")
    }
    (tmp_path / "0.tar").write_bytes(tar_bytes(members))
    index = build_index(str(tmp_path))
    assert list(find_faults(index, workers=0)) == []
    config = DataConfig(image_size=8, captions=True)
    [fault] = find_faults(index, workers=0, config=config)
    assert (fault.shard, fault.key, fault.part) == ("0.tar", "1", None)
    assert "caption" in fault.reason or "txt" in fault.reason
    with pytest.raises(ValueError, match=r"data\.image_size"):
        list(find_faults(index, workers=2, config=DataConfig()))


def test_parts_of_no_known_kind_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "0.tar").write_bytes(tar_bytes({"a.flac": b"?", "a.png": PNG}))
    build_index(str(tmp_path))
    assert verify.verify(str(tmp_path), workers=0) == 0
    assert capsys.readouterr().err.rstrip().endswith("were not decoded: flac")


def test_a_shard_rewritten_at_equal_size_is_named(tmp_path: Path) -> None:
    members = {f"{n}.{part}": data for n in range(4) for part, data in GOOD.items()}
    (tmp_path / "0.tar").write_bytes(tar_bytes(members))
    index = build_index(str(tmp_path))
    # The same bytes under other keys: sample 1 and 2 change places.
    swapped = {{"1": "2", "2": "1"}.get(name[0], name[0]) + name[1:]: data for name, data in members.items()}
    (tmp_path / "0.tar").write_bytes(tar_bytes(swapped))
    faults = list(find_faults(index, workers=0))
    assert [(fault.shard, fault.key, fault.part) for fault in faults] == [
        ("0.tar", "1", None),
        ("0.tar", "2", None),
    ]
    assert "the index does not fit the shard: the shard holds 2.jpg, 2.cls, 2.txt there" in faults[0].reason
    # One whose caption is shorter, which padding hides.
    shorter = tar_bytes(members | {"3.txt": GOOD["txt"][:-1]})
    assert len(shorter) == len(tar_bytes(members))
    (tmp_path / "0.tar").write_bytes(shorter)
    [fault] = find_faults(index, workers=0)
    assert fault.key == "3" and "parts are at other places, or of other lengths" in fault.reason
    # And one whose headers are gone.
    content = bytearray(tar_bytes(members))
    content[:512] = b"\x07" * 512
    (tmp_path / "0.tar").write_bytes(content)
    [fault] = find_faults(index, workers=0)
    assert fault.key == "0" and "headers cannot be read" in fault.reason


@pytest.mark.parametrize("options", [{"format": tarfile.PAX_FORMAT}, {"format": tarfile.GNU_FORMAT}])
def test_headers_of_long_names_fit(tmp_path: Path, options: dict) -> None:
    members = {f"{'long/' * 60}é{n}.{part}": data for n in range(3) for part, data in GOOD.items()}
    (tmp_path / "0.tar").write_bytes(tar_bytes({"folder.d/.hidden": b"x" * 700, **members}, **options))
    assert list(find_faults(build_index(str(tmp_path)), workers=0)) == []


def test_a_failed_read_is_an_error_and_no_bad_sample(memory_url: str) -> None:
    write_shards(memory_url, [3, 3])
    index = build_index(memory_url)
    fs, root = fsspec.core.url_to_fs(memory_url)
    fs.rm_file(f"{root}/001.tar")
    found: list[Fault] = []
    with pytest.raises(OSError, match=r"001\.tar"):
        found.extend(find_faults(index, workers=0))
    assert found == []


def test_consecutive_samples_are_one_request(memory_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(memory_url, [30, 30])
    index = build_index(memory_url)
    read, ranges = storage.read_range, []

    def counted(fs, path, start, end, *rest):
        ranges.append((path.rsplit("/", 1)[-1], start, end))
        return read(fs, path, start, end, *rest)

    monkeypatch.setattr(storage, "read_range", counted)
    monkeypatch.setattr(verify, "_CHUNK_SAMPLES", 20)
    assert list(find_faults(index, workers=0)) == []
    assert [name for name, _, _ in sorted(ranges)] == ["000.tar"] * 2 + ["001.tar"] * 2
    assert sum(end - start for _, start, end in ranges) == int(index.size.sum())


def test_a_worker_that_dies_ends_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "_CHUNK_SAMPLES", 1)
    write_shards(str(tmp_path), [60])
    index = build_index(str(tmp_path))

    def kill(_: int) -> None:
        for process in multiprocessing.active_children():
            process.kill()
            process.join()

    with pytest.raises(ChildProcessError, match=r"worker process died .* near 000\.tar, 00"):
        list(find_faults(index, workers=1, advance=kill))


ENDLESS = """
import sys, time
from ul_scale.data.index import open_index
from ul_scale.data.look import verify
def wait(samples):
    print("checked", flush=True)
    time.sleep(100)
if __name__ == "__main__":
    verify._CHUNK_SAMPLES = 1
    list(verify.find_faults(open_index(sys.argv[1]), workers=2, advance=wait))
"""


def test_workers_end_with_their_parent(tmp_path: Path) -> None:
    write_shards(str(tmp_path / "set"), [20])
    build_index(str(tmp_path / "set"))
    (tmp_path / "endless.py").write_text(ENDLESS)
    command = [sys.executable, str(tmp_path / "endless.py"), str(tmp_path / "set")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.kill()
        # The end of the stream: no process is left that could write to it.
        assert process.communicate(timeout=30)[0] == b""


def test_fast_looks_at_the_listing_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = str(tmp_path / "set")
    write_faulty(tmp_path / "set")
    assert verify.verify(url, fast=True) == 0
    out, err = capsys.readouterr()
    assert out == "" and "fits" in err and "40 samples in 2 shards" in err
    shard = tmp_path / "set" / "1.tar"
    shard.write_bytes(shard.read_bytes()[:-1024])
    with pytest.raises(ValueError, match=r"1\.tar"):
        verify.verify(url, fast=True)


def test_workers_are_not_negative(tmp_path: Path) -> None:
    write_shards(str(tmp_path), [1])
    with pytest.raises(ValueError, match="-1 workers; expected 0 or more"):
        list(find_faults(build_index(str(tmp_path)), workers=-1))


@pytest.mark.parametrize("bucket_root", ["gs"], indirect=True)
def test_workers_read_a_bucket(bucket_root: str, tmp_path: Path) -> None:
    url = f"{bucket_root}/train"
    expected = write_faulty(tmp_path / "set")
    fs, root = fsspec.core.url_to_fs(url)
    for tar in (tmp_path / "set").glob("*.tar"):
        fs.pipe_file(f"{root}/{tar.name}", tar.read_bytes())
    faults = find_faults(build_index(url, classes=["x", "y", "z"]), workers=1)
    assert [(fault.shard, fault.key, fault.part) for fault in faults] == expected
