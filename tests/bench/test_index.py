import json
from pathlib import Path

import numpy as np
import pytest

from ul_scale.bench import index as bench
from ul_scale.data.index import open_index


def test_the_set_is_one_that_opens(tmp_path: Path):
    bench.write_set(tmp_path, 2_500)
    index = open_index(str(tmp_path))
    assert len(index) == 2_500 and [shard.samples for shard in index.shards] == [1000, 1000, 500]
    # Samples lie behind one another, each part within its sample.
    assert np.array_equal(index.offset[1:1000], np.cumsum(index.size[:999]))
    ends = index.members[:, :, 0].astype(int) + index.members[:, :, 1]
    assert (ends <= index.size[:, None]).all() and (index.members[:, :, 0] > 0).all()
    assert index.names(1000, 1001) == ["bench/000001/0000010000"]
    shards = sorted(tmp_path.glob("*.tar"))
    assert shards[2].stat().st_size == index.offset[-1] + index.size[-1] + 1024
    assert sum(shard.stat().st_blocks for shard in shards) == 0


def test_figures_are_of_a_fresh_process_and_nothing_is_left(tmp_path: Path):
    lines: list[str] = []
    figures = bench.run(3_000, 1, str(tmp_path), lines.append)
    assert [len(of_kind) for of_kind in figures.values()] == [1, 1]
    for (one,) in figures.values():
        assert min(one.open_s, one.reopen_s, one.plan_s, one.find_s, one.names_s) > 0
        assert one.mapped >= 3_000 * 16 and one.peak_anonymous >= one.anonymous > 0
    assert len(lines) == 3 and not list(tmp_path.iterdir())
    text = bench.report(figures)
    assert "open (promised: under 1 s)" in text and "n = 1" in text


def test_too_little_room_is_said_first(tmp_path: Path):
    with pytest.raises(ValueError, match=r"GB free; such an index takes 4500000\.0"):
        bench.write_set(tmp_path, 10**14)
    assert not list(tmp_path.iterdir())


def test_a_cold_process_reads_the_files_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    bench.write_set(tmp_path, 10)
    dropped = []
    monkeypatch.setattr(bench.os, "posix_fadvise", lambda *args: dropped.append(args))
    measured = json.dumps(dict.fromkeys(bench.Figures.__dataclass_fields__, 0))
    monkeypatch.setattr(
        bench.subprocess, "run", lambda *a, **k: bench.subprocess.CompletedProcess(a, 0, measured)
    )
    bench.measure(tmp_path, cold=False)
    assert not dropped
    bench.measure(tmp_path, cold=True)
    assert len(dropped) == 6
