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
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from ul_scale.checkpoint import files
from ul_scale.config import AnyAutoencoder
from ul_scale.data.indexing import build_index
from ul_scale.data.latents import LatentShard, shard_name, statistics
from ul_scale.data.progress import progress_bar
from ul_scale.data.stream import iterate
from ul_scale.evaluate.encode_jobs import (
    RECORDS,
    SPLITS,
    EncodeConfig,
    Job,
    Left,
    begin,
    make_job,
    read_records,
    text_config,
)
from ul_scale.evaluate.encoders import Encoders
from ul_scale.evaluate.restore import newest_step, restore_autoencoder
from ul_scale.models.text import load_text_encoder
from ul_scale.parallel.engine import Process
from ul_scale.parallel.mesh import broadcast_object, distributed, gather_objects
from ul_scale.train.prepare import build_autoencoder, latent_facts, read_autoencoder

SHARDS_AT_ONCE = 2
"""Of a rank with a GPU: while one is encoded, another is read, or uploaded. Without one there is a shard for
each core, and a thread for each shard: results must not depend on the number of threads. Memory is bounded
by the number of shards: of each the rank holds the tar and a few batches of images."""
WAIT_S = 24 * 3600.0
"""What the ranks that are done wait for the slowest; one that dies is noticed at once."""

T = TypeVar("T")
_log = logging.getLogger(__name__)


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
        text = _on_rank_0(process, partial(text_config, config))
        step = _on_rank_0(process, lambda: newest_step(run_dir) if step is None else step)
        chosen = [split for split in SPLITS if getattr(run.data, split)] if splits is None else splits
        jobs = [make_job(run_dir, step, run.data, split, config, text) for split in chosen]
        for job in jobs:
            left = _on_rank_0(process, partial(begin, job))
            there = job.num_shards - len(left.shards)
            if process.rank == 0 and there and not left.complete:
                _tell(f"{job.split}: {there} of {job.num_shards} shards are there")
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


def _cores() -> int:
    """Return the cores that there are for each rank of this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


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
    records = read_records(job)
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
