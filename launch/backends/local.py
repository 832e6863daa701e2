"""Backend ``local``: this machine; torchrun where more than one process is asked for."""

import os
import sys
from pathlib import Path

TORCHRUN = Path(__file__).resolve().parent.parent / "torchrun.py"


def command(kind: str, config: str, overrides: list[str], processes: int) -> list[str]:
    """Return the command that trains a run or a sweep on this machine."""
    arguments = ["sweep", "run"] if kind == "sweep" else ["train"]
    launcher = ["-m"]
    if processes > 1:
        launcher = [str(TORCHRUN), "--standalone", f"--nproc-per-node={processes}", "-m"]
    return [sys.executable, *launcher, "ul_scale.cli", *arguments, config, *overrides]


def submit(kind: str, config: str, overrides: list[str], processes: int) -> None:
    """Become that command: signals and the exit code are its own."""
    arguments = command(kind, config, overrides, processes)
    sys.stdout.flush()
    os.execv(arguments[0], arguments)
