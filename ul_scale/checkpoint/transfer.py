"""Files of a checkpoint on their way: to a bucket, back to a local disk, and the scratch space for both.

Every file is hashed where it is local, and its size is compared where it arrives. Large files are never
held in memory whole.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, TypeVar

from ul_scale.checkpoint.files import is_local, list_names, make_dirs, request, sizes, sync

WORKERS = 4
"""Files in flight at a time; each may hold four parts of 50 MB in memory."""
BLOCK_BYTES = 16 * 2**20
TRIES, BUDGET_S = 5, 1800.0
"""Of each file, and for all files of a call together, in seconds."""
SCRATCH_PREFIX = "ul-scale-scratch-"

T = TypeVar("T")


class BrokenCheckpoint(RuntimeError):
    """A file of a checkpoint is missing, or is not the one that was saved."""


class SaveFailed(RuntimeError):
    """A checkpoint could not be written; the ones before it are as they were."""


class FileInfo(TypedDict):
    size: int
    sha256: str


class _Short(ConnectionError):
    """Fewer bytes came than were promised."""


def describe(path: Path) -> FileInfo:
    """Return size and checksum of a file, local or in a bucket, from where it is read in blocks."""
    if is_local(path):
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return {"size": file.tell(), "sha256": digest}
    size = int(request(path, lambda fs, key: fs.info(key)["size"], "read"))
    hasher = hashlib.sha256()
    for start in range(0, size, BLOCK_BYTES):
        hasher.update(request(path, partial(_block, start, min(start + BLOCK_BYTES, size)), "read"))
    return {"size": size, "sha256": hasher.hexdigest()}


def _block(start: int, end: int, fs: Any, key: str) -> bytes:
    data: bytes = fs.cat_file(key, start=start, end=end)
    if len(data) != end - start:
        raise _Short(f"{len(data)} bytes came instead of {end - start}")
    return data


def upload(
    local_dir: Path,
    remote_dir: Path,
    names: Iterable[str] | None = None,
    *,
    tries: int = TRIES,
    budget_s: float = BUDGET_S,
    log: Callable[[str], object] = print,
) -> dict[str, FileInfo]:
    """Copy files to a directory, in a bucket or not; return size and checksum of each as it was here.

    Args:
        local_dir: where they are.
        remote_dir: where they go, under the same names.
        names: relative paths; by default all files below ``local_dir``.
        tries: how often each file is sent at most.
        budget_s: for all together, in seconds.
        log: told, in one line, of every try that failed.

    Raises:
        OSError: naming the first file that could not be sent, and why.
    """
    deadline = time.monotonic() + budget_s

    def send(name: str) -> FileInfo:
        source, target = local_dir / name, remote_dir / name
        info = describe(source)
        if is_local(target):
            make_dirs(target.parent)
            shutil.copyfile(source, target)
            sync(target)
            return info

        def put(fs: Any, key: str) -> None:
            fs.put_file(str(source), key)
            if (found := int(fs.info(key)["size"])) != info["size"]:
                raise _Short(f"{found} bytes arrived of {info['size']}")

        request(target, put, "upload", tries=tries, budget_s=deadline - time.monotonic(), log=log)
        return info

    names = list(sizes(local_dir) if names is None else names)
    return dict(zip(names, _in_parallel(send, names)))


def download(
    remote_dir: Path,
    local_dir: Path,
    files: dict[str, FileInfo],
    *,
    tries: int = TRIES,
    budget_s: float = BUDGET_S,
    log: Callable[[str], object] = print,
) -> None:
    """Copy a checkpoint's files from a bucket to a local directory, comparing each with what was saved.

    Raises:
        BrokenCheckpoint: naming a file that is missing or differs.
        OSError: if the bucket could not be read, or the local disk is full.
    """
    if fault := wrong_size(remote_dir, files):
        raise BrokenCheckpoint(fault)
    require_space(local_dir, sum(info["size"] for info in files.values()))
    deadline = time.monotonic() + budget_s

    def fetch(name: str) -> None:
        source, target, expected = remote_dir / name, local_dir / name, files[name]
        target.parent.mkdir(parents=True, exist_ok=True)

        def get(fs: Any, key: str) -> None:
            fs.get_file(key, str(target))
            if (found := target.stat().st_size) != expected["size"]:
                raise _Short(f"{found} bytes came instead of {expected['size']}")

        request(source, get, "download", tries=tries, budget_s=deadline - time.monotonic(), log=log)
        if fault := wrong_hash(source, describe(target), expected):
            raise BrokenCheckpoint(fault)

    _in_parallel(fetch, list(files))


def wrong_size(directory: Path, files: dict[str, FileInfo]) -> str | None:
    """Return a line about the first file that is missing, cut short or too long, None if all are right."""
    there = sizes(directory)
    for name, info in files.items():
        if there.get(name) != info["size"]:
            what = f"has {there[name]} bytes" if name in there else "is missing"
            return f"{directory / name} {what}, expected {info['size']} bytes"
    return None


def wrong_hash(path: Path, found: FileInfo, expected: FileInfo) -> str | None:
    """Return a line about a file that is not the one that was saved, None if it is."""
    if found == expected:
        return None
    return f"{path} has sha256 {found['sha256']}, expected {expected['sha256']}"


def _in_parallel(work: Callable[[str], T], names: list[str]) -> list[T]:
    """Return the results in order; after a failure nothing new is begun."""
    with ThreadPoolExecutor(WORKERS) as pool:
        try:
            return list(pool.map(work, names))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


# Scratch space ------------------------------------------------------------------------------------


def require_space(directory: Path, num_bytes: int) -> None:
    """Raise ``OSError`` (ENOSPC) unless a local disk has room for so many bytes."""
    free = shutil.disk_usage(directory).free
    if free < num_bytes:
        raise OSError(
            errno.ENOSPC,
            f"the disk has {free / 1e9:.2f} GB free, {num_bytes / 1e9:.2f} GB are needed: make room, or set"
            " checkpoint.scratch to a folder on a larger disk",
            str(directory),
        )


@contextlib.contextmanager
def scratch(base: str | None = None, num_bytes: int = 0) -> Iterator[Path]:
    """Give an empty local directory that is removed afterwards, or by the next process after a kill.

    Args:
        base: an existing folder to make it in; by default the system's for temporary files.
        num_bytes: what is going to be written, if known.

    Raises:
        ValueError: there is no such folder.
        OSError: there is less room than that.
    """
    parent = Path(base or tempfile.gettempdir())
    if not parent.is_dir():
        raise ValueError(f"checkpoint.scratch is {base}; expected an existing folder")
    for name in list_names(parent):
        if name.startswith(SCRATCH_PREFIX):
            _remove_if_left(parent / name)
    require_space(parent, num_bytes)
    directory, lock = _locked_dir(parent)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(lock)


def _lock(directory: Path) -> int | None:
    """Return a descriptor that holds the lock of a directory, None if it is gone or someone's."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if directory.stat().st_ino == os.fstat(descriptor).st_ino:
            return descriptor
    except OSError:
        pass
    os.close(descriptor)
    return None


def _locked_dir(parent: Path) -> tuple[Path, int]:
    """Make a directory and lock it; another process may take it for left over until that is done."""
    while True:
        directory = Path(tempfile.mkdtemp(prefix=SCRATCH_PREFIX, dir=parent))
        if (lock := _lock(directory)) is not None:
            return directory, lock


def _remove_if_left(directory: Path) -> None:
    """Remove a scratch directory whose process is gone: a lock ends with whoever holds it."""
    if (lock := _lock(directory)) is not None:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(lock)
