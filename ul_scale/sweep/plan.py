"""From a sweep config to a DAG of content-addressed work: autoencoder → latents → base → evaluations."""

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf

from ul_scale import config as configs
from ul_scale.checkpoint import store
from ul_scale.config import AutoencoderRun, BaseRun, RunConfig
from ul_scale.evaluate.encode_jobs import (
    SPLITS,
    EncodeConfig,
    Job,
    check_settings,
    is_encoded,
    make_job,
    text_config,
)
from ul_scale.evaluate.features import load_network
from ul_scale.evaluate.metrics import EvaluationConfig, held_out, metric_name, read_evaluation
from ul_scale.models.text import TextConfig
from ul_scale.models.zoo import BASES
from ul_scale.sweep.checks import (
    SET_IN_AUTOENCODERS,
    SET_IN_BASES,
    check_base,
    check_held_out_data,
    check_overrides,
    check_points,
    known_classes,
)
from ul_scale.sweep.cost import Cost, autoencoder_cost, base_cost
from ul_scale.train.prepare import embeddings_identity, prepare

RunT = TypeVar("RunT", AutoencoderRun, BaseRun)


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """A grid of stage-1 templates × bitrates and stage-2 templates × sizes × seeds."""

    kind: str = "sweep"
    name: str
    root: str = "runs"
    autoencoder: str
    """Config of the autoencoders, relative to the sweep's file."""
    base: str
    """Config of the base models, relative to the sweep's file."""
    autoencoder_overrides: list[str] = field(default_factory=list)
    """Of the autoencoders' config, such as where the data are."""
    base_overrides: list[str] = field(default_factory=list)
    """Of the base models' config."""
    encoding: EncodeConfig = field(default_factory=EncodeConfig)
    """How latents are stored, and what beside them: given frames, embeddings of captions."""
    loss_factors: list[float] = field(default_factory=list)
    """c_lf of an autoencoder each."""
    targets_bits_per_pixel: list[float] = field(default_factory=list)
    """Bitrate that an autoencoder each is held at, by adapting its c_lf."""
    sizes: list[str]
    size_overrides: dict[str, list[str]] = field(default_factory=dict)
    """Overrides of the base config by size, such as a learning rate."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Seeds of the base models."""
    autoencoder_seed: int = 0
    evaluation_points: int = 3
    """Compute points of each base model, log-spaced; the last is the end of its training."""
    evaluation_span: float = 4.0
    """Steps of the last point / steps of the first."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        if self.kind != "sweep":
            raise ValueError(f"kind is {self.kind!r}; expected sweep")
        if self.name in ("", ".", "..") or "/" in self.name:
            raise ValueError(f"name is {self.name!r}; expected a name for a folder")
        for name in ("loss_factors", "targets_bits_per_pixel", "sizes", "seeds"):
            values = getattr(self, name)
            optional = name in ("loss_factors", "targets_bits_per_pixel")
            if not (values or optional) or len(set(values)) != len(values):
                raise ValueError(f"{name} is {list(values)}; expected one or more different values")
        if not self.loss_factors and not self.targets_bits_per_pixel:
            raise ValueError("loss_factors and targets_bits_per_pixel are empty; expected values of either")
        if self.evaluation_points < 1 or not 1 < self.evaluation_span < math.inf:
            raise ValueError(
                f"evaluation_points is {self.evaluation_points} and evaluation_span {self.evaluation_span}; "
                "expected 1 or more, and a number above 1"
            )
        unknown = {*self.size_overrides} - {*BASES}
        if unknown:
            named = ", ".join(sorted(unknown))
            raise ValueError(f"size_overrides names {named}; sizes are {', '.join(BASES)}")
        set_from = dict(SET_IN_AUTOENCODERS)
        if self.loss_factors:  # where bitrates are targets, it is only what c_lf starts from
            set_from["loss.loss_factor"] = "loss_factors"
        check_overrides("autoencoder_overrides", self.autoencoder_overrides, set_from)
        check_overrides("base_overrides", self.base_overrides, SET_IN_BASES)
        for size, overrides in self.size_overrides.items():
            check_overrides(f"size_overrides.{size}", overrides, SET_IN_BASES)


@dataclass(frozen=True)
class Node:
    """One piece of work: a process of ``ul-scale``, done when its files are there."""

    id: str
    kind: str
    """``autoencoder``, ``encode``, ``base`` or ``evaluate``."""
    command: tuple[str, ...]
    """Arguments of ``ul-scale``."""
    run_dir: Path
    steps: int
    """Training steps, for the progress display; 0 where it does not train."""
    flops: float
    parents: tuple[str, ...]
    done: Callable[[], bool] = dataclasses.field(compare=False)


@dataclass(frozen=True)
class Cell:
    """A base model of the grid, and the autoencoder that it stands on."""

    autoencoder_dir: Path
    autoencoder: AutoencoderRun
    base_dir: Path
    base: BaseRun
    evaluation_steps: list[int]
    cost: Cost
    autoencoder_cost: Cost


@dataclass(frozen=True)
class Plan:
    """What a sweep consists of."""

    config: SweepConfig
    directory: Path
    nodes: list[Node]
    runs: dict[str, RunConfig]
    """Resolved config of every run to train, by run id."""
    cells: list[Cell]

    @property
    def metric(self) -> str:
        """Name of the distance in its rows."""
        video = any(cell.autoencoder.data.clip_frames is not None for cell in self.cells)
        return metric_name(self.config.evaluation, video=video)


def load_sweep(path: str | Path, overrides: list[str] | None = None) -> tuple[SweepConfig, Path]:
    """Return a sweep's config, and the folder that its templates are relative to."""
    values = configs.apply_overrides(configs.read_yaml(path), overrides or [])
    return configs.structure(SweepConfig, values, str(path)), Path(path).parent


def evaluation_steps(steps: int, points: int, span: float) -> list[int]:
    """Return log-spaced steps up to ``steps``, the first at ``steps / span``."""
    if points == 1:
        return [steps]
    return sorted({max(1, round(steps * span ** (i / (points - 1) - 1))) for i in range(points)})


def plan_sweep(sweep: SweepConfig, folder: Path) -> Plan:
    """Expand a sweep.

    Raises:
        ValueError: in one line, if a template, a size or the data does not fit.
    """
    load_network(sweep.evaluation.features)  # or its absence would be found after hours of training
    if "://" in sweep.root:
        scheme = sweep.root.partition("://")[0]  # the rest may hold credentials
        raise ValueError(f"root is {scheme}://…; expected a local directory: sweeps do not run in buckets")
    directory = Path(sweep.root) / "sweeps" / sweep.name
    stored_text = text_config(sweep.encoding)
    nodes: list[Node] = []
    runs: dict[str, RunConfig] = {}
    cells: list[Cell] = []
    dials = [("loss_factor", "c", value) for value in sweep.loss_factors]
    dials += [("target_bits_per_pixel", "b", value) for value in sweep.targets_bits_per_pixel]
    for setting, letter, value in dials:
        dial = f"{letter}{value:g}"
        autoencoder = _template(
            folder / sweep.autoencoder,
            AutoencoderRun,
            sweep,
            [*sweep.autoencoder_overrides, f"loss.{setting}={value}", f"seed={sweep.autoencoder_seed}"],
            {"name": f"autoencoder-{dial}"},
        )
        last = autoencoder.train.last_step
        autoencoder = _placed(autoencoder, [last])
        prepared = prepare(autoencoder)
        index, run_id, run_dir = prepared.index, prepared.run_id, prepared.run_dir
        check_held_out_data(run_dir, autoencoder, held_out(autoencoder, sweep.evaluation.samples))
        runs[run_id] = autoencoder
        job = _latents_job(run_dir, last, autoencoder, sweep.encoding, stored_text)
        facts = {**job.further, **known_classes(index, job)}
        ae_cost = autoencoder_cost(autoencoder)
        nodes += [
            _train_node(run_id, "autoencoder", directory, run_dir, last, ae_cost.train_flops(last), ()),
            Node(
                f"{run_id}/latents",
                "encode",
                ("encode", str(run_dir), "--step", str(last), *_options(sweep.encoding)),
                run_dir,
                0,
                ae_cost.encode_flops * len(index),
                (run_id,),
                partial(_is_encoded, run_dir, last),
            ),
            _evaluate_node(run_id, run_dir, [last], sweep, ae_cost, (run_id,)),
        ]
        for size in sweep.sizes:
            for seed in sweep.seeds:
                base = _template(
                    folder / sweep.base,
                    BaseRun,
                    sweep,
                    [
                        *sweep.base_overrides,
                        f"model.size={size}",
                        f"seed={seed}",
                        *sweep.size_overrides.get(size, []),
                    ],
                    {"name": f"base-{dial}-{size}", "autoencoder": {"run": run_id, "step": last}},
                )
                if base.autoencoder.on_the_fly:
                    raise ValueError(
                        f"{folder / sweep.base}: autoencoder.on_the_fly is true; expected false: the base "
                        "models of a sweep are trained on latents that are encoded once"
                    )
                points = evaluation_steps(
                    base.train.last_step, sweep.evaluation_points, sweep.evaluation_span
                )
                base = _placed(base, points)
                check_base(base, index, job)
                encoder = embeddings_identity(base.model.text, facts)
                base_id = configs.run_id(base, None, encoder, facts.get("stored"))
                runs[base_id] = base
                base_dir, cost = Path(sweep.root) / base_id, base_cost(base, autoencoder, facts)
                check_points(base_dir, points, sweep.evaluation)
                latents = f"{run_id}/latents"
                training = cost.train_flops(base.train.last_step)
                nodes += [
                    _train_node(
                        base_id, "base", directory, base_dir, base.train.last_step, training, (latents,)
                    ),
                    _evaluate_node(base_id, base_dir, points, sweep, ae_cost, (base_id,), cost),
                ]
                cells.append(Cell(run_dir, autoencoder, base_dir, base, points, cost, ae_cost))
    return Plan(sweep, directory, nodes, runs, cells)


def _template(
    path: Path, schema: type[RunT], sweep: SweepConfig, overrides: list[str], values: dict[str, Any]
) -> RunT:
    config = configs.read_yaml(path)
    merged = OmegaConf.merge(config, {"root": sweep.root}, values)
    assert isinstance(merged, DictConfig)
    merged = configs.apply_overrides(merged, overrides)
    if (kind := merged.get("kind")) != schema.kind:
        raise ValueError(f"{path}: kind is {kind!r}; expected {schema.kind}")
    run = configs.resolve(merged, str(path))
    assert isinstance(run, schema)
    return run


def _placed(run: RunT, steps: list[int]) -> RunT:
    """Return a run as a sweep trains it: in one process, however its template is sharded; keeping steps."""
    return dataclasses.replace(
        run,
        checkpoint=dataclasses.replace(run.checkpoint, keep_steps=steps),
        parallel=dataclasses.replace(run.parallel, engine="none", dp_replicate=1),
    )


def _latents_job(
    run_dir: Path, step: int, run: AutoencoderRun, encoding: EncodeConfig, text: TextConfig | None
) -> Job:
    """Return how the training set is encoded; raise if latents are there that were stored otherwise."""
    jobs = [make_job(run_dir, step, run.data, split, encoding, text) for split in SPLITS]
    for job in jobs:
        check_settings(job)
    return jobs[0]


def _options(encoding: EncodeConfig) -> list[str]:
    """Return the options of ``ul-scale encode`` that say the same."""
    options = []
    for entry in dataclasses.fields(encoding):
        value, name = getattr(encoding, entry.name), entry.name.replace("_", "-")
        if value == entry.default:
            continue
        if isinstance(value, bool):
            options.append(f"--{name}" if value else f"--no-{name}")
        else:
            options += [f"--{name}", str(value)]
    return options


def _is_encoded(run_dir: Path, step: int) -> bool:
    return all(is_encoded(run_dir, step, split) for split in SPLITS)


def config_path(directory: Path, run_id: str) -> Path:
    """Return where a sweep writes the resolved config of a run."""
    return directory / "configs" / f"{run_id}.yaml"


def _train_node(
    run_id: str, kind: str, directory: Path, run_dir: Path, steps: int, flops: float, parents: tuple[str, ...]
) -> Node:
    return Node(
        run_id,
        kind,
        ("train", str(config_path(directory, run_id))),
        run_dir,
        steps,
        flops,
        parents,
        lambda: (store.read_success(run_dir) or 0) >= steps,
    )


def _evaluate_node(
    run_id: str,
    run_dir: Path,
    steps: list[int],
    sweep: SweepConfig,
    autoencoder: Cost,
    parents: tuple[str, ...],
    base: Cost | None = None,
) -> Node:
    evaluation = sweep.evaluation
    settings = [f"{key}={json.dumps(value)}" for key, value in dataclasses.asdict(evaluation).items()]
    step_args = [argument for step in steps for argument in ("--step", str(step))]
    per_image = autoencoder.decode_flops * evaluation.decoder_steps
    per_image += base.forward_flops * evaluation.base_calls if base else 0
    return Node(
        f"{run_id}/evals",
        "evaluate",
        ("evaluate", str(run_dir), *step_args, *settings),
        run_dir,
        0,
        per_image * evaluation.samples * len(steps),
        parents,
        lambda: all(read_evaluation(run_dir, step, evaluation) is not None for step in steps),
    )
