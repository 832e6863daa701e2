"""What is saved when: checkpoints on schedule and on request, and snapshots of the averages."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ul_scale.checkpoint.ema_snapshots import save_snapshot
from ul_scale.checkpoint.saver import Background, Saver, describe
from ul_scale.checkpoint.transfer import SaveFailed
from ul_scale.config import RunConfig
from ul_scale.parallel.engine import Engine
from ul_scale.train.ema import Ema
from ul_scale.train.health import StepHealth
from ul_scale.train.host import Host
from ul_scale.train.metrics import MetricsWriter
from ul_scale.train.notices import Source
from ul_scale.train.preemption import StopRequest, fits_notice, notice_in_force
from ul_scale.train.throughput import Throughput

ENDING = (Source.STOP_FILE, Source.DEADLINE)
"""A person's stop, or the end of the run's time."""


def training_state(
    engine: Engine, ema: Ema, completed: int, batch_size: int, skipped_steps: int
) -> dict[str, Any]:
    """Return all that a run is after so many completed steps."""
    return engine.state_dict() | {
        "ema": {name: engine.saved(average) for name, average in ema.averages.items()},
        "train": {"step": completed, "samples_seen": completed * batch_size, "skipped_steps": skipped_steps},
    }


@dataclass
class Saves:
    """Decides after every step, on every rank alike; see ``save_if_due``."""

    config: RunConfig
    engine: Engine
    ema: Ema
    saver: Saver
    stop: StopRequest
    health: StepHealth
    host: Host
    throughput: Throughput
    metrics: MetricsWriter | None
    log: Callable[[str], object]
    _snapshot: Background | None = None
    _snapshot_step: int = 0
    _told: bool = False

    def save_if_due(self, completed: int) -> bool:
        """Save what is due after so many completed steps; return whether all ranks are to stop here.

        Raises:
            SaveFailed: if an earlier save failed; what it replaced is still there.
        """
        if self.saver.failed or self._snapshot_failed():
            self.stop.request(Source.SAVE_FAILED)  # ranks learn of it at different steps, and leave together
        if self.saver.last_save_s is not None:
            self._measured(self.saver.last_save_s)
        asked = self.stop.agreed()
        if asked is not None:
            self.log(f"stopping after step {completed}: {asked}")
            if asked.source is Source.SAVE_FAILED:
                return True
        if self.config.ema.snapshot_due(completed):
            self._save_snapshot(completed)
        if asked is not None or self._due(completed):
            self.health.settle()
            with self.throughput.saving():
                self._save(completed)
        # Under a launcher that restarts, a notice that a machine goes ends this life and not the run.
        return asked is not None and (self.host.ends_when_stopped or asked.source in ENDING)

    def settle_before_commit(self, completed: int) -> None:
        """Have on disk what a run that resumes from the checkpoint will not write again; on rank 0."""
        if self.metrics is not None:
            self.metrics.flush()
        pending, step = self._snapshot, self._snapshot_step
        if pending is not None and step <= completed:
            pending.wait()

    def close(self) -> None:
        """Wait for what is in flight; raises what ``save_if_due`` does."""
        self.health.settle()
        self.saver.close()
        if self._snapshot is not None:
            try:
                self._snapshot.wait()
            except Exception as error:
                raise SaveFailed(f"a snapshot of the averages was not saved: {describe(error)}") from error

    def finish_save(self) -> None:
        """Let the save in flight be committed, when training has failed at the same step on all ranks."""
        with contextlib.suppress(SaveFailed):
            self.saver.close()

    def counters(self) -> dict[str, float]:
        """Return what a logged step tells of saves and skipped steps."""
        row: dict[str, float] = {"skipped_steps": self.health.skipped_steps}
        return row if self.saver.last_save_s is None else row | {"save_s": round(self.saver.last_save_s, 3)}

    def _due(self, completed: int) -> bool:
        checkpoint = self.config.checkpoint
        return (
            completed % checkpoint.every_steps == 0
            or completed in checkpoint.keep_steps
            or completed == self.config.train.last_step
        )

    def _save(self, completed: int) -> None:
        own_format = self.engine.checkpoint_format != "dcp"
        self.saver.save(
            training_state(
                self.engine,
                self.ema,
                completed,
                self.config.train.batch_size,
                self.health.skipped_steps,
            ),
            completed,
            save_files=self.engine.save_files if own_format else None,
            checkpoint_format=self.engine.checkpoint_format,
        )

    def _measured(self, save_s: float) -> None:
        self.stop.measured_save(save_s)
        if not self._told:
            self._told = True
            notice = notice_in_force(self.config.preemption)
            self.log(fits_notice(notice, save_s, self.config.checkpoint.every_steps, self.throughput.step_s))

    def _save_snapshot(self, completed: int) -> None:
        if self._snapshot is not None:
            self._snapshot.join()  # whether it failed is for all ranks to learn together
        averages = self.ema.power_averages(self.engine.whole)
        if self.saver.attempt is None or self._snapshot_failed():
            return
        run_dir, samples_seen = self.saver.run_dir, completed * self.config.train.batch_size
        self._snapshot_step = completed
        self._snapshot = Background(lambda: save_snapshot(run_dir, completed, samples_seen, averages))

    def _snapshot_failed(self) -> bool:
        return self._snapshot is not None and self._snapshot.failed
