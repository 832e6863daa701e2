"""How folders are opened and listed, ranges read, and files written: what is tried, refused and said."""

import pickle
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
from buckets import Gate, bucket_root, gate, gcs_bucket, s3_bucket
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

from ul_scale.checkpoint.files import sizes, write_atomic
from ul_scale.data import storage
from ul_scale.data.config import DataConfig
from ul_scale.data.storage import ReadPolicy

__all__ = ["bucket_root", "gate", "gcs_bucket", "s3_bucket"]

DATA = bytes(range(256))


@dataclass
class Clock:
    """A clock that only waits move on; notes them."""

    now: float = 0.0
    waits: list[float] = field(default_factory=list)

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(storage, "time", clock)
    return clock


class Failing(MemoryFileSystem):
    """Raises what it is told to, then reads."""

    cachable = False

    def __init__(self, *errors: Exception) -> None:
        super().__init__()
        self.errors, self.reads = list(errors), 0
        self.pipe_file("/f", DATA)

    def cat_file(self, *args, **kwargs):
        self.reads += 1
        if self.errors:
            raise self.errors.pop(0)
        return super().cat_file(*args, **kwargs)


# Reading -------------------------------------------------------------------------------------------


def test_the_policy_is_that_of_the_config_and_travels() -> None:
    config = DataConfig(read_timeout_s=1.5, read_attempts=3, read_budget_s=9)
    policy = ReadPolicy.of(config)
    assert policy == ReadPolicy(timeout_s=1.5, attempts=3, budget_s=9)
    assert pickle.loads(pickle.dumps(policy)) == policy
    assert ReadPolicy.of(DataConfig()) == ReadPolicy()


def test_waits_double_up_to_a_limit_and_differ(clock: Clock) -> None:
    with pytest.raises(
        OSError, match=r"/f: cannot read bytes 3 to 9 \(OSError: busy\); 12 tries in \d+\.\d s$"
    ):
        storage.read_range(
            Failing(*[OSError("busy")] * 12), "/f", 3, 9, ReadPolicy(attempts=12, budget_s=1e6)
        )
    expected = [0.5, 1, 2, 4, 8, 16, 30, 30, 30, 30, 30]
    ratios = [wait / middle for wait, middle in zip(clock.waits, expected, strict=True)]
    assert all(0.5 <= ratio <= 1.5 for ratio in ratios) and len(set(ratios)) > 5


def test_a_read_that_works_at_last(clock: Clock) -> None:
    fs = Failing(*[OSError("busy")] * 7)
    assert storage.read_range(fs, "/f", 3, 9) == DATA[3:9]
    assert fs.reads == 8


def test_the_budget_ends_the_tries(clock: Clock) -> None:
    fs = Failing(*[OSError("busy")] * 1000)
    with pytest.raises(OSError, match="busy"):
        storage.read_range(fs, "/f", 3, 9, ReadPolicy(attempts=1000, budget_s=100.0))
    assert 40 < clock.now < 100 and fs.reads > 6


def test_a_read_that_is_no_longer_wanted_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "RETRY_WAITS_S", (60.0,))
    fs, stop = Failing(*[OSError("busy")] * 8), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(storage.read_range, fs, "/f", 3, 9, ReadPolicy(), stop)
        stop.set()
        assert isinstance(read.exception(timeout=10), OSError)
    assert fs.reads == 1


def test_a_request_gets_no_more_time_than_is_left(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    timeouts = []

    def request(fs, path, start, end, timeout_s):
        timeouts.append(timeout_s)
        clock.now += timeout_s
        raise TimeoutError

    monkeypatch.setattr(storage, "_request_range", request)
    with pytest.raises(OSError, match=r"no answer within \d+"):
        storage.read_range(Failing(), "/f", 3, 9, ReadPolicy(timeout_s=30, attempts=99, budget_s=100))
    assert timeouts[:3] == [30, 30, 30] and 0 < timeouts[-1] < 30
    assert clock.now <= 100


@pytest.mark.parametrize("error", [FileNotFoundError("/f"), PermissionError("no")])
def test_what_another_try_cannot_change(clock: Clock, error: OSError) -> None:
    fs = Failing(error)
    with pytest.raises(type(error), match=r"/f: cannot read bytes 3 to 9 \(.*\)$"):
        storage.read_range(fs, "/f", 3, 9)
    assert fs.reads == 1 and not clock.waits


@pytest.mark.parametrize(
    ("start", "end", "cause"), [(250, 260, "6 bytes came instead of 10"), (300, 310, "0 bytes came")]
)
def test_a_range_past_the_end(clock: Clock, start: int, end: int, cause: str) -> None:
    with pytest.raises(OSError, match=cause):
        storage.read_range(Failing(), "/f", start, end)


def test_an_empty_range_is_not_asked_for() -> None:
    fs = Failing()
    assert storage.read_range(fs, "/f", 5, 5) == b""
    assert fs.reads == 0


def test_a_long_range_is_read_in_pieces(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    monkeypatch.setattr(storage, "PIECE_BYTES", 100)
    fs = Failing(*[OSError("busy")] * 7)
    assert storage.read_range(fs, "/f", 1, 256) == DATA[1:]
    assert fs.reads == 7 + 3
    fs.errors = [OSError("busy")] * 8
    with pytest.raises(OSError, match="cannot read bytes 1 to 101 "):
        storage.read_range(fs, "/f", 1, 256)


def test_signatures_of_urls_are_not_told(clock: Clock) -> None:
    error = OSError("GET https://host/f?X-Signature=hunter2&expires=1\nfailed")
    fs = Failing(*[error] * 8)
    with pytest.raises(OSError, match=r"OSError: GET https://host/f failed\)") as caught:
        storage.read_range(fs, "/f?token=hunter2", 0, 4)
    assert "hunter2" not in str(caught.value)
    # Nor in a traceback.
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


@pytest.fixture
def http_folder(tmp_path: Path) -> Iterator[str]:
    """Serve a folder with the standard library's server, which ignores Range."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path))
    threading.Thread(target=server.serve_forever, args=(0.02,)).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_server_without_ranges(http_folder: str, tmp_path: Path, no_waits: None) -> None:
    (tmp_path / "f").write_bytes(DATA)
    fs, root = storage.open_folder(http_folder)
    assert storage.read_range(fs, f"{root}/f", 0, 256) == DATA
    for start, end in ((3, 9), (0, 9), (1, 257)):
        with pytest.raises(
            OSError, match=rf"/f: cannot read bytes {start} to {end} \(the server ignored the"
        ):
            storage.read_range(fs, f"{root}/f", start, end, ReadPolicy(attempts=2))


# Opening -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("pipe:cat x.tar", "never read from a program"),
        ("simplecache::pipe:cat x.tar", "never read from a program"),
        ("simplecache:: PIPE://cat x.tar", "never read from a program"),
        ("s3://key:hunter2@bucket/train", r"^s3://…: the URL holds credentials"),
        ("simplecache::https://user:hunter2@host/train", r"^https://…: the URL holds credentials"),
        ("https://host/train?sig=hunter2", r"^https://host/train\?…: a query"),
        ("gs://", "names no bucket; expected gs://BUCKET"),
        ("nonsense://x", "nonsense"),
    ],
)
def test_urls_that_are_refused(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        storage.open_folder(url)
    assert "hunter2" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("scheme", "module", "extra"), [("gs", "gcsfs", "gcs"), ("s3", "s3fs", "s3")])
def test_a_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, scheme: str, module: str, extra: str
) -> None:
    monkeypatch.delitem(_registry, scheme, raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"^{scheme}://b/x: .*pip install 'ul-scale\[{extra}\]'$"):
        storage.open_folder(f"{scheme}://b/x")


def test_opening_imports_no_torch() -> None:
    """Worker processes read with this module."""
    code = "import sys, ul_scale.data.storage as s; s.open_folder('/'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_with_an_at_sign(tmp_path: Path) -> None:
    _, path = storage.open_folder(f"{tmp_path}/a@b")
    assert path == f"{tmp_path}/a@b"
    assert storage.open_folder("memory://x/a@b")[1] == "/x/a@b"


# Listing -------------------------------------------------------------------------------------------


def test_a_local_folder(tmp_path: Path) -> None:
    (tmp_path / "b.tar").write_bytes(DATA)
    (tmp_path / "a.tar").write_bytes(b"")
    (tmp_path / "sub").mkdir()
    files = storage.list_files(str(tmp_path))
    assert {name: info["size"] for name, info in files.items()} == {"a.tar": 0, "b.tar": 256}
    assert list(files) == ["a.tar", "b.tar"]
    assert storage.list_files(str(tmp_path / "sub")) == {}
    with pytest.raises(ValueError, match=r"b\.tar is a file; expected a folder"):
        storage.list_files(str(tmp_path / "b.tar"))
    with pytest.raises(ValueError, match="/none: no such folder$"):
        storage.list_files(str(tmp_path / "none"))


def test_a_listing_beside_another_writer(tmp_path: Path) -> None:
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            for number in range(50):
                write_atomic(tmp_path / f"{number}.tar", b"1")

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        try:
            for _ in range(300):
                assert all(entry["size"] is not None for entry in storage.list_files(str(tmp_path)).values())
                assert set(sizes(tmp_path).values()) <= {0, 1}
        finally:
            stop.set()
        writing.result()


def test_a_folder_in_a_bucket(bucket_root: str) -> None:
    fs, root = storage.open_folder(bucket_root)
    for name in ("b.tar", "a.tar", "sub/c.tar"):
        fs.pipe_file(f"{root}/{name}", DATA)
    files = storage.list_files(bucket_root)
    assert list(files) == ["a.tar", "b.tar"] and files["a.tar"]["size"] == 256
    with pytest.raises(ValueError, match=r"a\.tar is a file"):
        storage.list_files(f"{bucket_root}/a.tar")
    with pytest.raises(ValueError, match="/none: no such folder$"):
        storage.list_files(f"{bucket_root}/none")
    bucket = f"absent-{uuid.uuid4().hex[:8]}"
    with pytest.raises(ValueError, match=rf"no such bucket \({bucket}\)$"):
        storage.list_files(f"{bucket_root.partition('://')[0]}://{bucket}/train")


def test_another_processs_files_are_seen(bucket_root: str) -> None:
    fs, root = storage.open_folder(bucket_root)
    fs.pipe_file(f"{root}/a.tar", DATA)
    assert list(storage.list_files(bucket_root)) == ["a.tar"]
    other = fsspec.filesystem(bucket_root.partition("://")[0], skip_instance_cache=True)
    other.pipe_file(f"{root}/b.tar", DATA)
    assert list(storage.list_files(bucket_root)) == ["a.tar", "b.tar"]
    other.rm_file(f"{root}/b.tar")
    assert not fs.exists(f"{root}/b.tar")


def test_a_listing_is_one_request_for_many_files(bucket_root: str, gate: Gate) -> None:
    fs, root = storage.open_folder(bucket_root)
    for number in range(12):
        fs.pipe_file(f"{root}/{number}.tar", b"")
    gate.seen.clear()
    assert len(storage.list_files(bucket_root)) == 12
    assert len(gate.seen) == 1


def test_a_bucket_that_may_not_be_listed(bucket_root: str, gate: Gate) -> None:
    gate.refuse = lambda method, path: 403
    with pytest.raises(ValueError, match=rf"^{bucket_root}: cannot list the folder \(.*\)$"):
        storage.list_files(bucket_root)
    assert len(gate.seen) == 1


def test_a_store_that_is_busy(bucket_root: str, gate: Gate, no_waits: None) -> None:
    storage.write_file(*_file(bucket_root), DATA)
    answers = [503, 503]
    gate.refuse = lambda method, path: answers.pop() if answers else None
    assert list(storage.list_files(bucket_root)) == ["f"]
    answers += [503, 503]
    storage.write_file(*_file(bucket_root), b"new")
    assert storage.read_range(*_file(bucket_root), 0, 3) == b"new"
    assert not answers


# Writing -------------------------------------------------------------------------------------------


def _file(url: str):
    fs, root = storage.open_folder(url)
    return fs, f"{root}/f"


def test_a_file_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_waits: None
) -> None:
    storage.write_file(*_file(str(tmp_path)), b"old")
    assert [path.name for path in tmp_path.iterdir()] == ["f"]

    def fail(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage.os, "fsync", fail)
    with pytest.raises(OSError, match=r"/f: cannot write \(OSError: \[Errno 28\] No space left"):
        storage.write_file(*_file(str(tmp_path)), DATA)
    assert (tmp_path / "f").read_bytes() == b"old"


def test_a_file_in_a_bucket_appears_at_once(bucket_root: str, gate: Gate) -> None:
    """An object needs no other name to be written under."""
    storage.write_file(*_file(bucket_root), DATA)
    assert storage.read_range(*_file(bucket_root), 0, 256) == DATA
    assert not any("partial" in path for _, path in gate.seen)
    assert not {method for method, _ in gate.seen} & {"DELETE", "COPY"}


def test_a_bucket_that_is_not_there(bucket_root: str) -> None:
    url = f"{bucket_root.partition('://')[0]}://absent-{uuid.uuid4().hex[:8]}"
    with pytest.raises(FileNotFoundError, match=rf"^{url}/f: cannot write \(.*\)$"):
        storage.write_file(*_file(url), DATA)
