"""``ul-scale``: each command is a few lines that call one function."""

from ul_scale.lifetime import end_with_scheduler

end_with_scheduler()  # before the imports that take seconds

import os  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Annotated  # noqa: E402

import typer  # noqa: E402
from rich.console import Console  # noqa: E402

from ul_scale.bench_cli import bench_app  # noqa: E402
from ul_scale.checkpoint.attempts import Fenced, RunBusy  # noqa: E402
from ul_scale.checkpoint.transfer import BrokenCheckpoint, SaveFailed  # noqa: E402
from ul_scale.checkpoint_cli import checkpoint_app  # noqa: E402

EXIT_FAILED, EXIT_BAD_INPUT = 1, 2

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Train Unified Latents, and sweep base-model sizes against latent bitrates.",
)
data_app = typer.Typer(no_args_is_help=True, help="Write and index WebDataset shards.")
sweep_app = typer.Typer(no_args_is_help=True, help="Plan, run and report scaling-law sweeps.")
app.add_typer(data_app, name="data")
app.add_typer(sweep_app, name="sweep")
app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(bench_app, name="bench")

ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="Overrides, such as train.steps=1000.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan, start nothing.")]


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    processes: Annotated[
        int, typer.Option(min=1, help="Of a dry run: as if torchrun had started so many.")
    ] = 1,
    profile: Annotated[
        bool, typer.Option("--profile", help="Write a profiler trace of a few steps into the run directory.")
    ] = False,
) -> None:
    """Train a run, or go on with it; the same command again continues where it was.

    Examples:
    - `ul-scale train configs/quickstart/autoencoder.yaml`
    - `ul-scale train configs/quickstart/autoencoder.yaml loss.loss_factor=3 train.steps=500`
    - `torchrun --nproc-per-node=2 -m ul_scale.cli train CONFIG parallel.engine=fsdp`
    """
    from ul_scale.config import load
    from ul_scale.train import worker
    from ul_scale.train.prepare import check_resumable, describe, prepare

    resolved = load(config, overrides)
    if dry_run:
        prepared = prepare(resolved, processes)
        check_resumable(prepared)
        print(describe(prepared))
        return
    if processes > 1:
        raise ValueError("--processes is for --dry-run; torchrun or launch/submit.py start processes")
    raise typer.Exit(worker.run(resolved, profile=profile))


@app.command()
def stop(
    run: Annotated[str, typer.Argument(help="Run directory or URL.")],
    reason: Annotated[str, typer.Option(help="For its log.")] = "",
) -> None:
    """Ask a running run to save and end; the command that started it continues it.

    Example: `ul-scale stop runs/autoencoder-c2.7-0123456789`
    """
    import getpass
    import socket

    from ul_scale.checkpoint.files import run_path
    from ul_scale.train.preemption import request_stop

    print(request_stop(run_path(run), reason or f"by {getpass.getuser()}@{socket.gethostname()}"))


@app.command()
def config(config: ConfigPath, overrides: Overrides = None) -> None:
    """Print a config with its defaults and overrides resolved.

    Example: `ul-scale config configs/quickstart/autoencoder.yaml optim.lr=1e-3`
    """
    from ul_scale.config import load, to_yaml

    print(to_yaml(load(config, overrides)), end="")


@app.command()
def encode(
    run: Annotated[str, typer.Argument(help="Run directory of an autoencoder.")],
    step: Annotated[int | None, typer.Option(help="Its checkpoint; by default the newest.")] = None,
) -> None:
    """Write the latents of an autoencoder's data into its run directory, for base models.

    Example: `ul-scale encode runs/autoencoder-c2.7-0123456789 --step 800`
    """
    from ul_scale.evaluate.encode import encode as encode_run

    for folder in encode_run(local_run(run), step):
        print(folder)


@app.command()
def evaluate(
    run: Annotated[str, typer.Argument(help="Run directory.")],
    settings: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]…")] = None,
    step: Annotated[list[int] | None, typer.Option(help="Checkpoints; by default the newest.")] = None,
) -> None:
    """Measure a run: bitrate, PSNR and reconstruction distance, or generation distance; with pictures.

    Examples:
    - `ul-scale evaluate runs/autoencoder-c2.7-0123456789`
    - `ul-scale evaluate runs/base-c2.7-tiny-l-0123456789 --step 125 --step 500 samples=1000`
    """
    import json

    from omegaconf import OmegaConf

    from ul_scale.config import apply_overrides, structure
    from ul_scale.evaluate.metrics import EvaluationConfig
    from ul_scale.evaluate.metrics import evaluate as evaluate_run
    from ul_scale.evaluate.restore import newest_step

    values = apply_overrides(OmegaConf.create({}), settings or [])
    evaluation = structure(EvaluationConfig, values, "evaluate")
    run_dir = local_run(run)
    for number in step or [newest_step(run_dir)]:
        print(json.dumps(evaluate_run(run_dir, number, evaluation), indent=1), flush=True)


@data_app.command("build")
def data_build(
    source: Annotated[str, typer.Argument(help="SOURCE/<class>/<image>")],
    dest: Annotated[str, typer.Argument(help="Folder or URL of the shards.")],
    shortest_side: Annotated[int | None, typer.Option(help="Resize to this many pixels.")] = None,
    image_format: Annotated[str, typer.Option(help="keep, webp (lossless), png or jpg.")] = "keep",
    samples_per_shard: Annotated[int, typer.Option(help="Samples in a shard.")] = 1000,
) -> None:
    """Write WebDataset shards and their index from class folders of images.

    Run again after an interruption, it writes only the shards that are missing.

    Example: `ul-scale data build imagenet/train shards/train --shortest-side 512`
    """
    from ul_scale.data.build import build_class_folders

    index = build_class_folders(
        source,
        dest,
        shortest_side=shortest_side,
        image_format=image_format,
        samples_per_shard=samples_per_shard,
    )
    print(f"{dest}: {len(index)} samples, fingerprint {index.fingerprint}")


@data_app.command("index")
def data_index(url: Annotated[str, typer.Argument(help="Folder or URL of the shards.")]) -> None:
    """Index existing WebDataset tars, without rewriting them.

    Example: `ul-scale data index gs://bucket/imagenet/train`
    """
    from ul_scale.data.index import build_index

    index = build_index(url)
    print(f"{url}: {len(index)} samples, fingerprint {index.fingerprint}")


@sweep_app.command("run")
def sweep_run(
    config: ConfigPath,
    overrides: Overrides = None,
    slots: Annotated[
        int | None, typer.Option(min=1, help="Runs at once; by default one per GPU or core.")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Run a sweep on this machine, then write its report; only what is missing is run.

    Examples:
    - `ul-scale sweep run configs/quickstart/sweep.yaml`
    - `ul-scale sweep run configs/quickstart/sweep.yaml --dry-run`
    - `ul-scale sweep run configs/quickstart/sweep.yaml 'sizes=[tiny-s]' 'seeds=[0,1]'`
    """
    from ul_scale.sweep import command

    raise typer.Exit(command.run(config, overrides or [], slots=slots, dry_run=dry_run))


@sweep_app.command("report")
def sweep_report(config: ConfigPath, overrides: Overrides = None) -> None:
    """Write the report of what a sweep has measured so far.

    Example: `ul-scale sweep report configs/quickstart/sweep.yaml`
    """
    from ul_scale.sweep import command

    command.report(config, overrides or [])


def local_run(run: str) -> Path:
    """Return a run directory on this machine."""
    if "://" in run:
        raise ValueError(f"{run}: is in a bucket; expected a local run directory, such as a copy of it")
    return Path(run).resolve()


def main() -> None:
    """Run a command. What a user can mend ends in one line; UL_SCALE_TRACEBACK=1 shows where it came from."""
    try:
        app()
    except (ValueError, OSError, ImportError, RunBusy, Fenced, BrokenCheckpoint, SaveFailed) as error:
        if os.environ.get("UL_SCALE_TRACEBACK"):
            raise
        Console(stderr=True, soft_wrap=True, highlight=False).print(
            f"error: {error}", style="red", markup=False
        )
        sys.exit(EXIT_BAD_INPUT if isinstance(error, ValueError) else EXIT_FAILED)


if __name__ == "__main__":
    main()
