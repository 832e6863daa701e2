"""Which checkpoints a run has: the commit protocol, reading them back, and retention.

``checkpoints/step_00012000/`` holds the shards of attempt n in ``a<n>/`` and, once they are all on disk,
``COMMIT`` with every file's size and checksum, created last and exclusively. A step without COMMIT does
not exist for a reader. Neither does one whose COMMIT is *void*: by an older attempt, above the step that
a newer one resumed from, because it came too late or could not be loaded.

Only the newest attempt removes, and COMMIT goes before the shards. So whenever a kill comes, the newest
complete checkpoint stands, and what is left lying about is found and removed by ``clean``.

In a bucket every look is a request, so nothing is asked for twice where once will do; the order of what
is read and written is the same as on a disk, and so are the promises.
"""

import re
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from ul_scale.checkpoint.attempts import Attempt, read_attempts
from ul_scale.checkpoint.files import (
    TEMP_SUFFIX,
    create_exclusive,
    decode,
    encode,
    is_local,
    list_names,
    make_dirs,
    read,
    read_all,
    remove_if,
    remove_if_empty,
    remove_tree,
    sizes,
    sync,
    write_atomic,
)
from ul_scale.checkpoint.transfer import BrokenCheckpoint, FileInfo, describe, wrong_hash, wrong_size

FORMATS = ("dcp", "deepspeed")


@dataclass(frozen=True)
class Commit:
    """What COMMIT says; file names are relative to the shard directory ``a<attempt>``."""

    attempt: int
    step: int
    files: dict[str, FileInfo]
    format: str = "dcp"
    """Of the shards: ``dcp`` (torch.distributed.checkpoint), which COMMIT leaves unsaid, or ``deepspeed``."""
    run: str | None = None
    """The run's id, which its config and data determine; None of checkpoints that do not say."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every_steps: int = field(metadata={"identity": False})
    """Save after every so many steps."""
    keep_last: int = field(default=2, metadata={"identity": False})
    """How many of the newest checkpoints stay; with 1, a damaged one has nothing behind it."""
    keep_steps: list[int] = field(default_factory=list, metadata={"identity": False})
    """Completed steps whose checkpoints stay for good."""
    keep_every_steps: int | None = field(default=None, metadata={"identity": False})
    """Checkpoints at multiples of so many steps stay for good; a multiple of every_steps."""
    scratch: str | None = field(default=None, metadata={"identity": False})
    """Local folder for files on their way to or from a bucket; default the system's for temporary files."""
    upload_attempts: int = field(default=5, metadata={"identity": False})
    """How often each file is sent to a bucket before the save counts as failed."""
    upload_budget_s: float = field(default=1800.0, metadata={"identity": False})
    """Seconds after which no file of a save is sent once more."""

    def __post_init__(self) -> None:
        for name in ("every_steps", "keep_last", "upload_attempts", "upload_budget_s"):
            if getattr(self, name) < 1:
                raise ValueError(f"checkpoint.{name} must be at least 1, got {getattr(self, name)}")
        every, keep_every = self.every_steps, self.keep_every_steps
        if keep_every is not None and (keep_every < 1 or keep_every % every):
            raise ValueError(
                f"checkpoint.keep_every_steps must be a multiple of every_steps, {every}, got {keep_every}"
            )
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
        return Commit(
            int(value["attempt"]),
            int(value["step"]),
            dict(value["files"]),
            str(value.get("format", "dcp")),
            value.get("run"),
        )
    except (KeyError, TypeError, ValueError):
        return None


def _resume_points(run_dir: Path) -> dict[int, int]:
    """Return the step that each attempt resumed from, leaving out those that never came to decide."""
    points = {n: record.get("resumes_from") for n, record in read_attempts(run_dir).items()}
    return {n: step for n, step in points.items() if step is not None}


def _is_void(commit: Commit, resume_points: dict[int, int]) -> bool:
    return any(n > commit.attempt and step < commit.step for n, step in resume_points.items())


def _complete(run_dir: Path, steps: Iterable[int] | None = None) -> dict[int, Commit]:
    """Return the complete checkpoints, or those of them that are asked for."""
    steps = list(_steps(run_dir) if steps is None else steps)
    commits = read_all(_step_dir(run_dir, step) / "COMMIT" for step in steps)
    found = {step: _parse(data) for step, data in zip(steps, commits)}
    if not any(found.values()):
        return {}
    points = _resume_points(run_dir)
    return {step: commit for step, commit in found.items() if commit and not _is_void(commit, points)}


def complete_steps(run_dir: Path) -> list[int]:
    """Return the steps that have a complete checkpoint, ascending."""
    return list(_complete(run_dir))


def latest_step(run_dir: Path) -> int | None:
    """Return the newest complete checkpoint's step, or None."""
    return max(complete_steps(run_dir), default=None)


def check_step(run_dir: Path, step: int) -> None:
    """Raise ``ValueError`` if a run has no complete checkpoint at a step."""
    steps = complete_steps(run_dir)
    if step not in steps:
        raise ValueError(f"{run_dir}: no complete checkpoint at step {step}; complete: {steps or 'none'}")


def read_commit(run_dir: Path, step: int) -> Commit:
    """Return a complete checkpoint's COMMIT; raise ``FileNotFoundError`` if there is none at this step."""
    if commit := _complete(run_dir, [step]).get(step):
        return commit
    raise FileNotFoundError(
        f"{run_dir} has no complete checkpoint at step {step}; complete: {complete_steps(run_dir) or 'none'}"
    )


def shard_dir(run_dir: Path, step: int) -> Path:
    """Return the directory with the shards of a complete checkpoint."""
    return _shards(run_dir, read_commit(run_dir, step))


def hash_files(directory: Path, prefixes: tuple[str, ...] = ("",)) -> dict[str, FileInfo]:
    """Flush the files below a directory to disk; return size and checksum of each by its relative path.

    Only of paths that begin with one of the prefixes: so every rank can do its own.
    """
    names = [name for name in sizes(directory) if name.startswith(prefixes)]
    for name in names:
        sync(directory / name)
    with ThreadPoolExecutor(4) as pool:  # hashlib lets other threads run meanwhile.
        return dict(zip(names, pool.map(describe, [directory / name for name in names])))


def _shards(run_dir: Path, commit: Commit) -> Path:
    return _step_dir(run_dir, commit.step) / f"a{commit.attempt}"


def verify(run_dir: Path, step: int, part: tuple[int, int] = (0, 1)) -> None:
    """Compare every file of a complete checkpoint with what was saved.

    Args:
        run_dir: the run's directory.
        step: completed steps.
        part: read only the k-th of n shares of the files, given as (k, n); sizes are compared in any case.

    Raises:
        BrokenCheckpoint: naming the first file that is missing or differs.
        FileNotFoundError: there is no complete checkpoint at this step.
    """
    commit = read_commit(run_dir, step)
    directory = _shards(run_dir, commit)
    if fault := wrong_size(directory, commit.files):
        raise BrokenCheckpoint(fault)
    files = dict(list(commit.files.items())[part[0] :: part[1]])
    paths = [directory / name for name in files]
    with ThreadPoolExecutor(4) as pool:
        for path, expected, found in zip(paths, files.values(), pool.map(describe, paths)):
            if fault := wrong_hash(path, found, expected):
                raise BrokenCheckpoint(fault)


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


def checkpoint_dir(
    run_dir: Path, step: int, number: int, *, create: bool = True, replaces: bool = False
) -> Path:
    """Return the directory for an attempt's shards of a step, which ``commit`` will make a checkpoint of.

    One process creates it, empty; the others only ask for its name. With ``replaces``, beside the shards
    of a complete checkpoint that an older attempt wrote.

    Raises:
        FileExistsError: the step is complete already.
        ValueError: ``adopt`` comes first; else a late commit of an older attempt could not be told apart.
    """
    path = _step_dir(run_dir, step) / f"a{number}"
    if create:
        if number not in _resume_points(run_dir):
            raise ValueError(f"{run_dir}: attempt {number} must adopt a step, or 0, before it saves one")
        done = _complete(run_dir, [step]).get(step)
        if done and not (replaces and done.attempt < number):
            raise FileExistsError(f"{path.parent} is complete already")
        remove_tree(path)
        make_dirs(path)
    return path


def commit(
    run_dir: Path,
    step: int,
    attempt: Attempt,
    files: dict[str, FileInfo],
    *,
    format: str = "dcp",
    replaces: bool = False,
) -> None:
    """Make the shards in ``checkpoint_dir`` a complete checkpoint, in one instant.

    Args:
        run_dir: the run's directory.
        step: completed steps.
        attempt: who saved them.
        files: what ``hash_files`` or ``transfer.upload`` said of them, gathered from all ranks.
        format: of the shards, one of ``FORMATS``.
        replaces: put the same state in place of a complete checkpoint, in another format.

    Raises:
        Fenced: the run was taken over; what this attempt saves no longer counts.
        BrokenCheckpoint: a file is not there in full.
        FileExistsError: the step is complete already.
    """
    assert format in FORMATS, format
    shards = checkpoint_dir(run_dir, step, attempt.number, create=False)
    fault = wrong_size(shards, files)
    if not fault and is_local(shards):
        for directory in {shards / parent for name in files for parent in Path(name).parents}:
            sync(directory)
    attempt.require_newest(f"commit step {step}")
    if fault or not files:
        raise BrokenCheckpoint(fault or f"{shards} has no files to commit")
    said = {"run": run_dir.name, "attempt": attempt.number, "step": step, "files": files}
    path, data = shards.parent / "COMMIT", encode(said if format == "dcp" else said | {"format": format})
    if replaces:
        write_atomic(path, data)
    while not replaces and not create_exclusive(path, data):
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


def clean(
    run_dir: Path,
    attempt: Attempt,
    keep_last: int,
    keep_steps: Collection[int] = (),
    keep_every_steps: int | None = None,
) -> None:
    """Remove the checkpoints that are no longer wanted, and what kills have left lying about.

    A checkpoint goes once ``keep_last`` newer ones are complete, with every file in place, unless its step
    is one of ``keep_steps`` or a multiple of ``keep_every_steps``. Shards without COMMIT go if an older
    attempt wrote them, or if this one has completed a later step since: a save may be under way meanwhile,
    but not its ``commit``.

    Raises:
        Fenced: the run was taken over.
        ValueError: ``keep_last`` is below 1, or no step has been adopted yet.
    """
    if keep_last < 1 or attempt.resumes_from is None:
        raise ValueError(f"clean needs keep_last >= 1 and an adopted step, got {keep_last=}")
    attempt.require_newest("clean")
    complete = _complete(run_dir)
    oldest_kept = _oldest_kept(run_dir, complete, keep_last)
    newest = max(complete, default=0)
    for step in _steps(run_dir):
        for_good = step in keep_steps or (keep_every_steps is not None and step % keep_every_steps == 0)
        unwanted = step in complete and step < oldest_kept and not for_good
        # Most stay and hold nothing that has to go; to find that out takes one look.
        if step in complete and not unwanted:
            tidy = {"COMMIT", f"a{complete[step].attempt}"}
            if set(list_names(_step_dir(run_dir, step))) == tidy:
                continue
        _strip(run_dir, step, attempt, valid_too=unwanted, own=step < newest)
    for name in list_names(run_dir / "attempts"):
        if name.endswith(TEMP_SUFFIX) and int(name.split(".")[1]) < attempt.number:
            remove_tree(run_dir / "attempts" / name)


def _oldest_kept(run_dir: Path, complete: dict[int, Commit], keep_last: int) -> int:
    """Return the step of the oldest of the newest ``keep_last`` checkpoints that have every file, or 0."""
    whole = 0
    for step, commit in sorted(complete.items(), reverse=True):
        whole += not wrong_size(_shards(run_dir, commit), commit.files)
        if whole == keep_last:
            return step
    return 0


# The end ------------------------------------------------------------------------------------------


def write_success(run_dir: Path, step: int, attempt: Attempt) -> None:
    """Say that the run reached ``step``, which must be complete: after all else, for it means done."""
    attempt.require_newest("declare success")
    read_commit(run_dir, step)
    write_atomic(run_dir / "SUCCESS", encode({"step": step}))


def read_success(run_dir: Path) -> int | None:
    """Return the step at which the run was done, or None."""
    return decode(read(run_dir / "SUCCESS")).get("step")
