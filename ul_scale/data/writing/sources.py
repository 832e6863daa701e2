"""What there is to write: the images or videos of a source, with their classes and captions.

A source is a folder or a tar, laid out as class folders (ImageNet's train and val, its archives) or as
files that a table describes (ImageNet's flat val, Kinetics, images with captions).
"""

import posixpath
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ul_scale.data.index import open_index
from ul_scale.data.tar import split_name
from ul_scale.data.writing.annotations import read_captions, read_labels
from ul_scale.data.writing.source_files import Entry, list_source

# Suffixes of source files → the part that they are stored as, where they are kept as they are.
IMAGE_SUFFIXES = {".jpg": "jpg", ".jpeg": "jpg", ".png": "png", ".webp": "webp", ".bmp": "png", ".gif": "gif"}
VIDEO_SUFFIXES = {".mp4": "mp4", ".webm": "webm", ".mkv": "mkv", ".mov": "mov", ".avi": "avi"}
ANIMATION_SUFFIXES = {".webp": "webp", ".gif": "gif"}  # videos, where videos are asked for
SUFFIXES = {"images": IMAGE_SUFFIXES, "videos": VIDEO_SUFFIXES | ANIMATION_SUFFIXES}
KINDS = ("auto", *SUFFIXES)
SPLIT_FOLDERS = {"train", "training", "val", "valid", "validate", "validation", "test", "testing"}
# With more missing than this, the table and the source do not belong together.
MAX_MISSING_FRACTION = 0.5


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """How a source is read."""

    kind: str = "auto"
    """images, videos, or auto: whichever there are."""
    split: str | None = None
    """Split to take, of a table's column "split" or of the folders train, val, …"""
    labels: str | None = None
    """Where classes come from: folders (the default without captions), none, or the URL of a table."""
    captions: str | None = None
    """URL of a table of captions, or none; by default the .txt files beside the images, if any."""
    image_column: str | None = None
    """Column of the tables that names the file."""
    caption_column: str | None = None
    """Column of the captions table that holds the caption, or a list of them."""
    classes_from: str | None = None
    """URL of shards whose class ids are taken over."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind {self.kind!r}; expected one of {', '.join(KINDS)}")

    @property
    def has_table(self) -> bool:
        """Say whether a table describes the files."""
        return self.labels not in (None, "folders", "none") or self.captions not in (None, "none")


class SourceSample(NamedTuple):
    """A sample to write.

    Attributes:
        key: its key in the shards.
        entry: its image or video.
        part: that the entry is stored as, if kept as it is.
        label: its class id, None without classes.
        captions: from a table.
        sidecar: file that holds its caption.
    """

    key: str
    entry: Entry
    part: str
    label: int | None = None
    captions: tuple[str, ...] = ()
    sidecar: Entry | None = None


@dataclass(frozen=True)
class Source:
    """A source's samples, in the order of their names.

    Attributes:
        url: of the folder or tar.
        fs: its filesystem.
        kind: images or videos.
        samples: to be written.
        classes: names in the order of their ids, None without names.
        has_sidecars: whether captions are in .txt files beside the images.
        missing: names that the tables have and the source has not.
        others: names of files that are left out.
    """

    url: str
    fs: Any
    kind: str
    samples: list[SourceSample]
    classes: list[str] | None = None
    has_sidecars: bool = False
    missing: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)

    def describe(self) -> str:
        """Return one line that says what was found."""
        ids = {sample.label for sample in self.samples}
        facts = [f"{len(self.samples):,} {self.kind}"]
        if self.classes is not None:
            facts.append(f"{len(self.classes):,} classes" if len(self.classes) != 1 else "1 class")
        else:
            facts.append("no labels" if ids == {None} else f"class ids {min(ids)} to {max(ids)}")  # type: ignore[type-var]
        if self.has_sidecars or self.samples[0].captions:
            facts.append(f"captions from {'.txt files' if self.has_sidecars else 'a table'}")
        if self.missing:
            facts.append(f"{len(self.missing):,} of the table missing, such as {self.missing[0]}")
        if self.others:
            facts.append(f"{len(self.others):,} other files left out, such as {self.others[0]}")
        return f"{self.url}: {'; '.join(facts)}"


def find_source(url: str, options: SourceOptions) -> Source:
    """List a source and the tables that describe it, without decoding anything.

    Raises:
        ValueError: if the source, a table or an option does not fit; the message names it.
    """
    fs, entries, folders = list_source(url)
    kind = _kind(entries, options.kind, url)
    media = {entry.name: entry for entry in entries if _suffix(entry.name) in SUFFIXES[kind]}
    others = [entry.name for entry in entries if entry.name not in media]
    media, folders, prefix = _enter_split(media, folders, options, url)
    captions, sidecars, absent = _find_captions(media, entries, prefix, options)
    chosen = [name for name in media if captions is None or name in captions]
    missing = dict.fromkeys(absent)

    labels_from = options.labels or ("folders" if captions is None and not sidecars else "none")
    labels: dict[str, str | int] = {}
    classes = None
    if labels_from == "folders":
        labels, classes = _folder_labels(chosen, folders, url, kind), folders
    elif labels_from != "none":
        labels, classes, absent = read_labels(labels_from, media, options.split, options.image_column)
        chosen = [name for name in chosen if name in labels]
        missing.update(dict.fromkeys(absent))
    _check_missing(url, len(chosen), missing, next(iter(media)))
    _check_one_split(chosen, url)
    if options.classes_from is not None and labels_from != "none":
        classes = _classes_of(options.classes_from, {labels[name] for name in chosen})

    ids = {name: number for number, name in enumerate(classes or [])}
    samples = []
    for name in chosen:
        label = labels.get(name)
        samples.append(
            SourceSample(
                key=_key(name),
                entry=media[name],
                part=SUFFIXES[kind][_suffix(name)],
                label=ids[label] if isinstance(label, str) else label,
                captions=(captions or {}).get(name, ()),
                sidecar=sidecars.get(name),
            )
        )
    _check_keys(samples)
    used = {entry.name for entry in sidecars.values() if entry is not None} | set(chosen)
    others = [name for name in others if name not in used] + [name for name in media if name not in used]
    return Source(url, fs, kind, samples, classes, bool(sidecars), list(missing), others)


def _find_captions(
    media: dict[str, Entry], entries: list[Entry], prefix: str, options: SourceOptions
) -> tuple[dict[str, tuple[str, ...]] | None, dict[str, Entry | None], list[str]]:
    """Return captions by a table, or the .txt files that hold them, and the table's missing files."""
    if options.captions == "none":
        return None, {}, []
    if options.captions is not None:
        columns = options.image_column, options.caption_column
        captions, missing = read_captions(options.captions, media, options.split, *columns)
        return captions, {}, missing
    texts = {entry.name: entry for entry in entries if _suffix(entry.name) == ".txt"}
    sidecars = {name: texts.get(f"{prefix}{_stem(name)}.txt") for name in media}
    return None, sidecars if any(sidecars.values()) else {}, []


def _kind(entries: list[Entry], kind: str, url: str) -> str:
    """Return images or videos, whichever the source holds."""
    present = {_suffix(entry.name) for entry in entries}
    if kind == "videos" and present & set(SUFFIXES["videos"]):
        return kind
    plain = {"images": IMAGE_SUFFIXES, "videos": VIDEO_SUFFIXES}
    found = [name for name, suffixes in plain.items() if present & set(suffixes)]
    if kind == "auto" and len(found) > 1:
        raise ValueError(f"{url}: holds images and videos; choose with --kind")
    if not found or kind not in ("auto", *found):
        suffixes = {name: parts for name, parts in SUFFIXES.items() if kind in ("auto", name)}
        expected = ",".join(suffix for parts in suffixes.values() for suffix in parts)
        raise ValueError(f"{url}: no {' or '.join(suffixes)} found; expected <class>/<file>{{{expected}}}")
    return found[0] if kind == "auto" else kind


def _enter_split(
    media: dict[str, Entry], folders: list[str], options: SourceOptions, url: str
) -> tuple[dict[str, Entry], list[str], str]:
    """Enter the folder of a split, where splits are what the top folders are; return its prefix too."""
    tops = {name.split("/", 1)[0] for name in media if "/" in name}
    is_split = tops and all("/" in name for name in media) and {top.lower() for top in tops} <= SPLIT_FOLDERS
    if not is_split:
        if options.split is not None and not options.has_table:
            raise ValueError(
                f"{url}: --split {options.split} is given, but there are no folders of splits and no table"
            )
        return media, [name for name in folders if "/" not in name], ""
    if options.split is None:
        raise ValueError(f"{url}: holds the splits {', '.join(sorted(tops))}; choose one with --split")
    if options.split not in tops:
        if options.has_table:
            return media, [], ""
        raise ValueError(f"{url}: has no split {options.split!r}, only {', '.join(sorted(tops))}")
    prefix = f"{options.split}/"
    inside = {name[len(prefix) :]: entry for name, entry in media.items() if name.startswith(prefix)}
    folders = [name[len(prefix) :] for name in folders if name.startswith(prefix)]
    return inside, [name for name in folders if "/" not in name], prefix


def _check_one_split(names: Iterable[str], url: str) -> None:
    """Refuse what would mix splits: folders side by side that are called train and val, at any depth."""
    found: dict[str, dict[str, str]] = {}
    for folder in {posixpath.dirname(name) for name in names}:
        while folder:
            parent, base = posixpath.split(folder)
            split = base.lower().rstrip("0123456789_-")  # COCO's train2017
            if split in SPLIT_FOLDERS:
                found.setdefault(parent, {}).setdefault(split[:2], folder)
            folder = parent
    for folders in found.values():
        if len(folders) > 1:
            splits = ", ".join(sorted(folders.values()))
            raise ValueError(f"{url}: holds the splits {splits}; give the folder of one as the source")


def _folder_labels(names: list[str], folders: list[str], url: str, kind: str) -> dict[str, str | int]:
    """Return each file's top folder. All top folders are classes, also empty ones: ids must not shift."""
    flat = next((name for name in names if "/" not in name), None)
    if flat is not None:
        raise ValueError(
            f"{url}: {flat} is in no class folder (expected <class>/<file>); for flat {kind} give "
            "--labels FILE, --captions TABLE, or --labels none"
        )
    return {name: name.split("/", 1)[0] for name in names}


def _check_missing(url: str, found: int, missing: Iterable[str], example: str) -> None:
    names = list(missing)
    if not found or len(names) > MAX_MISSING_FRACTION * (found + len(names)):
        such = f", such as {names[0]}" if names else ""
        raise ValueError(
            f"{url}: {len(names)} files of the table are missing{such}, and {found} are there; "
            f"do they belong together? The source's first file is {example}"
        )


def _classes_of(url: str, labels: set[str | int]) -> list[str]:
    """Return the classes of existing shards, after checking that they have the labels."""
    classes = open_index(url).classes
    if classes is None:
        raise ValueError(f"{url}: its shards name no classes, so none can be taken from them")
    known = {*classes, *range(len(classes))}
    unknown = sorted((label for label in labels if label not in known), key=str)
    if unknown:
        raise ValueError(f"the class {unknown[0]!r} is not among the {len(classes)} of {url}")
    return list(classes)


def _check_keys(samples: list[SourceSample]) -> None:
    seen: dict[str, str] = {}
    for sample in samples:
        name = sample.entry.name
        if sample.key in seen:
            raise ValueError(f"{seen[sample.key]} and {name} would both be the sample {sample.key}")
        seen[sample.key] = name
        try:
            sample.key.encode()
            fits = split_name(f"{sample.key}.{sample.part}") == (sample.key, sample.part)
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(f"the file {name!a} has a name that a shard cannot hold; rename it")


def _suffix(name: str) -> str:
    return posixpath.splitext(name)[1].lower()


def _stem(name: str) -> str:
    return posixpath.splitext(name)[0]


def _key(name: str) -> str:
    """Return a file's key. A key ends at the first dot of its base name."""
    folder, base = posixpath.split(_stem(name))
    return posixpath.join(folder, base.replace(".", "_"))
