import pytest

from ul_scale.train.loop import Diverged, TrainConfig, check_finite, micro_batches


def test_micro_batches_cut_samples():
    assert micro_batches(6, 3) == [slice(0, 2), slice(2, 4), slice(4, 6)]
    with pytest.raises(ValueError, match="accumulation_steps is 4, but a rank has 6 samples"):
        micro_batches(6, 4)


def test_not_finite_is_named():
    check_finite({"loss": 1.0, "grad_norm": 2.0}, 5)
    with pytest.raises(Diverged, match="grad_norm not finite at step 5"):
        check_finite({"loss": 1.0, "grad_norm": float("inf")}, 5)


def test_last_step():
    assert TrainConfig(steps=10, batch_size=2).last_step == 10
    assert TrainConfig(steps=10, batch_size=2, stop_at_step=4).last_step == 4
