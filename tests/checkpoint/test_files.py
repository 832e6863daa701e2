"""File operations in buckets: the same promises as on disks, and errors that a person can read.

What they do on local disks is tested with the attempts.
"""

import errno
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from buckets import Gate, bucket_root, gate, gcs_bucket, s3_bucket

from ul_scale.checkpoint import files
from ul_scale.checkpoint.files import run_path

__all__ = ["bucket_root", "gate", "gcs_bucket", "s3_bucket"]

RACE = """
import sys, time
from pathlib import Path
from ul_scale.checkpoint.files import create_exclusive, list_names, run_path
go, root, who = Path(sys.argv[1]), run_path(sys.argv[2]), sys.argv[3]
list_names(root)
print("ready", flush=True)
while not go.exists():
    time.sleep(0.001)
print(*(k for k in range(15) if create_exclusive(root / str(k), f"{who} {k}".encode())), flush=True)
"""


@pytest.fixture
def memory_root() -> str:
    return f"memory://{uuid.uuid4().hex}"


def test_run_paths():
    assert run_path("runs") == Path("runs") and run_path("file:///runs") == Path("/runs")
    assert files.is_local(run_path("runs")) and not files.is_local(run_path("memory://runs"))
    assert str(run_path("memory://a/b") / "c") == "memory://a/b/c"
    for root, message in {
        "ftp://host/runs": "root is ftp://…; expected a local folder, gs://",
        "gs:///runs": "names no bucket",
        "s3://key:secret@bucket/runs": "holds credentials, which belong into the environment",
    }.items():
        with pytest.raises(ValueError, match=message) as refused:
            run_path(root)
        assert "secret" not in str(refused.value)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"root is gs://b/r, which needs gcsfs .* 'ul-scale\[gcs\]'"):
        run_path("gs://b/r")


def each_operation(directory: Path) -> None:
    files.make_dirs(directory / "d")
    path = directory / "d" / "name"
    assert files.read(path) is None and files.list_names(directory / "none") == []
    assert files.create_exclusive(path, b"first")
    assert not files.create_exclusive(path, b"second")
    assert files.read(path) == b"first"
    files.write_atomic(path, b"third!")
    files.write_atomic(directory / "d" / "other", b"")
    assert files.list_names(directory) == ["d"] and files.list_names(directory / "d") == ["name", "other"]
    assert files.sizes(directory) == {"d/name": 6, "d/other": 0} and files.sizes(directory / "none") == {}
    assert files.read_all([path, directory / "none", path]) == [b"third!", None, b"third!"]
    files.sync(path)
    files.remove_if(path, b"first")
    assert files.read(path) == b"third!"
    for _ in range(2):
        files.remove_if(path, b"third!")
    assert files.list_names(directory / "d") == ["other"]


def test_each_operation_on_disk_and_in_memory(tmp_path: Path, memory_root: str):
    each_operation(tmp_path)
    each_operation(run_path(memory_root))


def test_each_operation_in_buckets(bucket_root: str):
    each_operation(run_path(bucket_root))


def test_trees_go_without_their_namesakes(bucket_root: str):
    root = run_path(bucket_root)
    for name in ("a1/x", "a1/y/z", "a10/x", "a1.txt"):
        files.write_atomic(root / name, b"1")
    for _ in range(2):
        files.remove_tree(root / "a1")
    files.remove_tree(root / "a1.txt")
    assert list(files.sizes(root)) == ["a10/x"]


def test_versions_change_with_the_content(bucket_root: str):
    root = run_path(bucket_root)
    files.write_atomic(root / "a", b"1")
    files.write_atomic(root / "b", b"1")
    first = files.list_versions(root)
    files.write_atomic(root / "a", b"2")
    second = files.list_versions(root)
    assert None not in first.values() and second["b"] == first["b"] and second["a"] != first["a"]


def test_listings_show_what_others_write(bucket_root: str):
    ours, others = run_path(bucket_root), run_path(bucket_root)
    assert files.list_names(ours / "d") == []
    for k in range(3):
        files.write_atomic(others / "d" / str(k), b"")
        assert len(files.list_names(ours / "d")) == len(files.sizes(ours)) == k + 1


def test_of_processes_creating_one_object_one_wins(bucket_root: str, tmp_path: Path):
    racers = []
    for who in "ab":
        command = [sys.executable, "-c", RACE, str(tmp_path / "go"), bucket_root, who]
        racers.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    for racer in racers:
        assert racer.stdout is not None and racer.stdout.readline() == "ready\n"
    (tmp_path / "go").touch()
    won = {who: racer.communicate(timeout=60)[0].split() for who, racer in zip("ab", racers)}
    assert sorted(won["a"] + won["b"], key=int) == [str(k) for k in range(15)]
    for who, names in won.items():
        assert {files.read(run_path(bucket_root) / k) for k in names} == {
            f"{who} {k}".encode() for k in names
        }


def test_an_answer_that_was_lost_is_recognised(gate: Gate, bucket_root: str):
    """The object is made, the connection breaks, and the client's own retry finds it there."""
    path = run_path(bucket_root) / "name"
    lost = iter([0])
    gate.lose_answer = lambda method, url: next(lost, None) is not None
    assert files.create_exclusive(path, b"mine") and next(lost, None) is None
    assert len([method for method, _ in gate.seen if method in ("PUT", "POST")]) == 2
    assert not files.create_exclusive(path, b"another's")


def test_a_version_that_was_not_judged_is_not_removed(bucket_root: str, monkeypatch: pytest.MonkeyPatch):
    """It is replaced between the last look and the request, which must therefore name the version."""
    path = run_path(bucket_root) / "name"
    files.write_atomic(path, b"judged")
    info = path.fs.info(path.path)
    sent = []
    call = "call" if bucket_root.startswith("gs") else "call_s3"
    monkeypatch.setattr(type(path.fs), call, lambda fs, *args, **options: sent.append(options))
    files.remove_if(path, b"judged")
    (options,) = sent
    assert options.get("ifGenerationMatch", options.get("IfMatch")) == info.get(
        "generation", info.get("ETag")
    )
    assert info.get("generation", info.get("ETag")) is not None


@pytest.mark.parametrize("status", [503, 429, 500, 0])
def test_errors_that_pass_are_waited_out(gate: Gate, bucket_root: str, status: int):
    path = run_path(bucket_root) / "d" / "name"
    refusals = iter([status, status])
    gate.refuse = lambda method, url: next(refusals, None)
    assert files.create_exclusive(path, b"1") and next(refusals, None) is None
    refusals = iter([status, status])
    assert files.read(path) == b"1" and next(refusals, None) is None
    refusals = iter([status, status])
    assert files.list_names(path.parent) == ["name"] and next(refusals, None) is None


@pytest.mark.parametrize("status", [503, 0])
def test_errors_that_stay_are_told_in_a_line(gate: Gate, bucket_root: str, status: int):
    path = run_path(bucket_root) / "name"
    gate.refuse = lambda method, url: status
    for act in (lambda: files.write_atomic(path, b"1"), lambda: files.read(path)):
        with pytest.raises(OSError) as failed:
            act()
        message = str(failed.value)
        assert not isinstance(failed.value, FileNotFoundError | PermissionError | FileExistsError)
        assert message.startswith(str(path)) and "\n" not in message and "(try 4)" in message


def test_a_read_only_bucket_is_told_at_once(gate: Gate, bucket_root: str):
    path = run_path(bucket_root) / "name"
    files.write_atomic(path, b"1")
    gate.refuse = lambda method, url: None if method in ("GET", "HEAD") else 403
    gate.seen.clear()
    for act in (
        lambda: files.write_atomic(path, b"2"),
        lambda: files.create_exclusive(path.with_name("other"), b"2"),
        lambda: files.remove_if(path, b"1"),
        lambda: files.remove_tree(path),
    ):
        with pytest.raises(
            PermissionError, match=f"{bucket_root}/.*: cannot .*: permission denied"
        ) as denied:
            act()
        assert "\n" not in str(denied.value)
    assert len([method for method, _ in gate.seen if method not in ("GET", "HEAD")]) == 4
    assert files.read(path) == b"1"


def test_a_forbidden_object_is_not_taken_for_an_absent_one(gate: Gate, bucket_root: str):
    gate.refuse = lambda method, url: 403
    with pytest.raises(PermissionError):
        files.read(run_path(bucket_root) / "name")
    with pytest.raises(PermissionError):
        files.list_names(run_path(bucket_root))


def test_a_bucket_that_does_not_exist_is_named(bucket_root: str):
    files.require_bucket(run_path(bucket_root))
    files.require_bucket(Path("not/made/yet"))
    nowhere = run_path(bucket_root.split("://")[0] + "://no-such-bucket/runs")
    with pytest.raises(ValueError, match="://no-such-bucket/runs: cannot look .*: no such bucket"):
        files.require_bucket(nowhere)
    with pytest.raises(FileNotFoundError, match="cannot write: no such bucket"):
        files.create_exclusive(nowhere / "name", b"1")


def test_messages_hold_no_signed_urls(memory_root: str):
    def act(fs: object, key: str) -> None:
        raise OSError(errno.EIO, "https://host/object?X-Amz-Signature=secret failed\nand more")

    with pytest.raises(
        OSError, match="cannot read: OSError: .*https://host/object failed and more"
    ) as failed:
        files.request(run_path(memory_root), act, "read")
    assert "secret" not in str(failed.value)


def test_a_full_local_disk_is_not_the_buckets_fault(memory_root: str):
    tries = []

    def act(fs: object, key: str) -> None:
        tries.append(key)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/scratch/x")

    with pytest.raises(OSError, match="cannot download: the local disk is full: '/scratch/x'") as failed:
        files.request(run_path(memory_root), act, "download")
    assert failed.value.errno == errno.ENOSPC and len(tries) == 1


def test_a_budget_ends_the_tries(memory_root: str):
    tries = []

    def act(fs: object, key: str) -> None:
        tries.append(key)
        raise TimeoutError("slow")

    with pytest.raises(OSError, match=r"slow \(try 1\)"):
        files.request(run_path(memory_root), act, "read", budget_s=0)
    assert len(tries) == 1
