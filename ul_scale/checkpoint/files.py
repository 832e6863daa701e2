"""The few file operations that attempts and the commit protocol rest on, on disks and in buckets.

Each is atomic and durable: a kill, or a power loss after it returned, finds all of it or nothing. A run
directory is a ``pathlib.Path``, or a ``upath.UPath`` where it lies in a bucket; only this module knows the
difference. Objects appear whole or not at all and folders are only parts of their names, so in a bucket
there is nothing to flush or to make, and an exclusive create is a conditional PUT.
"""

import contextlib
import errno
import importlib.util
import json
import os
import random
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar, cast

from ul_scale.data.storage import filesystem_options

TEMP_SUFFIX = ".tmp"
# What link() answers on file systems without hard links, and fsync() where directories have none.
_UNSUPPORTED = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EMLINK)

T = TypeVar("T")

# The module that each kind of URL needs, and how to get it; memory:// is for tests.
_GCS, _S3 = ("gcsfs", "pip install 'ul-scale[gcs]'"), ("s3fs", "pip install 'ul-scale[s3]'")
_PROVIDERS = {"gs": _GCS, "gcs": _GCS, "s3": _S3, "memory": ("fsspec", "")}
TRIES, BUDGET_S, FIRST_WAIT_S = 4, 60.0, 0.5
"""Of a small request. gcsfs and s3fs repeat on their own as well, within each of our tries."""

_PASSING_STATUS = (408, 409, 425, 429, 500, 502, 503, 504)
# Classes of gcsfs, s3fs and what they rest on, by name, for they may not be installed.
# ClientError is aiohttp's; botocore's namesake has a status.
_PASSING = set("HTTPClientError ConnectionError IncompleteReadError ResponseParserError".split())
_PASSING |= set("ClientError RequestException ChecksumError TimeoutError".split())
_random = random.SystemRandom()  # The global generator may be seeded, and jitter has to differ.


def run_path(root: str) -> Path:
    """Return the path of a config's ``root``: a local folder, ``gs://`` or ``s3://``, without touching it.

    Listings are not cached: other processes write there too.

    Raises:
        ValueError: another kind of URL, one without a bucket or with credentials, or a missing package.
    """
    scheme, separator, rest = root.partition("://")
    if not separator:
        return Path(root)
    if scheme == "file":
        return Path(rest)
    if scheme not in _PROVIDERS:
        raise ValueError(f"root is {scheme}://…; expected a local folder, gs://BUCKET/… or s3://BUCKET/…")
    bucket = rest.split("/")[0]
    if not bucket or "@" in bucket:
        fault = "holds credentials, which belong into the environment" if bucket else "names no bucket"
        raise ValueError(f"root, a {scheme}:// URL, {fault}; expected {scheme}://BUCKET/…")
    module, extra = _PROVIDERS[scheme]
    if not (importlib.util.find_spec(module) and importlib.util.find_spec("upath")):
        raise ValueError(f"root is {root}, which needs {module} and universal-pathlib: {extra}")
    from upath import UPath

    options = filesystem_options(scheme)
    if module == "s3fs":
        options["max_concurrency"] = 4  # Parts of 50 MB that one upload holds in memory.
    return cast(Path, UPath(root, **options))


def is_local(path: Path) -> bool:
    return isinstance(path, Path)


def request(
    path: Path,
    act: Callable[[Any, str], T],
    doing: str,
    *,
    tries: int = TRIES,
    budget_s: float = BUDGET_S,
    log: Callable[[str], object] | None = None,
) -> T:
    """Call ``act(filesystem, key)`` on an object, again after errors that may pass, such as 503.

    Args:
        path: in a bucket.
        act: safe to repeat.
        doing: a verb for messages.
        tries: how often at most.
        budget_s: nor is it begun again later than this, in seconds.
        log: told of every try that failed and is repeated.

    Raises:
        OSError: in one line, the URL and the cause; ``FileNotFoundError``, ``FileExistsError`` and
            ``PermissionError`` are told apart, whatever the file system raises.
    """
    deadline = time.monotonic() + budget_s
    remote = cast(Any, path)
    for number in range(1, tries + 1):
        try:
            return act(remote.fs, remote.path)
        except Exception as error:
            failure, passing = _judge(error, f"{path}: cannot {doing}", number)
            wait_s = FIRST_WAIT_S * 2 ** (number - 1) * _random.uniform(0.5, 1.5)
            if not passing or number == tries or time.monotonic() + wait_s > deadline:
                raise failure from error
        if log is not None:
            log(f"{failure}; again in {wait_s:.1f} s")
        time.sleep(wait_s)
    raise AssertionError("unreachable")


def _judge(error: Exception, what: str, number: int) -> tuple[OSError, bool]:
    """Return an ``OSError`` of one line for what a file system raised, and whether another try may help."""
    # s3fs keeps botocore's answer as the cause of an OSError whose class says less.
    answer = getattr(error.__cause__ or error, "response", None)
    status = getattr(error, "code", None)
    if isinstance(answer, dict):
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    names = {base.__name__ for base in type(error).__mro__}
    # A signed URL may be part of the text, and its query is as good as a password.
    lines = re.sub(r"\?\S*", "", str(error)).splitlines()
    cause = f"{type(error).__name__}: {' '.join(lines)[:300]}".removesuffix(": ")
    if isinstance(error, FileNotFoundError) or status == 404:
        no_bucket = what.endswith(("write", "upload", "bucket"))
        return FileNotFoundError(f"{what}: {'no such bucket' if no_bucket else 'it does not exist'}"), False
    if isinstance(error, FileExistsError) or status == 412:
        return FileExistsError(f"{what}: it has been written meanwhile"), False
    denied = isinstance(error, PermissionError) or status in (401, 403) or "NoCredentialsError" in names
    if denied or str(error).startswith("Forbidden"):
        return PermissionError(f"{what}: permission denied ({cause})"), False
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OSError(error.errno, f"{what}: the local disk is full", error.filename), False
    passing = str(status).isdecimal() and int(str(status)) in _PASSING_STATUS
    passing = passing or bool(names & _PASSING and status is None) or getattr(error, "retryable", False)
    return OSError(f"{what}: {cause}" + (f" (try {number})" if passing else "")), passing


def require_bucket(path: Path) -> None:
    """Raise ``ValueError`` unless a path's bucket can be listed, or its local folder can be made."""
    if is_local(path):
        there = next((folder for folder in (path, *path.parents) if folder.exists()), path)
        if there.is_file():
            raise ValueError(f"{path}: {there} is a file; expected a folder")
        return
    if cast(Any, path).protocol == "memory":
        return
    try:
        request(path, lambda fs, key: fs.ls(key.partition("/")[0]), "look into its bucket")
    except OSError as error:
        raise ValueError(str(error)) from error


def _entries(directory: Path) -> dict[str, dict[str, Any]]:
    """Return what a bucket tells of the names directly in a folder."""
    try:
        entries = request(directory, lambda fs, key: fs.ls(key, detail=True), "list")
    except FileNotFoundError:
        return {}
    named = {entry["name"].rstrip("/"): entry for entry in entries}
    named.pop(cast(Any, directory).path, None)  # Some tools write an empty object in place of a folder.
    return {name.rsplit("/", 1)[-1]: entry for name, entry in named.items()}


def _remove_object_if(path: Path, data: bytes) -> None:
    """Delete the very version of an object that holds ``data``."""

    def act(fs: Any, key: str) -> None:
        info = fs.info(key)
        if fs.cat_file(key) != data:
            return
        bucket, _, name = key.partition("/")
        # Should the object have been replaced since ``info``, the store refuses.
        if "generation" in info:
            fs.call("DELETE", "b/{}/o/{}", bucket, name, ifGenerationMatch=info["generation"])
        elif "ETag" in info:
            # Stores that do not know the condition ignore it: there the look just before has to do.
            fs.call_s3("delete_object", Bucket=bucket, Key=name, IfMatch=info["ETag"])
        else:
            fs.rm_file(key)

    with contextlib.suppress(FileNotFoundError, FileExistsError):
        request(path, act, "remove")


def read(path: Path) -> bytes | None:
    """Return a file's bytes, or None if there is no such file. Other errors are not taken for absence."""
    try:
        if not is_local(path):
            return request(path, lambda fs, key: cast(bytes, fs.cat_file(key)), "read")
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


def read_all(paths: Iterable[Path]) -> list[bytes | None]:
    """Return what ``read`` says of each path, asking a bucket for many at a time."""
    paths = list(paths)
    if len(paths) < 2 or is_local(paths[0]):
        return [read(path) for path in paths]
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(read, paths))


def list_names(directory: Path) -> list[str]:
    """Return the sorted names in a directory, none if it does not exist."""
    if not is_local(directory):
        return sorted(_entries(directory))
    try:
        return sorted(os.listdir(directory))
    except (FileNotFoundError, NotADirectoryError):
        return []


def list_versions(directory: Path) -> dict[str, str | None]:
    """Return the names in a directory, each with a tag of its content where the store keeps one.

    What was read under a tag need not be read again while the tag is the same.
    """
    if is_local(directory):
        return dict.fromkeys(list_names(directory))
    return {name: entry.get("generation") or entry.get("ETag") for name, entry in _entries(directory).items()}


def sizes(directory: Path) -> dict[str, int]:
    """Return the size in bytes of every file below a directory, by its relative path, sorted."""
    if is_local(directory):
        there = {}
        for path in sorted(directory.rglob("*")):
            # Another writer's temporary file may just have got its name.
            with contextlib.suppress(FileNotFoundError):
                if path.is_file():
                    there[path.relative_to(directory).as_posix()] = path.stat().st_size
        return there
    try:
        found = request(directory, lambda fs, key: fs.find(key, detail=True), "list")
    except FileNotFoundError:
        return {}
    start = len(cast(Any, directory).path) + 1
    return {name[start:]: info["size"] for name, info in sorted(found.items()) if not name.endswith("/")}


def sync(path: Path) -> None:
    """Flush a file or a directory's entries to disk."""
    if not is_local(path):
        return
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
    if is_local(path) and not path.is_dir():
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
    if not is_local(path):
        try:
            request(path, lambda fs, key: fs.pipe_file(key, data, mode="create"), "write")
        except FileExistsError:
            return read(path) == data
        return True
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
    if not is_local(path):
        request(path, lambda fs, key: fs.pipe_file(key, data), "write")
        return
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
    if not is_local(path):
        _remove_object_if(path, data)
        return
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
    if not is_local(path):
        with contextlib.suppress(FileNotFoundError):
            request(path, lambda fs, key: fs.rm(key, recursive=True), "remove")
        return
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
    if not is_local(directory):
        return
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
