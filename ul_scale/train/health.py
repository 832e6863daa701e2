"""Steps whose loss or gradient is not finite: skipped by the engine, counted and named here."""

import math
from collections import deque
from collections.abc import Callable

from torch import Tensor

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
