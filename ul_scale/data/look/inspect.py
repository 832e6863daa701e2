"""What is in a set of shards: counts, classes, captions, resolutions, lengths, statistics of latents.

Counts and bytes come from the index and are exact. Everything else is measured on samples spread over the
set (or on all of them), mostly from their headers: an image that is cut short shows only in `verify`.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, pairwise
from typing import Any

import numpy as np

from ul_scale.data import storage
from ul_scale.data.fetch import READS_IN_FLIGHT, Fetcher
from ul_scale.data.index import Index
from ul_scale.data.look.survey import Report, Survey, Video
from ul_scale.data.plan import cut_chunks
from ul_scale.data.sample import Sample
from ul_scale.data.tar import ABSENT
from ul_scale.keyed import seed_of

# Selected samples that lie close together are read by one request, with what is between them, bytes.
_REQUEST_BYTES = 1_000_000
_SHOWN, _CLASSES_SHOWN = 5, 10

# Edges of the histograms; the last bin has no end.
_SIDE_EDGES = (0, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096)
_ASPECT_EDGES = (0, 0.5, 0.67, 0.8, 0.95, 1.05, 1.25, 1.5, 2.0)
_WORD_EDGES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)
_DURATION_EDGES = (0, 0.5, 1, 2, 5, 9, 11, 20, 30, 60, 120, 300, 600)
_FRAME_EDGES = (0, 1, 2, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
_CLASS_EDGES = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 100_000)


def inspect_set(
    index: Index,
    *,
    samples: int | None = 1000,
    policy: storage.ReadPolicy | None = None,
    advance: Callable[[int], None] = lambda samples: None,
) -> Report:
    """Describe a set; the result holds only what JSON can.

    Args:
        index: the set.
        samples: how many are read, spread over the set; None reads all.
        policy: of the reads.
        advance: called with the number of samples that were read since the last call.

    Returns:
        `shards`, `samples`, `bytes_per_sample` and `parts` are exact. `classes`, `captions`, `images`,
        `videos`, `latents` (each None where the set has none) and `unreadable` are of the `examined`.

    Raises:
        OSError: if a read fails; that says nothing of the sample.
        ValueError: if `samples` is less than 1.
        ImportError: if the set has videos and PyAV is not installed.
    """
    numbers = spread(len(index), len(index) if samples is None else samples)
    survey = Survey()
    for sample in read_samples(index, numbers, policy or storage.ReadPolicy()):
        survey.add(sample)
        advance(1)
    captioned = bool(survey.captions or survey.empty_captions) or "txt" in index.parts
    return {
        "url": index.url,
        "dataset": index.dataset,
        "fingerprint": index.fingerprint,
        "shards": {"count": len(index.shards), "bytes": _stats([shard.size for shard in index.shards])},
        "samples": len(index),
        "bytes_per_sample": _stats(index.size),
        "parts": {part: _describe_part(index, column) for column, part in enumerate(index.parts)},
        "examined": {"samples": len(numbers), "exact": len(numbers) == len(index)},
        "classes": _describe_classes(survey, index.classes) if "cls" in index.parts else None,
        "captions": _describe_captions(survey) if captioned else None,
        "images": _describe_images(survey) if survey.images else None,
        "videos": _describe_videos(survey.videos) if survey.videos else None,
        "latents": {part: moments.describe() for part, moments in sorted(survey.latents.items())} or None,
        "unreadable": {"samples": survey.unreadable, "first": survey.reasons},
    }


def spread(total: int, count: int) -> np.ndarray:
    """Return the numbers of at most `count` of `total` samples, ascending: one from each of equal stretches.

    Its place in the stretch is drawn, by a fixed key: every k-th sample would see one class of a set whose
    classes take turns.
    """
    if count < 1:
        raise ValueError(f"{count} samples; expected at least 1")
    count = min(count, total)
    ends = np.arange(count + 1) * total // max(count, 1)
    draws = np.random.Generator(np.random.Philox(seed_of("spread", total, count))).random(count)
    return ends[:-1] + (draws * np.diff(ends)).astype(np.int64)


def read_samples(index: Index, numbers: np.ndarray, policy: storage.ReadPolicy) -> Iterator[Sample]:
    """Yield the samples of these ascending numbers, several requests ahead."""
    shard, offset, size = index.shard[numbers], index.offset[numbers], index.size[numbers]
    runs = pairwise(cut_chunks(shard, offset, size, _REQUEST_BYTES, max_samples=len(numbers)).tolist())
    fetcher = Fetcher(index, policy)

    def begin(first: int, stop: int) -> tuple[Any, np.ndarray]:
        wanted = numbers[first:stop]
        return fetcher.begin(int(wanted[0]), int(wanted[-1]) + 1), wanted - wanted[0]

    try:
        reads = deque(begin(*run) for run in islice(runs, READS_IN_FLIGHT))
        while reads:
            read, places = reads.popleft()
            read_run = read.result()
            reads.extend(begin(*run) for run in islice(runs, 1))
            for place in places.tolist():
                yield read_run[place]
    finally:
        fetcher.close()


def _describe_part(index: Index, column: int) -> Report:
    offset, length = index.members[:, column, 0], index.members[:, column, 1]
    return {"samples": int(np.count_nonzero(offset != ABSENT)), "bytes": int(length.sum(dtype=np.int64))}


def _describe_classes(survey: Survey, names: Sequence[str] | None) -> Report:
    labels = survey.labels

    def row(label: int) -> Report:
        known = names is not None and 0 <= label < len(names)
        return {"class": label, "name": names[label] if names and known else None, "samples": labels[label]}

    ranked = sorted(labels, key=lambda label: (-labels[label], label))
    return {
        "labelled": labels.total(),
        "distinct": len(labels),
        "named": len(names) if names else None,
        "out_of_range": sum(n for label, n in labels.items() if label < 0 or (names and label >= len(names))),
        "samples_per_class": _stats(list(labels.values())),
        "histogram": histogram(np.array(list(labels.values()), np.float64), _CLASS_EDGES),
        "largest": [row(label) for label in ranked[:_CLASSES_SHOWN]],
        "smallest": [row(label) for label in reversed(ranked[-_CLASSES_SHOWN:])],
        "samples_by_class": {str(label): labels[label] for label in sorted(labels)},
    }


def _describe_captions(survey: Survey) -> Report:
    captions = survey.captions
    texts, counts = list(captions), list(captions.values())
    words = np.repeat([len(text.split()) for text in texts], counts)
    present = captions.total()
    return {
        "present": present,
        "empty": survey.empty_captions,
        "missing": survey.missing_captions,
        "distinct": len(captions),
        "characters": _stats(np.repeat([len(text) for text in texts], counts)),
        "words": _stats(words),
        "histogram": histogram(words, _WORD_EDGES),
        "repeated": [{"text": t, "samples": n} for t, n in captions.most_common(_SHOWN) if n > 1],
        "examples": [texts[i] for i in spread(len(texts), _SHOWN).tolist()],
    }


def _describe_images(survey: Survey) -> Report:
    width, height = np.repeat(list(survey.images), list(survey.images.values()), axis=0).T
    return {
        "samples": survey.images.total(),
        "width": _stats(width),
        "height": _stats(height),
        "shorter_side": histogram(np.minimum(width, height), _SIDE_EDGES),
        "aspect": histogram(width / height, _ASPECT_EDGES),
        "modes": dict(survey.modes.most_common()),
        "formats": dict(survey.formats.most_common()),
        "rotated_by_exif": survey.rotated,
    }


def _describe_videos(videos: Counter[Video]) -> Report:
    expanded = list(videos.elements())
    frames, duration = np.array([(video.frames, video.duration_s) for video in expanded]).T
    return {
        "samples": len(expanded),
        "width": _stats([video.width for video in expanded]),
        "height": _stats([video.height for video in expanded]),
        "shorter_side": histogram([min(video.width, video.height) for video in expanded], _SIDE_EDGES),
        "duration_s": {**_stats(duration), "histogram": histogram(duration, _DURATION_EDGES)},
        "frames": {**_stats(frames), "histogram": histogram(frames, _FRAME_EDGES)},
        "frame_rates": dict(Counter(f"{video.frame_rate:.4g}" for video in expanded).most_common(10)),
        "codecs": dict(Counter(video.codec for video in expanded).most_common()),
    }


def _stats(values: Sequence[float] | np.ndarray) -> Report:
    """Return total, min, mean, median and max, as numbers of Python; {} of nothing."""
    array = np.asarray(values)
    if not array.size:
        return {}
    return {
        "total": array.sum(dtype=np.float64 if array.dtype.kind == "f" else np.int64).item(),
        "min": array.min().item(),
        "mean": float(array.mean(dtype=np.float64)),
        "median": float(np.median(array)),
        "max": array.max().item(),
    }


def histogram(values: Sequence[float] | np.ndarray, edges: Sequence[float]) -> list[Report]:
    """Count values in bins [from, to), the last without end (to: None); empty ends are left out."""
    bins = np.searchsorted(edges, np.asarray(values), side="right") - 1
    counts = np.bincount(bins, minlength=len(edges)).tolist()
    used = [i for i, count in enumerate(counts) if count]
    ends = [*edges[1:], None]
    return [
        {"from": edges[i], "to": ends[i], "samples": counts[i]}
        for i in range(used[0] if used else 0, used[-1] + 1 if used else 0)
    ]
