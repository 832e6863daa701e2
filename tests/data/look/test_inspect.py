"""Reports and contact sheets of sets whose content is known, against numpy and Pillow."""

import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from ul_scale.data import fetch, storage
from ul_scale.data.index import Index
from ul_scale.data.indexing import build_index
from ul_scale.data.look.contact_sheet import SAMPLES, contact_sheet
from ul_scale.data.look.inspect import histogram, inspect_set, read_samples, spread
from ul_scale.data.look.inspect_text import print_report, show

from ..conftest import image_bytes, images, tar_bytes, write_shards

COLORS = {"red": (250, 10, 20), "green": (15, 240, 25), "blue": (5, 30, 245)}


def npy_bytes(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def plain(color: str, width: int, height: int) -> np.ndarray:
    return np.full((height, width, 3), COLORS[color], np.uint8)


def write_set(root: Path, *shards: dict[str, bytes], **options) -> Index:
    root.mkdir(exist_ok=True)
    for number, members in enumerate(shards):
        (root / f"{number:03d}.tar").write_bytes(tar_bytes(members))
    return build_index(str(root), **options)


def mixed_set(root: Path) -> Index:
    """Six samples, two of them with a fault, one without caption."""
    exif = Image.Exif()
    exif[0x0112] = 6
    first = {
        "a/0.jpg": image_bytes(plain("red", 300, 200), "JPEG"),
        "a/0.cls": b"0",
        "a/0.txt": b"a red thing",
        "a/1.jpg": image_bytes(plain("green", 300, 200), "JPEG", exif=exif),
        "a/1.cls": b"0",
        "a/1.txt": b"stock photo\n",
        "a/2.png": image_bytes(plain("blue", 64, 64)),
        "a/2.cls": b"2",
        "a/2.txt": b"stock photo",
    }
    second = {
        "b/3.png": image_bytes(np.arange(40 * 30, dtype=np.uint16).reshape(40, 30) * 50),
        "b/3.cls": b"dog",
        "b/3.txt": b"  ",
        "b/4.jpg": b"<html>",
        "b/4.cls": b"5",
        "b/4.json": '{"caption": "雪山 [bold]x"}'.encode(),
        "b/5.webp": image_bytes(images(1, 50)[0], "WEBP"),
        "b/5.cls": b"0",
    }
    return write_set(root, first, second, classes=["cat [ok]", "dog", "tree"])


def test_report_of_a_mixed_set(tmp_path: Path) -> None:
    index = mixed_set(tmp_path / "mixed")
    report = json.loads(json.dumps(inspect_set(index), allow_nan=False))
    assert report["samples"] == 6 and report["examined"] == {"samples": 6, "exact": True}
    assert report["shards"]["count"] == 2
    tars = (tmp_path / "mixed").glob("*.tar")
    assert report["shards"]["bytes"]["total"] == sum(tar.stat().st_size for tar in tars)
    assert report["bytes_per_sample"]["median"] == np.median(index.size)
    samples = {part: row["samples"] for part, row in report["parts"].items()}
    assert samples == {"cls": 6, "jpg": 3, "json": 1, "png": 2, "txt": 4, "webp": 1}
    assert report["parts"]["cls"]["bytes"] == 8

    classes = report["classes"]
    assert classes["samples_by_class"] == {"0": 3, "2": 1, "5": 1}
    assert (classes["labelled"], classes["distinct"], classes["out_of_range"]) == (5, 3, 1)
    assert classes["named"] == 3
    assert classes["largest"][0] == {"class": 0, "name": "cat [ok]", "samples": 3}
    assert [row["class"] for row in classes["smallest"]] == [5, 2, 0]

    captions = report["captions"]
    assert (captions["present"], captions["empty"], captions["missing"], captions["distinct"]) == (4, 1, 1, 3)
    assert captions["repeated"] == [{"text": "stock photo", "samples": 2}]
    assert captions["words"]["max"] == 3 and captions["words"]["total"] == 3 + 2 + 2 + 2
    assert captions["characters"]["min"] == 10 and captions["characters"]["total"] == 11 + 11 + 11 + 10
    assert sorted(captions["examples"]) == ["a red thing", "stock photo", "雪山 [bold]x"]

    shown = report["images"]
    assert shown["samples"] == 5 and shown["rotated_by_exif"] == 1
    assert shown["formats"] == {"JPEG": 2, "PNG": 2, "WEBP": 1}
    assert shown["modes"] == {"RGB": 4, "I;16": 1}
    # Sizes are of the upright image: 300×200, 200×300, 64×64, 30×40, 50×50.
    assert sorted(shown["width"][name] for name in ("min", "median", "max")) == [30, 64, 300]
    assert shown["width"]["mean"] == pytest.approx((300 + 200 + 64 + 30 + 50) / 5)
    assert shown["height"]["max"] == 300
    bins = {(row["from"], row["to"]): row["samples"] for row in shown["aspect"] if row["samples"]}
    assert bins == {(0.5, 0.67): 1, (0.67, 0.8): 1, (0.95, 1.05): 2, (1.5, 2.0): 1}
    assert report["videos"] is None and report["latents"] is None

    assert report["unreadable"]["samples"] == 2
    reasons = {(row["sample"], row["part"]): row["reason"] for row in report["unreadable"]["first"]}
    assert reasons == {
        ("mixed/001/b/3", "cls"): "b'dog' is not a class id",
        ("mixed/001/b/4", "jpg"): "not a readable image (UnidentifiedImageError: no known format)",
    }


def printed(report: dict, width: int = 100) -> str:
    console = Console(width=width, file=io.StringIO(), highlight=False)
    print_report(report, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_text_fits_100_columns_and_says_what_is_an_estimate(tmp_path: Path) -> None:
    index = mixed_set(tmp_path / "mixed")
    text = printed(inspect_set(index))
    assert max(map(len, text.splitlines())) <= 100
    assert "classes (all samples)" in text and "estimated" not in text
    assert "0 cat [ok]" in text and "“雪山 [bold]x”" in text and "2 ×  stock photo" in text
    assert "I;16 (grey, 16 bits): 1 (20 %)" in text
    assert "2 of 6 samples" in text and "b'dog' is not a class id" in text
    part = printed(inspect_set(index, samples=4))
    assert "images (estimated from 4 samples)" in part and "all samples" not in part
    # What the index knows stays exact.
    assert text.split("classes (")[0] == part.split("classes (")[0]


def test_bars_are_as_long_as_their_counts(tmp_path: Path) -> None:
    write_shards(str(tmp_path), [95])  # labels 0 to 9 in turn
    text = printed(inspect_set(build_index(str(tmp_path))))
    lines = text.split("classes (")[1].split("images (")[0].splitlines()
    bars = {line.split()[0]: (line.count("█"), int(line.split()[-1])) for line in lines if "█" in line}
    assert bars == {str(label): (16, 10) if label < 5 else (14, 9) for label in range(10)}


@pytest.mark.parametrize(("total", "count"), [(10, 10), (10, 3), (10, 25), (1, 1), (10**8, 1000), (997, 96)])
def test_spread_takes_one_of_each_equal_stretch(total: int, count: int) -> None:
    numbers = spread(total, count)
    count = min(count, total)
    ends = np.arange(count + 1) * total // count
    assert ((ends[:-1] <= numbers) & (numbers < ends[1:])).all() and len(numbers) == count
    assert np.array_equal(numbers, spread(total, count))


def test_spread_is_not_blind_to_classes_that_take_turns() -> None:
    counts = Counter((spread(100_000, 1000) % 10).tolist())
    assert len(counts) == 10 and min(counts.values()) > 60


def test_spread_of_none_is_refused() -> None:
    with pytest.raises(ValueError, match="0 samples; expected at least 1"):
        spread(10, 0)


def test_selected_samples_take_few_requests(memory_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(memory_url, [40, 0, 60], size=16)
    index = build_index(memory_url)
    read, requests = storage.read_range, []

    def counted(fs, path, start, end, *rest):
        requests.append(end - start)
        return read(fs, path, start, end, *rest)

    monkeypatch.setattr(storage, "read_range", counted)
    numbers = spread(100, 30)
    names = [sample.name for sample in read_samples(index, numbers, storage.ReadPolicy())]
    assert names == [index.names(0, 100)[number] for number in numbers]
    assert len(requests) == 2  # all lie close together, in two shards that hold any

    requests.clear()
    monkeypatch.setattr("ul_scale.data.look.inspect._REQUEST_BYTES", 1)
    names = [sample.name for sample in read_samples(index, numbers, storage.ReadPolicy())]
    assert names == [index.names(0, 100)[number] for number in numbers]
    assert requests == index.size[numbers].tolist()  # far apart, one each, without what is between


def test_a_failed_read_is_an_error(memory_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(memory_url, [5])
    index = build_index(memory_url)

    def fail(*args):
        raise OSError("memory://…/000.tar: no answer")

    monkeypatch.setattr(fetch.storage, "read_range", fail)
    with pytest.raises(OSError, match="no answer"):
        inspect_set(index)


def test_latents(tmp_path: Path) -> None:
    scale = np.array([0.5, 1, 2, 4]).reshape(4, 1, 1)
    latents = (np.random.default_rng(0).normal(size=(20, 4, 3, 5)) * scale + 3).astype(np.float16)
    members = {f"{n:02d}.z_clean.npy": npy_bytes(latent) for n, latent in enumerate(latents)}
    broken = latents[0].copy()
    broken[2, 0, 0] = np.inf
    members["99.z_clean.npy"] = npy_bytes(broken)
    report = inspect_set(write_set(tmp_path, members))["latents"]["z_clean.npy"]
    truth = latents.astype(np.float64)
    assert report["samples"] == 21 and report["shapes"] == {"float16 4×3×5": 21} and report["not_finite"] == 1
    assert report["mean"] == pytest.approx(truth.mean()) and report["std"] == pytest.approx(truth.std())
    assert report["channel_mean"] == pytest.approx(truth.mean(axis=(0, 2, 3)))
    assert report["channel_std"] == pytest.approx(truth.std(axis=(0, 2, 3)))
    assert "not finite in 1 samples" in printed(inspect_set(build_index(str(tmp_path))))


def test_histogram_against_numpy() -> None:
    values, edges = np.random.default_rng(0).integers(2, 900, 500), (0, 2, 8, 64, 512, 600, 1000, 2000)
    rows = histogram(values, edges)
    counts, _ = np.histogram(values, edges[1:7])
    assert [row["samples"] for row in rows] == counts.tolist()
    assert (rows[0]["from"], rows[-1]["to"]) == (2, 1000)
    assert histogram([5000, 0], (0, 10, 20))[-1] == {"from": 20, "to": None, "samples": 1}
    assert histogram([], (0, 1)) == []


def write_video(path: Path, frames: int, rate: int) -> bytes:
    """Write a video that turns from red to green to blue."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w", format="mp4") as container:
        video = container.add_stream("mpeg4", rate=rate)
        video.width, video.height, video.pix_fmt = 96, 64, "yuv420p"
        for number in range(frames):
            color = list(COLORS)[3 * number // frames]
            container.mux(video.encode(av.VideoFrame.from_ndarray(plain(color, 96, 64))))
        container.mux(video.encode())
    return path.read_bytes()


def animation(frames: int) -> bytes:
    stills = [Image.fromarray(pixels) for pixels in images(frames, 40, 3)]
    stream = io.BytesIO()
    stills[0].save(stream, "WEBP", save_all=True, append_images=stills[1:], duration=50)
    return stream.getvalue()


def test_videos(tmp_path: Path) -> None:
    members = {
        "0.mp4": write_video(tmp_path / "a.mp4", 30, 10),
        "1.mp4": write_video(tmp_path / "b.mp4", 50, 25),
        "2.webp": animation(6),
        "3.mp4": b"no video",
    }
    report = inspect_set(write_set(tmp_path / "set", members))
    videos = report["videos"]
    assert videos["samples"] == 3 and report["images"] is None
    assert videos["frame_rates"] == {"10": 1, "25": 1, "20": 1}
    assert videos["codecs"] == {"mpeg4": 2, "animated WEBP": 1}
    assert videos["frames"]["total"] == 30 + 50 + 6
    assert videos["duration_s"]["total"] == pytest.approx(3 + 2 + 0.3)
    assert [row["sample"] for row in report["unreadable"]["first"]] == ["set/000/3"]
    assert "mpeg4: 2 (66.7 %)" in printed(report)


def near(pixels: np.ndarray, color: str) -> np.ndarray:
    """Say of each pixel whether it has a color, as far as compression keeps it."""
    return np.abs(pixels.astype(int) - COLORS[color]).max(axis=-1) < 40


def test_contact_sheet_of_images(tmp_path: Path) -> None:
    sheet = contact_sheet(mixed_set(tmp_path))
    pixels = np.asarray(sheet)
    assert sheet.mode == "RGB" and pixels.shape[1] > 900
    # Samples in index order: red, green, blue, then a grey ramp, then a fault.
    columns = np.array_split(pixels, 6, axis=1)
    for color, column in zip(COLORS, columns):
        assert [near(column, other).mean() > 0.05 for other in COLORS] == [other == color for other in COLORS]
    fault = np.all(pixels == (0xFB, 0xEC, 0xEB), axis=-1)
    assert fault.any() and fault[:, : pixels.shape[1] // 2].sum() == 0
    # The first is 3:2 and the second is upright, 2:3; neither is cropped.
    red, green = near(pixels, "red"), near(pixels, "green")
    assert red.any(axis=0).sum() / red.any(axis=1).sum() == pytest.approx(1.5, rel=0.02)
    assert green.any(axis=1).sum() / green.any(axis=0).sum() == pytest.approx(1.5, rel=0.02)


def test_contact_sheet_of_clips_shows_their_course(tmp_path: Path) -> None:
    video = write_video(tmp_path / "a.mp4", 30, 10)
    members = {"0.mp4": video, "0.cls": b"1", "1.webp": animation(7), "2.gif": b"?"}
    sheet = np.asarray(contact_sheet(write_set(tmp_path / "set", members)))
    strip = sheet[:, : sheet.shape[1] // 3]
    red, green, blue = (np.flatnonzero(near(strip, color).any(axis=0)) for color in COLORS)
    assert red.max() < green.min() and green.max() < blue.min()
    assert np.all(sheet == (0xFB, 0xEC, 0xEB), axis=-1).any()


@pytest.mark.parametrize("shape", [(4, 6, 6), (1, 6, 6), (2, 6, 6), (4, 3, 6, 6)])
def test_contact_sheet_of_latents(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """The channel that varies most decides: here whether a latent's left half is bright."""
    rng = np.random.default_rng(0)
    members = {}
    for number in range(8):
        latent = 0.01 * rng.normal(size=shape)
        latent[0, ..., :3] += 5 if number % 2 else -5
        members[f"{number}.z_clean.npy"] = npy_bytes(latent.astype(np.float32))
    index = write_set(tmp_path, members)
    sheet = np.asarray(contact_sheet(index)).astype(int)
    assert np.array_equal(sheet, np.asarray(contact_sheet(index)))
    columns = np.array_split(sheet[70:], 3 if len(shape) == 4 else 8, axis=1)
    reds = [column[10:80, 14:40, 0].mean() for column in columns]
    assert min(abs(a - b) for a, b in zip(reds, reds[1:])) > 100


def test_contact_sheet_of_what_cannot_be_shown(tmp_path: Path) -> None:
    index = write_set(tmp_path, {"0.txt": b"\xff", "1.npy": npy_bytes(np.arange(3)), "2.cls": b"x"})
    assert np.all(np.asarray(contact_sheet(index)) == (0xFB, 0xEC, 0xEB), axis=-1).sum() > 3000


def test_contact_sheet_shows_48_of_many(tmp_path: Path) -> None:
    write_shards(str(tmp_path), [100])
    sheet = contact_sheet(build_index(str(tmp_path)))
    few = contact_sheet(build_index(str(tmp_path)), samples=8)
    assert SAMPLES == 48 and sheet.width == few.width and sheet.height > 4 * few.height


def test_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixed_set(tmp_path / "set")
    url, out = str(tmp_path / "set"), tmp_path / "sheet.png"
    show(url, samples=3, out=out, as_json=True)
    printed = capsys.readouterr()
    assert json.loads(printed.out)["examined"] == {"samples": 3, "exact": False}
    assert "sheet.png" in printed.err
    with Image.open(out) as sheet:
        assert sheet.format == "PNG"
    show(url)
    assert "images (all samples)" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"sheet\.jpg: .* expected a name that ends in \.png"):
        show(url, out=tmp_path / "sheet.jpg")
    with pytest.raises(ValueError, match="0 samples"):
        show(url, samples=0)
