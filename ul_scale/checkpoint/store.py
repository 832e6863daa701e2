"""Which checkpoints a run has: the commit protocol, reading them back, and retention.

``checkpoints/step_00012000/`` holds the shards of attempt n in ``a<n>/`` and, once they are all on disk,
``COMMIT`` with every file's size and checksum, created last and exclusively. A step without COMMIT does
not exist for a reader. Neither does one whose COMMIT is *void*: by an older attempt, above the step that
a newer one resumed from, because it came too late or could not be loaded.

Only the newest attempt removes, and COMMIT goes before the shards. So whenever a kill comes, the newest
complete checkpoint stands, and what is left lying about is found and removed by ``clean``.
"""

import hashlib
import re
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

from ul_scale.checkpoint.attempts import Attempt, attempt_numbers, attempt_path
from ul_scale.checkpoint.files import (
    TEMP_SUFFIX,
    create_exclusive,
    decode,
    encode,
    list_names,
    make_dirs,
    read,
    remove_if,
    remove_if_empty,
    remove_tree,
    sync,
    write_atomic,
)


class BrokenCheckpoint(RuntimeError):
    """A file of a checkpoint is missing, or is not the one that was saved."""


class FileInfo(TypedDict):
    size: int
    sha256: str


@dataclass(frozen=True)
class Commit:
    """What COMMIT says; file names are relative to the shard directory ``a<attempt>``."""

    attempt: int
    step: int
    files: dict[str, FileInfo]


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every_steps: int = field(metadata={"identity": False})
    """Save after every so many steps."""
    keep_last: int = field(default=2, metadata={"identity": False})
    """How many of the newest checkpoints stay; with 1, a damaged one has nothing behind it."""
    keep_steps: list[int] = field(default_factory=list, metadata={"identity": False})
    """Completed steps whose checkpoints stay for good."""

    def __post_init__(self) -> None:
        for name in ("every_steps", "keep_last"):
            if getattr(self, name) < 1:
                raise ValueError(f"checkpoint.{name} must be at least 1, got {getattr(self, name)}")
        if any(step < 1 for step in self.keep_steps):
            raise ValueError(f"checkpoint.keep_steps must be steps from 1 on, got {list(self.keep_steps)}")


# Reading ----------------------------------------------------------------------------------------


def _step_dir(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


def _steps(run_dir: Path) -> list[int]:
    names = list_names(run_dir / "checkpoints")
    return sorted(int(name[5:]) for name in names if re.fullmatch(r"step_\d{8,}", name))


def _parse(data: bytes | None) -> Commit | None:
    value = decode(data)
    try:
        return Commit(int(value["attempt"]), int(value["step"]), dict(value["files"]))
    except (KeyError, TypeError, ValueError):
        return None


def _resume_points(run_dir: Path) -> dict[int, int]:
    """Return the step that each attempt resumed from, leaving out those that never came to decide."""
    records = {n: decode(read(attempt_path(run_dir, n))) for n in attempt_numbers(run_dir)}
    return {
        n: record["resumes_from"] for n, record in records.items() if record.get("resumes_from") is not None
    }


def _is_void(commit: Commit, resume_points: dict[int, int]) -> bool:
    return any(n > commit.attempt and step < commit.step for n, step in resume_points.items())


def _complete(run_dir: Path) -> dict[int, Commit]:
    found = {step: _parse(read(_step_dir(run_dir, step) / "COMMIT")) for step in _steps(run_dir)}
    points = _resume_points(run_dir)
    return {step: commit for step, commit in found.items() if commit and not _is_void(commit, points)}


def complete_steps(run_dir: Path) -> list[int]:
    """Return the steps that have a complete checkpoint, ascending."""
    return list(_complete(run_dir))


def latest_step(run_dir: Path) -> int | None:
    """Return the newest complete checkpoint's step, or None."""
    return max(complete_steps(run_dir), default=None)


def read_commit(run_dir: Path, step: int) -> Commit:
    """Return a complete checkpoint's COMMIT; raise ``FileNotFoundError`` if there is none at this step."""
    complete = _complete(run_dir)
    if step not in complete:
        raise FileNotFoundError(
            f"{run_dir} has no complete checkpoint at step {step}; complete: {list(complete) or 'none'}"
        )
    return complete[step]


def shard_dir(run_dir: Path, step: int) -> Path:
    """Return the directory with the shards of a complete checkpoint."""
    return _shards(run_dir, read_commit(run_dir, step))


def _describe(path: Path) -> FileInfo:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"size": file.tell(), "sha256": digest}


def hash_files(directory: Path, prefixes: tuple[str, ...] = ("",)) -> dict[str, FileInfo]:
    """Flush the files below a directory to disk; return size and checksum of each by its relative path.

    Only of paths that begin with one of the prefixes: so every rank can do its own.
    """
    paths = {path.relative_to(directory).as_posix(): path for path in sorted(directory.rglob("*"))}
    paths = {name: path for name, path in paths.items() if name.startswith(prefixes) and path.is_file()}
    for path in paths.values():
        sync(path)
    with ThreadPoolExecutor(4) as pool:  # hashlib lets other threads run meanwhile.
        return dict(zip(paths, pool.map(_describe, paths.values())))


def _shards(run_dir: Path, commit: Commit) -> Path:
    return _step_dir(run_dir, commit.step) / f"a{commit.attempt}"


def _wrong_size(run_dir: Path, commit: Commit) -> str | None:
    """Return a line about the first file that is missing, cut short or too long, None if all are right."""
    for name, info in commit.files.items():
        path = _shards(run_dir, commit) / name
        found = path.stat().st_size if path.is_file() else None
        if found != info["size"]:
            what = "is missing" if found is None else f"has {found} bytes"
            return f"{path} {what}, expected {info['size']} bytes"
    return None


def verify(run_dir: Path, step: int) -> None:
    """Compare every file of a complete checkpoint with what was saved.

    Raises:
        BrokenCheckpoint: naming the first file that is missing or differs.
        FileNotFoundError: there is no complete checkpoint at this step.
    """
    commit = read_commit(run_dir, step)
    if fault := _wrong_size(run_dir, commit):
        raise BrokenCheckpoint(fault)
    paths = [_shards(run_dir, commit) / name for name in commit.files]
    with ThreadPoolExecutor(4) as pool:
        for path, expected, found in zip(paths, commit.files.values(), pool.map(_describe, paths)):
            if found != expected:
                raise BrokenCheckpoint(f"{path} has sha256 {found['sha256']}, expected {expected['sha256']}")


# Writing, by the newest attempt only --------------------------------------------------------------


def adopt(run_dir: Path, attempt: Attempt, resumes_from: int) -> None:
    """Declare the step that this attempt continues from: a checkpoint that has been loaded, or 0.

    Once that is recorded, older attempts' commits above it are void, those included that a process
    thought dead has yet to write. Those that are there are removed, with all else that lies above.

    Raises:
        Fenced: the run was taken over.
        ValueError: no such checkpoint is complete, or a fresh start would void all that are.
    """
    complete = complete_steps(run_dir)
    attempt.require_newest(f"continue from step {resumes_from}")
    if resumes_from not in (complete or [0]):
        raise ValueError(
            f"{run_dir}: cannot continue from step {resumes_from}; complete: {complete or 'none'}"
        )
    attempt.set_resumes_from(resumes_from)
    for step in _steps(run_dir):
        if step > resumes_from:
            _strip(run_dir, step, attempt, valid_too=False, own=True)


def checkpoint_dir(run_dir: Path, step: int, number: int, *, create: bool = True) -> Path:
    """Return the directory for an attempt's shards of a step, which ``commit`` will make a checkpoint of.

    One process creates it, empty; the others only ask for its name.

    Raises:
        FileExistsError: the step is complete already.
        ValueError: ``adopt`` comes first; else a late commit of an older attempt could not be told apart.
    """
    path = _step_dir(run_dir, step) / f"a{number}"
    if create:
        if number not in _resume_points(run_dir):
            raise ValueError(f"{run_dir}: attempt {number} must adopt a step, or 0, before it saves one")
        if step in _complete(run_dir):
            raise FileExistsError(f"{path.parent} is complete already")
        remove_tree(path)
        make_dirs(path)
    return path


def commit(run_dir: Path, step: int, attempt: Attempt, files: dict[str, FileInfo]) -> None:
    """Make the shards in ``checkpoint_dir`` a complete checkpoint, in one instant.

    Args:
        run_dir: the run's directory.
        step: completed steps.
        attempt: who saved them.
        files: what ``hash_files`` said of them, gathered from all ranks.

    Raises:
        Fenced: the run was taken over; what this attempt saves no longer counts.
        BrokenCheckpoint: a file is not there in full.
        FileExistsError: the step is complete already.
    """
    shards = checkpoint_dir(run_dir, step, attempt.number, create=False)
    fault = _wrong_size(run_dir, Commit(attempt.number, step, files))
    if not fault:
        for directory in {shards / parent for name in files for parent in Path(name).parents}:
            sync(directory)
    attempt.require_newest(f"commit step {step}")
    if fault or not files:
        raise BrokenCheckpoint(fault or f"{shards} has no files to commit")
    path, data = shards.parent / "COMMIT", encode({"attempt": attempt.number, "step": step, "files": files})
    while not create_exclusive(path, data):
        if _drop_commit(run_dir, step, attempt):
            raise FileExistsError(f"{path.parent} is complete already")
    # Again, for writing takes time: whoever gets past here is seen by every later attempt.
    attempt.require_newest(f"commit step {step}")


def _drop_commit(run_dir: Path, step: int, attempt: Attempt, *, valid_too: bool = False) -> Commit | None:
    """Remove a step's COMMIT if it is void or torn; return the one that stays."""
    path = _step_dir(run_dir, step) / "COMMIT"
    data = read(path)
    # Check after reading: by then whoever wrote a newer COMMIT has fenced us, however long we slept.
    attempt.require_newest(f"remove from step {step}")
    commit = _parse(data)
    if commit and not valid_too and not _is_void(commit, _resume_points(run_dir)):
        return commit
    if data is not None:
        remove_if(path, data)
    return None


def _strip(run_dir: Path, step: int, attempt: Attempt, *, valid_too: bool, own: bool) -> None:
    """Remove what does not count from a step, COMMIT first; on request the valid, and our own shards."""
    step_dir = _step_dir(run_dir, step)
    kept = _drop_commit(run_dir, step, attempt, valid_too=valid_too)
    for name in list_names(step_dir):
        is_shards = re.fullmatch(r"a\d+", name) and not (kept and name == f"a{kept.attempt}")
        if name.endswith(TEMP_SUFFIX) or (is_shards and int(name[1:]) < attempt.number + own):
            remove_tree(step_dir / name)
    if own:
        remove_if_empty(step_dir)


def discard(run_dir: Path, step: int, attempt: Attempt) -> None:
    """Remove a step's checkpoint, complete or not; raise ``Fenced`` if the run was taken over."""
    _strip(run_dir, step, attempt, valid_too=True, own=True)


def clean(run_dir: Path, attempt: Attempt, keep_last: int, keep_steps: Collection[int] = ()) -> None:
    """Remove the checkpoints that are no longer wanted, and what kills have left lying about.

    A checkpoint goes once ``keep_last`` newer ones are complete, with every file in place. Shards without
    COMMIT go if an older attempt wrote them, or if this one has completed a later step since: a save may
    be under way meanwhile, but not its ``commit``.

    Raises:
        Fenced: the run was taken over.
        ValueError: ``keep_last`` is below 1, or no step has been adopted yet.
    """
    if keep_last < 1 or attempt.resumes_from is None:
        raise ValueError(f"clean needs keep_last >= 1 and an adopted step, got {keep_last=}")
    complete = _complete(run_dir)
    whole = [step for step, commit in complete.items() if not _wrong_size(run_dir, commit)]
    oldest_kept = whole[-keep_last] if len(whole) >= keep_last else 0
    newest = max(complete, default=0)
    for step in _steps(run_dir):
        unwanted = step in complete and step < oldest_kept and step not in keep_steps
        _strip(run_dir, step, attempt, valid_too=unwanted, own=step < newest)
    for name in list_names(run_dir / "attempts"):
        if name.endswith(TEMP_SUFFIX) and int(name.split(".")[1]) < attempt.number:
            remove_tree(run_dir / "attempts" / name)


# The end ------------------------------------------------------------------------------------------


def write_success(run_dir: Path, step: int, attempt: Attempt) -> None:
    """Say that the run reached ``step``, which must be complete: after all else, for it means done."""
    attempt.require_newest("declare success")
    read_commit(run_dir, step)
    write_atomic(run_dir / "SUCCESS", encode({"step": step}))


def read_success(run_dir: Path) -> int | None:
    """Return the step at which the run was done, or None."""
    return decode(read(run_dir / "SUCCESS")).get("step")
