"""Latents read back with tarfile and numpy; the same bytes at any number of ranks and after any kill."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from buckets import bucket_root, gcs_bucket, s3_bucket
from PIL import Image
from templates import AUTOENCODER, write_template

from ul_scale import config as configs
from ul_scale.checkpoint.files import run_path
from ul_scale.data.config import DataConfig
from ul_scale.data.index import open_index
from ul_scale.data.indexing import build_index
from ul_scale.data.plan import lane_slots
from ul_scale.data.stream import LaneStream, make_plan
from ul_scale.evaluate import encode as subject
from ul_scale.evaluate.encode import EncodeConfig, encode
from ul_scale.evaluate.encode_jobs import is_encoded
from ul_scale.evaluate.restore import restore_autoencoder
from ul_scale.train import worker

__all__ = ["bucket_root", "gcs_bucket", "s3_bucket"]

STEP, SAMPLES, BAD = 2, 12, (3, 8)
PIXELS = np.random.default_rng(1).integers(0, 256, (SAMPLES, 16, 16), dtype=np.uint8)
SMALL = EncodeConfig(samples_per_shard=5, batch_size=2)


@pytest.fixture(scope="module")
def trained(shards, tmp_path_factory) -> Path:
    """Return a run whose held-out set has captions, and two images that are cut short."""
    root = tmp_path_factory.mktemp("encode")
    held_out = root / "held-out"
    held_out.mkdir()
    with tarfile.open(held_out / "a.tar", "w") as tar:
        for number, pixels in enumerate(PIXELS):
            stream = io.BytesIO()
            Image.fromarray(pixels).save(stream, "PNG")
            png = stream.getvalue()[: 100 if number in BAD else None]
            for part, content in {"png": png, "cls": b"%d" % (number % 4), "txt": b"No. %d" % number}.items():
                info = tarfile.TarInfo(f"{number:02d}.{part}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    build_index(str(held_out), dataset="held-out")
    urls = {"train": shards["train"], "val": str(held_out)}
    path = write_template(root, urls, AUTOENCODER, "config.yaml", train={"steps": STEP})
    config = configs.load(path)
    assert worker.run(config) == 0
    return worker.prepare(config).run_dir


@pytest.fixture
def run_dir(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "runs" / trained.name))


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder; of the index's note of it, all but when shards were written."""
    found = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    if "_index/meta.json" in found:
        found["_index/meta.json"] = timeless(found["_index/meta.json"])
    return found


def timeless(meta: bytes) -> bytes:
    values = json.loads(meta)
    values["shards"] = [shard | {"mtime": None, "etag": None} for shard in values["shards"]]
    return json.dumps(values).encode()


def members(folder: Path) -> dict[str, bytes]:
    """Return the members of all tars of a folder, in order."""
    found: dict[str, bytes] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            found |= {info.name: tar.extractfile(info).read() for info in tar}
    return found


def latents(folder: Path, part: str = "z_clean.npy") -> dict[int, np.ndarray]:
    return {
        int(name.split("/")[1].split(".")[0]): np.load(io.BytesIO(content))
        for name, content in members(folder).items()
        if name.endswith(f".{part}")
    }


def held_out(run_dir: Path, **options) -> Path:
    [folder] = encode(run_dir, STEP, ["val"], EncodeConfig(**{"max_bad_fraction": 0.2, **options}))
    return folder


@torch.no_grad()
def expected(run_dir: Path, pixels: np.ndarray) -> np.ndarray:
    _, stage = restore_autoencoder(run_dir, STEP)
    return stage.encode(torch.from_numpy(pixels[:, None] / np.float32(127.5) - 1)).numpy()


@pytest.fixture(scope="module")
def ways(trained, tmp_path_factory) -> Path:
    """Encode the training set in every way that must not matter; return the folder of results."""
    root = tmp_path_factory.mktemp("ways")
    run_dir = shutil.copytree(trained, root / "runs" / trained.name)
    tests = Path(__file__).parents[1]
    ended = subprocess.run(
        [sys.executable, str(tests / "evaluate" / "encode_ranks.py"), str(run_dir), str(root)],
        env=os.environ | {"PYTHONPATH": f"{tests}:{tests.parent}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return root


def test_the_bytes_depend_neither_on_processes_nor_on_kills(ways):
    alone = contents(ways / "1 ranks")
    assert sorted(name for name in alone if "/" not in name) == [f"latents-00000{n}.tar" for n in range(7)]
    assert len(members(ways / "1 ranks")) == 2 * 48 and "_index/meta.json" in alone
    others = [path for path in ways.iterdir() if path.name.startswith(("2", "3", "killed"))]
    assert len(others) == 5
    assert [path.name for path in others if contents(path) != alone] == []


def test_what_a_kill_leaves_is_not_taken_for_whole(ways):
    half, whole = ways / "half", ways / "whole but for the index"
    assert 0 < len(list(half.glob("*.tar"))) < 7 == len(list(whole.glob("*.tar")))
    for folder in (half, whole):
        with pytest.raises(ValueError, match="have no index"):
            open_index(str(folder))


def test_latents_captions_and_classes_are_those_of_the_samples(run_dir):
    folder = held_out(run_dir, samples_per_shard=5, batch_size=2)
    kept = [number for number in range(SAMPLES) if number not in BAD]
    z = latents(folder)
    assert list(z) == kept
    np.testing.assert_allclose(
        np.stack(list(z.values())), expected(run_dir, PIXELS[kept]), rtol=1e-4, atol=1e-5
    )
    found = members(folder)
    assert [found[f"a/{n:02d}.txt"] for n in kept] == [b"No. %d" % n for n in kept]
    assert [found[f"a/{n:02d}.cls"] for n in kept] == [b"%d" % (n % 4) for n in kept]
    index = open_index(str(folder))
    assert [shard.samples for shard in index.shards] == [4, 4, 2]
    assert index.names(3, 5) == ["held-out/latents-000000/a/04", "held-out/latents-000001/a/05"]
    exact = np.stack(list(z.values())).astype(np.float64)
    assert index.extra["mean"] == pytest.approx(exact.mean(), rel=1e-9)
    assert index.extra["std"] == pytest.approx(exact.std(), rel=1e-9)
    assert index.extra["num_classes"] == 4 and index.extra["left_out"] == 2


def test_captions_can_be_left_out(run_dir):
    folder = held_out(run_dir, captions=False)
    found = members(folder)
    assert len(found) == 20 and not any(name.endswith(".txt") for name in found)
    assert open_index(str(folder)).extra["stored"]["captions"] is False


def test_bad_samples_are_named_and_limited(run_dir, caplog):
    with pytest.raises(ValueError, match=r"held-out: [12] of 12 samples cannot be used and at most 0 may"):
        encode(run_dir, STEP, ["val"])
    assert not is_encoded(run_dir, STEP, "val")
    caplog.clear()
    folder = held_out(run_dir, samples_per_shard=1000)
    assert "left out: held-out/a/03.png: not a readable image" in caplog.text
    record = json.loads((folder / "_encoding" / "latents-000000.json").read_text())
    assert list(record["left_out"]) == ["held-out/a/03", "held-out/a/08"]


def test_a_shard_all_of_whose_samples_are_bad_is_empty(run_dir):
    folder = held_out(run_dir, samples_per_shard=1)
    assert [shard.samples for shard in open_index(str(folder)).shards] == [
        0 if number in BAD else 1 for number in range(SAMPLES)
    ]
    assert list(latents(folder)) == [number for number in range(SAMPLES) if number not in BAD]


def test_the_flipped_view_is_the_latent_of_the_mirror_image(run_dir):
    folder = held_out(run_dir, flipped=True)
    plain, mirrored = latents(folder), latents(folder, "z_clean_flipped.npy")
    assert list(plain) == list(mirrored) and len(plain) == 10
    kept = list(plain)
    for z, pixels in ((plain, PIXELS), (mirrored, PIXELS[:, :, ::-1])):
        np.testing.assert_allclose(
            np.stack(list(z.values())), expected(run_dir, pixels[kept]), rtol=1e-4, atol=1e-5
        )
    assert not any(np.allclose(plain[n], mirrored[n]) for n in kept)
    exact = np.stack(list(plain.values())).astype(np.float64)
    assert open_index(str(folder)).extra["std"] == pytest.approx(exact.std(), rel=1e-9)


def test_fp16_halves_the_latents_and_states_their_own_std(run_dir, trained, tmp_path):
    other = Path(shutil.copytree(trained, tmp_path / "other" / trained.name))
    full, half = held_out(run_dir), held_out(other, dtype="fp16")
    z, rounded = latents(full), latents(half)
    assert {a.dtype for a in rounded.values()} == {np.dtype(np.float16)}
    assert all(np.array_equal(rounded[n], z[n].astype(np.float16)) for n in z)
    exact = np.stack(list(rounded.values())).astype(np.float64)
    assert open_index(str(half)).extra["std"] == pytest.approx(exact.std(), rel=1e-12)


def test_the_stream_of_stage_2_reads_them(run_dir):
    index = open_index(str(held_out(run_dir, samples_per_shard=5)))
    config = DataConfig(workers=0, captions=True)
    plan = make_plan(index, config, seed=0, batch_size=5)
    batches = LaneStream(index, plan, config, lane_slots(plan.lanes, 0, 1)).batches(0)
    z, seen = latents(Path(index.url)), []
    for batch in (next(batches), next(batches)):
        for key, array, label, text in zip(
            batch["keys"], batch["z_clean"], batch["label"].tolist(), batch["text"]
        ):
            number = int(key[-2:])
            assert np.array_equal(array, z[number])
            assert label == number % 4 and text == f"No. {number}"
            seen.append(number)
    assert sorted(seen) == list(z)


def test_the_stream_of_stage_2_draws_between_both_views(run_dir):
    folder = held_out(run_dir, flipped=True)
    index, config = open_index(str(folder)), DataConfig(workers=0, horizontal_flip=True)
    plan = make_plan(index, config, seed=0, batch_size=5)
    batches = LaneStream(index, plan, config, lane_slots(plan.lanes, 0, 1)).batches(0)
    views, seen = (latents(folder), latents(folder, "z_clean_flipped.npy")), []
    for batch in (next(batches) for _ in range(4)):
        for key, array in zip(batch["keys"], batch["z_clean"]):
            seen += [view for view in (0, 1) if np.array_equal(array, views[view][int(key[-2:])])]
    assert len(seen) == 20 and set(seen) == {0, 1}


def test_a_run_in_a_bucket_has_the_same_latents_as_on_disk(run_dir, bucket_root):
    fs, root = fsspec.core.url_to_fs(bucket_root)
    fs.put(f"{run_dir}/", f"{root}/{run_dir.name}/", recursive=True)
    held_out(run_path(f"{bucket_root}/{run_dir.name}"), samples_per_shard=5)
    folder = held_out(run_dir, samples_per_shard=5)
    there = f"{root}/{folder.relative_to(run_dir.parent)}"
    found = {path.removeprefix(f"{there}/"): fs.cat_file(path) for path in fs.find(there)}
    found["_index/meta.json"] = timeless(found["_index/meta.json"])
    assert found == {name: data for name, data in contents(folder).items() if name != "_encoding/lock"}


def test_what_is_complete_is_left_alone_even_without_the_checkpoint(run_dir):
    folder = held_out(run_dir)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    shutil.rmtree(run_dir / "checkpoints")
    assert held_out(run_dir) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_shard_that_is_cut_short_or_gone_is_made_again(run_dir):
    folder = held_out(run_dir, samples_per_shard=5)
    before = contents(folder)
    with (folder / "latents-000001.tar").open("r+b") as file:
        file.truncate(700)
    (folder / "latents-000002.tar").unlink()
    held_out(run_dir, samples_per_shard=5)
    assert contents(folder) == before


def test_half_written_files_are_cleared_away(run_dir):
    folder = held_out(run_dir, samples_per_shard=5)
    before = contents(folder)
    (folder / "latents-000000.tar").unlink()
    (folder / ".latents-000000.tar.0123.tmp").write_bytes(b"half")
    (folder / "_index" / "size.npy.0123.partial").write_bytes(b"half")
    held_out(run_dir, samples_per_shard=5)
    assert contents(folder) == before


def test_other_settings_or_other_shards_are_not_mixed_in(run_dir):
    folder = held_out(run_dir)
    before = contents(folder)
    with pytest.raises(ValueError, match="holds latents with dtype fp32, and fp16 is asked for; delete"):
        held_out(run_dir, dtype="fp16")
    assert contents(folder) == before
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "mine.tar").write_bytes(b"")
    with pytest.raises(ValueError, match="holds shards that are not from encoding"):
        held_out(run_dir)
    assert contents(folder) == {"mine.tar": b""}


def test_a_collapsed_autoencoder_is_refused(run_dir, monkeypatch):
    config, stage = restore_autoencoder(run_dir, STEP)
    stage.encode = lambda x: torch.full((len(x), 2, 4, 4), 0.3)
    monkeypatch.setattr(subject, "restore_autoencoder", lambda *_: (config, stage))
    with pytest.raises(ValueError, match="every latent is the same: the autoencoder has collapsed"):
        held_out(run_dir, samples_per_shard=5)
    assert not is_encoded(run_dir, STEP, "val")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bf16"}, r"dtype is bf16; expected one of fp32, fp16 \(.npy files hold no bf16\)"),
        ({"batch_size": 0}, "batch_size is 0; expected 1 or more"),
        ({"max_tokens": 50}, "max_tokens is 50 and text_encoder is not set; expected both"),
        ({"text_precision": "bf16"}, "text_precision is bf16 and text_encoder is not set; expected both"),
        ({"max_bad_fraction": 2.0}, "max_bad_fraction is 2.0; expected 0 to 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        EncodeConfig(**options)


def test_bad_requests(run_dir):
    with pytest.raises(ValueError, match="split is test; expected one of train, val"):
        encode(run_dir, STEP, ["test"])
    with pytest.raises(ValueError, match="no complete checkpoint at step 7; complete: \\[2\\]"):
        encode(run_dir, 7, ["train"])
    with pytest.raises(ValueError, match="not a run directory"):
        encode(run_dir.parent, 2)
