"""Train a run or run a sweep on a backend; what it does is the same everywhere.

Running the same command again continues: a finished run says so and does nothing.
"""

import argparse
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch.backends import local
from ul_scale import config as configs
from ul_scale.sweep.command import run as run_sweep
from ul_scale.train import worker

EXAMPLES = """\
examples:
  python launch/submit.py configs/quickstart/sweep.yaml --backend local --dry-run
  python launch/submit.py configs/quickstart/sweep.yaml --backend local
  python launch/submit.py configs/quickstart/autoencoder.yaml --processes 2 parallel.engine=fsdp
"""


def check(config: str, overrides: list[str], processes: int, *, show: bool) -> str:
    """Check a config before anything is started; return its kind. With ``show``, print the plan."""
    kind = configs.read_yaml(config).get("kind")
    if kind == "sweep":
        if processes > 1:
            raise ValueError("--processes is for a single run; a sweep runs several runs side by side")
        if show:
            run_sweep(config, overrides, dry_run=True)
        return kind
    resolved = configs.load(config, overrides)
    if processes > 1 and resolved.parallel.engine == "none":
        raise ValueError(f"--processes {processes} needs parallel.engine=fsdp; it is none")
    prepared = worker.prepare(resolved, processes)
    if show:
        print(worker.describe(prepared))
    return kind


def main() -> int:
    """Parse, check, submit."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="YAML file of a run or a sweep")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="overrides, such as train.steps=1000"
    )
    parser.add_argument("--backend", choices=["local"], default="local", help="where to run (default: local)")
    parser.add_argument("--processes", type=int, default=1, help="processes on this machine, under torchrun")
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print the plan, start nothing"
    )
    arguments = parser.parse_intermixed_args()
    try:
        kind = check(arguments.config, arguments.overrides, arguments.processes, show=arguments.dry_run)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    submission = arguments.config, arguments.overrides, arguments.processes
    if arguments.dry_run:
        print(f"command    {shlex.join(local.command(kind, *submission))}")
        return 0
    local.submit(kind, *submission)
    return 0


if __name__ == "__main__":
    sys.exit(main())
