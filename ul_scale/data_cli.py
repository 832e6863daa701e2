"""``ul-scale data``: write, index, look at and check WebDataset shards; say what is in a batch."""

from pathlib import Path
from typing import Annotated

import typer

data_app = typer.Typer(no_args_is_help=True, help="Write, index, look at and check WebDataset shards.")


@data_app.command("build")
def data_build(
    source: Annotated[str, typer.Argument(help="Folder or .tar, local or in a bucket.", show_default=False)],
    dest: Annotated[str, typer.Argument(help="Folder or URL of the shards.", show_default=False)],
    kind: Annotated[str, typer.Option(help="images, videos, or auto: whichever there are.")] = "auto",
    split: Annotated[
        str | None, typer.Option(help="Split of the table, or of the folders train, val, …")
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            help="folders, none, or a .csv, .tsv, .jsonl, .parquet, .txt; by default folders, if no captions."
        ),
    ] = None,
    captions: Annotated[
        str | None, typer.Option(help="Table of captions, or none; by default .txt files beside the images.")
    ] = None,
    image_column: Annotated[
        str | None, typer.Option(help="Column of the tables that names the file.")
    ] = None,
    caption_column: Annotated[
        str | None, typer.Option(help="Column of the caption, or of a list of them.")
    ] = None,
    classes_from: Annotated[str | None, typer.Option(help="Shards whose class ids are taken over.")] = None,
    shortest_side: Annotated[
        int | None, typer.Option(help="Reduce larger images or videos to this, pixels.")
    ] = None,
    image_format: Annotated[str, typer.Option(help="keep, webp (lossless), png or jpg.")] = "keep",
    quality: Annotated[
        int | None, typer.Option(help="Of JPEGs that are written, 1 to 100; by default 95.")
    ] = None,
    frame_rate: Annotated[
        float | None, typer.Option(help="Frames per second of videos that have more.")
    ] = None,
    samples_per_shard: Annotated[int, typer.Option(help="Samples in a shard.")] = 1000,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave damaged files out.")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads; by default one per core.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be written, and stop.")] = False,
) -> None:
    """Write WebDataset shards and their index from images or videos, with classes or captions.

    Run again after an interruption, it writes only the shards that are missing. Damaged files, and what a
    table has but the source has not, are listed in DEST/_bad.jsonl.

    Examples:
    - `ul-scale data build imagenet/train shards/train --shortest-side 512`
    - `ul-scale data build ILSVRC2012_img_train.tar gs://bucket/imagenet/train`
    - `ul-scale data build ILSVRC2012_img_val.tar gs://bucket/imagenet/val --labels LOC_val_solution.csv`
    - `ul-scale data build k600/val shards/val --labels validate.csv --classes-from shards/train`
    - `ul-scale data build coco/train2017 shards/coco --captions captions.parquet --shortest-side 256`
    """
    import sys

    from ul_scale.data.writing.recode import Encoding
    from ul_scale.data.writing.shards import describe_build, write_shards
    from ul_scale.data.writing.sources import SourceOptions, find_source

    encoding = Encoding(
        shortest_side=shortest_side, image_format=image_format, quality=quality, frame_rate=frame_rate
    )
    options = SourceOptions(
        kind=kind,
        split=split,
        labels=labels,
        captions=captions,
        image_column=image_column,
        caption_column=caption_column,
        classes_from=classes_from,
    )
    found = find_source(source, options)
    if dry_run:
        print(describe_build(found, encoding, samples_per_shard))
        return
    print(found.describe(), file=sys.stderr)
    index = write_shards(
        found, dest, encoding, samples_per_shard=samples_per_shard, workers=workers, skip_bad=skip_bad
    )
    print(f"{dest}: {len(index)} samples, fingerprint {index.fingerprint}")


@data_app.command("index")
def data_index(
    url: Annotated[str, typer.Argument(help="Folder or URL of the shards.")],
    full: Annotated[bool, typer.Option("--full", help="Read all shards, also those that are known.")] = False,
    threads: Annotated[int, typer.Option(min=1, help="Shards that are read at a time.")] = 8,
) -> None:
    """Index existing WebDataset tars, without rewriting them; read only those that are new or have changed.

    Run again after an interruption, it goes on. Latents are indexed by `ul-scale encode`.

    Examples:
    - `ul-scale data index gs://bucket/imagenet/train`
    - `ul-scale data index s3://bucket/captions --threads 32`
    """
    from ul_scale.data.indexing import build_index

    index = build_index(url, threads=threads, full=full)
    print(f"{url}: {len(index)} samples in {len(index.shards)} shards, fingerprint {index.fingerprint}")


@data_app.command("inspect")
def data_inspect(
    url: Annotated[str, typer.Argument(help="Folder or URL of the shards.")],
    samples: Annotated[
        int, typer.Option(min=1, help="Samples to read, spread over the set, for what the index lacks.")
    ] = 1000,
    read_all: Annotated[bool, typer.Option("--all", help="Read every sample: exact, no estimates.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write a contact sheet, a PNG, to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Show what a set holds: classes, captions, resolutions, durations, statistics of latents.

    Counts and bytes are exact; the rest is estimated from some samples, and says from how many.

    Examples:
    - `ul-scale data inspect gs://bucket/imagenet/train --out sheet.png`
    - `ul-scale data inspect shards/train --all --json`
    """
    from ul_scale.data.look.inspect_text import show

    show(url, samples=None if read_all else samples, out=out, as_json=as_json)


@data_app.command("verify")
def data_verify(
    url: Annotated[str, typer.Argument(help="Folder or URL of the shards.")],
    config: Annotated[
        str | None, typer.Option(metavar="CONFIG", help="Also decode as this config's training would.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes; by default one per core. 0: no other process.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the lines to this file, not to stdout.")] = None,
    fast: Annotated[
        bool, typer.Option("--fast", help="Only compare the index with the shards' sizes and etags.")
    ] = False,
) -> None:
    """Decode every sample, and list the bad ones as JSON lines: shard, key, part, reason.

    Exit code: 0 if all are good, 1 if some are bad or a shard cannot be read, 2 if the index does not fit.

    Examples:
    - `ul-scale data verify gs://bucket/imagenet/train > bad.jsonl`
    - `ul-scale data verify shards/train --config configs/imagenet512/autoencoder.yaml`
    - `ul-scale data verify gs://bucket/imagenet/train --fast`
    """
    from ul_scale.config import load
    from ul_scale.data.look.verify import verify

    section = load(config).data if config else None
    raise typer.Exit(verify(url, config=section, workers=workers, out=out, fast=fast))


@data_app.command("order")
def order(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file.", show_default=False)],
    step: Annotated[int, typer.Option(help="The first step, from 0; also beyond train.steps.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]…")] = None,
    steps: Annotated[int, typer.Option(help="How many.")] = 1,
    world_size: Annotated[int, typer.Option(help="Data-parallel ranks.")] = 1,
) -> None:
    """Print what was, or will be, in a batch: JSON lines of step, rank, lane, epoch and keys.

    A key is dataset/shard/key. Nothing is replayed: any step takes the same time. Slots without weight are
    left out; a lane that goes over into its next epoch has a line for each.

    Examples:
    - `ul-scale data order configs/quickstart/autoencoder.yaml --step 700`
    - `ul-scale data order CONFIG --step 1000000 --steps 10 --world-size 64 | jq -r '.keys[]'`
    """
    from ul_scale.train.order import print_order

    print_order(config, overrides or [], step=step, steps=steps, world_size=world_size)
