"""Folders of shards behind any fsspec URL: list them, read exact byte ranges, write files whole.

Nothing above this module calls fsspec's reading functions: a short body and a whole object are silent in
fsspec, and a server that says nothing is waited for. So every read goes through `read_range`, which checks
what came, gives up on silence and tries again.
"""

import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import fsspec
from fsspec.asyn import sync
from fsspec.implementations.local import LocalFileSystem

from ul_scale.data.config import DataConfig

RETRY_WAITS_S = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
"""Waits between the tries of a request, seconds, each times 0.5 to 1.5; the last is repeated."""
CONNECT_S, SILENCE_S = 10.0, 60.0
"""How long a server may take to accept a connection and, while one is open, say nothing."""
PIECE_BYTES = 32_000_000
"""The longest range that one request asks for, bytes, so that its time limit also fits large files."""

_EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3"}
_OBJECT_STORES = {*_EXTRAS, "memory", "abfs", "az"}  # There a file appears whole or not at all.
# Statuses that another try may change, and those that it will not.
_PASSING_STATUS = (408, 425, 429, 500, 502, 503, 504)
_FINAL_STATUS = (401, 403, 404, 410, 416)
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError"}
_random = random.SystemRandom()  # Jitter has to differ between processes, whose seeds may be the same.

T = TypeVar("T")


@dataclass(frozen=True)
class ReadPolicy:
    """How long a read is tried."""

    timeout_s: float = 30.0
    """Of one request; it is then cancelled."""
    attempts: int = 8
    """How often a range is asked for."""
    budget_s: float = 300.0
    """Of all tries of a read and the waits between them."""

    @classmethod
    def of(cls, config: DataConfig) -> Self:
        """Return the policy that section ``data`` of a config asks for."""
        return cls(config.read_timeout_s, config.read_attempts, config.read_budget_s)


_SMALL = ReadPolicy(attempts=4, budget_s=60.0)


def open_folder(url: str) -> tuple[Any, str]:
    """Return the filesystem and the path of a folder, without touching the network.

    Raises:
        ValueError: if the URL runs a program (`pipe:`), holds credentials or names no bucket, or if its
            filesystem is unknown or not installed.
    """
    schemes = []
    for link in url.split("::"):
        scheme, _, rest = link.partition("://")
        schemes.append(scheme)
        if link.strip().lower().startswith("pipe:"):
            raise ValueError("pipe:…: data is never read from a program; give a folder or a bucket URL")
        if "@" in rest.split("/")[0]:
            raise ValueError(f"{scheme}://…: the URL holds credentials, which belong into the environment")
        if scheme in ("http", "https") and "?" in link:
            raise ValueError(f"{without_query(link)}?…: a query cannot be part of the URL of a folder")
        if scheme in _EXTRAS and not rest.strip("/"):
            raise ValueError(f"{url}: names no bucket; expected {scheme}://BUCKET/…")
    try:
        # In a chain, such as simplecache::gs://…, each filesystem has options of its own.
        options = {scheme: made for scheme in schemes if (made := filesystem_options(scheme))}
        fs, path = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        extra = next((_EXTRAS[scheme] for scheme in schemes if scheme in _EXTRAS), None)
        remedy = f"a package is missing: pip install 'ul-scale[{extra}]'" if extra else str(error)
        raise ValueError(f"{url}: {remedy}") from error
    except ValueError as error:
        raise ValueError(f"{url}: {error}") from error
    return fs, path.rstrip("/") or "/"


def filesystem_options(scheme: str) -> dict[str, Any]:
    """Return what a bucket's filesystem is made with: listings as they are now, no endless silence.

    s3fs has limits for silence of its own, gcsfs has none.
    """
    if scheme not in _EXTRAS:
        return {}
    options: dict[str, Any] = {"use_listings_cache": False}
    if _EXTRAS[scheme] == "gcs":
        from aiohttp import ClientTimeout

        options["requests_timeout"] = ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=SILENCE_S)
        # It logs tracebacks of errors that are reported here, in one line.
        if logging.getLogger("gcsfs").level == logging.NOTSET:
            logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    return options


def is_local(fs: Any) -> bool:
    """Say whether paths of `fs` can be opened and memory-mapped directly."""
    return isinstance(fs, LocalFileSystem)


def list_files(url: str) -> dict[str, dict[str, Any]]:
    """Return the files directly in a folder, base name → fsspec's details, sorted by name.

    Raises:
        ValueError: if there is no such folder or bucket, or if it may not be listed.
        OSError: if the store does not answer.
    """
    fs, root = open_folder(url)
    fs.invalidate_cache(root)
    try:
        entries = _persist(lambda _: _list(fs, root), _SMALL, f"{url}: cannot list the folder")
    except FileNotFoundError:
        raise ValueError(f"{url}: no such {_missing(fs, root)}") from None
    except PermissionError as error:
        raise ValueError(str(error)) from None
    files = {}
    for entry in entries:
        # Some tools write an empty object, `FOLDER/`, in place of a folder.
        if entry["type"] != "directory" and not entry["name"].endswith("/"):
            if entry["name"] == root:
                raise ValueError(f"{url} is a file; expected a folder")
            if entry["size"] is None and entry["name"].endswith(".tar"):
                entry |= _details(fs, entry)
            files[entry["name"].rsplit("/", 1)[-1]] = entry
    return {name: files[name] for name in sorted(files)}


def _details(fs: Any, entry: dict[str, Any]) -> dict[str, Any]:
    """Return what a store knows of a file whose size its listing does not tell, as those by http."""
    name = _name(fs, entry["name"])
    if entry["type"] != "file":
        raise ValueError(f"{name} is no file that can be read; expected a tar")
    details: dict[str, Any] = _persist(
        lambda _: fs.info(entry["name"]), _SMALL, f"{name}: cannot read its size"
    )
    return details


def _list(fs: Any, root: str) -> list[dict[str, Any]]:
    if not is_local(fs) or not os.path.isdir(root):
        entries: list[dict[str, Any]] = fs.ls(root, detail=True)
        return entries
    entries = []
    with os.scandir(root) as found:  # in half the time that fsspec takes, for it looks at every link twice
        for entry in found:
            if entry.is_file():
                try:
                    stat = entry.stat()
                except FileNotFoundError:  # another writer's temporary file has just got its name
                    continue
                entries.append(
                    {"name": entry.path, "type": "file", "size": stat.st_size, "mtime": stat.st_mtime}
                )
            elif not entry.is_dir():  # such as a link to nothing
                entries.append({"name": entry.path, "type": "other", "size": None})
    return entries


def read_range(
    fs: Any,
    path: str,
    start: int,
    end: int,
    policy: ReadPolicy = ReadPolicy(),
    stop: threading.Event | None = None,
) -> bytes:
    """Return exactly the bytes `start` to `end` of a file, trying again when a read fails or is not those.

    A request that takes longer than the policy allows is cancelled. That holds for filesystems that work
    asynchronously, which those of buckets and of http do; others, such as local disks, are waited for.
    From buckets and http an answer that is not the range is refused before its body is read. A filesystem
    that ignores ranges silently in another way has read the whole object before it is refused.

    A long range is read in pieces of `PIECE_BYTES`, and the policy's limits are those of each.

    Args:
        fs: filesystem, as opened by `open_folder`.
        path: of the file, in `fs`.
        start: first byte.
        end: byte after the last.
        policy: how long to try.
        stop: once it is set, a read that fails is not tried again, nor waits for that.

    Raises:
        OSError: naming the file, the range and the last cause, when no try succeeded.
            `FileNotFoundError` and `PermissionError` are told apart, and not tried again.
    """
    longest = 2**30 if is_local(fs) else PIECE_BYTES  # one system call reads less than 2 GiB
    if end - start > longest:
        pieces = [(at, min(at + longest, end)) for at in range(start, end, longest)]
        return b"".join(read_range(fs, path, *piece, policy, stop) for piece in pieces)
    if start == end:  # which no range header can say
        return b""

    def attempt(timeout_s: float) -> bytes:
        data = _request_range(fs, path, start, end, timeout_s)
        if len(data) != end - start:
            raise _Refused(f"{len(data)} bytes came instead of {end - start}")
        return data

    return _persist(attempt, policy, f"{_name(fs, path)}: cannot read bytes {start} to {end}", stop)


def read_file(fs: Any, path: str) -> bytes:
    """Return a small file's content; raises what `read_range` does."""
    what = f"{_name(fs, path)}: cannot read"
    return read_range(fs, path, 0, _persist(lambda _: int(fs.info(path)["size"]), _SMALL, what))


def write_file(fs: Any, path: str, data: bytes) -> None:
    """Write a file so that it exists whole or not at all, replacing one of the same name.

    Raises:
        OSError: naming the file and the cause.
    """

    def attempt(_: float) -> None:
        if _schemes(fs) & _OBJECT_STORES:
            fs.pipe_file(path, data)
            return
        partial = f"{path}.partial"
        if is_local(fs):
            with open(partial, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        else:
            fs.pipe_file(partial, data)
            fs.mv(partial, path)

    _persist(attempt, _SMALL, f"{_name(fs, path)}: cannot write")


def without_query(text: str) -> str:
    """Return a text without the queries of the URLs in it: that of a signed URL is as good as a password."""
    return re.sub(r"\?\S*", "", text)


class _Refused(OSError):
    """An answer that is not what was asked for."""


def _persist(
    act: Callable[[float], T], policy: ReadPolicy, what: str, stop: threading.Event | None = None
) -> T:
    """Return what `act(timeout_s)` returns, calling it again as long as another try may help.

    Raises:
        OSError: `what`, and the cause, in one line.
    """
    began = time.monotonic()
    for number in range(1, policy.attempts + 1):
        left_s = began + policy.budget_s - time.monotonic()
        timeout_s = min(policy.timeout_s, left_s)
        try:
            return act(timeout_s)
        except Exception as error:  # each filesystem raises classes of its own
            kind, cause = _judge(error, timeout_s)
        wait_s = RETRY_WAITS_S[min(number, len(RETRY_WAITS_S)) - 1] * _random.uniform(0.5, 1.5)
        left_s = began + policy.budget_s - time.monotonic()
        if kind is not None or number == policy.attempts or wait_s >= left_s:
            break
        if stop is None:
            time.sleep(wait_s)
        elif stop.wait(wait_s):
            break
    tried = f"; {number} tries in {time.monotonic() - began:.1f} s" if number > 1 else ""
    # What the filesystem raised is left out of the traceback: it may spell out a signed URL.
    raise (kind or OSError)(f"{what} ({cause}){tried}") from None


def _judge(error: Exception, timeout_s: float) -> tuple[type[Exception] | None, str]:
    """Return the class to raise at once, None if another try may help, and the cause in one line."""
    name, text = type(error).__name__, " ".join(without_query(str(error)).split())[:300]
    # Some of these classes say nothing more.
    cause = text if isinstance(error, _Refused) else f"{name}: {text}" if text else name
    if isinstance(error, TimeoutError) and not text:
        cause = f"no answer within {timeout_s:.3g} s"
    # s3fs keeps the answer in the cause of an OSError whose class says less.
    answer = getattr(error.__cause__ or error, "response", None)
    status = getattr(error, "status", None) or getattr(error, "code", None)
    if isinstance(answer, dict):
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    if isinstance(error, FileNotFoundError | NotADirectoryError) or status == 404:
        return FileNotFoundError, cause
    if isinstance(error, PermissionError) or text.startswith("Forbidden") or name in _NO_CREDENTIALS:
        return PermissionError, cause
    if str(status).isdecimal() and int(str(status)) in _FINAL_STATUS:
        return PermissionError if int(str(status)) in (401, 403) else OSError, cause
    return (MemoryError if isinstance(error, MemoryError) else None), cause


def _request_range(fs: Any, path: str, start: int, end: int, timeout_s: float) -> bytes:
    """Return what one request for a range brings, which may be too little or too much."""
    if is_local(fs):
        with open(path, "rb", buffering=0) as file:
            return os.pread(file.fileno(), end - start, start)
    if not getattr(fs, "async_impl", False) or fs.asynchronous:
        return bytes(fs.cat_file(path, start=start, end=end))
    reader = _for_reading(fs)
    read = _read_s3 if "s3" in _schemes(fs) else _read
    return bytes(sync(reader.loop, read, reader, path, start, end, timeout=timeout_s))


def _for_reading(fs: Any) -> Any:
    """Return a filesystem that leaves it to us to try again, and looks at answers before reading them.

    Uploads and listings stay with `fs`, and with its own retries. fsspec keeps one instance per process.
    """
    schemes, options = _schemes(fs), dict(fs.storage_options)
    if "s3" in schemes:
        limits = {"connect_timeout": CONNECT_S, "read_timeout": SILENCE_S, **fs.config_kwargs}
        options["config_kwargs"] = {**limits, "retries": {"total_max_attempts": 1}}
    elif "gs" in schemes:
        options["session_kwargs"] = {**fs.session_kwargs, "raise_for_status": _check_answer}
    elif schemes & {"http", "https"}:
        options["client_kwargs"] = {**fs.client_kwargs, "raise_for_status": _check_answer}
    else:
        return fs
    reader = type(fs)(*fs.storage_args, **options)
    if "s3" in schemes:
        reader.retries = 1
    return reader


async def _read(fs: Any, path: str, start: int, end: int) -> bytes:
    data: bytes = await fs._cat_file(path, start=start, end=end)
    return data


async def _read_s3(fs: Any, path: str, start: int, end: int) -> bytes:
    """Do what s3fs's `_cat_file` does, but look at the answer before its body is read."""
    bucket, key, _ = fs.split_path(path)
    answer = await fs._call_s3("get_object", Bucket=bucket, Key=key, Range=f"bytes={start}-{end - 1}")
    body = answer["Body"]
    try:
        _check_range(answer.get("ContentRange"), answer.get("ContentLength"), start, end)
        data: bytes = await body.read()
        return data
    finally:
        body.close()


async def _check_answer(response: Any) -> None:
    """Read aiohttp's answer to a range request, raising before its body if it is not that range.

    aiohttp calls this as soon as it has the headers, and keeps the body for whoever asks for it next. What
    is raised here is not of the classes after which gcsfs would try again on its own, for half a minute.
    """
    from aiohttp import ClientError

    wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", response.request_info.headers.get("Range", ""))
    if wanted is None:
        return
    if response.status in _PASSING_STATUS:
        raise _Refused(f"status {response.status} {response.reason or ''}".strip())
    if response.status < 300:
        start, end = int(wanted[1]), int(wanted[2]) + 1
        _check_range(response.headers.get("Content-Range"), response.content_length, start, end)
        try:
            await response.read()
        except ClientError as error:
            raise _Refused(f"{type(error).__name__}: {without_query(str(error))}") from error


def _check_range(content_range: str | None, content_length: int | None, start: int, end: int) -> None:
    """Raise if an answer's headers say that it is not the bytes `start` to `end`."""
    if content_range is None:
        if start > 0 or content_length != end:
            raise _Refused("the server ignored the range and sent the whole object")
    elif not content_range.startswith(f"bytes {start}-{end - 1}/"):
        raise _Refused(f"{content_range} came instead of bytes {start}-{end - 1}")


def _missing(fs: Any, root: str) -> str:
    """Return which is missing, the folder or its bucket."""
    bucket = root.split("/")[0]
    if _schemes(fs) & set(_EXTRAS):
        try:
            fs.ls(bucket)
        except FileNotFoundError:
            return f"bucket ({bucket})"
        except Exception:  # then the folder is what is known to be missing
            pass
    return "folder"


def _schemes(fs: Any) -> set[str]:
    return {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)


def _name(fs: Any, path: str) -> str:
    return without_query(fs.unstrip_protocol(path))
