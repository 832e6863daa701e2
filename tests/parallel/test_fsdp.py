import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    path = tmp_path_factory.mktemp("fsdp") / "result"
    tests = Path(__file__).parents[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    ended = subprocess.run(
        [*command, str(tests / "parallel" / "fsdp_ranks.py"), str(path)],
        env=os.environ | {"PYTHONPATH": f"{tests}:{tests.parent}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return [json.loads(Path(f"{path}.{rank}").read_text()) for rank in range(2)]


def test_a_sample_that_is_not_finite_on_one_rank_skips_the_step_on_all(ranks):
    for result in ranks:
        assert math.isnan(result["poisoned norm"]) and result["unchanged"]


def test_a_frozen_encoder_is_sharded_and_not_saved(ranks):
    for result in ranks:
        assert result["frozen is sharded"]
        assert "z_std" in result["saved"] and not any("encoder" in name for name in result["saved"])


def test_when_parameters_are_gathered_and_freed_changes_no_bit(ranks):
    for result in ranks:
        assert result["kept gathered"] == result["fp32"]


def test_bf16_keeps_fp32_weights_and_stays_close_to_fp32(ranks):
    for result in ranks:
        assert result["master weights"] == ["torch.float32"]
        for exact, rounded in zip(result["fp32"][0], result["bf16"][0]):
            assert rounded == pytest.approx(exact, rel=0.02) and rounded != exact
