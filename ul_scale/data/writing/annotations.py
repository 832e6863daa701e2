"""The labels and captions that a table gives to the files of a source."""

import io
import json
import posixpath
from collections.abc import Iterable, Sequence

from ul_scale.data import storage
from ul_scale.data.writing import tables


class _Lookup:
    """Finds a source's files by what tables call them: path or base name, with or without suffix."""

    def __init__(self, files: Iterable[str], split: str | None) -> None:
        self._names: dict[str, str | None] = {}
        for name in files:
            stem, base = posixpath.splitext(name)[0], posixpath.basename(name)
            # Where the folder of a split was entered, tables may still name files by it.
            in_split = {f"{split}/{name}", f"{split}/{stem}"}
            for alias in {stem, base, posixpath.splitext(base)[0], *in_split} - {name}:
                self._names[alias] = None if alias in self._names else name
        self._names.update((name, name) for name in files)

    def find(self, names: Sequence[str], table: str) -> str | None:
        for name in names:
            name = name.removeprefix("./")
            if name in self._names:
                found = self._names[name]
                if found is None:
                    raise ValueError(f"{table}: {name!r} is the name of several files; expected their paths")
                return found
        return None


def _names_in_row(row: tables.Row, column: str) -> list[str]:
    """Return what the file of a row may be called; Kinetics' clips are named by video and time."""
    name = str(row[column])
    fields = {key.lower(): value for key, value in row.items()}
    try:
        start, end = (int(float(fields[key])) for key in ("time_start", "time_end"))
    except (KeyError, ValueError, TypeError):
        return [name]
    return [f"{name}_{start:06d}_{end:06d}", f"{name}_{start}_{end}", name]


def read_captions(
    url: str, files: Iterable[str], split: str | None, image_column: str | None, caption_column: str | None
) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """Read a table of captions.

    Args:
        url: of the table.
        files: names of the source's files.
        split: to take, where the table has several.
        image_column: that names the file, where it has no usual name.
        caption_column: that holds a caption or a list of them, likewise.

    Returns:
        The captions of each file that the table has, of all its rows, and what it has that is not there.

    Raises:
        ValueError: if the table does not fit, or has a caption that is empty or no text.
    """
    rows = tables.read_rows(url)
    column = _file_column(rows, image_column, url)
    text = tables.find_column(rows, _given_or(caption_column, tables.CAPTION_COLUMNS), "caption", url)
    lookup, missing = _Lookup(files, split), []
    captions: dict[str, tuple[str, ...]] = {}
    for row in tables.select_split(rows, split, column, url):
        names = _names_in_row(row, column)
        found, value = lookup.find(names, url), row.get(text)
        texts = value if isinstance(value, list) else [value]
        if not texts or not all(isinstance(one, str) and one.strip() for one in texts):
            raise ValueError(f"{url}: the caption of {names[0]} is {json.dumps(value)}; expected text")
        if found is None:
            missing.append(names[0])
        else:
            captions[found] = (*captions.get(found, ()), *texts)
    return captions, missing


def read_labels(
    url: str, files: Iterable[str], split: str | None, image_column: str | None
) -> tuple[dict[str, str | int], list[str] | None, list[str]]:
    """Read a table, or a text file, of labels.

    A text file has lines `FILE LABEL`, or a label for each file in the order of their names. Labels that
    are all numbers are class ids; else a class's id is the rank of its name among those of all splits.

    Args:
        url: of the table or .txt file.
        files: names of the source's files.
        split: to take, where the table has several.
        image_column: that names the file, where it has no usual name.

    Returns:
        The label of each file that the table has, the classes in the order of their ids (None for numbers),
        and what the table has that is not there.

    Raises:
        ValueError: if the table does not fit the files, or contradicts itself.
    """
    files = list(files)
    if url.lower().endswith(".txt"):
        labels, missing = _label_list(url, files), list[str]()
        every = set(labels.values())
    else:
        rows = tables.read_rows(url)
        column = _file_column(rows, image_column, url)
        label_column = tables.find_column(rows, tables.LABEL_COLUMNS, "label", url)
        lookup, labels, missing = _Lookup(files, split), {}, []
        for row in tables.select_split(rows, split, column, url):
            names, label = _names_in_row(row, column), _label(row, label_column, url)
            found = lookup.find(names, url)
            if found is None:
                missing.append(names[0])
            elif labels.setdefault(found, label) != label:
                raise ValueError(f"{url}: {names[0]} has the labels {labels[found]!r} and {label!r}")
        every = {_label(row, label_column, url) for row in rows}
    if all(label.isascii() and label.isdigit() for label in every):
        return {name: int(label) for name, label in labels.items()}, None, missing
    return dict(labels), sorted(every), missing


def _file_column(rows: Sequence[tables.Row], given: str | None, url: str) -> str:
    column = tables.find_column(rows, _given_or(given, tables.PATH_COLUMNS), "file", url)
    nameless = next((number for number, row in enumerate(rows, 1) if not row.get(column)), None)
    if nameless is not None:
        raise ValueError(f"{url}: row {nameless} has no {column}")
    return column


def _given_or(given: str | None, usual: Sequence[str]) -> Sequence[str]:
    return usual if given is None else (given,)


def _label(row: tables.Row, column: str, url: str) -> str:
    label = str(row.get(column) if row.get(column) is not None else "").strip()
    if not label:
        raise ValueError(f"{url}: a row has no {column}: {json.dumps(row, default=str)}")
    # ImageNet's PredictionString is a synset and the boxes of its objects.
    return label.split()[0] if column.lower() == "predictionstring" else label


def _label_list(url: str, files: list[str]) -> dict[str, str]:
    lines = [line.split() for line in tables.read_text(url).splitlines() if line.strip()]
    if lines and all(len(line) == 2 for line in lines):
        lookup = _Lookup(files, None)
        found = [(lookup.find([name], url), name, label) for name, label in lines]
        absent = [name for path, name, _ in found if path is None]
        if absent:
            raise ValueError(f"{url}: {len(absent)} files are missing, such as {absent[0]}")
        return {path: label for path, _, label in found if path is not None}
    if any(len(line) != 1 for line in lines):
        raise ValueError(f"{url}: expected lines of FILE LABEL, or of a label each")
    if len(lines) != len(files):
        raise ValueError(f"{url}: has {len(lines)} labels for {len(files)} files; expected one each")
    labels = [line[0] for line in lines]
    if "validation_ground_truth" in url.rsplit("/", 1)[-1]:
        synsets = _devkit_synsets(url)
        if unknown := set(labels) - set(synsets):
            raise ValueError(f"{url}: has the id {min(unknown)}, which meta.mat beside it does not")
        labels = [synsets[label] for label in labels]
    return dict(zip(files, labels))


def _devkit_synsets(url: str) -> dict[str, str]:
    """Return the synset of each id that ImageNet's ground truth uses, from meta.mat beside it."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise ValueError(
            f"{url}: its ids are explained by meta.mat, which needs scipy to be read; pip install scipy, or "
            "give LOC_val_solution.csv"
        ) from None
    fs, path = storage.open_folder(f"{url.rsplit('/', 1)[0] if '/' in url else '.'}/meta.mat")
    if not fs.exists(path):
        raise ValueError(f"{url}: its ids are explained by meta.mat, which is not beside it as in the devkit")
    data = storage.read_file(fs, path)
    table = loadmat(io.BytesIO(data), squeeze_me=True)["synsets"]
    return {str(int(row["ILSVRC2012_ID"])): str(row["WNID"]) for row in table}
