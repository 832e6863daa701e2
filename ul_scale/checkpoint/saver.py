"""Saves that training does not wait for: copied in memory, then written, sent and committed in a thread."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor

from ul_scale.checkpoint import state as states
from ul_scale.checkpoint import store, transfer
from ul_scale.checkpoint.attempts import Attempt, Fenced
from ul_scale.checkpoint.files import is_local, remove_tree
from ul_scale.checkpoint.store import CheckpointConfig, FileInfo
from ul_scale.checkpoint.transfer import SaveFailed
from ul_scale.parallel.engine import Process
from ul_scale.parallel.mesh import cpu_group, gather_objects

SLACK_S = 1800.0
"""Beyond the uploads' budget: one rank may write to a slow disk while the others wait for its outcome."""


class Saver:
    """Saves of one attempt, at most one in flight; all methods are called on every rank at the same steps.

    Args:
        run_dir: the run's directory, local or in a bucket.
        attempt: rank 0's attempt; None on the others.
        number: the attempt's number.
        config: retention, and the scratch directory of uploads.
        process: this process.
        saved: told after each commit how many steps it holds; called in the thread.
    """

    def __init__(
        self,
        run_dir: Path,
        attempt: Attempt | None,
        number: int,
        config: CheckpointConfig,
        process: Process,
        saved: Callable[[int], None] | None = None,
    ):
        self.run_dir, self.attempt, self.number = run_dir, attempt, number
        self.config, self.process = config, process
        self.saved = saved
        self.before_commit: Callable[[int], None] | None = None
        """Called in the thread of rank 0 before each COMMIT."""
        self.stall_s = 0.0
        """Seconds that training has stood still for saves."""
        self.last_save_s: float | None = None
        """Seconds from the beginning of the last complete save to its commit."""
        # The thread's collectives must not meet those of training.
        self._group = cpu_group(config.upload_budget_s + SLACK_S, process)
        cuda = process.device.type == "cuda"
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=cuda,
                use_shared_memory=False,
                use_async_staging=False,
                use_non_blocking_copy=cuda,
            )
        )
        self._pending: Background | None = None

    def save(
        self,
        state: dict[str, Any],
        completed: int,
        *,
        save_files: Callable[[Path], None] | None = None,
        checkpoint_format: str = "dcp",
    ) -> None:
        """Copy a state and begin to save it; first waits for the save before, if it is not done.

        Args:
            state: of this rank; may change as soon as this returns.
            completed: completed steps.
            save_files: writes an engine's own files into a local directory, now.
            checkpoint_format: of COMMIT.

        Raises:
            SaveFailed: if the save before failed.
            Fenced: if the run was taken over.
        """
        began = time.monotonic()
        self.wait()
        resources, scratch, error = contextlib.ExitStack(), None, None
        try:
            if save_files is not None or not is_local(self.run_dir):
                scratch = resources.enter_context(transfer.scratch(self.config.scratch, local_bytes(state)))
            if save_files is not None and scratch is not None:
                save_files(scratch)
        except OSError as caught:  # such as a full disk, on this rank alone: the thread tells the others
            error = caught
        staged = cast(dict[str, Any], self._stager.stage(state))

        def work() -> None:
            with resources:
                self._write(staged, completed, scratch, checkpoint_format, error)
            self.last_save_s = time.monotonic() - began
            if self.saved is not None:
                self.saved(completed)

        self._pending = Background(work)
        self.stall_s += time.monotonic() - began

    @property
    def failed(self) -> bool:
        """Whether a save has failed that nobody has waited for yet; ranks may learn it at different steps."""
        return self._pending is not None and self._pending.failed

    def wait(self) -> None:
        """Return once nothing is in flight; raises what ``save`` raises, on every rank."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.wait()

    def close(self) -> None:
        """Wait, and let go of the copies."""
        try:
            self.wait()
        finally:
            self._stager.close()

    def _write(
        self,
        staged: dict[str, Any],
        completed: int,
        scratch: Path | None,
        checkpoint_format: str,
        error: Exception | None,
    ) -> None:
        """Write, upload and commit; ends the same way on every rank."""
        directory = store.checkpoint_dir(self.run_dir, completed, self.number, create=False)
        try:
            errors = gather_objects(describe(error), self.process, self._group)
            self._on_rank_0(lambda: self._begin(completed, errors), completed)
            files = dict[str, FileInfo]()
            try:
                files = self._write_shards(staged, directory, scratch)
            except Exception as caught:
                error = caught
            outcomes = gather_objects((files, describe(error)), self.process, self._group)
            self._on_rank_0(lambda: self._commit(completed, outcomes, checkpoint_format), completed)
        except (SaveFailed, Fenced):
            raise
        except Exception as error:  # of a collective: the other ranks are gone
            raise SaveFailed(f"step {completed} was not saved: {describe(error)}") from error

    def _write_shards(
        self, staged: dict[str, Any], directory: Path, scratch: Path | None
    ) -> dict[str, FileInfo]:
        """Return name, size and hash of this rank's files, which are then in ``directory``."""
        local = is_local(self.run_dir)
        target = directory if scratch is None or local else scratch
        states.write(staged, target, self._group)
        if scratch is None:
            return store.hash_files(directory, prefixes=states.own_files(directory))
        files = transfer.upload(
            scratch, directory, tries=self.config.upload_attempts, budget_s=self.config.upload_budget_s
        )
        if local:
            files |= store.hash_files(directory, prefixes=states.own_files(directory))
        return files

    def _begin(self, completed: int, errors: list[str | None]) -> None:
        refuse(completed, errors)
        store.checkpoint_dir(self.run_dir, completed, self.number)

    def _commit(
        self, completed: int, outcomes: list[tuple[dict[str, FileInfo], str | None]], checkpoint_format: str
    ) -> None:
        assert self.attempt is not None
        try:
            refuse(completed, [error for _, error in outcomes])
        except SaveFailed:
            with contextlib.suppress(OSError):  # what was written in vain may fill the disk
                remove_tree(store.checkpoint_dir(self.run_dir, completed, self.number, create=False))
            raise
        files = {name: info for part, _ in outcomes for name, info in part.items()}
        if self.before_commit is not None:
            self.before_commit(completed)
        store.commit(self.run_dir, completed, self.attempt, files, format=checkpoint_format)
        config = self.config
        try:
            store.clean(
                self.run_dir, self.attempt, config.keep_last, config.keep_steps, config.keep_every_steps
            )
        except OSError as error:
            print(f"old checkpoints were not removed: {describe(error)}", file=sys.stderr)

    def _on_rank_0(self, work: Callable[[], object], completed: int) -> None:
        """Run something on rank 0 alone; what it raises is raised on every rank."""
        failure: tuple[type[RuntimeError], str] | None = None
        if self.process.rank == 0:
            try:
                work()
            except Exception as error:
                failure = self._verdict(error, completed)
        if self.process.world_size > 1:
            box = [failure]
            dist.broadcast_object_list(box, src=0, group=self._group, device=torch.device("cpu"))
            failure = box[0]
        if failure is not None:
            raise failure[0](failure[1])

    def _verdict(self, error: Exception, completed: int) -> tuple[type[RuntimeError], str]:
        """Return what to raise: our files vanish when the run is taken over, and then that is the cause."""
        assert self.attempt is not None
        try:
            self.attempt.require_newest(f"save step {completed}")
        except Fenced as fenced:
            return Fenced, str(fenced if not isinstance(error, Fenced) else error)
        except OSError:
            pass  # the store is away: what failed first says more
        if isinstance(error, SaveFailed):
            return SaveFailed, str(error)
        return SaveFailed, f"step {completed} was not saved: {describe(error)}"


def refuse(completed: int, errors: list[str | None]) -> None:
    """Raise ``SaveFailed`` if any rank had an error."""
    for rank, error in enumerate(errors):
        if error is not None:
            raise SaveFailed(f"step {completed} was not saved: {error} (rank {rank})")


def local_bytes(value: Any) -> int:
    """Return the bytes of a state's tensors, or shards of them, on this rank."""
    if isinstance(value, Mapping):
        return sum(map(local_bytes, value.values()))
    if isinstance(value, DTensor):
        value = value.to_local()
    return value.nbytes if isinstance(value, torch.Tensor) else 0


def describe(error: BaseException | None) -> str | None:
    """Return an error in one line."""
    if error is None:
        return None
    text = " ".join(str(error).split())
    return text if isinstance(error, OSError) and text else f"{type(error).__name__}: {text}"


class Background:
    """Work in a thread of its own, which does not keep a failing process alive."""

    def __init__(self, work: Callable[[], None]):
        self._work = work
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="ul-scale-save", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self._error = error

    @property
    def failed(self) -> bool:
        return not self._thread.is_alive() and self._error is not None

    def join(self) -> None:
        """Return once the thread has ended."""
        # Not only its work: a thread in torch's code while the interpreter ends aborts the process.
        self._thread.join()

    def wait(self) -> None:
        """Return once the thread has ended; raise what it raised."""
        self.join()
        if self._error is not None:
            raise self._error
