"""Train a run or run a sweep on a backend; what it does is the same everywhere.

Running the same command again continues: a finished run says so and does nothing.
"""

import argparse
import importlib.util
import os
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from launch.backends import local, ray_train
from ul_scale import config as configs
from ul_scale.sweep.command import run as run_sweep
from ul_scale.train.prepare import check_resumable, describe, prepare

EXAMPLES = """\
examples:
  python launch/submit.py configs/quickstart/sweep.yaml --backend local --dry-run
  python launch/submit.py configs/quickstart/sweep.yaml --backend local
  python launch/submit.py configs/quickstart/autoencoder.yaml --processes 2 parallel.engine=fsdp
  python launch/submit.py configs/quickstart/autoencoder.yaml --backend ray --workers 1:4 parallel.engine=fsdp
"""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="YAML file of a run or a sweep")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="overrides, such as train.steps=1000"
    )
    parser.add_argument(
        "--backend", choices=["local", "ray"], default="local", help="where to run (default: local)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print the plan, start nothing"
    )
    here = parser.add_argument_group("backend local")
    here.add_argument("--processes", type=int, help="processes on this machine, under torchrun (default: 1)")
    ray = parser.add_argument_group("backend ray")
    ray.add_argument("--workers", metavar="N|MIN:MAX", help="a number, or as many as fit (default: 1)")
    ray.add_argument("--cpus-per-worker", metavar="N|auto", help="default: auto")
    ray.add_argument("--gpus-per-worker", metavar="0|1|auto", help="default: auto: 1 where there are GPUs")
    ray.add_argument(
        "--address", help="of a running cluster (default: RAY_ADDRESS, else an own one on this machine)"
    )
    ray.add_argument(
        "--max-restarts-without-progress", type=int, metavar="N", help="in a row, then stop (default: 3)"
    )
    return parser.parse_intermixed_args()


def run_local(arguments: argparse.Namespace) -> int:
    """Check, then become the command that trains or sweeps on this machine."""
    given = [
        name
        for name in (
            "workers",
            "cpus_per_worker",
            "gpus_per_worker",
            "max_restarts_without_progress",
            "address",
        )
        if getattr(arguments, name) is not None
    ]
    if given:
        raise ValueError(f"--{given[0].replace('_', '-')} is for --backend ray; the backend is local")
    processes = 1 if arguments.processes is None else arguments.processes
    kind = check_local(arguments.config, arguments.overrides, processes, show=arguments.dry_run)
    submission = kind, arguments.config, arguments.overrides, processes
    if arguments.dry_run:
        print(f"command    {shlex.join(local.command(*submission))}")
        return 0
    local.submit(*submission)
    return 0


def check_local(config: str, overrides: list[str], processes: int, *, show: bool) -> str:
    """Check a config before anything is started; return its kind. With ``show``, print the plan."""
    kind = configs.read_yaml(config).get("kind")
    if kind == "sweep":
        if processes > 1:
            raise ValueError("--processes is for a single run; a sweep runs several runs side by side")
        if show:
            run_sweep(config, overrides, dry_run=True)
        return kind
    resolved = configs.load(config, overrides)
    if processes < 1:
        raise ValueError(f"--processes {processes}: expected 1 or more")
    if processes > 1 and resolved.parallel.engine == "none":
        raise ValueError(f"--processes {processes} needs parallel.engine=fsdp; it is none")
    gpus = torch.cuda.device_count()
    if 0 < gpus < processes:
        raise ValueError(f"--processes {processes}: this machine has {gpus} GPUs; expected at most {gpus}")
    prepared = prepare(resolved, processes)
    check_resumable(prepared)
    if show:
        print(describe(prepared))
    return kind


def run_ray(arguments: argparse.Namespace) -> int:
    """Check, then train in a worker group of Ray Train."""
    if arguments.processes is not None:
        raise ValueError("--processes is for --backend local; with --backend ray give --workers")
    if configs.read_yaml(arguments.config).get("kind") == "sweep":
        raise ValueError(
            f"{arguments.config}: a sweep, which --backend local runs; --backend ray trains a single run"
        )
    address = arguments.address or os.environ.get("RAY_ADDRESS")
    options = ray_train.Options(
        workers=ray_train.parse_workers(arguments.workers or "1"),
        cpus_per_worker=number_or_auto("cpus-per-worker", arguments.cpus_per_worker),
        gpus_per_worker=number_or_auto("gpus-per-worker", arguments.gpus_per_worker),
        address=None if address == "local" else address,
        max_restarts=arguments.max_restarts_without_progress,
    )
    prepared = ray_train.check(configs.load(arguments.config, arguments.overrides), options)
    if arguments.dry_run:
        print(ray_train.describe(prepared, options))
        return 0
    if importlib.util.find_spec("ray") is None:
        raise ValueError("--backend ray needs the extra ray: pip install 'ul-scale[ray]'")
    return ray_train.submit(prepared, arguments.config, options)


def number_or_auto(name: str, text: str | None) -> int | None:
    if text is None or text == "auto":
        return None
    if not text.isdecimal():
        raise ValueError(f"--{name} {text}: expected a number or auto")
    return int(text)


def main() -> int:
    """Parse, check, submit."""
    arguments = parse()
    try:
        return run_ray(arguments) if arguments.backend == "ray" else run_local(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
