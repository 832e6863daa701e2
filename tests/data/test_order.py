"""What `data order` prints against the batches that a stream delivers."""

import json
import os
import subprocess
import sys
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from templates import AUTOENCODER, BASE

from ul_scale import config as configs
from ul_scale.data import plan as plan_module
from ul_scale.data.config import DataConfig
from ul_scale.data.index import Index
from ul_scale.data.indexing import build_index
from ul_scale.data.order import OrderLine, order_lines
from ul_scale.data.plan import LanePlan, lane_slots
from ul_scale.data.stream import LaneStream, make_plan
from ul_scale.keyed import permutation
from ul_scale.train.order import print_order
from ul_scale.train.prepare import latents_dir, prepare

from .conftest import write_latents, write_shards

CONFIG = DataConfig(image_size=8, channels=1, lanes=5, chunk_bytes=6000, window_chunks=2, workers=0)
BATCH_SIZE = 15


@pytest.fixture
def index(memory_url: str) -> Index:
    write_shards(memory_url, [13, 0, 1, 30, 20])
    return build_index(memory_url, dataset="set")


def plan_of(index: Index, batch_size: int = BATCH_SIZE) -> LanePlan:
    return make_plan(index, CONFIG, seed=3, batch_size=batch_size)


def delivered(
    index: Index, plan: LanePlan, config: DataConfig, step: int, steps: int, world_size: int
) -> dict:
    """Return the keys of each step and rank's batch that have weight."""
    keys = {}
    for rank in range(world_size):
        stream = LaneStream(index, plan, config, lane_slots(plan.lanes, rank, world_size))
        with closing(stream.batches(step)) as batches:
            for number, batch in enumerate(islice(batches, steps), step):
                weighted = zip(batch["keys"], batch["weight"].tolist())
                keys[number, rank] = [key for key, weight in weighted if weight]
    return keys


def printed(lines: list[OrderLine]) -> dict:
    keys: dict = {}
    for line in lines:
        assert list(line) == ["step", "rank", "lane", "epoch", "keys"]
        keys.setdefault((line["step"], line["rank"]), []).extend(line["keys"])
    return keys


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("step", [0, 1_000_000])
def test_keys_are_those_of_the_batches(index: Index, step: int, world_size: int) -> None:
    lines = list(order_lines(index, plan_of(index), step, 6, world_size))  # an epoch is 4.3 steps
    assert printed(lines) == delivered(index, plan_of(index), CONFIG, step, 6, world_size)


@pytest.mark.parametrize("batch_size", [15, 200])  # 200: a lane batch is three lane epochs and more
def test_a_lane_batch_over_epochs_has_a_line_for_each(index: Index, batch_size: int) -> None:
    b, lanes = batch_size // 5, 5
    lines = list(order_lines(index, plan_of(index, batch_size), 0, 6, 2))
    places = [(line["step"], line["rank"], line["lane"], line["epoch"]) for line in lines]
    assert places == sorted(places) and len(set(places)) == len(places)
    for lane in range(lanes):
        own = [line for line in lines if line["lane"] == lane]
        assert {line["rank"] for line in own} == {int(lane >= 2)}
        shown = [(line["step"], line["epoch"]) for line in own for _ in line["keys"]]
        length = (lane + 1) * 64 // lanes - lane * 64 // lanes
        assert shown == [(i // b, i // length) for i in range(6 * b)]
    assert max(epoch for *_, epoch in places) >= 1
    first = [key for line in lines if line["epoch"] == 0 for key in line["keys"]]
    assert len(set(first)) == len(first) == 64


def test_a_far_step_is_found_as_fast_as_a_near_one(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    monkeypatch.setattr(plan_module, "permutation", lambda *args: drawn.append(args[0]) or permutation(*args))
    costs = []
    for step in (3, 10**6 + 3, 10**15 + 3):
        drawn.clear()
        list(order_lines(index, plan_of(index), step, 1, 1))
        costs.append(len(drawn))
    assert 0 < max(costs) <= 2 + 3 * 5  # the chunks of two epochs, and for each lane the windows it touches


@pytest.mark.parametrize(
    ("step", "steps", "world_size", "message"),
    [
        (-1, 1, 1, "step is -1; expected 0 or more"),
        (0, 0, 1, "steps is 0; expected 1 or more"),
        (0, 1, 0, "world size is 0; expected 1 or more"),
        (0, 1, 6, "6 data-parallel ranks for 5 lanes: use at most 5 ranks"),
    ],
)
def test_numbers_out_of_range(index: Index, step: int, steps: int, world_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        next(order_lines(index, plan_of(index), step, steps, world_size))


def run_order(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ul_scale.cli", "data", "order", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)


def test_the_command_prints_json_lines_of_a_run_that_never_ran(write_config, tmp_path: Path) -> None:
    path = write_config(AUTOENCODER, data={"workers": 0})
    options = ("--step", 1_000_000, "--steps", 8, "--world-size", 3)
    result = run_order(path, *options, "seed=5", "train.batch_size=12")
    assert (result.returncode, result.stderr) == (0, "")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    ready = prepare(configs.load(path, ["seed=5", "train.batch_size=12"]))
    expected = delivered(ready.index, ready.plan, ready.config.data, 1_000_000, 8, 3)
    assert printed(lines) == expected
    assert not (tmp_path / "runs").exists()


def test_the_command_ends_with_one_line_for_more_ranks_than_lanes(write_config) -> None:
    result = run_order(write_config(AUTOENCODER), "--step", 0, "--world-size", 5)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: 5 data-parallel ranks for 4 lanes")
    assert result.stderr.count("\n") == 1


def test_a_run_directorys_config_gives_the_same(write_config, tmp_path: Path, capsys) -> None:
    path = write_config(AUTOENCODER)
    print_order(str(path), ["seed=7"], step=2, steps=3)
    copy = tmp_path / "resolved.yaml"
    copy.write_text(configs.to_yaml(configs.load(path, ["seed=7"])))
    first = capsys.readouterr()
    print_order(str(copy), step=2, steps=3)
    assert first.out and capsys.readouterr() == first


def test_a_base_models_order_is_its_latents(write_config, tmp_path: Path, capsys) -> None:
    parent = {"run": "tiny-0123456789", "step": 12}
    path = write_config(BASE | {"autoencoder": parent})
    with pytest.raises(ValueError, match="tiny-0123456789: not a run directory"):
        print_order(str(path), step=0)
    folder = latents_dir(tmp_path / "runs", "tiny-0123456789", 12)
    write_latents(str(folder), np.zeros((30, 2, 4, 4), np.float32), 9)
    print_order(str(path), step=5, steps=4)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    ready = prepare(configs.load(path))
    expected = delivered(ready.index, ready.plan, ready.config.data, 5, 4, 1)
    assert printed(lines) == expected
    assert all(key.startswith("latents/latents-00000") for key in lines[0]["keys"])


def test_a_base_model_on_the_fly_reads_images(write_config, shards, capsys) -> None:
    parent = {"run": "tiny-0123456789", "step": 12, "on_the_fly": True}
    path = write_config(BASE | {"autoencoder": parent}, data={"train": shards["train"], "image_size": 16})
    print_order(str(path), step=0)
    base = capsys.readouterr().out
    print_order(str(write_config(AUTOENCODER, "images.yaml")), step=0)
    assert base and capsys.readouterr().out == base
    path = write_config(BASE | {"autoencoder": parent}, "no_data.yaml")
    with pytest.raises(ValueError, match=r"data\.train and data\.image_size are not both set"):
        print_order(str(path), step=0)
