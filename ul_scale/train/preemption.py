"""Stop requests: a signal on any rank becomes one decision of all ranks, at the same step."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@contextmanager
def leaving_on_signals(exit_code: int) -> Iterator[None]:
    """Exit with a code of our own when asked to stop while there is nothing to save yet."""

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(exit_code)

    before = {number: signal.signal(number, leave) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopRequest:
    """Catches SIGTERM, SIGUSR1 and SIGINT; ``agreed`` is asked once a step on every rank.

    A flag travels by an asynchronous reduction on CPU that is waited for one step later, so that no
    step waits for it and all ranks stop at the same step. A second SIGINT interrupts at once.
    """

    def __init__(self, world_size: int):
        self._world_size = world_size
        self._requested = False
        self._pending: tuple[dist.Work, torch.Tensor] | None = None
        for number in STOP_SIGNALS:
            signal.signal(number, self._request)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self._requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def agreed(self) -> bool:
        """Return whether any rank had been asked to stop, one step ago."""
        if self._world_size == 1:
            return self._requested
        flag = torch.tensor([int(self._requested)])
        agreed = False
        if self._pending is not None:
            work, previous = self._pending
            work.wait()
            agreed = bool(previous.item())
        work = dist.all_reduce(flag, op=dist.ReduceOp.MAX, async_op=True)
        assert work is not None
        self._pending = (work, flag)
        return agreed
