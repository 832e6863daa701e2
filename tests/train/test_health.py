import pytest
import torch

from ul_scale.parallel.engine import Process
from ul_scale.train.health import Diverged, StepHealth

ALONE = Process(0, 1, torch.device("cpu"))


def test_a_skipped_step_is_counted_and_its_samples_are_named_one_step_late():
    lines = []
    health = StepHealth(3, ALONE, 5, lines.append)
    health.watch(0, torch.tensor(1.0), ["a/0"])
    health.watch(1, torch.tensor(float("nan")), ["a/2", "a/1", "a/2"])
    assert health.skipped_steps == 5 and not lines
    health.watch(2, torch.tensor(1.0), ["a/3"])
    assert health.skipped_steps == 6
    assert lines == ["skipped step 1: gradient norm nan; its samples: a/1, a/2"]
    health.watch(3, torch.tensor(float("inf")), ["a/4"])
    health.settle()
    assert health.skipped_steps == 7 and "step 3" in lines[-1]


def test_too_many_in_a_row_end_the_run_and_a_good_step_between_does_not():
    health = StepHealth(2, ALONE, 0, lambda line: None)
    for step, norm in enumerate([float("nan"), 1.0, float("nan"), float("nan")]):
        health.watch(step, torch.tensor(norm), [])
    with pytest.raises(Diverged, match="2 steps in a row, the last one step 3"):
        health.settle()
