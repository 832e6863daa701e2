"""``ul-scale`` as it is, with its file operations drawn out, so that a killer outside can aim between them.

CHAOS_SLOW_S: seconds before each operation on a checkpoint's files. CHAOS_STOP_BEFORE: stop as if by SIGSTOP
before linking a file whose path ends so. CHAOS_PATIENCE_S: seconds without a heartbeat after which a run is
taken over, in place of two minutes.
"""

import functools
import os
import signal
import sys
import time

SLOW_S = float(os.environ.get("CHAOS_SLOW_S", 0))
STOP_BEFORE = os.environ.get("CHAOS_STOP_BEFORE")
PATIENCE_S = float(os.environ.get("CHAOS_PATIENCE_S", 0))
# rmtree's own events name files without their folder, relative to a descriptor.
EVENTS = ("open", "os.link", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")
NAMES = ("/checkpoints/", "COMMIT", ".distcp", ".metadata")


def draw_out(event: str, args: tuple) -> None:
    if event in EVENTS and any(name in str(arg) for arg in args[:2] for name in NAMES):
        time.sleep(SLOW_S)
        if STOP_BEFORE and event == "os.link" and str(args[1]).endswith(STOP_BEFORE):
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(0.5)  # the signal may meet another thread first


if __name__ == "__main__":
    from ul_scale import cli
    from ul_scale.checkpoint.attempts import start_attempt
    from ul_scale.train import worker

    if PATIENCE_S:
        patient = {"timeout_s": PATIENCE_S, "heartbeat_s": PATIENCE_S / 4}
        worker.start_attempt = functools.partial(start_attempt, **patient)
    if SLOW_S or STOP_BEFORE:
        sys.addaudithook(draw_out)
    cli.main()
