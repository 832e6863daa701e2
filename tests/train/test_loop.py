import pytest

from ul_scale.train.loop import TrainConfig, micro_batches


def test_micro_batches_cut_samples():
    assert micro_batches(6, 3) == [slice(0, 2), slice(2, 4), slice(4, 6)]


def test_last_step():
    assert TrainConfig(steps=10, batch_size=2).last_step == 10
    assert TrainConfig(steps=10, batch_size=2, stop_at_step=4).last_step == 4


@pytest.mark.parametrize("change", [{"precision": "fp16"}, {"max_skipped_in_a_row": 0}, {"stop_at_step": 11}])
def test_bad_values_are_refused(change):
    with pytest.raises(ValueError, match=f"train.{next(iter(change))}"):
        TrainConfig(steps=10, batch_size=2, **change)
