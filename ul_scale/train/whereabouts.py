"""Where a process is, so that one that is stuck or fails can say so."""

import sys
import threading
import time

from ul_scale.parallel.engine import Process


class Whereabouts:
    """The step and phase that this process is in; a thread reports when they have not changed for long.

    On GPUs a collective that has timed out ends the process from within NCCL's watchdog, where no Python
    runs any more: so the report comes before that, at half the timeout.

    Args:
        process: this process.
        timeout_s: of collectives, seconds.
    """

    def __init__(self, process: Process, timeout_s: float):
        self._process, self._timeout_s = process, timeout_s
        self._step, self._phase = 0, "starting"
        self._since, self._reported = time.monotonic(), False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="ul-scale-whereabouts", daemon=True)
        self._thread.start()

    def at(self, step: int, phase: str) -> None:
        """Note what comes next: a step, counted from 0, and one of its phases."""
        self._step, self._phase = step, phase
        self._since, self._reported = time.monotonic(), False

    def __str__(self) -> str:
        rank, size = self._process.rank, self._process.world_size
        return f"rank {rank} of {size}, step {self._step}, {self._phase}"

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._closed.wait(min(5.0, self._timeout_s / 8)):
            stuck_s = time.monotonic() - self._since
            if stuck_s > self._timeout_s / 2 and not self._reported:
                self._reported = True
                print(
                    f"{self}: no progress for {stuck_s:.0f} s; collectives time out after "
                    f"{self._timeout_s:g} s (parallel.timeout_s)",
                    file=sys.stderr,
                    flush=True,
                )
