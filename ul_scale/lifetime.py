"""Processes that a scheduler starts end with it, so that a rerun never meets live orphans."""

import ctypes
import os
import signal
import sys

SCHEDULER_PID = "UL_SCALE_SCHEDULER_PID"
"""Environment variable by which a scheduler tells its processes who it is."""
_PR_SET_PDEATHSIG = 1


def end_with_scheduler() -> None:
    """Ask the kernel to kill this process when the scheduler that started it dies, if one did."""
    scheduler = os.environ.get(SCHEDULER_PID)
    if scheduler is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(scheduler):  # it died before the call above
        os.kill(os.getpid(), signal.SIGKILL)
