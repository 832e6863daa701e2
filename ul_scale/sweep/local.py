"""The local scheduler: independent nodes side by side as processes, each with its share of the machine."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

import torch

from ul_scale import config as configs
from ul_scale.checkpoint.files import write_atomic
from ul_scale.lifetime import SCHEDULER_PID
from ul_scale.sweep.plan import Node, Plan, config_path
from ul_scale.sweep.progress import Progress
from ul_scale.train.worker import EXIT_RUN_AGAIN

POLL_S = 0.2
MAX_RESTARTS = 3


@dataclass(frozen=True)
class Machine:
    """How many nodes run at once, and what each of them gets."""

    slots: int
    threads: int
    gpus: tuple[str, ...] = ()

    def environment(self, slot: int) -> dict[str, str]:
        share = {"OMP_NUM_THREADS": str(self.threads), SCHEDULER_PID: str(os.getpid())}
        if self.gpus:
            share["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
        return share


def this_machine(slots: int | None = None) -> Machine:
    """Return one slot per GPU, or without GPUs one per core: two one-thread workers beat a two-thread one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    gpus = tuple(visible.split(",") if visible else map(str, range(count)))[:count]
    slots = slots or len(gpus) or cores
    return Machine(slots, max(1, cores // slots), gpus)


class Interrupted(Exception):
    """The sweep was asked to stop."""


@dataclass
class Running:
    """A node's process."""

    node: Node
    slot: int
    process: subprocess.Popen[bytes]
    since: float


def critical_paths(nodes: list[Node]) -> dict[str, float]:
    """Return for each node the FLOPs from its start to the end of the sweep, along its longest way."""
    children: dict[str, list[Node]] = {}
    for node in nodes:
        for parent in node.parents:
            children.setdefault(parent, []).append(node)
    lengths: dict[str, float] = {}
    for node in reversed(nodes):  # parents come before their children
        lengths[node.id] = node.flops + max(
            (lengths[child.id] for child in children.get(node.id, ())), default=0
        )
    return lengths


def log_path(plan: Plan, node: Node) -> Path:
    return plan.directory / "logs" / f"{node.id.replace('/', '-')}.log"


def run_sweep(plan: Plan, machine: Machine) -> dict[str, str]:
    """Run what is missing; return the failed nodes with the end of their logs.

    A node whose parents failed is not started; the others go on. Killed at any instant, the same call
    continues: what counts as done is read from the runs' files.

    Raises:
        ValueError: if another process runs this sweep.
        Interrupted: after SIGINT or SIGTERM, once the running nodes have saved and ended.
    """
    for name in ("configs", "logs"):
        (plan.directory / name).mkdir(parents=True, exist_ok=True)
    # One sweep at a time under a root: sweeps share runs.
    with (plan.directory.parent / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{plan.directory.parent}: another process is running a sweep here") from None
        for run_id, config in plan.runs.items():
            config = replace(config, parallel=replace(config.parallel, threads=machine.threads))
            write_atomic(config_path(plan.directory, run_id), configs.to_yaml(config).encode())
        return _run_nodes(plan, machine)


def _run_nodes(plan: Plan, machine: Machine) -> dict[str, str]:
    lengths = critical_paths(plan.nodes)
    done = {node.id for node in plan.nodes if node.done()}
    waiting = sorted((n for n in plan.nodes if n.id not in done), key=lambda n: -lengths[n.id])
    running: dict[str, Running] = {}
    failed: dict[str, str] = {}
    restarts: dict[str, int] = {}

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted

    handlers = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    progress = Progress(plan.nodes, done)
    try:
        with progress:
            while waiting or running:
                for node in list(waiting):
                    if any(parent in failed for parent in node.parents):
                        waiting.remove(node)
                        failed[node.id] = f"not started: {', '.join(node.parents)} failed"
                    elif len(running) < machine.slots and done.issuperset(node.parents):
                        waiting.remove(node)
                        slot = min(set(range(machine.slots)) - {r.slot for r in running.values()})
                        running[node.id] = _start(plan, machine, node, slot)
                        progress.started(node)
                time.sleep(POLL_S)
                for item in list(running.values()):
                    code = item.process.poll()
                    if code is None:
                        continue
                    del running[item.node.id]
                    if code == 0 and item.node.done():
                        done.add(item.node.id)
                        progress.finished(item.node, time.monotonic() - item.since)
                    elif code == EXIT_RUN_AGAIN and restarts.get(item.node.id, 0) < MAX_RESTARTS:
                        restarts[item.node.id] = restarts.get(item.node.id, 0) + 1
                        waiting.insert(0, item.node)
                    else:
                        failed[item.node.id] = f"exit code {code}\n{_tail(log_path(plan, item.node))}"
                        progress.failed(item.node)
                progress.update([item.node for item in running.values()])
    except Interrupted:
        print("\nstopping: the running nodes save and end…", file=sys.stderr, flush=True)
        for number in handlers:
            signal.signal(number, signal.SIG_IGN)
        for item in running.values():
            item.process.terminate()
        for item in running.values():
            item.process.wait()
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return failed


def _start(plan: Plan, machine: Machine, node: Node, slot: int) -> Running:
    # A session of its own: Ctrl-C reaches the scheduler alone, which then asks each node to save.
    with log_path(plan, node).open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "ul_scale.cli", *node.command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | machine.environment(slot),
            start_new_session=True,
        )
    return Running(node, slot, process, time.monotonic())


def _tail(path: Path, lines: int = 12) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
