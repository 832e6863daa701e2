import gzip
import json

import pytest
import torch

from ul_scale.checkpoint.files import read, run_path
from ul_scale.parallel.engine import Process
from ul_scale.train import profile
from ul_scale.train.profile import profiler

CPU = torch.device("cpu")


def train(steps, run_dir, *, enabled=True, rank=0):
    """Multiply matrices for some steps; return what the user was told."""
    said = []
    a = torch.ones(64, 64)
    process = Process(rank=rank, world_size=2, device=CPU)
    with profiler(enabled, run_dir, 3, process, 100, said.append) as step_done:
        for _ in range(steps):
            (a @ a).relu()
            step_done()
    return "\n".join(said)


@pytest.mark.parametrize("root", [None, "memory://bucket/profiled"])
def test_a_trace_of_the_recorded_steps_and_the_longest_operations(tmp_path, root):
    run_dir = run_path(root) if root else tmp_path
    said = train(14, run_dir)
    path = run_dir / "profile" / "attempt3_rank0.json.gz"
    events = json.loads(gzip.decompress(read(path)))["traceEvents"]
    assert len([e for e in events if e["name"] == "aten::mm" and e.get("ph") == "X"]) == 3
    assert f"profile from step 108 on: {path}" in said and "aten::mm" in said and "ProfilerStep" not in said
    assert len(said.splitlines()) <= 2 + profile.TOP_OPERATIONS


def test_a_run_that_ends_too_soon_is_told_so(tmp_path):
    assert "no profile, for the run ended before step 108" in train(6, tmp_path)


def test_a_run_that_ends_while_it_is_recorded_has_a_trace(tmp_path):
    assert "attempt3_rank0.json.gz" in train(8, tmp_path)


@pytest.mark.parametrize("enabled,rank", [(False, 0), (True, 1)])
def test_nothing_happens_where_nothing_is_asked_for(tmp_path, enabled, rank):
    assert train(14, tmp_path, enabled=enabled, rank=rank) == "" and not list(tmp_path.iterdir())


def test_a_trace_that_cannot_be_written_does_not_end_the_run(tmp_path, monkeypatch):
    def full(path, data):
        raise OSError("no space left on device")

    monkeypatch.setattr(profile, "write_atomic", full)
    assert train(14, tmp_path) == "warning: the profile cannot be written: no space left on device"
