"""Write a source's samples as WebDataset tars, in a fixed mixed order; run again, it goes on."""

import hashlib
import json
import logging
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import Any, NamedTuple, TypeVar

from ul_scale.data import storage
from ul_scale.data.index import Index, open_index
from ul_scale.data.indexing import build_index
from ul_scale.data.progress import progress_bar
from ul_scale.data.writing.recode import (
    Encoding,
    import_av,
    is_animated,
    recode_image,
    recode_video,
    video_encoder,
)
from ul_scale.data.writing.shard_writer import ShardWriter
from ul_scale.data.writing.source_files import read_entry
from ul_scale.data.writing.sources import ANIMATION_SUFFIXES, Source, SourceSample
from ul_scale.keyed import permutation

BAD_FILES = "_bad.jsonl"
# With more bad files than this, something else is wrong.
MAX_BAD_FRACTION = 0.5
# An index counts a sample's bytes in 32 bits; its other parts and headers have room.
MAX_FILE_BYTES = 2**32 - 2**24
_RECORD = "_build.json"
_AHEAD_PER_WORKER = 2  # bounds memory: videos are held whole
_log = logging.getLogger(__name__)

AS_IT_IS = Encoding()
T = TypeVar("T")
R = TypeVar("R")


class BadFile(NamedTuple):
    """A file of a source that cannot be used, and why."""

    file: str
    reason: str


def write_shards(
    source: Source,
    dest: str,
    encoding: Encoding = AS_IT_IS,
    *,
    samples_per_shard: int = 1000,
    dataset: str | None = None,
    workers: int | None = None,
    skip_bad: bool = False,
) -> Index:
    """Write a source as shards with an index, or finish what a former call began.

    The order over shards is a fixed permutation of all samples, so that no shard is a single class, and
    does not depend on workers or interruptions. Every image and video is decoded once, so damaged ones are
    met here; with `_bad.jsonl` they and what tables miss are listed beside the shards.

    Args:
        source: what to write.
        dest: folder to write to; it may hold what the same call wrote before it was interrupted.
        encoding: how images and videos are stored.
        samples_per_shard: samples in every shard but the last, those of bad files included.
        dataset: first part of the samples' names, by default dest's base name.
        workers: threads that read and encode, by default one per core, or 16 for a remote source.
        skip_bad: leave bad files out; else they are an error, after all other shards have been written.

    Raises:
        ValueError: if dest holds something else, if files are bad, or an option does not fit.
        OSError: if a file cannot be read.
    """
    if f"{storage.open_folder(dest)[1]}/".startswith(f"{storage.open_folder(source.url)[1]}/"):
        raise ValueError(f"{dest}: lies inside the source {source.url}; choose a folder outside")
    encoding.check_kind(source.kind)
    if _animations(source) and (encoding.shortest_side or encoding.frame_rate):
        raise ValueError(
            f"{source.url}: holds animated images, which keep their bytes; expected no size or frame rate"
        )
    shards = _deal(source.samples, samples_per_shard)
    record = _Record(dest, _given(source, encoding, samples_per_shard))
    todo = [name for name, samples in shards.items() if not record.has(name, samples)]
    if todo:
        workers = workers or (os.cpu_count() or 1 if storage.is_local(source.fs) else 16)
        bad = _write_missing(
            source, encoding, {name: shards[name] for name in todo}, record, workers, skip_bad
        )
    else:
        try:
            return open_index(dest)
        except ValueError:  # interrupted after the last shard
            bad = []
    bad += record.bad()
    _write_bad_files(record, bad, source.missing)
    if bad and (not skip_bad or len(bad) > MAX_BAD_FRACTION * len(source.samples)):
        remedy = "mend them" if skip_bad else "mend them, or leave them out with --skip-bad"
        raise ValueError(
            f"{source.url}: {len(bad)} of {len(source.samples)} files cannot be used, such as {bad[0].file} "
            f"({bad[0].reason}); {remedy}. All are listed in {dest}/{BAD_FILES}"
        )
    left_out = {"skipped": len(bad), "missing": len(source.missing), "stills": record.stills()}
    if left_out["stills"]:
        _log.warning("%s: left out %d still images, for videos are asked for", dest, left_out["stills"])
    extra = {name: count for name, count in left_out.items() if count}
    return build_index(dest, dataset=dataset, classes=source.classes, extra=extra)


def describe_build(source: Source, encoding: Encoding, samples_per_shard: int) -> str:
    """Return what would be written, as lines for a person.

    Raises:
        ValueError: if an option does not fit the source.
    """
    encoding.check_kind(source.kind)
    shards = _deal(source.samples, samples_per_shard)
    size = sum(sample.entry.size for sample in source.samples)
    lines = [source.describe(), f"{len(shards)} shards of {samples_per_shard}; {size:,} bytes in the source"]
    if source.classes:
        counts = Counter(sample.label for sample in source.samples)
        sizes = [counts[label] for label in range(len(source.classes))]
        lines.append(f"classes: {_some(source.classes)}; {min(sizes)} to {max(sizes)} samples each")
    lines.append(f"first samples: {_some([sample.key for sample in next(iter(shards.values()))])}")
    return "\n".join(lines)


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def _deal(samples: list[SourceSample], samples_per_shard: int) -> dict[str, list[SourceSample]]:
    if samples_per_shard < 1:
        raise ValueError(f"{samples_per_shard} samples per shard; expected at least 1")
    shuffled = [samples[i] for i in permutation(len(samples), "build")]
    return {
        f"shard-{number:06d}.tar": shuffled[first : first + samples_per_shard]
        for number, first in enumerate(range(0, len(shuffled), samples_per_shard))
    }


def _given(source: Source, encoding: Encoding, samples_per_shard: int) -> str:
    """Return a hash of what the shards' bytes depend on, so that a build goes on with nothing else."""
    encoder = None
    if source.kind == "videos":
        import_av()
        encoder = video_encoder()[0] if encoding != AS_IT_IS else None
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps([asdict(encoding), encoder, samples_per_shard, source.classes]).encode())
    for sample in source.samples:
        sidecar = sample.sidecar.size if sample.sidecar else None
        what = [sample.key, sample.part, sample.label, sample.captions, sidecar is not None]
        digest.update(json.dumps(what).encode())
    return digest.hexdigest()


def _animations(source: Source) -> bool:
    """Say whether animated images are to be taken as videos."""
    return source.kind == "videos" and any(
        sample.part in ANIMATION_SUFFIXES.values() for sample in source.samples
    )


def _files_of(samples: list[SourceSample]) -> str:
    """Return a hash of a shard's source files as far as a listing tells: one that was mended has another."""
    sizes = [[sample.entry.size, sample.sidecar.size if sample.sidecar else None] for sample in samples]
    return hashlib.blake2b(json.dumps(sizes).encode(), digest_size=16).hexdigest()


def _write_missing(
    source: Source,
    encoding: Encoding,
    shards: dict[str, list[SourceSample]],
    record: "_Record",
    workers: int,
    skip_bad: bool,
) -> list[BadFile]:
    """Write shards, several samples at a time; return the bad files of those that were not finished."""

    def encode(sample: SourceSample) -> dict[str, bytes] | BadFile | None:
        try:
            return _encode(source, sample, encoding)
        except ValueError as error:
            return BadFile(sample.entry.name, str(error))

    unfinished: list[BadFile] = []
    samples = [sample for shard in shards.values() for sample in shard]
    with progress_bar("Writing shards", len(samples)) as advance, ThreadPoolExecutor(workers) as pool:
        encoded = _in_order(pool, encode, samples, workers * _AHEAD_PER_WORKER)
        try:
            for name, shard in shards.items():
                bad = _write_shard(record, name, shard, encoded, advance, skip_bad)
                if bad and not skip_bad:
                    unfinished += bad
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return unfinished


def _write_shard(
    record: "_Record",
    name: str,
    samples: list[SourceSample],
    encoded: Iterator[dict[str, bytes] | BadFile | None],
    advance: Callable[[int], None],
    skip_bad: bool,
) -> list[BadFile]:
    shard, bad, stills = ShardWriter(record.fs, f"{record.root}/{name}"), list[BadFile](), 0
    try:
        for sample, parts in zip(samples, encoded):
            if isinstance(parts, BadFile):
                _log.warning("%s: %s", parts.file, parts.reason)
                bad.append(parts)
            elif parts is None:
                stills += 1
            else:
                shard.write(sample.key, parts)
            advance(1)
    except BaseException:
        shard.discard()
        raise
    if bad and not skip_bad:
        shard.discard()
    else:
        record.add(name, shard.commit(), samples, bad, stills)
    return bad


def _encode(source: Source, sample: SourceSample, encoding: Encoding) -> dict[str, bytes] | None:
    """Return the parts under which a sample is stored, None for a still image where videos are asked for.

    Raises:
        ValueError: if a file of it is bad.
    """
    if sample.entry.size >= MAX_FILE_BYTES:
        raise ValueError(f"has {sample.entry.size:,} bytes; a sample has less than 4 GiB")
    data = read_entry(source.fs, sample.entry)
    if sample.part in ANIMATION_SUFFIXES.values() and source.kind == "videos" and not is_animated(data):
        return None
    if source.kind == "images" or sample.part in ANIMATION_SUFFIXES.values():
        part, data = recode_image(data, encoding)
    else:
        part, data = recode_video(data, sample.part, encoding)
    if part == "gif" and source.kind == "images":
        raise ValueError("is an animated GIF, and images are stills; build it with --kind videos")
    parts = {part: data}
    if sample.label is not None:
        parts["cls"] = str(sample.label).encode()
    captions = sample.captions
    if sample.sidecar is not None:
        captions = (_read_caption(source, sample.sidecar),)
    elif source.has_sidecars:
        raise ValueError("has no .txt file with a caption beside it")
    if captions:
        parts["txt"] = captions[0].encode()
    if len(captions) > 1:
        parts["json"] = json.dumps({"captions": captions}, ensure_ascii=False).encode()
    return parts


def _read_caption(source: Source, sidecar: Any) -> str:
    try:
        text = read_entry(source.fs, sidecar).decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"its caption {sidecar.name} is not UTF-8 text (byte {error.start})") from error
    if not text:
        raise ValueError(f"its caption {sidecar.name} is empty")
    return text


def _in_order(pool: Executor, function: Callable[[T], R], items: Iterable[T], ahead: int) -> Iterator[R]:
    """Yield function(item) in the items' order, with so many of them at work or waiting."""
    results: deque[Future[R]] = deque()
    for item in items:
        results.append(pool.submit(function, item))
        if len(results) >= ahead:
            yield results.popleft().result()
    while results:
        yield results.popleft().result()


def _write_bad_files(record: "_Record", bad: list[BadFile], missing: list[str]) -> None:
    path = f"{record.root}/{BAD_FILES}"
    bad = sorted(bad) + [BadFile(name, "in the table, but not in the source") for name in missing]
    if bad:
        lines = [json.dumps(file._asdict(), ensure_ascii=False) + "\n" for file in bad]
        storage.write_file(record.fs, path, "".join(lines).encode())
    elif record.fs.exists(path):
        record.fs.rm_file(path)


class _Record:
    """What a build was given (a hash) and has finished, in a file beside the shards."""

    def __init__(self, dest: str, given: str) -> None:
        self.fs, self.root = storage.open_folder(dest)
        self.fs.makedirs(self.root, exist_ok=True)
        self._given = given
        files = storage.list_files(dest) if self.fs.isdir(self.root) else {}  # buckets keep no empty folders
        self._present = {name: info["size"] for name, info in files.items()}
        self._shards = dict[str, dict[str, Any]]()
        if _RECORD in self._present:
            former = self._read(dest)
            if former["given"] != self._given:
                raise ValueError(
                    f"{dest} holds shards of other files or options; choose an empty folder or delete it"
                )
            self._shards = former["shards"]
        elif any(name.endswith(".tar") for name in self._present):
            raise ValueError(f"{dest} holds shards that are not from this build; choose an empty folder")
        else:
            self._write()

    def has(self, name: str, samples: list[SourceSample]) -> bool:
        """Say whether a shard was finished of these very files, and is still as long as it was."""
        shard = self._shards.get(name)
        return shard is not None and (self._present.get(name), _files_of(samples)) == (
            shard["size"],
            shard["files"],
        )

    def add(self, name: str, size: int, samples: list[SourceSample], bad: list[BadFile], stills: int) -> None:
        """Note that a shard is finished, and what was left out of it."""
        self._shards[name] = {"size": size, "files": _files_of(samples), "bad": bad, "stills": stills}
        self._write()

    def stills(self) -> int:
        """Return how many still images were left out of videos."""
        return sum(shard["stills"] for shard in self._shards.values())

    def bad(self) -> list[BadFile]:
        """Return the files that were left out of the shards."""
        return [BadFile(*file) for shard in self._shards.values() for file in shard["bad"]]

    def _read(self, dest: str) -> dict[str, Any]:
        content = storage.read_range(self.fs, f"{self.root}/{_RECORD}", 0, self._present[_RECORD])
        try:
            record = json.loads(content)
            return {"given": record["given"], "shards": record["shards"]}
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{dest}/{_RECORD} is damaged; choose an empty folder or delete it") from None

    def _write(self) -> None:
        record = {"given": self._given, "shards": dict(sorted(self._shards.items()))}
        storage.write_file(self.fs, f"{self.root}/{_RECORD}", json.dumps(record, indent=1).encode())
