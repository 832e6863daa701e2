"""Steps whose loss is not finite, and samples that cannot be used: counted, named, and limited."""

import math
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from ul_scale.data.stream import Batch
from ul_scale.parallel.engine import Process
from ul_scale.parallel.mesh import gather_objects


class Diverged(RuntimeError):
    """The loss or the gradient has not been a finite number for too many steps in a row."""


class StepHealth:
    """Looks at each step's gradient norm one step late, so that the device never waits for it.

    The norm is global, so all ranks judge alike, at the same step.

    Args:
        limit: skipped steps in a row that end the run.
        process: this process.
        skipped_steps: skipped so far in the whole run.
        log: takes one line for a person; called on rank 0.
    """

    def __init__(self, limit: int, process: Process, skipped_steps: int, log: Callable[[str], object]):
        self._limit, self._process, self._log = limit, process, log
        self.skipped_steps = skipped_steps
        self._in_a_row = 0
        self._pending: deque[tuple[int, Tensor, list[str]]] = deque()

    def watch(self, step: int, grad_norm: Tensor, keys: list[str]) -> None:
        """Take note of a step (from 0), its norm and its samples; judge the step before.

        Raises:
            Diverged: if that was one too many.
        """
        self._pending.append((step, grad_norm, keys))
        if len(self._pending) > 1:
            self._judge()

    def settle(self) -> None:
        """Judge what has not been judged yet: before a save, and at the end."""
        while self._pending:
            self._judge()

    def _judge(self) -> None:
        step, grad_norm, keys = self._pending.popleft()
        if math.isfinite(float(grad_norm)):
            self._in_a_row = 0
            return
        self.skipped_steps += 1
        self._in_a_row += 1
        everyones = gather_objects(keys, self._process)
        if self._process.rank == 0:
            samples = sorted({key for part in everyones for key in part})
            self._log(
                f"skipped step {step}: gradient norm {float(grad_norm)}; its samples: {', '.join(samples)}"
            )
        if self._in_a_row >= self._limit:
            raise Diverged(
                f"loss or gradient not finite in {self._in_a_row} steps in a row, the last one step {step} "
                "(train.max_skipped_in_a_row): try a lower optim.lr, or look at the samples named above"
            )


JUDGED_SAMPLES = 10_000
"""A share of bad samples means little before so many have been drawn, or all of a smaller set."""


class TooManyBadSamples(RuntimeError):
    """More samples had to be replaced than ``data.max_bad_fraction`` allows."""


class SampleHealth:
    """Counts the draws in which another sample took the place of one that cannot be used.

    Args:
        max_fraction: of draws, more of which end the run.
        num_samples: in the set.
    """

    def __init__(self, max_fraction: float, num_samples: int):
        self._max_fraction, self._judged = max_fraction, min(num_samples, JUDGED_SAMPLES)
        self._replaced = 0.0

    def watch(self, batch: Batch) -> None:
        self._replaced += float((batch["weight"] * batch["replaced"]).sum())

    def counted(self, device: torch.device) -> Tensor:
        """Return this rank's count since the attempt began, to be added up over ranks."""
        return torch.tensor(self._replaced, device=device)

    def judge(self, replaced: float, drawn: int) -> None:
        """Take all ranks' count, of so many draws.

        Raises:
            TooManyBadSamples: on every rank alike.
        """
        expected = self._max_fraction * max(drawn, self._judged)
        allowed = expected + 4 * math.sqrt(expected)  # chance alone does not end a run
        if replaced > allowed:
            raise TooManyBadSamples(
                f"{replaced:.0f} of {drawn} samples could not be used and were replaced, more than "
                f"data.max_bad_fraction {self._max_fraction:g} allows ({int(allowed)}): see above, "
                "and ul-scale data verify lists all of them"
            )
