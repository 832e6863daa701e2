"""Stop requests: a notice at any rank becomes one decision of all ranks, at the same step."""

import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

import torch
import torch.distributed as dist

from ul_scale.checkpoint.attempts import attempt_numbers, attempt_path, is_alive
from ul_scale.checkpoint.files import decode, read
from ul_scale.parallel.engine import NOT_IDENTITY, Process
from ul_scale.train.host import Host
from ul_scale.train.notices import (
    CLOUDS,
    Source,
    Watcher,
    cloud_looks,
    detect_cloud,
    stop_file,
    write_stop_file,
)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
DELAY_STEPS = 2
"""Steps between a rank's flag and what all do about it."""
_ONE_PRESS_S = 1.0
_LEAST_LEAD_S = 60.0


@dataclass(frozen=True, kw_only=True)
class PreemptionConfig:
    """Section ``preemption``: who may ask a run to save and end early, to be run again."""

    cloud: str = field(default="auto", metadata=NOT_IDENTITY)
    """Whose metadata server to ask for preemption notices: ``gce``, ``ec2``, ``none``; ``auto``: what the
    machine's firmware says it is."""
    poll_s: float = field(default=5.0, metadata=NOT_IDENTITY)
    """Seconds between two looks for a notice, there and for ``ul-scale stop``."""
    stop_after_s: float | None = field(default=None, metadata=NOT_IDENTITY)
    """Have saved when this process has run for so long. A job script can give the unix time of its own end
    in the environment variable UL_SCALE_DEADLINE; the earlier one holds."""
    notice_s: float | None = field(default=None, metadata=NOT_IDENTITY)
    """Seconds from a notice to the end of the machine, where the defaults (GCE 30, its Kubernetes pods 15,
    EC2 120, signals 30) are wrong; and how long before a deadline to save. null: before a deadline, twice
    the longest save so far and a few steps, at least a minute."""

    def __post_init__(self) -> None:
        if self.cloud not in ("auto", "none", *CLOUDS):
            expected = ", ".join(("auto", "none", *CLOUDS))
            raise ValueError(f"preemption.cloud is {self.cloud!r}; expected one of {expected}")
        for name in ("poll_s", "stop_after_s", "notice_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"preemption.{name} is {value}; expected a number of seconds above 0")

    def resolved_cloud(self) -> str | None:
        return detect_cloud() if self.cloud == "auto" else None if self.cloud == "none" else self.cloud


@dataclass(frozen=True)
class Stop:
    """What all ranks have agreed to stop for.

    Attributes:
        source: who asked.
        rank: the highest rank that was asked.
        detail: what was said, where this rank knows it.
    """

    source: Source
    rank: int
    detail: str | None

    def __str__(self) -> str:
        detail = f", {self.detail}" if self.detail else ""
        return f"{self.source.value} (rank {self.rank}{detail})"


class StopRequest:
    """Hears every source of stop requests while it is entered; ``agreed`` is asked once a step on every rank.

    Each rank's flags, one per source, travel by an asynchronous reduction on CPU, whose result is looked at
    ``DELAY_STEPS`` steps later: no step waits for it, and all ranks act at the same step.

    Args:
        config: which sources, how often.
        process: this process. To enter is collective.
        host: whose guest we are.
        run_dir: the run's directory, where rank 0 looks for ``ul-scale stop``.
        attempt: our attempt's number.
        deadline: from ``find_deadline``.
        timeout_s: of the reduction, in seconds.
        log: takes one line for a person.
    """

    def __init__(
        self,
        config: PreemptionConfig,
        process: Process,
        host: Host,
        *,
        run_dir: Path,
        attempt: int,
        deadline: float | None = None,
        timeout_s: float = 600.0,
        log: Callable[[str], object] = print,
    ):
        self._config, self._process, self._host = config, process, host
        self._deadline, self._timeout_s = deadline, timeout_s
        self._flags: dict[Source, str] = {}
        self._acted: set[Source] = set()
        looks = {} if int(os.environ.get("LOCAL_RANK", 0)) else cloud_looks(config.resolved_cloud())
        if process.rank == 0:
            looks[Source.STOP_FILE] = stop_file(run_dir, attempt)
        self._watcher = Watcher(looks, config.poll_s, self._hear, log)
        self._entered = ExitStack()
        self._interrupted_at: float | None = None
        self._group: dist.ProcessGroup | None = None
        self._pending: deque[tuple[dist.Work, torch.Tensor]] = deque()
        self._host_asked_at = time.monotonic()
        now = time.monotonic()
        # A short deadline is not eaten up by the least lead.
        self._least_lead_s = min(_LEAST_LEAD_S, max(0.0, (deadline or now) - now) / 4)
        self._step_ends: deque[float] = deque(maxlen=8)
        self._save_s = 0.0

    def __enter__(self) -> Self:
        if self._process.world_size > 1:
            # A group of its own: the flags pass the collectives of training and of saves.
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=self._timeout_s))
        if self._host.takes_signals:
            self._entered.enter_context(_signals_caught_by(self._signalled))
        self._watcher.start()
        self._entered.callback(self._watcher.stop)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered.close()
        if kind is None:
            # No rank leaves while another still reduces; after an error, the others may never come.
            for work, _ in self._pending:
                work.wait()
        self._pending.clear()

    def request(self, source: Source, detail: str = "") -> None:
        """Ask all ranks to stop; may be called on any rank and in any thread, and is never taken back."""
        self._flags[source] = detail

    def measured_save(self, seconds: float) -> None:
        """Take note of how long a save took, from its request to its commit: deadlines allow for it."""
        self._save_s = max(self._save_s, seconds)

    def agreed(self) -> Stop | None:
        """Return what all ranks have agreed to stop for, once for each source that comes up, or None.

        With one process at once, else ``DELAY_STEPS`` calls after the flag. A source that has gone quiet
        on all ranks counts anew when it comes back.
        """
        self._look_at_clock()
        ranks, ask_host = self._reduced()
        if ask_host and self._host.notice is not None:
            self._hear(Source.HOST, self._host.notice())
        current = {source for source, rank in zip(Source, ranks) if rank >= 0}
        new = [source for source in Source if source in current - self._acted]
        self._acted = current
        if not new:
            return None
        return Stop(new[0], ranks[list(Source).index(new[0])], self._flags.get(new[0]))

    def _reduced(self) -> tuple[list[int], bool]:
        """Return per source the highest rank that had its flag up, or -1; and whether to ask the host."""
        flags = dict(self._flags)
        mine = [self._process.rank if source in flags else -1 for source in Source]
        # The host may need all ranks to ask it together: rank 0's clock says when.
        now = time.monotonic()
        ask_host = self._process.rank == 0 and now - self._host_asked_at >= self._config.poll_s
        if ask_host:
            self._host_asked_at = now
        if self._group is None:
            return mine, ask_host
        values = torch.tensor([*mine, ask_host], dtype=torch.int32, device="cpu")
        work = dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None
        self._pending.append((work, values))
        if len(self._pending) <= DELAY_STEPS:
            return [-1] * len(Source), False
        work, values = self._pending.popleft()
        work.wait()
        *ranks, asked = values.tolist()
        return ranks, bool(asked)

    def _look_at_clock(self) -> None:
        self._step_ends.append(time.monotonic())
        if self._deadline is None:
            return
        steps = list(self._step_ends)
        step_s = max((after - before for before, after in zip(steps, steps[1:])), default=0.0)
        # A save may just have begun when the last one is asked for.
        lead_s = max(self._least_lead_s, 2 * self._save_s + (DELAY_STEPS + 2) * step_s)
        if self._config.notice_s is not None:
            lead_s = self._config.notice_s
        left_s = self._deadline - steps[-1]
        if left_s <= lead_s and Source.DEADLINE not in self._flags:
            self._flags[Source.DEADLINE] = f"{left_s:.0f} s left"

    def _hear(self, source: Source, detail: str | None) -> None:
        if detail is None:
            self._flags.pop(source, None)
        else:
            self._flags[source] = detail

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        self._flags[Source[signal.Signals(number).name]] = ""
        if number != signal.SIGINT:
            return
        now = time.monotonic()
        if self._interrupted_at is None:
            self._interrupted_at = now
        # torchrun passes a Ctrl-C on that the terminal has sent to its workers already: that is one press.
        elif now - self._interrupted_at > _ONE_PRESS_S:
            raise KeyboardInterrupt


def leaving_on_signals(exit_code: int, *, takes_signals: bool = True) -> AbstractContextManager[None]:
    """Exit with a code of our own when asked to stop while there is nothing to save yet.

    Args:
        exit_code: what to exit with.
        takes_signals: whether signals are ours to catch; if not, nothing is done.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(exit_code)

    return _signals_caught_by(leave) if takes_signals else nullcontext()


@contextmanager
def _signals_caught_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, previous in before.items():
            # None stands for a handler that some library set in C, which Python cannot set again.
            signal.signal(number, signal.SIG_DFL if previous is None else previous)


def request_stop(run_dir: Path, reason: str) -> str:
    """Ask a running run to save and end; return a line that says what will happen.

    Raises:
        ValueError: if there is no such run, or it is not running.
    """
    number = max(attempt_numbers(run_dir), default=None)
    if number is None:
        raise ValueError(f"{run_dir}: no such run; expected a run directory, with attempts in it")
    record = decode(read(attempt_path(run_dir, number)))
    if record.get("ended"):
        raise ValueError(f"{run_dir}: is not running; its attempt {number} has ended")
    if is_alive(record) is False:
        raise ValueError(f"{run_dir}: is not running; the process of its attempt {number} is gone")
    write_stop_file(run_dir, number, reason)
    return (
        f"{run_dir}: asked attempt {number} (process {record.get('pid')} on {record.get('host')}) to stop; "
        "within a few steps it saves and exits with 75, and its command, given again, continues"
    )


# A save must fit the notice -----------------------------------------------------------------------


@dataclass(frozen=True)
class Notice:
    """How long before its end a machine gives notice, who gives it, and how late it may be heard."""

    seconds: float
    source: str
    late_s: float = 0.0


def notice_in_force(config: PreemptionConfig) -> Notice:
    """Return the notice that this machine gives."""
    cloud = config.resolved_cloud()
    late_s = config.poll_s if cloud else 0.0
    if config.notice_s is not None:
        return Notice(config.notice_s, "preemption.notice_s", late_s)
    if cloud == "gce":
        in_pod = "KUBERNETES_SERVICE_HOST" in os.environ
        return Notice(15.0, "GCE pod", late_s) if in_pod else Notice(30.0, "GCE", late_s)
    if cloud == "ec2":
        return Notice(120.0, "EC2", late_s)
    # What torchrun, Slurm and Kubernetes leave between SIGTERM and SIGKILL unless told otherwise.
    return Notice(30.0, "SIGTERM")


def fits_notice(notice: Notice, save_s: float | None, steps_at_risk: int, step_s: float | None) -> str:
    """Return a line that says whether a save fits into the notice, and what is lost otherwise.

    Args:
        notice: in force.
        save_s: measured seconds from the request of a save to its commit, None before the first.
        steps_at_risk: steps between two saves.
        step_s: measured seconds per step, or None.
    """
    save = "save not measured yet" if save_s is None else f"save {save_s:.1f} s (measured)"
    work = f"{steps_at_risk} steps" + ("" if step_s is None else f" ({steps_at_risk * step_s:.0f} s)")
    line = f"{save}, notice {notice.seconds:g} s ({notice.source}), at risk {work} of work between saves"
    # The step under way when it comes, and those until all ranks have agreed.
    unused_s = notice.late_s + (DELAY_STEPS + 1) * (step_s or 0.0)
    if save_s is not None and save_s + unused_s > notice.seconds:
        line += (
            f"; WARNING: the save, begun up to {unused_s:.1f} s after the notice, may not be done in time: "
            "save more often (checkpoint.every_steps), or to a faster place (root)"
        )
    return line
