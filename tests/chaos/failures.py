"""What goes wrong around a run: told in one line, nothing lost, and the same command goes on."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import fsspec
import pytest
from buckets import Gate
from chaos.runs import SHORT, SLOW_S, Life, assert_bit_identical, newest_attempt, run_dir_of, write_run

from ul_scale.checkpoint import store
from ul_scale.checkpoint.attempts import attempt_path, read_attempts
from ul_scale.checkpoint.files import run_path, sizes


@dataclass
class Scene:
    """What a scenario needs."""

    shards: dict[str, str]
    folder: Path
    undisturbed: Path
    request: pytest.FixtureRequest
    said: list[str] = field(default_factory=list)
    """Messages that users get to see."""

    def config(self, name: str = "run", **sections) -> Path:
        return write_run(self.folder / name, self.shards, **SHORT | sections)

    def says(self, line: str, *expected: str) -> None:
        assert "\n" not in line and all(text in line for text in expected), line
        self.said.append(
            line.replace(str(self.folder), "…").replace(f" on {socket.gethostname()}:", " on HOST:")
        )

    def finds(self, output: str, *expected: str) -> None:
        """Expect a line among others."""
        lines = [line for line in output.splitlines() if expected[0] in line]
        assert lines, output
        self.says(lines[0], *expected)

    def check_end(self, run_dir: Path) -> None:
        assert_bit_identical(run_dir, self.undisturbed)


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Callable[[int], None]]:
    """Mount a file system of so many bytes; gives what changes its size."""

    def mount(*options: str) -> int:
        return subprocess.run(["mount", *options, str(folder)], capture_output=True).returncode

    folder.mkdir(parents=True)
    if mount("-t", "tmpfs", "-o", f"size={size}", "none"):
        pytest.skip("needs the right to mount a small file system")
    try:
        yield lambda size: mount("-o", f"remount,size={size}")
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def full_disk(scene: Scene) -> None:
    num_bytes = sum(sizes(store.shard_dir(scene.undisturbed, 16)).values())
    config = scene.config()
    with small_disk(scene.folder / "run" / "runs", int(2.6 * num_bytes)) as resize:
        error, run_dir = Life(config).error(), run_dir_of(config)
        scene.says(error, "step 12 was not saved", "No space left", "newest complete checkpoint: step 8")
        assert store.complete_steps(run_dir) == [4, 8]
        resize(20 * num_bytes)
        assert "resuming from step 8" in Life(config).succeed()
        scene.check_end(run_dir)


def bucket(scene: Scene, refuse: Callable[[str, str], int | None]) -> tuple[Path, Path, Gate]:
    """Return config and directory of a run in a bucket, and the proxy before it that refuses requests."""
    root = f"{scene.request.getfixturevalue('s3_bucket')}/{time.time_ns()}"
    patch = scene.request.getfixturevalue("monkeypatch")
    gate = Gate(os.environ["AWS_ENDPOINT_URL"].removeprefix("http://"))
    scene.request.addfinalizer(gate.close)
    patch.setenv("AWS_ENDPOINT_URL", gate.url)
    fsspec.get_filesystem_class("s3").clear_instance_cache()  # which may hold clients of an earlier gate
    patch.setenv("AWS_MAX_ATTEMPTS", "1")
    gate.refuse = refuse
    config = scene.config(root=root, checkpoint=SHORT["checkpoint"] | {"upload_attempts": 3})
    return config, run_path(root) / scene.undisturbed.name, gate


def is_write_of(step: int, method: str, path: str) -> bool:
    return method in ("PUT", "POST") and f"checkpoints/step_{step:08d}/" in path


def bucket_that_is_away_for_a_while(scene: Scene) -> None:
    answers = [503, 503]

    def refuse(method: str, path: str) -> int | None:
        return answers.pop() if answers and is_write_of(8, method, path) else None

    config, run_dir, _ = bucket(scene, refuse)
    scene.finds(Life(config).succeed(), "cannot upload", "503", "(try 1)")
    assert not answers
    scene.check_end(run_dir)


def bucket_that_stays_away(scene: Scene) -> None:
    config, run_dir, gate = bucket(scene, lambda *request: 503 if is_write_of(12, *request) else None)
    expected = ("step 12 was not saved", "503", "(try 3)", "newest complete checkpoint: step 8")
    scene.says(Life(config).error(), *expected)
    assert store.complete_steps(run_dir) == [4, 8]
    gate.refuse = lambda *request: None
    assert "resuming from step 8" in Life(config).succeed()
    scene.check_end(run_dir)


def read_only_bucket(scene: Scene) -> None:
    def deny(method: str, path: str) -> int | None:
        return 403 if method in ("PUT", "POST", "DELETE") else None

    config, run_dir, gate = bucket(scene, deny)
    scene.says(Life(config).error(), "permission denied")
    gate.refuse = lambda *request: 403 if is_write_of(12, *request) else None
    expected = ("step 12 was not saved", "permission denied", "newest complete checkpoint: step 8")
    scene.says(Life(config).error(), *expected)
    assert store.complete_steps(run_dir) == [4, 8]
    gate.refuse = lambda *request: None
    assert "resuming from step 8" in Life(config).succeed()
    scene.check_end(run_dir)


def truncated_newest_checkpoint(scene: Scene) -> None:
    config = scene.config()
    run_dir = run_dir_of(config)
    Life(config, "train.stop_at_step=12").succeed()
    shard = next(store.shard_dir(run_dir, 12).glob("*.distcp"))
    os.truncate(shard, shard.stat().st_size // 2)
    output = Life(config).succeed()
    scene.finds(output, "step 12 cannot be loaded", shard.name, "expected")
    assert "resuming from step 8" in output
    scene.check_end(run_dir)


def checkpoint_of_another_config(scene: Scene) -> None:
    """Of another network, and of another learning rate: nothing but COMMIT tells the second from ours."""
    config = scene.config()
    run_dir = run_dir_of(config)
    Life(config, "train.stop_at_step=8").succeed()
    for change, step in (("optim.lr=2e-3", 12), ("model.latent_channels=1", 16)):
        Life(scene.config("other"), change, f"train.stop_at_step={step}").succeed()
        (stranger,) = (scene.folder / "other" / "runs").iterdir()
        name = f"checkpoints/step_{step:08d}"
        shutil.copytree(stranger / name, run_dir / name)
        shutil.rmtree(stranger)
    commit = run_dir / "checkpoints/step_00000016" / "COMMIT"  # as one of before COMMIT named the run
    commit.write_text(json.dumps({k: v for k, v in json.loads(commit.read_text()).items() if k != "run"}))
    output = Life(config).succeed()
    scene.finds(output, "step 16 cannot be loaded", "does not fit this code or config")
    scene.finds(output, "step 12 cannot be loaded", "it is of another run, tiny-")
    assert "resuming from step 8" in output
    scene.check_end(run_dir)


def started_at_the_same_instant(scene: Scene) -> None:
    config = scene.config()
    run_dir = run_dir_of(config)
    for life in (1, 2):
        rivals = [Life(config, slow_s=SLOW_S) for _ in range(3)]
        while newest_attempt(run_dir) < life:
            time.sleep(0.001)
        owner = json.loads(attempt_path(run_dir, life).read_text())["pid"]
        os.kill(owner, signal.SIGSTOP)  # or it might be done before the others have asked
        (winner,) = [rival for rival in rivals if rival.process.pid == owner]
        for rival in rivals:
            if rival is not winner:
                scene.says(rival.error(), f"is in use by attempt {life}, process {owner} ")
        os.kill(owner, signal.SIGCONT)
        assert newest_attempt(run_dir) == life
        if life == 1:
            assert winner.until(lambda: store.latest_step(run_dir)), winner.output()
            winner.kill()
    winner.succeed()
    scene.check_end(run_dir)


def late_write_of_a_dead_attempt(scene: Scene) -> None:
    config = scene.config()
    run_dir = run_dir_of(config)
    asleep = Life(config, stop_before="step_00000008/COMMIT")
    assert asleep.until(lambda: asleep.stopped), asleep.output()
    on_another_host(attempt_path(run_dir, 1))
    heir = Life(config, patience_s=1.0)
    assert heir.until(lambda: read_attempts(run_dir).get(2, {}).get("resumes_from")), heir.output()
    asleep.process.send_signal(signal.SIGCONT)
    scene.says(asleep.error(), "attempt 1 may not", "the run was taken over", "this process can only end")
    output = heir.succeed()
    assert "no heartbeat for 1 s" in output and "resuming from step 4" in output
    scene.check_end(run_dir)


def on_another_host(path: Path) -> None:
    """Let an attempt's file be that of a host that cannot be asked whether the process lives."""
    record = json.loads(path.read_text()) | {"boot_id": "another", "host": "another-host"}
    path.with_suffix(".new").write_text(json.dumps(record))
    path.with_suffix(".new").replace(path)


SCENARIOS = {
    "full disk": full_disk,
    "bucket away (503) for two requests of a save": bucket_that_is_away_for_a_while,
    "bucket away (503) until the save gives up": bucket_that_stays_away,
    "read-only bucket, at the start and at a save": read_only_bucket,
    "truncated newest checkpoint": truncated_newest_checkpoint,
    "checkpoint of another config in the directory": checkpoint_of_another_config,
    "three runs started at the same instant, twice": started_at_the_same_instant,
    "late write of an attempt that was thought dead": late_write_of_a_dead_attempt,
}
