"""Runs as processes of their own: start them, see on disk what they are at, kill them, compare the ends."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load as load_safetensors
from templates import AUTOENCODER, write_template
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ul_scale import config as configs
from ul_scale.checkpoint import state, store
from ul_scale.checkpoint.attempts import attempt_numbers, read_attempts
from ul_scale.checkpoint.ema_snapshots import FOLDER
from ul_scale.checkpoint.files import decode, list_names, read, sizes
from ul_scale.train import worker
from ul_scale.train.metrics import read_metrics
from ul_scale.train.prepare import prepare

REPOSITORY = Path(__file__).parents[2]
SUBJECT = Path(__file__).parent / "subject.py"
SLOW_S = 0.02
TIMEOUT_S = 200.0
OF_THE_MACHINE = """time_s images_per_s tflops_per_s_per_device mfu data_wait_share checkpoint_stall_s
memory_bytes save_s attempt""".split()
"""Columns of the metrics that a run's fate may change."""

STARTING, RESUMING, TRAINING = "before the attempt exists", "resuming (verifying, loading)", "training"
SHARDS, BEFORE_COMMIT = "writing shards", "between last shard and COMMIT"
AFTER_COMMIT, CLEANING = "between COMMIT and clean-up", "cleaning up"
AIMED = (RESUMING, TRAINING, SHARDS, BEFORE_COMMIT, AFTER_COMMIT, CLEANING)

STEPS, EVERY_STEPS, KEEP_LAST = 120, 6, 2
TEMPLATE = AUTOENCODER | {
    "train": AUTOENCODER["train"] | {"steps": STEPS},
    "checkpoint": {"every_steps": EVERY_STEPS, "keep_last": KEEP_LAST},
    "ema": {"half_lives_samples": [40, 400], "power_widths": [0.1], "snapshot_every_steps": 12},
}
SHORT = {"train": {"steps": 16}, "checkpoint": {"every_steps": 4}}


def write_run(folder: Path, shards: dict[str, str], template: dict = TEMPLATE, **sections) -> Path:
    folder.mkdir(exist_ok=True)
    return write_template(folder, shards, template, "config.yaml", **sections)


def undisturbed_run(folder: Path, shards: dict[str, str], template: dict = TEMPLATE, **sections) -> Path:
    """Train in this process, in one go; return the run directory."""
    config = write_run(folder, shards, template, **sections)
    assert worker.run(configs.load(config)) == 0
    return run_dir_of(config)


def run_dir_of(config: Path) -> Path:
    return prepare(configs.load(config)).run_dir


class Life:
    """One life of a run: ``ul-scale train``, or torchrun with several of it.

    Args:
        config: its path.
        overrides: of the config.
        processes: if more than one, under torchrun with engine fsdp.
        slow_s: drawn out by so many seconds for each file operation of checkpoints.
        stop_before: stops, as if by SIGSTOP, before it links a file whose path ends so.
        patience_s: with a heartbeat that stands still, in place of two minutes.
    """

    def __init__(self, config: Path, *overrides, processes=1, slow_s=0.0, stop_before="", patience_s=0.0):
        command = [sys.executable]
        if processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
            overrides += ("parallel.engine=fsdp",)
        changes = {"CHAOS_SLOW_S": slow_s, "CHAOS_PATIENCE_S": patience_s, "OMP_NUM_THREADS": 1}
        changes |= {"CHAOS_STOP_BEFORE": stop_before, "PYTHONPATH": REPOSITORY}
        self._output = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [*command, str(SUBJECT), "train", str(config), *overrides],
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env=os.environ | {name: str(value) for name, value in changes.items()},
        )

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def until(self, condition: Callable[[], object]) -> bool:
        """Wait until something holds; return False if the life ends before that."""
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            if self.ended:
                return False
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.001)
        return True

    @property
    def stopped(self) -> bool:
        return Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"

    def ranks(self) -> list[int]:
        """Return the process ids of torchrun's ranks, in order."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        numbered = {}
        for pid in map(int, children):
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            numbered |= {int(v[5:]): pid for v in variables if v.startswith(b"RANK=")}
        return [numbered[rank] for rank in sorted(numbered)]

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def wait(self) -> int:
        return self.process.wait(TIMEOUT_S)

    def output(self) -> str:
        self._output.seek(0)
        return self._output.read()

    def error(self) -> str:
        """Wait for the end, which must be a failure with one line for a person; return that line."""
        code, text = self.wait(), self.output()
        errors = [line for line in text.splitlines() if line.startswith("error: ")]
        assert code == 1 and len(errors) == 1 and "Traceback" not in text, (code, text)
        return errors[0]

    def succeed(self) -> str:
        """Wait for the end, which must be a success; return what was printed."""
        assert self.wait() == 0, self.output()
        return self.output()


def phase(run_dir: Path, attempts_before: int) -> str:
    """Return what the newest attempt is at, judged by what is on disk alone.

    Args:
        run_dir: local.
        attempts_before: how many there were before the life in question began.
    """
    attempts = read_attempts(run_dir)
    number = max(attempts, default=0)
    if number <= attempts_before:
        return STARTING
    if attempts[number].get("resumes_from") is None:
        return RESUMING
    found = {int(path.name[5:]): path for path in (run_dir / "checkpoints").glob("step_*")}
    committed = [step for step, path in found.items() if (path / "COMMIT").exists()]
    newest = max(committed, default=0)
    for step, path in found.items():
        if step > newest and (path / f"a{number}").exists():
            return BEFORE_COMMIT if (path / f"a{number}" / ".metadata").exists() else SHARDS
    if any(step < newest for step in found.keys() - set(committed)):
        return CLEANING
    return AFTER_COMMIT if len(committed) > KEEP_LAST else TRAINING


def newest_attempt(run_dir: Path) -> int:
    return max(attempt_numbers(run_dir), default=0)


def newest_row(run_dir: Path) -> int:
    rows = read_metrics(run_dir)
    return rows[-1]["step"] if rows else 0


def tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of the newest checkpoint, whole, by name, and of the snapshots of averages."""
    with state.local_copy(run_dir, store.latest_step(run_dir)) as directory:
        metadata = FileSystemReader(directory).read_metadata().state_dict_metadata
        found = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        state.load(found, directory)
    for part in ("model.", "optim.", "ema."):
        assert any(name.startswith(part) for name in found)
    for name in list_names(run_dir / FOLDER):
        found |= {
            f"{name}/{key}": value for key, value in load_safetensors(read(run_dir / FOLDER / name)).items()
        }
    return found


def rows(run_dir: Path) -> list[dict[str, float]]:
    """Return the metrics, without the columns that tell of time and machine."""
    kept = [{k: v for k, v in row.items() if k not in OF_THE_MACHINE} for row in read_metrics(run_dir)]
    assert kept and "loss/prior" in kept[0] and [row["step"] for row in kept] == list(range(1, len(kept) + 1))
    return kept


def assert_bit_identical(run_dir: Path, undisturbed: Path) -> None:
    assert store.read_success(run_dir) == store.read_success(undisturbed) is not None
    assert rows(run_dir) == rows(undisturbed)
    mine, theirs = tensors(run_dir), tensors(undisturbed)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
    left = {name.split("/")[1] for name in sizes(run_dir) if name.startswith("checkpoints/")}
    assert len(left) == KEEP_LAST == len(store.complete_steps(run_dir)), left
    for name in left:  # nothing that kills have left lying about is there any more
        step_dir = run_dir / "checkpoints" / name
        assert list_names(step_dir) == ["COMMIT", f"a{decode(read(step_dir / 'COMMIT'))['attempt']}"]
