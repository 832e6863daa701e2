"""Backend ``ray``: a run in a worker group of Ray Train, of a size that may vary, here or on a cluster.

Ray Train gives places, restarts and preemption notices; what is trained, saved and resumed is the same as
everywhere (``ul_scale.train.worker``). The nodes need the code at this path or installed, and the run's
root and data under the same names.
"""

import dataclasses
import logging
import os
import secrets
import socket
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from launch.backends.ray_restarts import RestartGuard, Stop, callback
from launch.backends.ray_stop import Following, StopSignals
from ul_scale import config as configs
from ul_scale.checkpoint import store
from ul_scale.config import RunConfig
from ul_scale.data.plan import lane_slots
from ul_scale.parallel.build import check_layout
from ul_scale.train.prepare import Prepared, check_resumable, prepare
from ul_scale.train.prepare import describe as describe_run

if TYPE_CHECKING:
    from ray.train.v2.torch.torch_trainer import TorchTrainer

REPOSITORY = Path(__file__).resolve().parents[2]
RESIZE_INTERVAL_S = 600.0
"""Growing is a restart, which costs the steps since the last save: not at every node that comes."""

ENVIRONMENT = {
    # Lines of the workers as they are, and the same line of two attempts twice: it is news.
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_DEDUP_LOGS": "0",
    # Relative paths of a config are relative to where the command was given.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # A notice may come 15 s before the end: Ray looks for it every 5 s unless told otherwise.
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    # For some 20 s a node that has gone counts as there, and a group that waits for it gets nowhere.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
    # A worker that is silent for so long is taken for dead; its training goes on in another thread.
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "300",
    "RAY_USAGE_STATS_ENABLED": "0",
    # What Ray will do some day, and today warns of: see CUDA_VISIBLE_DEVICES below.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Set for driver, controller and workers, unless the user has set it otherwise."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line says of the cluster.

    Attributes:
        workers: least and most workers; equal: a fixed number.
        cpus_per_worker: reserved in Ray's books, and torch's threads; None: a fair share of an own
            cluster, 1 of another's.
        gpus_per_worker: 0 or 1; None: 1 where there are GPUs.
        address: of a running cluster; None: an own one on this machine, for the time of the run.
        max_restarts: in a row without progress, before the run is given up; None: 3.
    """

    workers: tuple[int, int] = (1, 1)
    cpus_per_worker: int | None = None
    gpus_per_worker: int | None = None
    address: str | None = None
    max_restarts: int | None = None

    def __post_init__(self) -> None:
        low, high = self.workers
        if not 1 <= low <= high:
            raise ValueError(f"--workers {low}:{high}: expected MIN:MAX with 1 <= MIN <= MAX")
        if self.cpus_per_worker is not None and self.cpus_per_worker < 1:
            raise ValueError(f"--cpus-per-worker {self.cpus_per_worker}: expected 1 or more, or auto")
        if self.gpus_per_worker not in (None, 0, 1):
            raise ValueError(f"--gpus-per-worker {self.gpus_per_worker}: expected 0, 1 or auto")
        if self.max_restarts is not None and self.max_restarts < 0:
            raise ValueError(f"--max-restarts-without-progress {self.max_restarts}: expected 0 or more")
        if self.address is not None and self.address.startswith("ray://"):
            raise ValueError(
                f"--address {self.address}: Ray Train needs a driver on the cluster; run this command on a "
                "node of it, with --address auto"
            )

    @property
    def restarts(self) -> int:
        return 3 if self.max_restarts is None else self.max_restarts

    @property
    def elastic(self) -> bool:
        return self.workers[0] < self.workers[1]


def parse_workers(text: str) -> tuple[int, int]:
    """Return least and most workers of ``N`` or ``MIN:MAX``."""
    low, colon, high = text.partition(":")
    if not low.isdecimal() or not (high if colon else low).isdecimal():
        raise ValueError(f"--workers {text}: expected N or MIN:MAX, such as 4 or 1:8")
    return int(low), int(high if colon else low)


def check(config: RunConfig, options: Options) -> Prepared:
    """Check a run at every number of workers that it may get, before anything is started."""
    low, high = options.workers
    if config.parallel.engine == "deepspeed" and options.elastic:
        raise ValueError(
            f"--workers {low}:{high} is elastic, but DeepSpeed's checkpoints resume at their own number of "
            f"workers only; expected --workers {high}, or parallel.engine=fsdp"
        )
    gpus = torch.cuda.device_count()
    wants_gpus = options.gpus_per_worker or (options.gpus_per_worker is None and gpus)
    if options.address is None and wants_gpus and gpus < high:
        raise ValueError(
            f"--workers {high} with a GPU each: this machine has {gpus}; expected at most {gpus} workers, "
            "--gpus-per-worker 0, or --address of a cluster"
        )
    prepared = prepare(config, high)
    check_resumable(prepared)
    for count in range(low, high):
        try:
            check_layout(config.parallel, count, samples_each(prepared, count))
        except ValueError as error:
            raise ValueError(f"--workers {low}:{high} allows {count}, which does not work: {error}") from None
    return prepared


def samples_each(prepared: Prepared, count: int) -> int:
    """Return the samples per step of each of so many workers."""
    return len(lane_slots(prepared.plan.lanes, 0, count)) * prepared.plan.lane_batch_size


def describe(prepared: Prepared, options: Options) -> str:
    """Return what a run would do under Ray, for a dry run."""
    low, high = options.workers
    plan, accumulation = prepared.plan, prepared.config.parallel.accumulation_steps
    per_worker = ", ".join(
        f"{name} {'auto' if value is None else value}"
        for name, value in (("CPUs", options.cpus_per_worker), ("GPUs", options.gpus_per_worker))
    )
    lines = [
        describe_run(prepared),
        f"cluster    {options.address or 'an own one on this machine, for the time of the run'}",
        f"workers    {f'{low} to {high}, as many as there is room for' if options.elastic else high}; "
        f"each: {per_worker}",
        "           workers  lanes each  idle lanes  samples each per micro-batch",
    ]
    for count in range(low, high + 1):
        samples = samples_each(prepared, count)
        lanes = samples // plan.lane_batch_size
        idle = count * lanes - plan.lanes
        lines.append(f"           {count:7}  {lanes:10}  {idle:10}  {samples // accumulation:28}")
    settings = {name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()}
    lines += [
        f"restarts   without limit while checkpoints get newer, else {options.restarts} in a row",
        "settings   " + "\n           ".join(f"{name}={value}" for name, value in settings.items()),
    ]
    return "\n".join(lines)


def submit(prepared: Prepared, source: str, options: Options) -> int:
    """Train a run under Ray; return the exit code.

    SIGTERM or SIGINT: the workers save, all ends, and the code is 75. A second one does not wait.

    Args:
        prepared: what ``check`` returned.
        source: the config's path, for messages.
        options: of the cluster.
    """
    last_step = prepared.config.train.last_step
    if (store.read_success(prepared.run_dir) or 0) >= last_step:
        print(f"{prepared.run_id} is done: {prepared.run_dir} reached step {last_step}")
        return 0
    set_environment(options)
    signals = StopSignals()
    with signals, tempfile.TemporaryDirectory(prefix="ul_scale_ray_") as scratch:
        import ray

        try:
            resources = start(options)
            signals.install()  # again: ray.init takes SIGTERM for itself
            guard = RestartGuard(prepared.run_dir, options.restarts)
            build = partial(build_trainer, prepared, source, options, resources, guard, scratch)
            return Following(prepared.run_dir, partial(fit, build, guard)).until_the_end(signals)
        except Stop as stop:
            print(f"error: {stop.message}", file=sys.stderr)
            return stop.exit_code
        finally:
            ray.shutdown()


def set_environment(options: Options) -> None:
    """Set what Ray reads when it is imported."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if options.address is None:
        # An own cluster, too, listens on all addresses of the machine, and who gets in can run code.
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


def start(options: Options) -> dict[str, int]:
    """Start a cluster or join one; return what a worker reserves."""
    import ray

    high = options.workers[1]
    # Of the processes that Ray adds, what is an error; what the workers print comes through.
    quiet: dict[str, Any] = {
        "logging_level": logging.ERROR,
        "logging_config": ray.LoggingConfig(log_level="ERROR"),
    }
    if options.address is None:
        cores = os.cpu_count() or 1
        ray.init(
            address="local",
            # Counted, not measured: more workers than cores are slow, but they run.
            num_cpus=max(cores, high * (options.cpus_per_worker or 1)),
            object_store_memory=100 * 2**20,  # Nothing goes through it; Ray's default is 30 % of memory.
            include_dashboard=False,
            **quiet,
        )
        cpus = options.cpus_per_worker or max(1, cores // high)
    else:
        join(options.address, quiet)
        cpus = options.cpus_per_worker or 1
    gpus = options.gpus_per_worker
    if gpus is None:
        gpus = int(ray.cluster_resources().get("GPU", 0) > 0)
    resources = {name: value for name, value in (("CPU", cpus), ("GPU", gpus)) if value}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(int(min(node.get(name, 0) // need for name, need in resources.items())) for node in nodes)
    if room < options.workers[0]:
        print(
            f"waiting for nodes: the cluster has room for {room} workers of {resources}, "
            f"and {options.workers[0]} are needed",
            flush=True,
        )
    return resources


def join(address: str, quiet: dict[str, Any]) -> None:
    """Connect to a running cluster; raise ``ValueError`` if there is none."""
    import ray

    host, _, port = address.rpartition(":")
    try:
        if port.isdecimal():  # Ray itself would try for minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        ray.init(address=address, **quiet)
    except OSError as error:
        first, *_ = str(error).splitlines()
        raise ValueError(f"--address {address}: no Ray cluster can be joined there: {first}") from None


def build_trainer(
    prepared: Prepared,
    source: str,
    options: Options,
    resources: dict[str, int],
    guard: RestartGuard,
    scratch: str,
) -> "TorchTrainer":
    """Return the trainer; every setting that is not Ray's default says why."""
    from ray.train.torch import TorchConfig
    from ray.train.v2.api.config import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.v2.torch.torch_trainer import TorchTrainer

    from ul_scale.train.ray_worker import train_loop

    class Trainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            # The cleaner of placement groups asks the dashboard whether the controller lives. An own cluster
            # has none and goes with this process; on a busy machine the cleaner ended in a traceback.
            callbacks = super()._create_default_callbacks()
            without = {"PlacementGroupCleanerCallback"} if options.address is None else set()
            return [callback for callback in callbacks if type(callback).__name__ not in without]

    config = prepared.config
    low, high = options.workers
    return Trainer(
        train_loop,
        train_loop_config={"config": configs.to_yaml(absolute(config)), "source": source},
        torch_config=TorchConfig(
            # Flags and pickled objects go over gloo, so that they never wait for a GPU.
            backend="cpu:gloo,cuda:nccl" if "GPU" in resources else "gloo",
            timeout_s=int(config.parallel.timeout_s),
        ),
        scaling_config=ScalingConfig(
            num_workers=(low, high) if options.elastic else high,
            use_gpu="GPU" in resources,
            resources_per_worker=resources,
            # Fill a node before the next: ranks of one node share its fast links, and the fewer nodes a
            # group is on, the fewer can take it down.
            placement_strategy="PACK",
            elastic_resize_monitor_interval_s=RESIZE_INTERVAL_S,
        ),
        run_config=RunConfig(
            name=prepared.run_id,
            # Ray's own notes, of which we read none: on this node, so that no bucket is needed for them.
            storage_path=scratch,
            failure_config=FailureConfig(
                # Counting failures would end a long run on spot nodes; the guard counts what does not get on.
                max_failures=-1,
                # Also when the cluster has no place: nodes come back.
                controller_failure_limit=-1,
                max_preemption_failures=-1,
                # The save that a notice asked for may be in its last upload when the node goes.
                preemption_grace_s=5.0,
                # A sharded save needs every rank: those that stay could not complete it alone.
                relax_collectives_on_preemption=False,
            ),
            callbacks=[callback(guard)],
            worker_runtime_env={"env_vars": worker_environment(with_gpu="GPU" in resources)},
            # Ray reports each failure several times over; the guard prints a line, and the end in full.
            logging_config=LoggingConfig(log_level="CRITICAL"),
        ),
    )


def worker_environment(*, with_gpu: bool) -> dict[str, str]:
    """Return what workers find set beside what their node has set."""
    variables = {name: value for name, value in os.environ.items() if name.startswith("UL_SCALE_")}
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    # Workers that have reserved no GPU must not find one: their process group is on the CPU.
    return variables if with_gpu else variables | {"CUDA_VISIBLE_DEVICES": ""}


def absolute(config: RunConfig) -> RunConfig:
    """Return a config whose local paths do not depend on the working directory."""

    def of(path: str) -> str:
        return path if "://" in path else str(Path(path).absolute())

    data = config.data
    data = dataclasses.replace(data, train=data.train and of(data.train), val=data.val and of(data.val))
    return dataclasses.replace(config, root=of(config.root), data=data)


def fit(build: "Callable[[], TorchTrainer]", guard: RestartGuard) -> int:
    """Train to the end; return 0, or 75 after a stop request.

    Ray restarts the workers by itself. What it does not retry, such as a node that goes while the process
    group is being formed, is tried again here, under the same guard.

    Raises:
        Stop: the run has failed for good.
    """
    while True:
        try:
            result: Any = build().fit()
            return int(result.return_value or 0)
        except Exception as error:
            cause = getattr(error, "controller_failure", error)
            if isinstance(cause, Stop):
                raise cause from None
            print(guard.failed({0: cause}), flush=True)
