"""What a worker of Ray Train runs: ``worker.run``, as everywhere, as a guest. Only this module knows Ray.

Ray Train gives places, restarts and notices. Where to go on from, what is saved and when is the run
directory's business: nothing is ever reported to Ray as a checkpoint.
"""

import time
import traceback
import uuid
from collections.abc import Callable

from ul_scale import config as configs
from ul_scale.checkpoint.attempts import RunBusy
from ul_scale.train import worker
from ul_scale.train.host import Host

EXIT_BAD_INPUT = 2

BUSY_TRIES, BUSY_WAIT_S = 10, 20.0
"""How long a run stays refused before that is final: a node that Ray has lost may write until it notices."""

ECHOES = ("Connection closed by peer", "Connection reset", "Socket Timeout", "recvValue failed", "NCCL")
"""In a worker's exception: what it looks like from here when another worker has failed."""


class WorkerFailed(RuntimeError):
    """How a worker's training ended, as text: it gets to the driver whole, whatever was raised.

    Attributes:
        summary: one line for a person.
        details: the traceback.
        exit_code: the driver's, at once; None where another try may go better.
        echo: whether it was most likely another worker that failed first.
        token: tells this failure from any other, for Ray shows it more than once.
    """

    def __init__(
        self,
        summary: str,
        details: str = "",
        exit_code: int | None = None,
        echo: bool = False,
        token: str = "",
    ):
        super().__init__(summary, details, exit_code, echo, token)
        self.summary, self.details, self.exit_code = summary, details, exit_code
        self.echo, self.token = echo, token

    def __str__(self) -> str:
        return f"{self.summary}\n{self.details}"


def as_failure(error: Exception) -> WorkerFailed:
    """Return an exception of ``worker.run`` as it travels; bad input and a busy run are final."""
    exit_code = {ValueError: EXIT_BAD_INPUT, RunBusy: worker.EXIT_FAILED}.get(type(error))
    name = "" if exit_code else f"{type(error).__name__}: "
    first, *_ = str(error).splitlines() or [""]
    return WorkerFailed(
        name + first,
        "".join(traceback.format_exception(error)),
        exit_code,
        echo=any(echo in str(error) for echo in ECHOES),
        token=uuid.uuid4().hex,
    )


def train_loop(job: dict[str, str]) -> int:
    """Train a run; return 0 when it is done, 75 if it was asked to stop and has saved.

    Args:
        job: ``config``, the resolved config as YAML, and ``source``, its path, for messages.

    Raises:
        WorkerFailed: whatever else happened.
    """
    try:
        config = configs.resolve(configs.parse(job["config"], job["source"]), job["source"])
        host = Host(takes_signals=False, ends_when_stopped=False, notice=preemption_notice())
        code = run_when_free(lambda: worker.run(config, host))
    except Exception as error:
        raise as_failure(error) from None
    if code not in (worker.EXIT_DONE, worker.EXIT_RUN_AGAIN):
        raise WorkerFailed(
            f"training ended with exit code {code}; its lines above say why", token=uuid.uuid4().hex
        )
    return code


def run_when_free(run: Callable[[], int], wait_s: float = BUSY_WAIT_S) -> int:
    """Run, again and again while the workers of a node that Ray has given up still write to the run.

    Every rank is refused alike, so all wait and try again alike.
    """
    for _ in range(BUSY_TRIES - 1):
        try:
            return run()
        except RunBusy:
            time.sleep(wait_s)
    return run()


def preemption_notice() -> Callable[[], str | None]:
    """Return a question that is answered once for each node of ours that Ray says will be taken away.

    It is a barrier with one answer for all: every rank asks at the same steps, or none.
    """
    import ray.train

    known: set[str] = set()

    def ask() -> str | None:
        info = ray.train.get_preemption_info()
        leaving = set(info.preempted_node_ids) - known if info else set()
        if not info or not leaving:
            return None
        known.update(leaving)
        left_s = f" in {info.deadline_ms / 1000 - time.time():.0f} s" if info.deadline_ms else ""
        return f"Ray: the node of ranks {', '.join(map(str, info.preempted_ranks))} goes away{left_s}"

    return ask
