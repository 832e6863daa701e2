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
from ul_scale.data_cli import data_app  # noqa: E402
from ul_scale.flops_cli import flops  # noqa: E402

EXIT_FAILED, EXIT_BAD_INPUT = 1, 2

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Train Unified Latents, and sweep base-model sizes against latent bitrates.",
)
sweep_app = typer.Typer(no_args_is_help=True, help="Plan, run and report scaling-law sweeps.")
app.add_typer(data_app, name="data")
app.add_typer(sweep_app, name="sweep")
app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(bench_app, name="bench")
app.command()(flops)

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
    from ul_scale.config import AutoencoderRun, load
    from ul_scale.train import worker
    from ul_scale.train.collapse import warn_of_loss_factor
    from ul_scale.train.prepare import check_resumable, describe, prepare

    resolved = load(config, overrides)
    if dry_run:
        prepared = prepare(resolved, processes)
        check_resumable(prepared)
        print(describe(prepared))
        if isinstance(resolved, AutoencoderRun):
            if warning := warn_of_loss_factor(resolved.loss, resolved.model):
                print(warning)
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
    from ul_scale.config import load_any, to_yaml

    print(to_yaml(load_any(config, overrides)), end="")


@app.command()
def encode(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN|CONFIG", help="Run directory or URL of an autoencoder; or config of a fixed one."
        ),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="Overrides of CONFIG.")
    ] = None,
    step: Annotated[int | None, typer.Option(help="Its checkpoint; by default the newest.")] = None,
    split: Annotated[list[str] | None, typer.Option(help="train, val; by default those it has.")] = None,
    dtype: Annotated[str, typer.Option(help="Of what is stored: fp32, or fp16 at half the size.")] = "fp32",
    flipped: Annotated[bool, typer.Option("--flipped", help="Also store mirror images' latents.")] = False,
    given_frames: Annotated[
        int | None, typer.Option(help="Of videos: also store the latent of the first so many frames.")
    ] = None,
    captions: Annotated[bool | None, typer.Option(help="Keep captions; by default if there are any.")] = None,
    text_encoder: Annotated[
        str | None, typer.Option(help="Also store captions' embeddings: folder or hub name of a model.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Of a caption; longer ones are cut.")] = 77,
    text_precision: Annotated[str, typer.Option(help="Of the text encoder: fp32 or bf16.")] = "fp32",
    batch_size: Annotated[int, typer.Option(min=1, help="Images that are encoded at a time.")] = 100,
    samples_per_shard: Annotated[int, typer.Option(min=1, help="Of the source's samples.")] = 1000,
    max_bad_fraction: Annotated[
        float | None, typer.Option(help="Share that may be left out; by default data.max_bad_fraction.")
    ] = None,
) -> None:
    """Write the latents of an autoencoder's data into its run directory, for base models.

    Run again after an interruption, on any number of processes, it writes only the shards that are missing.

    Examples:
    - `ul-scale encode runs/autoencoder-c2.7-0123456789 --step 800`
    - `ul-scale encode gs://bucket/runs/autoencoder-c2.7-0123456789 --dtype fp16 --flipped --split train`
    - `ul-scale encode RUN --text-encoder google/t5-v1_1-base`
    - `ul-scale encode RUN --given-frames 5`
    - `ul-scale encode configs/baselines/sd_vae.yaml model.weights=FOLDER data.train=shards/train`
    - `torchrun --nproc-per-node=8 -m ul_scale.cli encode RUN`
    """
    from ul_scale.checkpoint.files import run_path
    from ul_scale.checkpoint.inspect import check_steps
    from ul_scale.evaluate.encode import EncodeConfig
    from ul_scale.evaluate.encode import encode as encode_run
    from ul_scale.evaluate.fixed_run import fixed_run

    is_config = run.endswith((".yaml", ".yml"))
    if overrides and not is_config:
        raise ValueError(f"{overrides[0]} is given with the run {run}; overrides are of a CONFIG only")
    if is_config and step:
        raise ValueError(f"--step is {step}, but {run} is not trained; expected none, or 0")
    config = EncodeConfig(
        dtype=dtype,
        flipped=flipped,
        given_frames=given_frames,
        captions=captions,
        text_encoder=text_encoder,
        max_tokens=max_tokens,
        text_precision=text_precision,
        batch_size=batch_size,
        samples_per_shard=samples_per_shard,
        max_bad_fraction=max_bad_fraction,
    )
    run_dir = fixed_run(run, overrides or []) if is_config else run_path(run)
    check_steps(run_dir, [] if step is None else [step])
    for folder in encode_run(run_dir, step, split or None, config):
        print(folder)


@app.command()
def bitrate(
    run: Annotated[str, typer.Argument(help="Run directory of an autoencoder or a base model.")],
    data: Annotated[str, typer.Option(help="Split of its data: val, or train.")] = "val",
    step: Annotated[int | None, typer.Option(help="Checkpoint; by default the newest.")] = None,
    samples: Annotated[int, typer.Option(min=2, help="The first so many of the split.")] = 1000,
    times_per_image: Annotated[int, typer.Option(min=1, help="Noise levels per image.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time; changes nothing.")] = 100,
) -> None:
    """Measure the bits per pixel of a run's latents, an upper bound, with its 95 % confidence interval.

    Under an autoencoder's own prior, or under a base model. Held-out data bound the bits; on training data
    they are fewer by as much as the prior has overfitted.

    Examples:
    - `ul-scale bitrate runs/autoencoder-c2.7-0123456789 --data val`
    - `ul-scale bitrate runs/autoencoder-c2.7-0123456789 --data train --samples 5000`
    """
    import json

    from ul_scale.evaluate.bitrate import measure_bitrate

    figures = measure_bitrate(
        local_run(run),
        step,
        split=data,
        samples=samples,
        times_per_image=times_per_image,
        seed=seed,
        batch_size=batch_size,
    )
    print(json.dumps(figures, indent=1))


@app.command()
def evaluate(
    run: Annotated[str, typer.Argument(help="Run directory.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]…",
            help="samples, base_steps, decoder_steps, times_per_image, batch_size, seed, features; "
            "base_sampler and decoder_sampler (ancestral, ddim, dpmpp_2m); guidance, guidance_interval.",
        ),
    ] = None,
    step: Annotated[list[int] | None, typer.Option(help="Checkpoints; by default the newest.")] = None,
) -> None:
    """Measure a run: bitrate, PSNR and reconstruction distance, or generation distance; with pictures.

    Examples:
    - `ul-scale evaluate runs/autoencoder-c2.7-0123456789`
    - `ul-scale evaluate runs/base-c2.7-tiny-l-0123456789 --step 125 --step 500 samples=1000`
    - `ul-scale evaluate RUN base_sampler=dpmpp_2m base_steps=20 guidance=2 'guidance_interval=[-5,1]'`
    """
    import json

    from omegaconf import OmegaConf

    from ul_scale.checkpoint.inspect import check_steps
    from ul_scale.config import apply_overrides, structure
    from ul_scale.evaluate.metrics import EvaluationConfig, evaluation_dir
    from ul_scale.evaluate.metrics import evaluate as evaluate_run
    from ul_scale.evaluate.restore import newest_step

    values = apply_overrides(OmegaConf.create({}), settings or [])
    evaluation = structure(EvaluationConfig, values, "evaluate")
    run_dir = local_run(run)
    check_steps(run_dir, step or [])
    for number in step or [newest_step(run_dir)]:
        print(json.dumps(evaluate_run(run_dir, number, evaluation), indent=1), flush=True)
        print(f"figures and pictures: {evaluation_dir(run_dir, number)}", file=sys.stderr)


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
    scheme, is_url, _ = run.partition("://")
    if is_url:  # it may hold credentials
        raise ValueError(
            f"{scheme}://…: is in a bucket; expected a local run directory, such as a copy of it"
        )
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
