"""One loss, one gradient norm, one set of parameters: whatever the engine, processes and layout."""

import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, astuple
from pathlib import Path

import pytest
from parallel.parity import (
    LOSS_TOLERANCE,
    PARAMETER_TOLERANCE,
    STEPS,
    Case,
    all_cases,
)

TABLE = Path(__file__).parents[2] / "docs" / "parity.md"


def pairs(case: Case) -> set[tuple]:
    return set(itertools.combinations(enumerate(astuple(case)), 2))


def covering() -> list[Case]:
    """Return few cases in which every possible pair of settings occurs, chosen greedily."""
    left, chosen = set().union(*map(pairs, all_cases())), []
    while left:
        best = max(all_cases(), key=lambda case: len(pairs(case) & left))
        chosen.append(best)
        left -= pairs(best)
    return chosen


def run(cases: list[Case], folder: Path, timeout_s: float) -> list[dict]:
    (folder / "cases.json").write_text(json.dumps([asdict(case) for case in cases]))
    tests = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": f"{tests}:{tests.parent}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tests / "parallel" / "parity.py"), str(folder)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return [
        result for path in sorted(folder.glob("results-*.json")) for result in json.loads(path.read_text())
    ]


def check(results: list[dict], cases: list[Case]) -> None:
    assert len(results) == len(cases)
    for result in results:
        assert result["loss"] < LOSS_TOLERANCE and result["norm"] < LOSS_TOLERANCE, result
        assert result["parameters"] < PARAMETER_TOLERANCE, result


def test_covering_cases_agree_with_one_plain_process(tmp_path):
    check(run(covering(), tmp_path, 280), covering())


def test_the_covering_cases_cover():
    assert set().union(*map(pairs, covering())) == set().union(*map(pairs, all_cases()))


@pytest.mark.exhaustive
@pytest.mark.timeout(7200)
def test_every_case_agrees_and_the_table_is_written(tmp_path):
    from datetime import date

    import torch

    results = run(all_cases(), tmp_path, 7000)
    check(results, all_cases())
    groups = Counter((r["stage"], r["engine"], r["world_size"]) for r in results)
    lines = [
        f"Largest deviation from one plain process over {STEPS} steps (fp32, gloo, clipping active)",
        "over accumulation (1, 2) and activation checkpointing (none, selective, full).",
        f"torch {torch.__version__}, {date.today()}; {len(results)} cases. Made by",
        "`python -m pytest -m exhaustive tests/parallel/test_parity.py`.",
        "",
        "| stage | engine | processes | cases | loss, relative | gradient norm, relative | parameters |",
        "|---|---|---|---|---|---|---|",
    ]
    for key, count in groups.items():
        rows = [r for r in results if (r["stage"], r["engine"], r["world_size"]) == key]
        worst = [f"{max(r[name] for r in rows):.1e}" for name in ("loss", "norm", "parameters")]
        lines.append(f"| {' | '.join(map(str, (*key, count, *worst)))} |")
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text("# Parity of engines\n\n" + "\n".join(lines) + "\n")
