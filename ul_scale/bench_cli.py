"""``ul-scale bench``: what the trainer costs on this machine."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

bench_app = typer.Typer(no_args_is_help=True, help="Measure loop, checkpoints and models on this machine.")


def _in_a_folder(path: Path | None) -> Path | None:
    # Found out now rather than after minutes of measuring.
    if path is not None and not path.absolute().parent.is_dir():
        raise ValueError(f"--json is {path}; expected a file in an existing folder")
    return path


JsonFile = Annotated[
    Path | None,
    typer.Option("--json", callback=_in_a_folder, help="Also write the figures to this file."),
]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _write(path: Path | None, command: str, figures: dict[str, Any], device: Any) -> None:
    from datetime import UTC, datetime

    from ul_scale.bench.workload import hardware

    if path is not None:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        document = {"command": command, "time": now, "hardware": hardware(device), **figures}
        path.write_text(json.dumps(document, indent=1) + "\n")


def _process() -> Any:
    from ul_scale.parallel.engine import Process
    from ul_scale.parallel.mesh import local_device

    return Process(rank=0, world_size=1, device=local_device())


@bench_app.command()
def step(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="Overrides of --config.")
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="A run's config; by default a base model with steps above 50 ms.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of a block.")] = 20,
    rounds: Annotated[int, typer.Option(min=1, help="Pairs of blocks.")] = 10,
    json_file: JsonFile = None,
) -> None:
    """Compare the training loop with a bare one, in blocks of steps by turns.

    Both train the same module with the same optimizer, averages, clipping and batch in memory. Ours also
    keys its noise, watches, logs (once a block) and hears stop requests. Loading data is in neither.

    Examples:
    - `ul-scale bench step`
    - `ul-scale bench step --config configs/quickstart/autoencoder.yaml train.batch_size=256 --rounds 20`
    """
    from ul_scale.bench import step as bench
    from ul_scale.bench.workload import Workload
    from ul_scale.config import BaseRun, load
    from ul_scale.train.prepare import prepare

    process = _process()
    if config is None:
        if overrides:
            raise ValueError(f"override {overrides[0]!r} is given without --config; expected both or neither")
        work = bench.default_workload(process, _say)
    else:
        resolved = load(config, overrides)
        latents = prepare(resolved).latents if isinstance(resolved, BaseRun) else None
        work = Workload(resolved, process, latents)
    result = bench.compare_loops(work, steps=steps, rounds=rounds, say=_say)
    print(bench.report(result, process.device))
    _write(json_file, "step", result.as_json() | {"steps": steps}, process.device)


@bench_app.command()
def checkpoint(
    gigabytes: Annotated[
        float, typer.Option(help="Parameters, in GB; what is saved is four times as much.")
    ] = 1.0,
    root: Annotated[
        str, typer.Option(help="Local folder, gs:// or s3://, to save under; cleaned up.")
    ] = "runs",
    rounds: Annotated[int, typer.Option(min=1, help="Asynchronous and synchronous saves, each.")] = 3,
    calm_steps: Annotated[int, typer.Option(min=1, help="Steps before and after each async save.")] = 8,
    json_file: JsonFile = None,
) -> None:
    """Measure what asynchronous and synchronous saves cost training, and a restore.

    Examples:
    - `ul-scale bench checkpoint`
    - `ul-scale bench checkpoint --gigabytes 4 --root gs://bucket/bench --rounds 5`
    """
    from ul_scale.bench import checkpoint as bench
    from ul_scale.checkpoint.files import run_path

    if not gigabytes > 0:
        raise ValueError(f"--gigabytes is {gigabytes:g}; expected a number above 0")
    process, folder = _process(), run_path(root)
    bench.check_room(gigabytes, folder, process.device)
    work = bench.make_workload(gigabytes, process)
    result = bench.measure(work, folder, rounds=rounds, calm_steps=calm_steps, say=_say)
    print(bench.report(result, process.device))
    _write(json_file, "checkpoint", result.as_json() | {"root": root}, process.device)


@bench_app.command()
def model(
    size: Annotated[
        list[float] | None, typer.Option(help="Forward GFLOPs of a base model; by default 100 to 970.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="At most; halved until it fits.")] = 64,
    steps: Annotated[int, typer.Option(min=1, help="Steps of a round.")] = 10,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="All models alike.")] = True,
    smoke: Annotated[bool, typer.Option("--smoke", help="Tiny models, to see that it runs.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Measure images/s, MFU and memory of base models and stage 1, in bf16, beside DiTs of equal FLOPs.

    diffusers' DiT takes part where diffusers is installed.

    Examples:
    - `ul-scale bench model`
    - `ul-scale bench model --size 300 --size 970 --batch-size 128 --json model.json`
    """
    import dataclasses

    from ul_scale.bench import model as bench
    from ul_scale.bench.workload import describe_hardware, hardware

    process = _process()
    if process.device.type != "cuda" and not smoke:
        raise ValueError("this machine shows no GPU; expected one, or --smoke for tiny models on the CPU")
    settings = bench.SMOKE
    if not smoke:
        settings = bench.Settings(batch_size=batch_size, steps=steps, rounds=rounds, compiled=compiled)
    if size:
        if min(size) <= 0:
            raise ValueError(f"--size is {min(size):g}; expected forward GFLOPs above 0")
        settings = dataclasses.replace(settings, sizes_gflops=tuple(size))
    rows = bench.measure(settings, process, _say)
    print(bench.table(rows))
    print(f"\n{describe_hardware(hardware(process.device))}; {settings.precision}, ", end="")
    print("compiled" if settings.compiled else "not compiled")
    figures = {"settings": dataclasses.asdict(settings), "rows": [dataclasses.asdict(row) for row in rows]}
    _write(json_file, "model", figures, process.device)
