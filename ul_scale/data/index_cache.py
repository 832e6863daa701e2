"""Keep a copy of the index of a remote set on the local disk, where it can be memory-mapped.

The cache is `$UL_SCALE_CACHE`, else `ul_scale/` in `$XDG_CACHE_HOME` or `~/.cache`. An index's folder there,
`index/<digest>/`, is named by the content of its meta.json, which lists the sizes and digests of the other
files. So it is never stale, and it can be deleted whenever no run uses it.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from ul_scale.data import storage

_RANGE_BYTES = 16_000_000
_RANGES_AT_A_TIME = 8
_log = logging.getLogger(__name__)

Files = dict[str, dict[str, Any]]
"""Of each file, by its name: `size` in bytes and `digest`."""


def digest_of(data: bytes | bytearray) -> str:
    """Return the digest by which a file's content is known."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def digest_file(path: Path) -> str:
    """Return the digest of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, partial(hashlib.blake2b, digest_size=16)).hexdigest()


def cache_folder() -> Path:
    """Return the folder of everything that is kept on this machine to save downloads."""
    if given := os.environ.get("UL_SCALE_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ul_scale"


def cached(fs: Any, folder: str, meta: bytes, files: Files) -> Path | None:
    """Return a local folder with an index's files, downloaded if they are not there yet.

    Any number of processes may ask for the same index: one downloads, the others wait for it.

    Args:
        fs: filesystem of the set.
        folder: of the index, in `fs`.
        meta: content of its meta.json.
        files: sizes and digests of its other files.

    Returns:
        The folder, or None where the cache cannot be written, which is said in a warning.

    Raises:
        ValueError: if a file in the store is not the one that meta.json is about.
        OSError: if the store does not deliver a file.
    """
    try:
        target = cache_folder() / "index" / digest_of(meta)
        if not _is_whole(target, files):
            target.parent.mkdir(parents=True, exist_ok=True)
            with _locked(target.with_suffix(".lock")):
                if not _is_whole(target, files):
                    _download(fs, folder, target, meta, files)
    except (OSError, RuntimeError) as error:  # the latter where there is no home
        if isinstance(error, OSError) and error.errno is None:  # the store's; the disk's have a number
            raise
        _warn_of_memory(str(error))
        return None
    return target


def fetch(fs: Any, path: str, name: str, expected: dict[str, Any]) -> bytearray:
    """Return a file's content, checked like that of `cached`."""
    data = bytearray(expected["size"])

    def put(start: int, part: bytes) -> None:
        data[start : start + len(part)] = part

    _read(fs, path, expected["size"], put)
    _check(digest_of(data), name, expected)
    return data


def _is_whole(target: Path, files: Files) -> bool:
    try:
        return (
            all((target / name).stat().st_size == files[name]["size"] for name in files)
            and (target / "meta.json").is_file()
        )
    except FileNotFoundError:
        return False


def _download(fs: Any, folder: str, target: Path, meta: bytes, files: Files) -> None:
    """Fill `target`, which gets its name when all is there; the caller holds its lock."""
    size = sum(file["size"] for file in files.values())
    _log.info("%s: downloading %.1f MB to %s", fs.unstrip_protocol(folder), size / 1e6, target)
    unfinished = target.with_suffix(".partial")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
    unfinished.mkdir()
    try:
        for name, expected in files.items():
            with open(unfinished / name, "wb") as file:
                fd = file.fileno()

                def put(start: int, part: bytes, fd: int = fd) -> None:
                    while part:
                        written = os.pwrite(fd, part, start)
                        start, part = start + written, part[written:]

                _read(fs, f"{folder}/{name}", expected["size"], put)
                # A rename may reach the disk before what it names.
                os.fsync(fd)
            _check(digest_file(unfinished / name), name, expected)
        (unfinished / "meta.json").write_bytes(meta)
        shutil.rmtree(target, ignore_errors=True)
        unfinished.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _read(fs: Any, path: str, size: int, put: Callable[[int, bytes], None]) -> None:
    """Read a whole file in ranges, several at a time."""

    def read(start: int) -> None:
        put(start, storage.read_range(fs, path, start, min(start + _RANGE_BYTES, size)))

    with ThreadPoolExecutor(_RANGES_AT_A_TIME) as pool:
        futures = [pool.submit(read, start) for start in range(0, size, _RANGE_BYTES)]
        try:
            for future in futures:
                future.result()
        finally:
            for future in futures:
                future.cancel()


def _check(digest: str, name: str, expected: dict[str, Any]) -> None:
    if digest != expected["digest"]:
        raise ValueError(f"{name} is not the file that meta.json is about: damaged, or being replaced")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed, or its process dies
        yield


@lru_cache
def _warn_of_memory(cause: str) -> None:
    _log.warning(
        "indexes of remote sets are kept in memory, once for each process (%s); "
        "set UL_SCALE_CACHE to a folder that can be written",
        cause,
    )
