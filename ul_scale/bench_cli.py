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
    keys its noise, watches, logs (once a block) and hears stop requests. Loading data is in neither, nor what
    the system takes to hand freed memory out again.

    Examples:
    - `ul-scale bench step`
    - `ul-scale bench step --config configs/quickstart/autoencoder.yaml train.batch_size=256 --rounds 20`
    """
    from ul_scale.bench import step as bench
    from ul_scale.bench.workload import Workload
    from ul_scale.config import BaseRun, load
    from ul_scale.train.prepare import prepare

    process = _process()
    bench.keep_freed_memory()
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


@bench_app.command("index")
def index_command(
    samples: Annotated[int, typer.Option(min=1, help="Of the made-up set.")] = 100_000_000,
    folder: Annotated[str | None, typer.Option("--dir", help="Where to write it, for a while.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Fresh processes of each kind.")] = 3,
    json_file: JsonFile = None,
) -> None:
    """Measure opening the index of a large made-up set, its order at step 1,000,000, and their memory.

    Examples:
    - `ul-scale bench index`
    - `ul-scale bench index --samples 10000000 --dir /scratch`
    """
    from dataclasses import asdict

    from ul_scale.bench import index as bench

    figures = bench.run(samples, rounds, folder, _say)
    print(bench.report(figures))
    rows = {kind: [asdict(one) for one in ones] for kind, ones in figures.items()}
    _write(json_file, "index", {"samples": samples, **rows}, _process().device)


@bench_app.command()
def loader(
    data: Annotated[
        str | None, typer.Option(help="Folder or URL of indexed shards; by default images are made up.")
    ] = None,
    against: Annotated[str, typer.Option(help="Peers, separated by commas.")] = (
        "webdataset,files,mosaicml-streaming,litdata"
    ),
    venvs: Annotated[
        Path | None, typer.Option(help="Folder with a virtual environment per peer, named like it.")
    ] = None,
    python: Annotated[
        list[str] | None, typer.Option(metavar="PEER=PATH", help="The interpreter that has a peer.")
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="bytes, 64, 256, video (the default), or with other suffixes.")
    ] = None,
    images: Annotated[int, typer.Option(min=64, help="To make, or to take from --data.")] = 5000,
    videos: Annotated[int, typer.Option(min=8, help="To make, or to take from --data.")] = 64,
    workers: Annotated[int, typer.Option(min=1, help="Processes that read and decode, of each loader.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each loader, by turns.")] = 5,
    work_dir: Annotated[Path, typer.Option(help="Keeps what was made and written, for another time.")] = Path(
        "runs/bench-loader"
    ),
    json_file: JsonFile = None,
) -> None:
    """Compare how fast batches arrive: ours and other loaders, on the same samples, by turns.

    Each peer is run by the interpreter that has it: of --python, of --venvs, or this one. It needs its own
    package, torch, numpy and Pillow there. More tasks: bytes-in-process (no workers), 64-our-decoder and
    256-our-decoder (peers decode with ours, where they can import it, so that reading is what differs).

    Examples:
    - `ul-scale bench loader --against files`
    - `ul-scale bench loader --venvs venvs --json loader.json`
    - `ul-scale bench loader --data gs://bucket/imagenet/train --task 256 --python webdataset=venv/bin/python`
    """
    import dataclasses

    import torch
    from rich.console import Console

    from ul_scale.bench import loader as bench
    from ul_scale.bench.loader_result import remarks, table
    from ul_scale.bench.workload import describe_hardware, hardware

    pythons = {}
    for item in python or []:
        name, _, path = item.partition("=")
        if not path:
            raise ValueError(f"--python is {item!r}; expected PEER=PATH")
        pythons[name] = path
    for name in task or []:
        if name not in bench.TASKS:
            raise ValueError(f"--task is {name!r}; expected one of {', '.join(bench.TASKS)}")
    tasks = [bench.TASKS[name] for name in task or bench.DEFAULT_TASKS]
    tasks = [dataclasses.replace(one, workers=workers if one.workers else 0) for one in tasks]
    peers, missing = bench.find_peers([name for name in against.split(",") if name], pythons, venvs)
    result = bench.measure(
        work_dir, tasks, peers, data=data, num_images=images, num_videos=videos, rounds=rounds, say=_say
    )
    result.not_measured += missing
    Console(width=120).print(table(result))
    print("\n".join(["", *remarks(result), describe_hardware(hardware(torch.device("cpu")))]))
    settings = {"data": data, "tasks": [dataclasses.asdict(one) for one in tasks], "rounds": rounds}
    _write(json_file, "loader", {"settings": settings} | result.as_json(), torch.device("cpu"))
