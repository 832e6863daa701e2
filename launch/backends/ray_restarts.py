"""When a run under Ray goes on after a failure, and when it has failed for good."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ul_scale.checkpoint import store
from ul_scale.train.ray_worker import WorkerFailed

if TYPE_CHECKING:
    from ray.train.v2.api.callback import UserCallback


class Stop(RuntimeError):
    """The run has failed for good.

    Attributes:
        message: for a person; with the root traceback where there is one.
        exit_code: the driver's.
    """

    def __init__(self, message: str, exit_code: int):
        super().__init__(message, exit_code)
        self.message, self.exit_code = message, exit_code

    def __str__(self) -> str:
        return self.message


class RestartGuard:
    """Allows restarts without limit as long as the run gets on, and few while it does not.

    Getting on means a newer complete checkpoint than at the failure before. So spot nodes may come and go
    for weeks, and a crash at the same step ends the run after a few tries.

    Args:
        run_dir: the run's directory, read at each failure.
        limit: restarts in a row without progress.
    """

    def __init__(self, run_dir: Path, limit: int):
        self._run_dir, self._limit = run_dir, limit
        self._newest = self._newest_step(0)
        self._without_progress = 0
        self._seen: set[str] = set()

    def _newest_step(self, otherwise: int) -> int:
        try:
            return store.latest_step(self._run_dir) or 0
        except Exception:  # A bucket that cannot be read for a while, in its client's own words, ends no run.
            return otherwise

    def failed(self, failures: Mapping[int, Exception]) -> str | None:
        """Count a failure; return a line on what follows, or None for one that was counted before.

        Args:
            failures: what each failed worker raised, by rank.

        Raises:
            Stop: this was once too often, or no other try could go better.
        """
        tokens = {
            error.token if isinstance(error, WorkerFailed) else str(error) for error in failures.values()
        }
        seen, self._seen = self._seen & tokens, self._seen | tokens
        for error in failures.values():
            if isinstance(error, WorkerFailed) and error.exit_code is not None:
                raise Stop(error.summary, error.exit_code)
        if seen:
            return None
        newest = self._newest_step(self._newest)
        self._without_progress = 0 if newest > self._newest else self._without_progress + 1
        self._newest = newest
        rank, root = root_failure(failures)
        what = f"worker {rank}: {summary(root)}"
        if self._without_progress > self._limit:
            raise Stop(
                f"{self._limit} restarts in a row without a newer checkpoint than step {newest}, giving up; "
                f"{what}\n{details(root)}",
                exit_code=1,
            )
        return (
            f"{what}; going on from step {newest} "
            f"({self._without_progress} of {self._limit} restarts without progress)"
        )


def root_failure(failures: Mapping[int, Exception]) -> tuple[int, Exception]:
    """Return the rank and exception that the others followed from, as far as they tell."""

    def rating(item: tuple[int, Exception]) -> tuple[int, int]:
        rank, error = item
        if not isinstance(error, WorkerFailed):
            return 1, rank  # A process is gone: a cause, but it says less than an exception does.
        return 2 if error.echo else 0, rank

    return min(failures.items(), key=rating)


def summary(error: Exception) -> str:
    """Return one line on a failure."""
    if isinstance(error, WorkerFailed):
        return error.summary
    cause = getattr(error, "health_check_failure", error)  # Ray's own: the worker's process has gone
    first, *_ = str(cause).strip().splitlines() or [""]
    return f"{type(cause).__name__}: {first}"


def details(error: Exception) -> str:
    return error.details if isinstance(error, WorkerFailed) else str(error)


def callback(guard: RestartGuard) -> "UserCallback":
    """Return a callback for Ray Train's controller that has the guard decide.

    What it raises ends the run: an error in a callback is the one kind that Ray never retries.
    """
    from ray.train.v2.api.callback import UserCallback

    class Restarts(UserCallback):
        def after_exception(self, run_context: object, worker_exceptions: dict[int, Exception]) -> None:
            line = guard.failed(worker_exceptions)
            if line is not None:
                print(line, flush=True)

    return Restarts()
