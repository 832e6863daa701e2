"""RunConfig: gathers the section dataclasses, loads and checks YAML, and gives a run its identity."""

import dataclasses
import difflib
import hashlib
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from ul_scale.checkpoint.store import CheckpointConfig
from ul_scale.data.config import DataConfig
from ul_scale.models import zoo
from ul_scale.parallel.engine import NOT_IDENTITY, ParallelConfig
from ul_scale.stages.autoencoder import AutoencoderLoss, AutoencoderModel
from ul_scale.stages.base import BaseLoss, BaseModel
from ul_scale.stages.fixed import FixedLoss, FixedModel
from ul_scale.train.ema import EmaConfig
from ul_scale.train.loop import TrainConfig
from ul_scale.train.metrics import LogConfig
from ul_scale.train.optim import OptimConfig
from ul_scale.train.preemption import PreemptionConfig

METHOD_VERSION = 1
"""Counts in every run's identity; raised when the same config would train to other numbers."""


@dataclass(frozen=True, kw_only=True)
class AutoencoderRun:
    """A stage-1 run."""

    kind: str = "autoencoder"
    name: str
    seed: int = 0
    root: str = field(default="runs", metadata=NOT_IDENTITY)
    """Where run directories lie."""
    data: DataConfig
    model: AutoencoderModel
    loss: AutoencoderLoss
    train: TrainConfig
    optim: OptimConfig
    ema: EmaConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig
    preemption: PreemptionConfig = field(default_factory=PreemptionConfig, metadata=NOT_IDENTITY)
    log: LogConfig = field(default_factory=LogConfig, metadata=NOT_IDENTITY)


@dataclass(frozen=True, kw_only=True)
class AutoencoderRef:
    """Section ``autoencoder`` of a base model: whose latents it is trained on."""

    run: str
    """Run id of a stage-1 run under the same root."""
    step: int
    """Its checkpoint."""
    on_the_fly: bool = field(default=False, metadata={"legacy": False})
    """Train on images of ``data.train`` and encode each batch, rather than on latents that are encoded
    once. Costs the encoder's forward pass, needs no room for latents, and allows augmentation."""

    def __post_init__(self) -> None:
        # A path to the same run would give the same training another identity.
        if "/" in self.run:
            raise ValueError(f"autoencoder.run is {self.run!r}; expected a run id under root, not a path")
        if self.step < 0:
            raise ValueError(f"autoencoder.step is {self.step}; expected 0 or more")


@dataclass(frozen=True, kw_only=True)
class BaseRun:
    """A stage-2 run; its data are the latents of ``autoencoder``."""

    kind: str = "base"
    name: str
    seed: int = 0
    root: str = field(default="runs", metadata=NOT_IDENTITY)
    """Where run directories lie."""
    autoencoder: AutoencoderRef
    data: DataConfig
    model: BaseModel
    loss: BaseLoss
    train: TrainConfig
    optim: OptimConfig
    ema: EmaConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig
    preemption: PreemptionConfig = field(default_factory=PreemptionConfig, metadata=NOT_IDENTITY)
    log: LogConfig = field(default_factory=LogConfig, metadata=NOT_IDENTITY)


@dataclass(frozen=True, kw_only=True)
class FixedRun:
    """An autoencoder that is not trained here, whose latents base models are trained on as on others'."""

    kind: str = "fixed_autoencoder"
    name: str
    root: str = field(default="runs", metadata=NOT_IDENTITY)
    """Where run directories lie."""
    data: DataConfig
    model: FixedModel
    loss: FixedLoss = field(default_factory=FixedLoss)


RunConfig = AutoencoderRun | BaseRun
AnyAutoencoder = AutoencoderRun | FixedRun
KINDS: dict[str, tuple[type, dict[str, zoo.Fields]]] = {
    "autoencoder": (AutoencoderRun, zoo.AUTOENCODERS),
    "base": (BaseRun, zoo.BASES),
    "fixed_autoencoder": (FixedRun, {}),
}
T = TypeVar("T")


def read_yaml(path: str | Path, _seen: tuple[Path, ...] = ()) -> DictConfig:
    """Read a YAML file over the files that its ``defaults`` list names, relative to itself."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such config file")
    if path.resolve() in _seen:
        raise ValueError(f"{path}: its defaults lead back to itself")
    config = parse(path.read_bytes(), str(path))
    names = config.pop("defaults", None) or []
    if isinstance(names, str):
        raise ValueError(f"{path}: defaults is {names!r}; expected a list of files")
    bases = [read_yaml(path.parent / name, (*_seen, path.resolve())) for name in names]
    merged = OmegaConf.merge(*bases, config)
    assert isinstance(merged, DictConfig)
    return merged


def apply_overrides(config: DictConfig, overrides: list[str]) -> DictConfig:
    """Return config with ``a.b=c`` overrides; values are YAML."""
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not all(key.split(".")):
            raise ValueError(f"override {override!r}: expected key=value, such as train.steps=1000")
        try:
            OmegaConf.update(config, key, yaml.safe_load(value), merge=False, force_add=True)
        except (
            yaml.YAMLError,
            OmegaConfBaseException,
            IndexError,
            TypeError,
            ValueError,
            RecursionError,
        ) as error:
            raise ValueError(f"override {override!r}: {str(error).splitlines()[0]}") from None
    return config


def known_keys(schema: type, prefix: str = "") -> list[str]:
    """Return every dotted key of a section dataclass."""
    keys = []
    for entry in dataclasses.fields(schema):
        keys.append(prefix + entry.name)
        if isinstance(entry.type, type) and dataclasses.is_dataclass(entry.type):
            keys += known_keys(entry.type, f"{prefix}{entry.name}.")
    return keys


def _writable(node: Any) -> None:
    """Let frozen dataclasses be merged into; OmegaConf marks each of them read-only."""
    OmegaConf.set_readonly(node, None)
    content = node._content
    for child in content.values() if isinstance(content, dict) else content or ():
        if isinstance(child, DictConfig | ListConfig):
            _writable(child)


def _check_shape(kind: Any, value: Any, where: str = "") -> None:
    """Check that plain values have the sections, keys and lists of a schema, of which ``kind`` is a type.

    OmegaConf checks the rest, but of these it does not say what was expected, nor where inside a list.
    """
    if isinstance(kind, UnionType):
        kind = next(choice for choice in get_args(kind) if choice is not NoneType)
    if value is None or (isinstance(value, str) and value.startswith(("${", "???"))):
        return
    if get_origin(kind) is list:
        if not isinstance(value, list):
            raise ValueError(f"{where} is {value!r}; expected a list")
        for index, item in enumerate(value):
            _check_shape(get_args(kind)[0], item, f"{where}[{index}]")
    elif dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ValueError(f"{where} is {value!r}; expected a section of keys and values")
        kinds = get_type_hints(kind)
        for key, item in value.items():
            prefix = f"{where}." if where else ""
            if key not in kinds:
                valid = known_keys(kind)  # type: ignore[arg-type]
                near = difflib.get_close_matches(str(key), valid, n=1, cutoff=0.4)
                hint = f"; did you mean {prefix}{near[0]}?" if near else ""
                raise ValueError(f"unknown key {prefix}{key}{hint}")
            _check_shape(kinds[key], item, f"{prefix}{key}")


def structure(schema: type[T], values: DictConfig, source: str, defaults: zoo.Fields | None = None) -> T:
    """Return ``values``, over ``defaults``, as an instance of a section dataclass.

    Raises:
        ValueError: in one line: an unknown key with the nearest valid one, a missing key, or a value
            of another type or outside its range.
    """
    typed = OmegaConf.structured(schema)
    _writable(typed)
    try:
        _check_shape(schema, OmegaConf.to_container(values))
        result = OmegaConf.to_object(OmegaConf.merge(typed, defaults or {}, values))
    except MissingMandatoryValue as error:
        raise ValueError(f"{source}: {error.full_key} is not set and has no default") from None
    except OmegaConfBaseException as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"{source}: {error.full_key}: {first}") from None
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    return result  # type: ignore[return-value]


def resolve(values: DictConfig, source: str) -> RunConfig:
    """Return the checked config of a run that is trained, with ``model.size`` filled in."""
    config = resolve_any(values, source)
    if isinstance(config, FixedRun):
        raise ValueError(f"{source}: there is nothing to train; expected: ul-scale encode CONFIG")
    return config


def resolve_any(values: DictConfig, source: str) -> RunConfig | FixedRun:
    """Return a checked config of any kind."""
    kind = values.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"{source}: kind is {kind!r}; expected one of {', '.join(KINDS)}")
    schema, sizes = KINDS[kind]
    model = values.get("model")
    size = model.get("size") if isinstance(model, DictConfig) else None
    if size is not None and (not isinstance(size, str) or size not in sizes):
        expected = f"one of {', '.join(sizes)}" if sizes else f"none, for a {kind} has no sizes"
        raise ValueError(f"{source}: model.size is {size!r}; expected {expected}")
    defaults = {} if size is None else {"model": sizes[size]}
    config: RunConfig | FixedRun = structure(schema, values, source, defaults)
    if "/" in config.name or not config.name:
        raise ValueError(f"{source}: name is {config.name!r}; expected a name for a folder")
    return config


def load(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read, override, resolve and check the config of a run that is trained."""
    return resolve(apply_overrides(read_yaml(path), overrides or []), str(path))


def load_any(path: str | Path, overrides: list[str] | None = None) -> RunConfig | FixedRun:
    """Read, override, resolve and check a config of any kind."""
    return resolve_any(apply_overrides(read_yaml(path), overrides or []), str(path))


def loads(text: str | bytes, source: str) -> RunConfig | FixedRun:
    """Resolve and check a config of any kind from its YAML; ``source`` is named in errors."""
    return resolve_any(parse(text, source), source)


def parse(text: str | bytes, source: str) -> DictConfig:
    """Return the keys and values of YAML, in UTF-8 where it is bytes; ``source`` is named in errors."""
    try:
        values = OmegaConf.load(io.StringIO(text if isinstance(text, str) else text.decode()))
    except (yaml.YAMLError, OmegaConfBaseException, OSError, ValueError) as error:
        raise ValueError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, DictConfig):
        raise ValueError(f"{source}: expected keys and values at the top")
    return values


def to_yaml(config: Any) -> str:
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def identity(section: Any) -> dict[str, Any]:
    """Return the fields that count for identity, as plain JSON values.

    A field counts unless its metadata says ``identity: False``; one that was added later is left out
    while it has the value under its metadata's ``legacy``.
    """
    result = {}
    for entry in dataclasses.fields(section):
        value = getattr(section, entry.name)
        if not entry.metadata.get("identity", True):
            continue
        if "legacy" in entry.metadata and value == entry.metadata["legacy"]:
            continue
        result[entry.name] = _plain(value)
    return result


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return identity(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    # 1 and 1.0 are the same setting, whichever way a YAML file writes it.
    return int(value) if isinstance(value, float) and value.is_integer() else value


def hash10(value: Any) -> str:
    """Return the first 10 hex digits of the SHA-256 of a JSON value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def run_id(
    config: RunConfig | FixedRun,
    data_identity: str | None,
    text_identity: str | None = None,
    stored: dict[str, Any] | None = None,
) -> str:
    """Return ``<name>-<hash10>``: what the run computes, not where or how.

    Args:
        config: resolved.
        data_identity: dataset id and fingerprint of the training shards; None for a base model, whose
            data are given by ``autoencoder.run`` and ``autoencoder.step``.
        text_identity: of the text encoder that runs beside it.
        stored: how a base model's latents were stored, where not as ``encode`` does by default.
    """
    counted = {"method_version": METHOD_VERSION, "data_identity": data_identity, **identity(config)}
    if text_identity is not None:
        counted["text_identity"] = text_identity
    if stored:
        counted["stored"] = stored
    return f"{config.name}-{hash10(counted)}"
