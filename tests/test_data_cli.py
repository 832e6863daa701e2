"""``ul-scale data`` as a user meets it: from a folder of images to what is in it and what is bad."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from ul_scale.data_cli import data_app


def run(*arguments: object):
    return CliRunner().invoke(data_app, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (tmp_path / "source" / label).mkdir(parents=True)
        for number in range(6):
            pixels = rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "source" / label / f"{number}.png")
    return tmp_path / "source"


def test_from_a_folder_to_what_is_bad(source: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    planned = run("build", source, shards, "--samples-per-shard", 5, "--dry-run")
    assert "12 images; 2 classes" in planned.output and not shards.exists()
    built = run("build", source, shards, "--samples-per-shard", 5, "--shortest-side", 16)
    assert built.exit_code == 0 and "12 samples, fingerprint" in built.output
    assert "12 samples in 3 shards" in run("index", shards).output

    sheet = tmp_path / "sheet.png"
    inspected = run("inspect", shards, "--all", "--json", "--out", sheet)
    report = json.loads(inspected.stdout)
    assert report["examined"] == {"samples": 12, "exact": True} and Image.open(sheet).width > 500

    assert run("verify", shards, "--workers", 0).exit_code == 0
    shard = shards / "shard-000001.tar"
    content = bytearray(shard.read_bytes())
    at = content.index(b"\x89PNG")
    content[at : at + 8] = b"spoiled!"
    shard.write_bytes(content)
    checked = run("verify", shards, "--workers", 0)
    [fault] = map(json.loads, checked.stdout.splitlines())
    assert checked.exit_code == 1 and fault["shard"] == "shard-000001.tar" and fault["part"] == "png"
    shard.unlink()
    with pytest.raises(ValueError, match=r"shard-000001\.tar is in the index but not in the folder"):
        run("verify", shards, "--fast")
