"""Read the headers of a tar and group its members into samples, by the conventions of WebDataset.

Headers are parsed here rather than by `tarfile`, which takes several times as long for each: a set of a
hundred million samples has some three hundred million of them.
"""

import os
import re
import tarfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import lru_cache
from typing import Any, NamedTuple
from zlib import adler32

import numpy as np

from ul_scale.data import storage

# The offset of a part that a sample does not have.
ABSENT = 0xFFFFFFFF
# Parts that only unpickling could decode, which would run whatever code they carry.
PICKLED = {"pyd", "pkl", "pth", "pickle", "pt"}
MAX_PARTS = 64

_BLOCK = tarfile.BLOCKSIZE
# The convention of webdataset: the key ends at the first dot of the last path component.
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")
_UNSAFE = re.compile(r"[\x00-\x1f\x7f\\]")
# Remotely a request costs more than the bytes between two headers; locally it is the other way round.
_AHEAD_BYTES, _LOCAL_AHEAD_BYTES = 16_000_000, 16_384
_REGULAR = {tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE}
_PAX = {tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE}

ReadAt = Callable[[int, int], bytes]


class ShardScan(NamedTuple):
    """What one shard holds: its samples' keys and arrays as in an index, for the parts that it has."""

    keys: list[str]
    offset: np.ndarray
    size: np.ndarray
    parts: list[str]
    members: np.ndarray


class Member(NamedTuple):
    """A regular file: its name, where its first header and its content start, and its length in bytes."""

    name: str
    start: int
    content: int
    length: int


def scan_shard(fs: Any, path: str, size: int) -> ShardScan:
    """Read the headers of one tar and group its members into samples.

    Raises:
        ValueError: if the tar is damaged, names a part twice, or has members that are refused.
        OSError: if it cannot be read.
    """
    where = fs.unstrip_protocol(path)
    return _group(read_members(fs, path, 0, size, where), where)


def read_members(fs: Any, path: str, start: int, size: int, where: str) -> Iterator["Member"]:
    """Yield the regular files of a tar that lies in a file from byte `start` on; offsets count from there.

    Raises:
        ValueError: if the tar is damaged, or has members that are refused; `where` names it.
        OSError: if it cannot be read.
    """
    with ExitStack() as stack:
        local = storage.is_local(fs)
        fd = stack.enter_context(open(path, "rb", buffering=0)).fileno() if local else -1

        def read(begin: int, end: int) -> bytes:
            if local:
                return os.pread(fd, end - begin, start + begin)
            return storage.read_range(fs, path, start + begin, start + end)

        yield from _members(_ahead(read, size, _LOCAL_AHEAD_BYTES if local else _AHEAD_BYTES), size, where)


def split_name(name: str) -> tuple[str, str] | None:
    """Split a member's name into key and part; None if it is no part of a sample (hidden, or without suffix).

    Raises:
        ValueError: if the name leads out of the folder it is unpacked to, or the part holds pickled content.
    """
    if name.startswith("/") or (".." in name and ".." in name.split("/")) or _UNSAFE.search(name):
        raise ValueError(f"member {name!r} has an absolute path, '..', a backslash or a control character")
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    part, pickled = _part(match[2])
    if pickled:
        raise ValueError(f"member {name!r} holds pickled content, which can run code; store plain formats")
    return match[1], part


@lru_cache(maxsize=4096)
def _part(suffix: str) -> tuple[str, bool]:
    part = suffix.lower()
    return part, bool(PICKLED & set(part.split(".")))


def _members(read_at: ReadAt, size: int, where: str) -> Iterator[Member]:
    """Yield the regular files of a tar of `size` bytes, in its order."""
    at = start = 0
    long_name, pax = None, dict[str, str]()
    while True:
        block = read_at(at, _BLOCK)
        if len(block) < _BLOCK:
            raise ValueError(f"{where}: the tar ends at byte {size} without an end mark; it is cut short")
        if not block.strip(b"\0"):
            return
        try:
            name, kind, length = _header(block)
            describes_next = kind in _PAX or kind == tarfile.GNUTYPE_LONGNAME
            if pax and not describes_next:
                length = int(pax.get("size", length))
            content = at + _BLOCK
            if not 0 <= length <= size - content:
                raise ValueError(f"its content would end at byte {content + length} of {size}")
            if kind == tarfile.GNUTYPE_LONGNAME:
                long_name = read_at(content, length).rstrip(b"\0").decode()
            elif describes_next:
                pax = _pax_records(read_at(content, length))
        except ValueError as error:
            raise ValueError(f"{where}: no readable tar header at byte {at} ({error})") from error
        at = _padded(content + length)
        if describes_next:
            continue
        name = pax.get("path") or long_name or name
        if kind in _REGULAR and not any(keyword.startswith("GNU.sparse") for keyword in pax):
            if kind != tarfile.AREGTYPE or not name.endswith("/"):  # the oldest tars mark folders so
                yield Member(name, start, content, length)
        elif kind not in (tarfile.DIRTYPE, tarfile.XGLTYPE):
            raise ValueError(
                f"{where}: member {name!r} is a link, device or sparse file, expected plain files"
            )
        start, long_name, pax = at, None, {}


def _header(block: bytes) -> tuple[str, bytes, int]:
    """Return name, type and content's length from a header of any of the tar formats."""
    summed = block[:148] + b" " * 8 + block[156:]
    # The lower half of adler32 is a sum of bytes plus 1, exact for at most 256 of them; sum() is slower.
    checksum = (adler32(summed[:256]) & 0xFFFF) + (adler32(summed[256:]) & 0xFFFF) - 2
    if _number(block[148:156]) not in (checksum, checksum - 256 * _count_high(summed)):
        raise ValueError("bad checksum")
    name = block[:100].partition(b"\0")[0]
    if block[345] and block[257:263] == b"ustar\0":
        name = block[345:500].partition(b"\0")[0] + b"/" + name
    return name.decode(), block[156:157], _number(block[124:136])


def _count_high(block: bytes) -> int:
    """Count the bytes that are negative where bytes are signed, as some old writers summed them."""
    return 0 if block.isascii() else sum(byte > 127 for byte in block)


def _number(field: bytes) -> int:
    """Parse a number: octal digits, or GNU's binary form for large ones."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip()
    if digits and not digits.isdigit():
        raise ValueError(f"{field!r} is no number")
    return int(digits or b"0", 8)


def _padded(at: int) -> int:
    return -(-at // _BLOCK) * _BLOCK


def _pax_records(data: bytes) -> dict[str, str]:
    """Parse records `LENGTH KEYWORD=VALUE` that end with a newline; LENGTH counts the whole record."""
    records = {}
    while data:
        digits, _, _ = data.partition(b" ")
        record, data = data[: int(digits)], data[int(digits) :]
        keyword, found, value = record[len(digits) + 1 : -1].partition(b"=")
        if not found or int(digits) <= len(digits):
            raise ValueError("a malformed PAX record")
        if keyword in (b"path", b"size") or keyword.startswith(b"GNU.sparse"):
            records[keyword.decode()] = value.decode()
    return records


def _ahead(read: ReadAt, size: int, ahead_bytes: int) -> ReadAt:
    """Return a reader of `length` bytes at `at` that goes through a file in ranges of `ahead_bytes`.

    What lies between two headers is skipped where it is longer than a range. Args of `read`: start, end.
    """
    first, held = 0, b""

    def read_at(at: int, length: int) -> bytes:
        nonlocal first, held
        end = min(at + length, size)
        if at < first or end > first + len(held):
            first = at
            held = read(at, min(max(end, at + ahead_bytes), size)) if at < end else b""
        return held[at - first : end - first]

    return read_at


def _group(members: Iterator[Member], where: str) -> ShardScan:
    """Group adjacent members of one key into samples."""
    numbers: dict[str, int] = {}
    columns: dict[str, int] = {}
    starts, ends = list[int](), list[int]()
    # Of each member that is a part of a sample: sample, column, offset from the sample's start, length.
    rows, cols, offsets, lengths = list[int](), list[int](), list[int](), list[int]()
    current, seen = None, set[str]()
    for name, start, content, length in members:
        try:
            split = split_name(name)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if split is None:
            continue
        key, part = split
        if key != current:
            if key in numbers:
                raise ValueError(f"{where}: the parts of {key!r} do not lie next to each other")
            numbers[key], current, seen = len(numbers), key, set()
            starts.append(start)
            ends.append(start)
        if part in seen:
            raise ValueError(f"{where}: two members are named {key}.{part}")
        seen.add(part)
        ends[-1] = _padded(content + length)
        if ends[-1] - starts[-1] >= ABSENT:
            raise ValueError(f"{where}: sample {key!r} is longer than 4 GiB")
        rows.append(len(starts) - 1)
        cols.append(columns.setdefault(part, len(columns)))
        offsets.append(content - starts[-1])
        lengths.append(length)
        if len(columns) > MAX_PARTS:
            check_parts(columns, where)
    parts = sorted(columns)
    place = np.empty(len(parts), np.intp)
    place[[columns[part] for part in parts]] = np.arange(len(parts))
    found = np.zeros((len(starts), len(parts), 2), np.uint32)
    found[:, :, 0] = ABSENT
    if rows:
        found[rows, place[cols]] = np.array([offsets, lengths], np.uint32).T
    begin, end = np.array(starts, np.uint64), np.array(ends, np.uint64)
    return ShardScan(list(numbers), begin, (end - begin).astype(np.uint32), parts, found)


def check_parts(parts: Any, where: str) -> None:
    """Raise a ValueError if there are so many parts that keys with dots must have been taken apart."""
    if len(parts) > MAX_PARTS:
        raise ValueError(
            f"{where}: more than {MAX_PARTS} kinds of parts, such as {', '.join(sorted(parts)[:3])}; "
            "a key ends at the first dot of a file's name, so names must have no other dots"
        )
