"""The few file operations that attempts and the commit protocol rest on.

Each is atomic and durable: a kill, or a power loss after it returned, finds all of it or nothing.
"""

import contextlib
import errno
import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

TEMP_SUFFIX = ".tmp"
# What link() answers on file systems without hard links, and fsync() where directories have none.
_UNSUPPORTED = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EMLINK)


def read(path: Path) -> bytes | None:
    """Return a file's bytes, or None if there is no such file. Other errors are not taken for absence."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def list_names(directory: Path) -> list[str]:
    """Return the sorted names in a directory, none if it does not exist."""
    try:
        return sorted(os.listdir(directory))
    except FileNotFoundError:
        return []


def sync(path: Path) -> None:
    """Flush a file or a directory's entries to disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    finally:
        os.close(fd)


def make_dirs(path: Path) -> None:
    """Create a directory and its parents, each entry flushed."""
    if not path.is_dir():
        make_dirs(path.parent)
        with contextlib.suppress(FileExistsError):
            os.mkdir(path)
        sync(path.parent)


def _write_new(path: Path, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise


def _temp(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}{TEMP_SUFFIX}")


def create_exclusive(path: Path, data: bytes) -> bool:
    """Create a file with this content unless it exists; return whether it now holds ``data`` by our doing.

    The content is linked into place, so nobody ever sees a part of it. Only where there are no hard
    links can a kill leave a torn file, which readers must therefore take for no file. ``data`` must be
    unlike anyone else's: a network client may repeat a request whose answer was lost, and finding our
    own words then means that the create worked.
    """
    temp = _temp(path)
    _write_new(temp, data)
    try:
        os.link(temp, path)
    except FileExistsError:
        if read(path) != data:
            return False
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        try:
            _write_new(path, data)
        except FileExistsError:
            return False
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temp)
    sync(path.parent)
    return True


def write_atomic(path: Path, data: bytes) -> None:
    """Create or replace a file in one step."""
    temp = _temp(path)
    _write_new(temp, data)
    try:
        os.replace(temp, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temp)
        raise
    sync(path.parent)


def remove_if(path: Path, data: bytes) -> None:
    """Remove a file only while it still holds ``data``: what was judged is what goes.

    A process that slept between judging and removing may by now meet the file of a later writer. It
    notices because it looks again after moving the file aside, and puts it back.
    """
    aside = _temp(path)
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, aside)
        if read(aside) == data:
            os.unlink(aside)
        else:
            os.rename(aside, path)
        sync(path.parent)


def remove_tree(path: Path) -> None:
    """Remove a file or a directory tree; what someone else still writes to is left for the next time."""
    try:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            os.unlink(path)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EBUSY):
            raise


def remove_if_empty(directory: Path) -> None:
    """Remove a directory if nothing is in it."""
    try:
        os.rmdir(directory)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY):
            raise


def decode(data: bytes | None) -> dict[str, Any]:
    """Return the JSON object in ``data``; of an absent or torn file nothing is known: an empty one."""
    try:
        value = json.loads(data or b"")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def encode(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=1).encode() + b"\n"
