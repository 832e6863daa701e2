"""``ul-scale checkpoint``: what exists, whether it is whole, and weights for use elsewhere."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

checkpoint_app = typer.Typer(
    no_args_is_help=True, help="List, verify, convert and export the checkpoints of a run."
)

Run = Annotated[str, typer.Argument(metavar="RUN", help="Run directory: a local folder, gs:// or s3://.")]
Step = Annotated[int | None, typer.Option(help="Completed steps; by default the newest.")]


@checkpoint_app.command("list")
def list_command(
    run: Run, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False
) -> None:
    """Show a run's complete checkpoints, and why each is kept.

    Examples:
    - `ul-scale checkpoint list runs/autoencoder-c2.7-0123456789`
    - `ul-scale checkpoint list gs://bucket/runs/base-c2.7-0123456789 --json`
    """
    from ul_scale.checkpoint import inspect
    from ul_scale.checkpoint.files import run_path

    info = inspect.describe(run_path(run))
    if as_json:
        print(json.dumps(inspect.as_json(info), indent=1))
        return
    state = "no SUCCESS yet" if info.done_at_step is None else f"done at step {info.done_at_step}"
    print(f"run            {info.run_id}: {state}")
    print(f"EMAs           {', '.join(info.ema_names)}")
    if info.ema_snapshots:
        first, last = info.ema_snapshots[0], info.ema_snapshots[-1]
        print(f"EMA snapshots  {len(info.ema_snapshots)}, steps {first} to {last}")
    if not info.checkpoints:
        print("no complete checkpoint")
        return
    _print_table(inspect.COLUMNS, inspect.rows(info))


def _print_table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    console = Console()
    if console.is_terminal:
        table = Table()
        for column in columns:
            table.add_column(column, no_wrap=True)
        for row in rows:
            table.add_row(*row)
        console.print(table)
        return
    widths = [max(map(len, column)) for column in zip(columns, *rows)]
    for row in (columns, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


@checkpoint_app.command()
def verify(
    run: Run,
    step: Annotated[str | None, typer.Option(help="Completed steps, or all; by default the newest.")] = None,
) -> None:
    """Compare every file of a checkpoint with the size and SHA-256 that were saved with it.

    Exit code 1 if a file is missing or differs; a line for each.

    Examples:
    - `ul-scale checkpoint verify runs/autoencoder-c2.7-0123456789`
    - `ul-scale checkpoint verify gs://bucket/runs/base-c2.7-0123456789 --step all`
    """
    from ul_scale.checkpoint import inspect, store
    from ul_scale.checkpoint.convert import pick_step
    from ul_scale.checkpoint.files import run_path

    run_dir = run_path(run)
    inspect.read_config(run_dir)
    every = step == "all"
    if step is not None and not every and not step.isdecimal():
        raise ValueError(f"--step is {step!r}; expected completed steps, or all")
    one = pick_step(run_dir, None if step is None or every else int(step))
    broken = False
    for each in store.complete_steps(run_dir) if every else [one]:
        total = sum(info["size"] for info in store.read_commit(run_dir, each).files.values())
        faults = []
        with _progress() as progress:
            task = progress.add_task(f"step {each}", total=total)
            for size, fault in inspect.verify_files(run_dir, each):
                progress.advance(task, size)
                faults += [fault] if fault else []
        for fault in faults:
            print(f"step {each}: {fault}")
        if not faults:
            print(f"step {each}: whole, {inspect.human_bytes(total)}")
        broken = broken or bool(faults)
    if broken:
        raise typer.Exit(1)


def _progress() -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


@checkpoint_app.command()
def convert(run: Run) -> None:
    """Make a DeepSpeed run's newest checkpoint loadable at any world size, by every engine.

    Those of engines none and fsdp already are. Nobody may be training the run meanwhile.

    Example: `ul-scale checkpoint convert runs/base-c2.7-0123456789`
    """
    from ul_scale.checkpoint.convert import convert as convert_newest
    from ul_scale.checkpoint.files import run_path

    step = convert_newest(run_path(run))
    if step is None:
        print("nothing to convert: the newest checkpoint loads at any world size")
    else:
        print(f"step {step} now loads at any world size, with every engine")


@checkpoint_app.command()
def export(
    run: Run,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Local folder to write to.")],
    step: Step = None,
    weights: Annotated[
        str, typer.Option(help="ema (the one that is evaluated), model, or an EMA's name, see list.")
    ] = "ema",
    ema_width: Annotated[
        float | None, typer.Option(help="Rebuild an EMA of this relative width from EMA snapshots.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the stored weights: fp32, bf16 or fp16.")] = "fp32",
) -> None:
    """Write model.safetensors and config.json, which load without the trainer.

    In Python: `ul_scale.exported.load_exported(OUT, "cuda")`.

    Examples:
    - `ul-scale checkpoint export runs/base-c2.7-0123456789 exported --dtype bf16`
    - `ul-scale checkpoint export runs/base-c2.7-0123456789 exported --ema-width 0.07 --step 500`
    """
    from ul_scale.checkpoint.convert import export as export_weights
    from ul_scale.checkpoint.files import run_path

    if ema_width is not None and weights != "ema":
        raise ValueError(f"--ema-width is {ema_width} and --weights is {weights!r}; expected one of them")
    config = export_weights(run_path(run), out, step=step, weights=weights, ema_width=ema_width, dtype=dtype)
    origin = config["provenance"]
    print(f"{out}: {origin['weights']} at step {origin['step']}, {dtype}")
