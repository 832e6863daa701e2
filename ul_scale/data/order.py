"""Say which samples a batch is made of, for any step, without reading a sample."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TypedDict

from ul_scale.data.index import Index
from ul_scale.data.plan import LanePlan, lane_slots


class OrderLine(TypedDict):
    """Samples of one lane epoch that a lane slot brings to a rank's batch, in the batch's order.

    epoch: the lane's own; `keys` are `dataset/shard/key`.
    """

    step: int
    rank: int
    lane: int
    epoch: int
    keys: list[str]


def order_lines(index: Index, plan: LanePlan, step: int, steps: int, world_size: int) -> Iterator[OrderLine]:
    """Yield what is in the batches of `steps` steps from `step` on, by step, rank and lane.

    The keys of a rank's lines, one after the other, are the keys of its batch, less those of its surplus
    slots, whose weight is 0. A lane batch that goes over from an epoch into the next has a line for each.

    Raises:
        ValueError: if a number is out of range, or there are more ranks than lanes.
    """
    for name, value, least in (("step", step, 0), ("steps", steps, 1), ("world size", world_size, 1)):
        if value < least:
            raise ValueError(f"{name} is {value}; expected {least} or more")
    ranks = [lane_slots(plan.lanes, rank, world_size) for rank in range(world_size)]
    for number in range(step, step + steps):
        for rank, slots in enumerate(ranks):
            for lane, weight in slots:
                if not weight:
                    continue
                epochs, samples = plan.lane_batch(number, lane)
                names = _names(index, samples.tolist())
                for epoch, group in groupby(zip(epochs.tolist(), names), key=lambda pair: pair[0]):
                    keys = [name for _, name in group]
                    yield OrderLine(step=number, rank=rank, lane=lane, epoch=epoch, keys=keys)


def _names(index: Index, samples: Sequence[int]) -> list[str]:
    """Return the names of samples, looked up in the index's order, in which their keys lie together."""
    names = {sample: index.names(sample, sample + 1)[0] for sample in sorted(set(samples))}
    return [names[sample] for sample in samples]
