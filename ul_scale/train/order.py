"""Print what is in the batches of a config's run."""

import json
from collections.abc import Sequence

from ul_scale.config import load
from ul_scale.data.index import open_index
from ul_scale.data.order import order_lines
from ul_scale.data.stream import make_plan
from ul_scale.train.prepare import training_url


def print_order(
    config: str, overrides: Sequence[str] = (), *, step: int, steps: int = 1, world_size: int = 1
) -> None:
    """Print the order of a config's run as JSON lines, whether or not it ever ran.

    Raises:
        ValueError: if the config, its data or a number is not as expected.
    """
    run = load(config, list(overrides))
    index = open_index(training_url(run))
    plan = make_plan(index, run.data, seed=run.seed, batch_size=run.train.batch_size)
    for line in order_lines(index, plan, step, steps, world_size):
        print(json.dumps(line))
