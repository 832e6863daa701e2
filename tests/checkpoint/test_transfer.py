"""Files on their way to buckets and back: whole, counted and hashed, or an error that names the file."""

import errno
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from buckets import Gate, bucket_root, gate, gcs_bucket, s3_bucket

from ul_scale.checkpoint import files, transfer
from ul_scale.checkpoint.files import run_path
from ul_scale.checkpoint.transfer import BrokenCheckpoint, FileInfo

__all__ = ["bucket_root", "gate", "gcs_bucket", "s3_bucket"]

CONTENT = {"__0_0.distcp": b"shard" * 1000, ".metadata": b"layout", "deep/er/empty": b""}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for name, data in CONTENT.items():
        path = tmp_path / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "source"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "target").mkdir()
    return tmp_path / "target"


def truth() -> dict[str, FileInfo]:
    return {
        name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in CONTENT.items()
    }


def contents(directory: Path) -> dict[str, bytes]:
    return {name: (directory / name).read_bytes() for name in files.sizes(directory)}


def test_there_and_back(bucket_root: str, source: Path, target: Path):
    remote = run_path(bucket_root) / "a1"
    assert transfer.upload(source, remote) == truth()
    assert files.sizes(remote) == {name: len(data) for name, data in CONTENT.items()}
    assert {name: transfer.describe(remote / name) for name in CONTENT} == truth()
    transfer.download(remote, target, truth())
    assert contents(target) == CONTENT


def test_only_what_is_named_goes(source: Path, target: Path):
    """A local directory will do as well: shards that an engine wrote elsewhere get there in this way."""
    assert transfer.upload(source, target / "a1", [".metadata"]) == {".metadata": truth()[".metadata"]}
    assert contents(target) == {"a1/.metadata": b"layout"}


def test_large_files_go_in_parts(bucket_root: str, tmp_path: Path, target: Path):
    """Beyond what gcsfs sends in one request; what comes back is hashed in several blocks."""
    data = os.urandom(6 * 2**20) + bytes(11 * 2**20)
    (tmp_path / "large").write_bytes(data)
    remote = run_path(bucket_root)
    info = transfer.upload(tmp_path, remote, ["large"])
    assert info == {"large": {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}}
    assert transfer.describe(remote / "large") == info["large"]
    transfer.download(remote, target, info)
    assert (target / "large").read_bytes() == data


def test_failed_tries_are_told_and_repeated(gate: Gate, bucket_root: str, source: Path, target: Path):
    remote = run_path(bucket_root)
    refused = []

    def sometimes(method: str, url: str) -> int | None:
        if method not in ("GET", "HEAD") and len(refused) < 7:
            refused.append(url)
            return 503
        return None

    gate.refuse = sometimes
    lines: list[str] = []
    assert transfer.upload(source, remote, [".metadata"], tries=9, log=lines.append) == {
        ".metadata": truth()[".metadata"]
    }
    assert len(refused) == 7 and lines
    assert all(line.startswith(f"{remote}/.metadata: cannot upload: ") and "\n" not in line for line in lines)
    assert "(try 1); again in 0.0 s" in lines[0]


def test_an_upload_that_stays_refused_stops(gate: Gate, bucket_root: str, source: Path):
    gate.refuse = lambda method, url: None if method in ("GET", "HEAD") else 503
    lines: list[str] = []
    with pytest.raises(OSError, match=r"cannot upload: .*\(try 2\)") as failed:
        transfer.upload(source, run_path(bucket_root), [".metadata"], tries=2, log=lines.append)
    assert str(failed.value).startswith(f"{bucket_root}/.metadata") and len(lines) == 1
    with pytest.raises(OSError, match=r"\(try 1\)"):
        transfer.upload(source, run_path(bucket_root), [".metadata"], budget_s=0, log=lines.append)
    gate.refuse = lambda method, url: None if method in ("GET", "HEAD") else 403
    with pytest.raises(PermissionError, match="cannot upload: permission denied"):
        transfer.upload(source, run_path(bucket_root), [".metadata"], log=lines.append)
    assert len(lines) == 1


def in_memory(source: Path) -> Path:
    remote = run_path(f"memory://{source.parent.name}")
    files.remove_tree(remote)
    transfer.upload(source, remote)
    return remote


@pytest.mark.parametrize(
    "damage, message",
    [
        (b"shard", "has 5 bytes, expected 5000"),
        (None, "is missing, expected 5000"),
        (b"x" * 5000, "has sha256"),
    ],
)
def test_what_was_damaged_there_is_named(source: Path, target: Path, damage: bytes | None, message: str):
    remote = in_memory(source)
    if damage is None:
        files.remove_tree(remote / "__0_0.distcp")
    else:
        files.write_atomic(remote / "__0_0.distcp", damage)
    with pytest.raises(BrokenCheckpoint, match=f"{remote}/__0_0.distcp {message}"):
        transfer.download(remote, target, truth())


def test_a_body_that_ends_early_is_fetched_again(source: Path, target: Path, monkeypatch: pytest.MonkeyPatch):
    remote = in_memory(source)
    monkeypatch.setattr(files, "FIRST_WAIT_S", 0.01)
    kind = type(remote.fs)
    get_file, cat_file = kind.get_file, kind.cat_file
    short = iter([True, True, True])

    def get(fs: object, key: str, local: str) -> None:
        get_file(fs, key, local)
        if key.endswith(".distcp") and next(short, False):
            os.truncate(local, 100)

    def cat(fs: object, key: str, start: int, end: int) -> bytes:
        data = cat_file(fs, key, start=start, end=end)
        return data[:-1] if next(short, False) else data

    monkeypatch.setattr(kind, "get_file", get)
    lines: list[str] = []
    transfer.download(remote, target, truth(), log=lines.append)
    assert contents(target) == CONTENT and len(lines) == 3 and "100 bytes came instead of 5000" in lines[0]
    short = iter([True, True, True])
    monkeypatch.setattr(kind, "cat_file", cat)
    assert transfer.describe(remote / "__0_0.distcp") == truth()["__0_0.distcp"]


def test_an_upload_that_arrives_short_is_sent_again(source: Path, monkeypatch: pytest.MonkeyPatch):
    remote = run_path(f"memory://{source.parent.name}")
    monkeypatch.setattr(files, "FIRST_WAIT_S", 0.01)
    kind = type(remote.fs)
    put_file, tries = kind.put_file, []

    def put(fs: object, local: str, key: str) -> None:
        tries.append(key)
        put_file(fs, local if len(tries) == 3 else os.devnull, key)

    monkeypatch.setattr(kind, "put_file", put)
    lines: list[str] = []
    transfer.upload(source, remote, [".metadata"], log=lines.append)
    assert files.read(remote / ".metadata") == b"layout"
    assert len(lines) == 2 and "0 bytes arrived of 6" in lines[0]


# Scratch space ------------------------------------------------------------------------------------


def test_scratch_is_empty_private_and_removed(tmp_path: Path):
    with transfer.scratch(str(tmp_path)) as first, transfer.scratch(str(tmp_path)) as second:
        assert first != second and first.parent == second.parent == tmp_path
        assert files.list_names(first) == [] and first.stat().st_mode & 0o077 == 0
        (first / "file").touch()
    assert files.list_names(tmp_path) == []
    with pytest.raises(ValueError, match=r"checkpoint.scratch is /no/where; expected an existing folder"):
        with transfer.scratch("/no/where"):
            pass


def test_scratch_of_a_killed_process_goes_with_the_next(tmp_path: Path):
    code = "import sys, time; from ul_scale.checkpoint.transfer import scratch\n"
    code += (
        "with scratch(sys.argv[1]) as path: (path / 'big').touch(); print(path, flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        left = Path(process.stdout.readline().strip())
        with transfer.scratch(str(tmp_path)):
            assert left.is_dir()
        process.kill()
        process.wait()
        assert left.is_dir()
        with transfer.scratch(str(tmp_path)):
            assert not left.exists()


def test_too_small_a_disk_is_told_beforehand(source: Path, target: Path, monkeypatch: pytest.MonkeyPatch):
    remote = in_memory(source)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9))
    for act in (
        lambda: transfer.scratch(str(target), 5 * 10**9).__enter__(),
        lambda: transfer.require_space(target, 5 * 10**9),
    ):
        with pytest.raises(
            OSError, match=r"1.00 GB free, 5.00 GB are needed: .* set checkpoint.scratch"
        ) as full:
            act()
        assert full.value.errno == errno.ENOSPC and str(target) in str(full.value)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(OSError, match="are needed"):
        transfer.download(remote, target, truth())
    assert files.list_names(target) == []
