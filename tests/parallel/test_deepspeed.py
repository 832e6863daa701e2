"""Engine ``deepspeed`` in real processes on gloo, beside engine ``none`` in this one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from parallel import deepspeed_ranks
from parallel.deepspeed_ranks import BROKEN, SAVED, STEPS, make_engine, train

from ul_scale.parallel.deepspeed import check_fits
from ul_scale.parallel.deepspeed_convert import to_universal, universal_to_dcp_state
from ul_scale.parallel.engine import Process

pytest.importorskip("deepspeed")
ALONE = Process(0, 1, torch.device("cpu"))


def start(world_size, folder):
    """Run all cases of one world size; return what rank 0 saved."""
    tests = Path(__file__).parents[1]
    # Nothing is compiled here, but DeepSpeed decorates functions at its import, which loads the compiler.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tests), *sys.path])
    command = [sys.executable, deepspeed_ranks.__file__]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(world_size), str(folder)],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(world_size)
    ]
    try:
        outputs = [rank.communicate(timeout=200) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert all(rank.returncode == 0 for rank in ranks), [err[-2000:] for _, err in outputs]
    assert not any(out for out, _ in outputs), "standard output belongs to the run"
    return torch.load(folder / f"world{world_size}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("deepspeed")


@pytest.fixture(scope="module")
def two(folder):
    return start(2, folder)


@pytest.fixture(scope="module")
def converted(folder, two):
    """Return the state of each ZeRO stage's checkpoint of two processes, also saved as engine none would."""
    states = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        for stage in (1, 2, 3):
            to_universal(folder / f"zero{stage}", folder / f"universal{stage}")
            states[stage] = universal_to_dcp_state(folder / f"universal{stage}")
            dcp.save(states[stage], checkpoint_id=folder / f"converted{stage}", no_dist=True)
    return states


@pytest.fixture(scope="module")
def three(folder, converted):
    return start(3, folder)


@pytest.fixture(scope="module")
def alone():
    """Return curve and final weights of engine none, in each precision."""
    results = {}
    for precision in ("fp32", "bf16"):
        engine = make_engine(ALONE, precision=precision)
        curve = train(engine, ALONE, range(STEPS))
        results[precision] = {"curve": curve, "final": engine.state_dict()["model"]}
    return results


def assert_like(result, expected, *, rtol=1e-5, atol=2e-5):
    """Compare losses and norms before clipping, the NaN step apart, and final weights."""
    curve, whole = result["curve"], expected["curve"][-len(result["curve"]) :]
    broken = torch.arange(STEPS)[-len(curve) :] == BROKEN
    assert not curve[broken].isfinite().any() and not whole[broken].isfinite().any()
    torch.testing.assert_close(curve[~broken], whole[~broken], rtol=rtol, atol=0)
    assert result["final"].keys() == expected["final"].keys() and len(result["final"]) > 60
    for name, value in expected["final"].items():
        torch.testing.assert_close(result["final"][name], value.cpu(), rtol=rtol, atol=atol, msg=name)


@pytest.mark.exhaustive
def test_one_process_trains_like_engine_none(folder, alone):
    results = start(1, folder)
    for stage in (1, 2, 3):
        assert_like(results[(stage,)], alone["fp32"])


def test_two_processes_train_like_engine_none(two, alone):
    for case, result in two.items():
        if "bf16" in case:
            assert_like(result, alone["bf16"], rtol=3e-3, atol=2e-2)
        elif "resumed" not in case:
            assert_like(result, alone["fp32"])


def test_three_processes_train_like_engine_none(three, alone):
    for stage in (1, 2, 3):
        assert_like(three[(stage,)], alone["fp32"])


def test_own_files_resume_bit_for_bit(two):
    for stage in (1, 2, 3):
        undisturbed, resumed = two[(stage,)], two["resumed", stage]
        assert resumed["curve"].tolist()[0] == undisturbed["curve"].tolist()[SAVED]
        for name, value in undisturbed["saved"].items():
            assert torch.equal(resumed["loaded"][name], value)
        for name, value in undisturbed["final"].items():
            assert torch.equal(resumed["final"][name], value)


def test_files_of_another_layout_are_refused(two, tmp_path):
    assert two["resumed", 1]["refusal"] is None
    assert "parallel.zero_stage=1, but this run has 2 and 3" in two["resumed", 3]["refusal"]
    (tmp_path / "deepspeed").mkdir()
    (tmp_path / "deepspeed" / "about.json").write_text(json.dumps({"world_size": 4, "zero_stage": 2}))
    check_fits(tmp_path, 4, 2)
    with pytest.raises(
        ValueError, match=r"saved it with 4 processes .* this run has 3 .* checkpoint convert"
    ):
        check_fits(tmp_path, 3, 2)


def test_the_shared_part_of_a_checkpoint_holds_whole_weights(folder, two):
    for stage in (1, 2, 3):
        model = {name: torch.zeros_like(value) for name, value in two[(stage,)]["saved"].items()}
        dcp.load({"model": model}, checkpoint_id=folder / f"zero{stage}" / "dcp", no_dist=True)
        for name, value in two[(stage,)]["saved"].items():
            assert torch.equal(model[name], value)


def test_converted_files_continue_on_engine_none(two, converted, alone):
    for stage, state in converted.items():
        saved = two[(stage,)]["saved"]
        assert state["model"].keys() == saved.keys()
        assert all(torch.equal(state["model"][name], value) for name, value in saved.items())
        engine = make_engine(ALONE, seed=5)
        mine = engine.state_dict()
        assert mine["model"].keys() == state["model"].keys()
        assert mine["optim"]["state"].keys() == state["optim"]["state"].keys()
        assert mine["optim"]["param_groups"][0].keys() == state["optim"]["param_groups"][0].keys()
        engine.load_state_dict(state)
        curve = train(engine, ALONE, range(SAVED, STEPS))
        assert_like({"curve": curve, "final": engine.state_dict()["model"]}, alone["fp32"])


def test_converted_files_continue_at_another_size_and_stage(three, alone):
    assert_like(three["converted", 1], alone["fp32"])
    assert_like(three["converted", 3], alone["fp32"])
