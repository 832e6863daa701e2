"""Leaving a run under Ray: a signal to the driver becomes a request to the workers, which save first."""

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from ul_scale.checkpoint import store
from ul_scale.checkpoint.attempts import attempt_numbers
from ul_scale.train.notices import write_stop_file
from ul_scale.train.worker import EXIT_RUN_AGAIN

PATIENCE_S = 300.0
"""How long to wait for the workers' end after a signal, and again after each new checkpoint."""


class StopSignals:
    """Counts SIGTERM, SIGINT and SIGUSR1 to this process instead of dying of them."""

    def __init__(self) -> None:
        self.count = 0
        self._before: dict[int, object] = {}

    def install(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            before = signal.signal(number, self._count)
            self._before.setdefault(number, before)

    def _count(self, number: int, frame: FrameType | None) -> None:
        self.count += 1

    def __enter__(self) -> None:
        self.install()

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)  # type: ignore[arg-type]


class Following:
    """Training in a thread, while the main thread listens for signals.

    Args:
        run_dir: the run's directory.
        train: what to run; returns an exit code. In its own thread Ray leaves our signal handlers alone.
    """

    def __init__(self, run_dir: Path, train: Callable[[], int]):
        self._run_dir = run_dir
        self._attempts_before = self._newest_attempt()
        self._train = train
        self._code: int | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="fit", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._code = self._train()
        except BaseException as error:
            self._error = error

    def _newest_attempt(self) -> int:
        return max(attempt_numbers(self._run_dir), default=0)

    def until_the_end(self, signals: StopSignals, poll_s: float = 0.5) -> int:
        """Wait until training has ended, or has saved after a signal; return the exit code."""
        while not self._ended(poll_s):
            if signals.count:
                return self._leave(signals, poll_s)
        return self._result()

    def _ended(self, within_s: float) -> bool:
        self._thread.join(within_s)
        return not self._thread.is_alive()

    def _result(self) -> int:
        if self._error is not None:
            raise self._error
        assert self._code is not None
        return self._code

    def _leave(self, signals: StopSignals, poll_s: float) -> int:
        if self._newest_attempt() == self._attempts_before:
            print("stopped before training began; the same command starts it", flush=True)
            return EXIT_RUN_AGAIN
        print("asking the workers to save and stop; a second signal does not wait for them", flush=True)
        named, asked = 0, signals.count
        newest = self._newest_step()
        give_up_at = time.monotonic() + PATIENCE_S
        while signals.count == asked and time.monotonic() < give_up_at:
            if self._newest_attempt() > named:  # Also while Ray restarts them: a request is to one attempt.
                named = self._newest_attempt()
                write_stop_file(self._run_dir, named, "a signal to the command that submitted the run")
            if self._ended(poll_s):
                return self._result()
            # It may be one that was due anyway: the workers end by themselves when theirs is complete.
            if self._newest_step() > newest:
                newest, give_up_at = self._newest_step(), time.monotonic() + PATIENCE_S
        print(f"left at step {newest}; the same command continues", flush=True)
        return EXIT_RUN_AGAIN

    def _newest_step(self) -> int:
        return store.latest_step(self._run_dir) or 0
