"""Samples that cannot be used, seen from a run: counted in its metrics, and too many of them end it."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from templates import AUTOENCODER
from train.test_worker import cli, run_dir_of

from ul_scale.checkpoint import store
from ul_scale.data.indexing import build_index
from ul_scale.train.health import SampleHealth, TooManyBadSamples
from ul_scale.train.metrics import read_metrics


@pytest.fixture
def damaged(shards: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """Return the test's sets with one image of 48 spoiled."""
    folder = tmp_path / "damaged"
    shutil.copytree(shards["train"], folder)
    shard = folder / "shard-000001.tar"
    content = bytearray(shard.read_bytes())
    at = content.index(b"\x89PNG")
    content[at : at + 8] = b"spoiled!"
    shard.write_bytes(content)
    build_index(str(folder))
    return shards | {"train": str(folder)}


def test_one_is_replaced_counted_and_named_once(write_config, damaged) -> None:
    path = write_config(AUTOENCODER, data={**damaged, "max_bad_fraction": 0.05})
    result = cli("train", path, "data.workers=1")
    assert result.returncode == 0, result.stderr
    named = re.findall(r"bad sample train/shard-000001/\S+: not a readable image.*", result.stderr)
    assert len(named) == 1
    # 12 steps of 8 draws: each of 48 samples twice.
    counts = [row["replaced_samples"] for row in read_metrics(run_dir_of(path))]
    assert counts == sorted(counts) and counts[-1] == 2
    assert read_metrics(run_dir_of(path))[-1]["loader_memory_bytes"] > 10**7


def test_too_many_end_the_run_and_name_the_remedy(write_config, damaged) -> None:
    path = write_config(AUTOENCODER, data={**damaged, "max_bad_fraction": 0.0}, checkpoint={"every_steps": 1})
    result = cli("train", path)
    assert result.returncode == 1
    assert re.search(
        r"error: 1 of \d+ samples could not be used .* data\.max_bad_fraction 0 allows", result.stderr
    )
    assert "ul-scale data verify lists all of them; newest complete checkpoint: step" in result.stderr
    steps = store.complete_steps(run_dir_of(path))
    assert steps and steps[-1] < 12


def test_a_share_is_judged_over_many_draws_or_the_whole_set() -> None:
    def batch(replaced: list[float], weight: list[float]) -> dict:
        return {"replaced": torch.tensor(replaced), "weight": torch.tensor(weight)}

    health = SampleHealth(0.001, num_samples=10**6)
    health.watch(batch([1, 0, 1], [1, 1, 0]))  # type: ignore[arg-type]  # a surplus slot does not count
    health.watch(batch([1, 1, 0], [1, 1, 1]))  # type: ignore[arg-type]
    assert float(health.counted(torch.device("cpu"))) == 3
    health.judge(22, drawn=64)  # of 10,000 that are judged at least: 10, and four standard deviations
    with pytest.raises(TooManyBadSamples, match=r"23 of 64 samples .* 0\.001 allows \(22\)"):
        health.judge(23, drawn=64)
    health.judge(1100, drawn=10**6)
    with pytest.raises(TooManyBadSamples):
        health.judge(1200, drawn=10**6)
    with pytest.raises(TooManyBadSamples):
        SampleHealth(0.0, num_samples=999).judge(1, drawn=8)
