"""Tables that come with a data set: labels, splits and captions, as CSV, TSV, JSON lines or Parquet."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ul_scale.data import storage

Row = Mapping[str, Any]

PATH_COLUMNS = (
    *("path", "file", "file_name", "filename", "filepath"),
    *("image", "image_path", "imageid", "video", "video_path", "youtube_id"),
)
LABEL_COLUMNS = ("label", "class", "class_name", "category", "synset", "wnid", "predictionstring")
CAPTION_COLUMNS = ("caption", "captions", "text")
SPLIT_COLUMN = "split"


def read_text(url: str) -> str:
    """Return a text file.

    Raises:
        ValueError: if there is no such file, or if it is not UTF-8.
    """
    try:
        return _read(url).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{url}: is not UTF-8 text ({error.reason} at byte {error.start})") from None


def read_rows(url: str) -> list[Row]:
    """Read a table; its format is told by its suffix.

    Raises:
        ValueError: if it is missing, damaged, empty, or of another format.
    """
    storage.open_folder(url)  # refuses credentials before any message repeats them
    suffix = url.rsplit(".", 1)[-1].lower()
    rows: list[Row]
    if suffix == "parquet":
        try:
            rows = pq.read_table(pa.BufferReader(_read(url))).to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{url}: not a readable Parquet file ({_one_line(error)})") from error
    elif suffix in ("csv", "tsv"):
        rows = _csv_rows(url, "\t" if suffix == "tsv" else ",")
    elif suffix in ("jsonl", "ndjson"):
        rows = _json_rows(url)
    else:
        raise ValueError(f"{url}: expected a table that ends in .csv, .tsv, .jsonl or .parquet")
    if not rows:
        raise ValueError(f"{url}: has no rows")
    return rows


def find_column(rows: Sequence[Row], names: Sequence[str], what: str, url: str) -> str:
    """Return the column that goes by one of the names, in any case, the first name first.

    Raises:
        ValueError: if there is none, naming those that there are.
    """
    columns = {column.lower(): column for column in rows[0]}
    for name in names:
        if name.lower() in columns:
            return columns[name.lower()]
    expected = f"one of {', '.join(names)}" if len(names) > 1 else names[0]
    raise ValueError(f"{url}: no column for the {what}; it has {', '.join(rows[0])}, expected {expected}")


def select_split(rows: list[Row], split: str | None, identity: str, url: str) -> list[Row]:
    """Return the rows of one split.

    Args:
        rows: of the table; without a column "split" they are all of one.
        split: as the table names it.
        identity: column that tells what may be in one split only, such as the video that a clip is from.
        url: of the table, for messages.

    Raises:
        ValueError: if there are several splits and none is chosen, no such split, or if something is in two.
    """
    column = next((name for name in rows[0] if name.lower() == SPLIT_COLUMN), None)
    if column is None:
        return rows
    split_of: dict[str, str] = {}
    for row in rows:
        name, of = str(row.get(identity)), str(row.get(column))
        if split_of.setdefault(name, of) != of:
            raise ValueError(f"{url}: {name} is in both {split_of[name]} and {of}; expected one split")
    splits = sorted(set(split_of.values()))
    if split is None and len(splits) > 1:
        raise ValueError(f"{url}: holds the splits {', '.join(splits)}; choose one with --split")
    if split is not None and split not in splits:
        raise ValueError(f"{url}: has no split {split!r}, only {', '.join(splits)}")
    return [row for row in rows if split in (None, str(row.get(column)))]


def _read(url: str) -> bytes:
    fs, path = storage.open_folder(url)
    try:
        size = fs.size(path)
    except FileNotFoundError:
        raise ValueError(f"{url}: no such file") from None
    return storage.read_range(fs, path, 0, size)


def _csv_rows(url: str, delimiter: str) -> list[Row]:
    reader = csv.DictReader(io.StringIO(read_text(url), newline=""), delimiter=delimiter, strict=True)
    rows: list[Row] = []
    try:
        for row in reader:
            if None in row or None in row.values():
                columns = len(reader.fieldnames or ())
                raise ValueError(
                    f"{url}: line {reader.line_num} does not have the {columns} columns of the first"
                )
            rows.append(row)
    except csv.Error as error:
        raise ValueError(f"{url}: line {reader.line_num} is not readable ({error})") from error
    return rows


def _json_rows(url: str) -> list[Row]:
    rows: list[Row] = []
    for number, line in enumerate(read_text(url).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{url}: line {number} is not JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{url}: line {number} is not a JSON object")
        rows.append(row)
    return rows


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
