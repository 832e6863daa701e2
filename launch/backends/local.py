"""Backend ``local``: this machine; torchrun where more than one process is asked for."""

import subprocess
import sys


def command(kind: str, config: str, overrides: list[str], processes: int) -> list[str]:
    """Return the command that trains a run or a sweep on this machine."""
    arguments = ["sweep", "run"] if kind == "sweep" else ["train"]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    else:
        launcher = ["-m"]
    return [sys.executable, *launcher, "ul_scale.cli", *arguments, config, *overrides]


def submit(kind: str, config: str, overrides: list[str], processes: int) -> int:
    """Run in the foreground; return the exit code."""
    process = subprocess.Popen(command(kind, config, overrides, processes))
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue  # the terminal has sent it to the process too, which saves and ends
