"""What the launcher that started a training process provides, where it differs from a plain process."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Host:
    """A plain process or one of torchrun's is its own master; Ray Train's worker is a guest.

    Attributes:
        takes_signals: whether signals are ours to catch; a guest's code runs outside the main thread.
        ends_when_stopped: whether to end after the save that follows a notice. Ray would take a clean return
            for the end of the run and an exception for a failure: there, training goes on until the process
            is torn down. A person's stop and a deadline end it in any case.
        notice: asked now and then on every rank, in the training thread and at the same steps; returns why
            to stop, or None.
    """

    takes_signals: bool = True
    ends_when_stopped: bool = True
    notice: Callable[[], str | None] | None = None


PLAIN_PROCESS = Host()
