"""Folders of shards behind any fsspec URL: list them, read exact byte ranges, write files whole.

Nothing above this module calls fsspec's reading functions: a short body is silent in fsspec, so every
read goes through `read_range`, which checks what came.
"""

import time
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

# Waits between the tries of one read, seconds. Filesystems retry on their own as well; this covers
# what they let through, such as bodies that end early.
RETRY_WAITS_S = (0.1, 0.5, 2.0)


def open_folder(url: str) -> tuple[Any, str]:
    """Return the filesystem and the path of a folder, without touching the network.

    Raises:
        ValueError: if the URL runs a program (`pipe:`), or if its filesystem is unknown or not installed.
    """
    if url.startswith("pipe:"):
        raise ValueError(f"{url}: data is never read from a program; give a folder or a bucket URL")
    try:
        fs, path = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise ValueError(f"{url}: {error}") from error
    return fs, path.rstrip("/") or "/"


def is_local(fs: Any) -> bool:
    """Say whether paths of `fs` can be opened and memory-mapped directly."""
    return isinstance(fs, LocalFileSystem)


def list_files(url: str) -> dict[str, dict[str, Any]]:
    """Return the files directly in a folder, base name → fsspec's details, sorted by name.

    Raises:
        ValueError: if there is no such folder.
    """
    fs, root = open_folder(url)
    fs.invalidate_cache(root)
    if not fs.isdir(root):
        raise ValueError(f"{url}: no such folder")
    entries = [entry for entry in fs.ls(root, detail=True) if entry["type"] != "directory"]
    return dict(sorted((entry["name"].rsplit("/", 1)[-1], entry) for entry in entries))


def read_range(fs: Any, path: str, start: int, end: int) -> bytes:
    """Return exactly the bytes `start` to `end` of a file, trying again when a read fails or is short.

    Raises:
        OSError: naming the file, the range and the last cause, when no try succeeded.
    """
    cause = ""
    for wait_s in (0.0, *RETRY_WAITS_S):
        time.sleep(wait_s)
        try:
            data = fs.cat_file(path, start=start, end=end)
        except (FileNotFoundError, PermissionError) as error:
            cause = f"{type(error).__name__}: {error}"
            break
        except Exception as error:  # each filesystem raises classes of its own
            cause = f"{type(error).__name__}: {error}"
        else:
            if len(data) == end - start:
                return data
            cause = f"{len(data)} bytes came instead of {end - start}"
    raise OSError(f"{fs.unstrip_protocol(path)}: cannot read bytes {start} to {end} ({cause})")


def write_file(fs: Any, path: str, data: bytes) -> None:
    """Write a file under a temporary name, then move it, so that it exists whole or not at all."""
    partial = f"{path}.partial"
    fs.pipe_file(partial, data)
    fs.mv(partial, path)
