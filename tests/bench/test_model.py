import json

import pytest
import torch
from typer.testing import CliRunner

from ul_scale.bench import model
from ul_scale.bench.dit import DiT
from ul_scale.bench.workload import Spread
from ul_scale.bench_cli import bench_app


def test_dit_is_the_published_one():
    # Peebles & Xie, table 4: DiT-XL/2 on 32 × 32 × 4 latents has 675 M parameters and 118.64 Gflops, which
    # are multiply-adds. Theirs predicts variances too, in 2 · 2 · 2 · 4 more channels of the head.
    settings = model.Settings(latent_shape=(4, 32, 32))
    assert model.dit_gflops(16, settings) == pytest.approx(2 * 118.64, rel=0.002)
    with torch.device("meta"):
        dit = DiT(heads=16, depth=28, channels=4, grid=32)
    assert sum(p.numel() for p in dit.parameters()) == pytest.approx(675e6, rel=0.002)


def test_dit_keeps_places_in_order():
    torch.manual_seed(0)
    dit = DiT(heads=1, depth=1, channels=2, grid=4)
    z, t, label = torch.randn(2, 2, 4, 4), torch.tensor([0.1, 0.9]), torch.tensor([3, 4])
    out = dit(z, t, label)
    assert out.shape == z.shape
    torch.testing.assert_close(dit(z[1:], t[1:], label[1:]), out[1:])


@pytest.mark.parametrize("target", [0.3, 1.0, 5.0, 7.9, 30.0, 100.0])
def test_nearest_size(target):
    squares = [n**2 for n in range(1, 20)]
    found = model.nearest_size(lambda n: n**2, target)
    assert abs(found**2 - target) == min(abs(square - target) for square in squares)


def test_base_models_have_the_flops_of_their_blocks():
    def blocks(number: int, tokens: int, width: int) -> int:
        return number * (2 * tokens * 12 * width**2 + 4 * tokens**2 * width)

    expected = blocks(6, 32 * 32, 384) + blocks(16, 16 * 16, 768)
    # Stem, head, changes of resolution and conditioning add little.
    assert model.base_gflops(model.base_net(768), (32, 32, 32)) == pytest.approx(expected / 1e9, rel=0.02)


def test_batch_is_halved_until_it_fits():
    tried = []

    def make(batch_size):
        tried.append(batch_size)
        if batch_size > 2:
            raise torch.OutOfMemoryError
        return Idle()

    row = model.measure_one("m", make, model.Settings(batch_size=8, steps=1, rounds=1), torch.device("cpu"))
    assert tried == [8, 4, 2]
    assert row.batch_size == 2


class Idle:
    def __enter__(self):
        return (lambda steps: None), 10, 10**9

    def __exit__(self, *error):
        return None


def test_table():
    row = model.Row("m", 5_000_000, 250.0, 8, Spread(3, 40.0, 39.0, 41.0), 0.3, 2.0)
    assert row.tflops_per_s == pytest.approx(3 * 250e9 * 40 / 1e12)
    last = model.table([row]).splitlines()[-1]
    assert last == "| m | 5.0 M | 250 | 8 | 40.0 (39.0 to 41.0) | 30 | 30.0 % | 2.0 GB |"


def test_smoke_command(tmp_path):
    out = tmp_path / "model.json"
    result = CliRunner().invoke(bench_app, ["model", "--smoke", "--json", str(out)], catch_exceptions=False)
    assert result.exit_code == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["model"].split()[0] for row in rows][:2] == ["ours,", "DiT"]
    assert rows[-1]["model"] == "ours, stage 1 at 32 px"
    assert all(row["images_per_s"]["median"] > 0 for row in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_is_asked_for():
    with pytest.raises(ValueError, match="no GPU"):
        CliRunner().invoke(bench_app, ["model"], catch_exceptions=False)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--size", "-1"], "--size is -1; expected forward GFLOPs above 0"),
        (["--json", "no/such/folder.json"], "--json is no/such/folder.json; expected a file in an existing"),
    ],
)
def test_bad_options_are_named(args, message):
    with pytest.raises(ValueError, match=message):
        CliRunner().invoke(bench_app, ["model", "--smoke", *args], catch_exceptions=False)
