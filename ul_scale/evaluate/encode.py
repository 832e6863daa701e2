"""Write the latents z_clean of a data set as shards, for stage 2: on any number of ranks, and resumable.

Shard i holds the samples i·n to (i + 1)·n of its source, encoded in batches of its own, so that neither the
number of ranks nor an interruption changes a byte. Its record, in `_encoding/`, is written after it and says
that it is whole and what it adds to the statistics; the index, written last, says that the set is.

Shards and records are put in place in one step, and their sizes and offsets do not depend on arithmetic. So
two encoders of one set at once, which nothing prevents, do the work twice and leave the same as one; in a
bucket, the later may fail at the index, of which another writes the same, and finds all done when run again.
"""

import contextlib
import fcntl
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from ul_scale.checkpoint import files
from ul_scale.config import AnyAutoencoder
from ul_scale.data.config import DataConfig
from ul_scale.data.index import Index, open_index
from ul_scale.data.indexing import build_index
from ul_scale.data.latents import DTYPES, LatentShard, Summary, is_complete, shard_name, statistics
from ul_scale.data.progress import progress_bar
from ul_scale.data.stream import iterate
from ul_scale.evaluate.encoders import Encoders
from ul_scale.evaluate.restore import newest_step, restore_autoencoder
from ul_scale.models.text import PRECISIONS, TextConfig, load_text_encoder, read_text_config
from ul_scale.parallel.engine import Process
from ul_scale.parallel.mesh import broadcast_object, distributed, gather_objects
from ul_scale.train.conditions import text_facts
from ul_scale.train.prepare import build_autoencoder, latent_facts, latents_dir, read_autoencoder

SPLITS = ("train", "val")
RECORDS = "_encoding"
FORMAT_VERSION = 1

SHARDS_AT_ONCE = 2
"""Of a rank with a GPU: while one is encoded, another is read, or uploaded. Without one there is a shard for
each core, and a thread for each shard: results must not depend on the number of threads. Memory is bounded
by the number of shards: of each the rank holds the tar and a few batches of images."""
BATCHES_AHEAD = 2
"""Of each shard, read and decoded while one is encoded."""
WAIT_S = 24 * 3600.0
"""What the ranks that are done wait for the slowest; one that dies is noticed at once."""

T = TypeVar("T")
_log = logging.getLogger(__name__)


def is_encoded(run_dir: Path, step: int, split: str) -> bool:
    return is_complete(str(latents_dir(str(run_dir.parent), run_dir.name, step, split)))


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """How latents are made and stored."""

    dtype: str = "fp32"
    """Of what is stored, fp32 or fp16; the statistics are of what is stored."""
    flipped: bool = False
    """Also store the latents of the mirror images, from which ``data.horizontal_flip`` then chooses."""
    captions: bool | None = None
    """Keep captions; by default, if the source has them. A sample without one is then left out."""
    text_encoder: str | None = None
    """Also store the embeddings of captions, in fp16, by this transformers model: a folder, or a hub name."""
    max_tokens: int = 77
    """Of a caption; longer ones are cut."""
    text_precision: str = "fp32"
    """Of the text encoder's weights and activations, fp32 or bf16."""
    given_frames: int | None = None
    """Also store the latents of each clip's first so many frames, encoded alone, for base models that are
    conditioned on them: a clip's own latent frames also know of later ones."""
    batch_size: int = 100
    """Images that are encoded at a time, which may decide last bits."""
    samples_per_shard: int = 1000
    """Of the source, also where some of them are left out."""
    max_bad_fraction: float | None = None
    """Share of the samples that may be left out; ``data.max_bad_fraction`` of the run by default."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(
                f"dtype is {self.dtype}; expected one of {', '.join(DTYPES)} (.npy files hold no bf16)"
            )
        if self.text_precision not in PRECISIONS:
            raise ValueError(
                f"text_precision is {self.text_precision}; expected one of {', '.join(PRECISIONS)}"
            )
        if self.text_encoder is not None and self.captions is False:
            raise ValueError("text_encoder is set and captions are left out; expected captions with it")
        for name in ("batch_size", "samples_per_shard", "max_tokens", "given_frames"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 1 or more")
        if self.max_bad_fraction is not None and not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction is {self.max_bad_fraction}; expected 0 to 1")


def encode(
    run_dir: Path,
    step: int | None = None,
    splits: Sequence[str] | None = None,
    config: EncodeConfig | None = None,
) -> list[Path]:
    """Encode a run's own data with the first EMA of its encoder, or finish what a former call began.

    Of videos, the centre clips.

    Called by every rank that torchrun started, or by one process. Weights and activations are fp32, with
    PyTorch's default TF32 for convolutions on GPUs. Samples that cannot be decoded are left out, logged, and
    named in the records.

    Args:
        run_dir: of an autoencoder, on disk or in a bucket.
        step: its checkpoint; the newest complete one by default.
        splits: which of ``data.train`` and ``data.val``; by default those that the run has.
        config: how; by default in fp32.

    Returns:
        the folders of latent shards on rank 0, [] on the others. Their index also says the latents' shape,
        their std over all entries, the pixels that one stands for, the noise level that the decoder
        expects, and what there is beside them: ``text`` and ``given_frames``.

    Raises:
        ImportError: if captions are to be embedded, and transformers is missing.
        ValueError: if the run or its data do not fit, if the folder holds latents that were made otherwise,
            if too many samples are bad, or if the autoencoder has collapsed.
    """
    config = config or EncodeConfig()
    run_dir = run_dir.resolve() if files.is_local(run_dir) else run_dir
    reproducible = torch.backends.cudnn.flags(enabled=True, deterministic=True)
    with distributed(WAIT_S) as process, reproducible:
        run = read_autoencoder(run_dir)
        encoders: Encoders | None = None
        text = _on_rank_0(process, partial(_text, config))
        step = _on_rank_0(process, lambda: newest_step(run_dir) if step is None else step)
        chosen = [split for split in SPLITS if getattr(run.data, split)] if splits is None else splits
        jobs = [_job(run_dir, step, run.data, split, config, text) for split in chosen]
        for job in jobs:
            left = _on_rank_0(process, partial(_begin, job))
            if left.shards:
                encoders = encoders or Encoders(
                    restore_autoencoder(run_dir, step)[1],
                    load_text_encoder(text, process.device),
                    config.given_frames,
                    config.flipped,
                    process.device,
                )
                _encode_share(job, encoders, left, process)
            gather_objects(None, process)  # all shards are there
            _on_rank_0(process, partial(_finish, job, run, left))
        return [job.folder for job in jobs] if process.rank == 0 else []


@dataclass(frozen=True)
class Job:
    """The encoding of one split, as every rank knows it.

    Attributes:
        split: its name.
        index: of the images.
        data: how they are read.
        folder: of the latents.
        config: how latents are made and stored.
        settings: all that decides what the shards hold, as it is written down beside them.
        further: those of them that say what there is beside latents and captions.
        max_left_out: so many samples may be left out.
    """

    split: str
    index: Index
    data: DataConfig
    folder: Path
    config: EncodeConfig
    settings: dict[str, Any]
    further: dict[str, Any]
    max_left_out: int

    @property
    def num_shards(self) -> int:
        return -(-len(self.index) // self.config.samples_per_shard)

    def span(self, number: int) -> tuple[int, int]:
        """Return the first and one past the last sample of a shard."""
        samples = self.config.samples_per_shard
        return number * samples, min((number + 1) * samples, len(self.index))

    def check_left_out(self, count: int, reason: str) -> None:
        """Raise ``ValueError`` if so many samples are too many to leave out."""
        if count > self.max_left_out:
            raise ValueError(
                f"{self.index.url}: {count} of {len(self.index)} samples cannot be used and at most "
                f"{self.max_left_out} may be left out (raise --max-bad-fraction, or mend them), such as "
                f"{reason}"
            )


def _text(config: EncodeConfig) -> TextConfig | None:
    if config.text_encoder is None:
        return None
    return read_text_config(
        config.text_encoder, max_tokens=config.max_tokens, precision=config.text_precision
    )


def _job(
    run_dir: Path, step: int, data: DataConfig, split: str, config: EncodeConfig, text: TextConfig | None
) -> Job:
    if split not in SPLITS:
        raise ValueError(f"split is {split}; expected one of {', '.join(SPLITS)}")
    url = getattr(data, split)
    if url is None:
        raise ValueError(f"{run_dir}: data.{split} is not set, so there is nothing to encode")
    index = open_index(url)
    captions, further = config.captions, dict[str, Any]()
    if captions is None:
        captions = data.captions or text is not None or "txt" in index.parts
    if text is not None:
        further["text"] = text_facts(text)
    if config.given_frames is not None:
        if config.given_frames >= (data.clip_frames or 1):
            what = f"clips of {data.frames} frames" if data.clip_frames else "images"
            raise ValueError(f"given_frames is {config.given_frames}, but {run_dir} encodes {what}")
        further["given_frames"] = config.given_frames
    limit = data.max_bad_fraction if config.max_bad_fraction is None else config.max_bad_fraction
    return Job(
        split=split,
        index=index,
        # Read in this process, whose one other task is to feed the device.
        data=replace(
            data, captions=captions, workers=0, prefetch_steps=min(data.prefetch_steps, BATCHES_AHEAD)
        ),
        folder=latents_dir(str(run_dir.parent), run_dir.name, step, split),
        config=config,
        settings={
            "format_version": FORMAT_VERSION,
            "run": run_dir.name,
            "step": step,
            "source": index.identity,
            "dtype": config.dtype,
            "flipped": config.flipped,
            "captions": captions,
            "samples_per_shard": config.samples_per_shard,
            "batch_size": config.batch_size,
            **further,
        },
        further=further,
        max_left_out=int(limit * len(index)),
    )


def _cores() -> int:
    """Return the cores that there are for each rank of this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


@dataclass(frozen=True)
class Left:
    """What there is still to do.

    Attributes:
        shards: numbers of those that are not whole.
        left_out: samples that the others leave out.
        torn: names of half-written files; they stay to the end, for another encoder may be writing them.
        complete: whether there is nothing to do at all.
    """

    shards: list[int]
    left_out: int
    torn: list[str]
    complete: bool


def _on_rank_0(process: Process, act: Callable[[], T]) -> T:
    """Do something on rank 0 alone; return its result, or raise its error, on every rank."""
    result: T | None = None
    error: Exception | None = None
    if process.rank == 0:
        try:
            result = act()
        except Exception as caught:
            error = caught
    result, error = broadcast_object((result, error), process)
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def _begin(job: Job) -> Left:
    """Write down how the set is encoded, or compare; return what is left to do."""
    path = job.folder / RECORDS / "settings.json"
    if files.read(path) is None:
        if any(name.endswith(".tar") for name in files.list_names(job.folder)):
            raise ValueError(f"{job.folder}: holds shards that are not from encoding; move them elsewhere")
        files.make_dirs(path.parent)
        files.create_exclusive(path, files.encode(job.settings))
    found = files.decode(files.read(path))
    for key in {**job.settings, **found}:
        was, value = found.get(key), job.settings.get(key)
        if was != value:
            raise ValueError(
                f"{job.folder}: holds latents with {key} {was}, and {value} is asked for; "
                "delete that folder to encode anew"
            )
    records = _read_records(job)
    shards = [number for number in range(job.num_shards) if number not in records]
    complete = not shards and is_complete(str(job.folder))
    if records and not complete:
        _tell(f"{job.split}: {len(records)} of {job.num_shards} shards are there")
    torn = [name for name in files.sizes(job.folder) if name.endswith((files.TEMP_SUFFIX, ".partial"))]
    return Left(shards, sum(len(left_out) for _, left_out in records.values()), torn, complete)


def _read_records(job: Job) -> dict[int, tuple[Summary, dict[str, str]]]:
    """Return, for each shard that is whole, what it holds, and the samples left out with the reasons."""
    sizes = files.sizes(job.folder)
    numbers = [n for n in range(job.num_shards) if f"{RECORDS}/{shard_name(n)}.json" in sizes]
    texts = files.read_all(job.folder / RECORDS / f"{shard_name(n)}.json" for n in numbers)
    records = {}
    for number, record in zip(numbers, map(files.decode, texts)):
        if record and record["summary"]["size"] == sizes.get(f"{shard_name(number)}.tar"):
            records[number] = Summary(**record["summary"]), record["left_out"]
    return records


def _encode_share(job: Job, encoders: Encoders, left: Left, process: Process) -> None:
    """Encode this rank's part of the shards that are left."""
    numbers = left.shards[process.rank :: process.world_size]
    spans = [job.span(number) for number in numbers]
    left_out: list[str] = []
    on_gpu, reading = process.device.type != "cpu", job.data
    at_once = SHARDS_AT_ONCE if on_gpu else max(SHARDS_AT_ONCE, _cores())
    turn, given_up = threading.Semaphore(1 if on_gpu else at_once), threading.Event()
    if on_gpu:
        reading = replace(reading, threads=max(reading.threads, _cores()))

    def encode_shard(number: int) -> None:
        shard, reasons = LatentShard(job.config.dtype), dict[str, str]()

        def leave_out(name: str, reason: str) -> None:
            _log.warning("left out: %s", reason)
            reasons[name] = reason
            left_out.append(reason)
            advance(1)

        for batch in iterate(
            job.index, reading, *job.span(number), batch_size=job.config.batch_size, on_bad=leave_out
        ):
            if given_up.is_set():
                return
            with turn:
                encoded = encoders.encode(batch)
            for name, parts in zip(batch["keys"], encoded):
                # Its image's shard and key: unique in the set, and says where a latent came from.
                shard.write(name.removeprefix(f"{job.index.dataset}/"), **parts)
            advance(len(batch["keys"]))
        if left_out:
            job.check_left_out(left.left_out + len(left_out), left_out[-1])
        tar, summary = shard.finish()
        files.write_atomic(job.folder / f"{shard_name(number)}.tar", tar)
        record = {"summary": asdict(summary), "left_out": dict(sorted(reasons.items()))}
        files.write_atomic(job.folder / RECORDS / f"{shard_name(number)}.json", files.encode(record))

    title = job.split if process.world_size == 1 else f"{job.split}, rank 0 of {process.world_size}"
    count = sum(stop - start for start, stop in spans)
    unit = "clips" if job.data.clip_frames else "images"
    with (
        progress_bar(f"Encoding {title}", count, unit, shown=process.rank == 0 and count > 0) as advance,
        ThreadPoolExecutor(at_once, "ul-scale-encode", torch.set_num_threads, (1,)) as pool,
    ):
        try:
            for _ in pool.map(encode_shard, numbers):
                pass
        except BaseException:
            given_up.set()
            raise


def _finish(job: Job, config: AnyAutoencoder, left: Left) -> None:
    """Write the index of a set whose shards are all there."""
    if left.complete:
        return
    records = _read_records(job)
    missing = [shard_name(number) for number in range(job.num_shards) if number not in records]
    if missing:
        raise OSError(f"{job.folder}: {missing[0]}.tar is not there or not whole; run the command again")
    left_out = [reason for _, reasons in records.values() for reason in reasons.values()]
    if left_out:
        job.check_left_out(len(left_out), left_out[-1])
        _tell(f"{job.split}: left out {len(left_out)} of {len(job.index)} samples, named in {RECORDS}/")
    try:
        moments = statistics(summary for summary, _ in records.values())
    except ValueError as error:
        raise ValueError(f"{job.folder}: {error}") from None
    with torch.device("meta"):
        stage = build_autoencoder(config)
    extra = {
        "autoencoder": {"run": job.settings["run"], "step": job.settings["step"]},
        "source": job.index.identity,
        **latent_facts(stage),
        "left_out": len(left_out),
        **moments,
        **job.further,
    }
    with _alone(job.folder / RECORDS):
        build_index(str(job.folder), dataset=job.index.dataset, classes=job.index.classes, extra=extra)
    for name in left.torn:
        files.remove_tree(job.folder / name)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process of this machine is here; buckets have no such lock."""
    if not files.is_local(folder):
        yield
        return
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
