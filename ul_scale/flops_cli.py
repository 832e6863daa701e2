"""``ul-scale flops``: what a config costs, found on the meta device, without data, latents or weights."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

# Weight, gradient and AdamW's two moments, each in fp32 whatever the precision of products; an average more.
BYTES_PER_PARAMETER, BYTES_PER_AVERAGE = 16, 4


@dataclass(frozen=True)
class NetworkCost:
    """One trained network; per example."""

    parameters: int
    forward_flops: int
    training_flops: int
    transformer_blocks: dict[int, int]
    """How many blocks work on how many tokens."""
    activation_bytes: dict[str, dict[str, int]]
    """By precision (fp32, bf16), then by activation checkpointing (none, full)."""


@dataclass(frozen=True)
class Plan:
    """A run's cost."""

    name: str
    latent_shape: tuple[int, ...]
    networks: dict[str, NetworkCost]
    batch_size: int
    steps: int
    precision: str
    num_averages: int
    gpus: int
    gpu: str
    peak_tflops: float
    """Of one GPU, dense, in the run's precision."""
    mfu: float

    @property
    def parameters(self) -> int:
        return sum(network.parameters for network in self.networks.values())

    @property
    def state_bytes(self) -> int:
        """Weights, gradients, optimizer state and averages, over all GPUs that shard them."""
        return self.parameters * (BYTES_PER_PARAMETER + BYTES_PER_AVERAGE * self.num_averages)

    @property
    def run_flops(self) -> int:
        per_example = sum(network.training_flops for network in self.networks.values())
        return per_example * self.batch_size * self.steps

    @property
    def hours(self) -> float:
        return self.run_flops / (self.gpus * self.peak_tflops * 1e12 * self.mfu) / 3600

    def activation_bytes(self, precision: str, checkpointing: str) -> int:
        """Return what one example holds; with checkpointing an upper bound: every network's largest block."""
        return sum(network.activation_bytes[precision][checkpointing] for network in self.networks.values())

    def as_json(self) -> dict[str, Any]:
        derived = ("parameters", "state_bytes", "run_flops", "hours")
        return asdict(self) | {name: getattr(self, name) for name in derived}


def network_cost(module: Any, call: Any) -> NetworkCost:
    """Return what one network costs per example."""
    from ul_scale.models import flops

    forward = flops.forward_flops(module, call)
    memory = {
        precision: asdict(flops.activation_memory(module, call, precision=precision))
        for precision in ("fp32", "bf16")
    }
    return NetworkCost(
        parameters=flops.num_parameters(module),
        forward_flops=forward,
        training_flops=flops.training_flops({"": forward}),
        transformer_blocks=flops.blocks_by_tokens(module, call),
        activation_bytes=memory,
    )


def parse_latent(text: str) -> tuple[int, ...]:
    """Return the shape that ``32x32x32`` (C × h × w) or ``32x4x16x16`` (C × t × h × w) stands for."""
    parts = text.lower().replace("×", "x").split("x")
    if len(parts) not in (3, 4) or not all(part.isdecimal() and int(part) for part in parts):
        raise ValueError(f"--latent is {text!r}; expected CxHxW or CxTxHxW, such as 32x32x32")
    return tuple(map(int, parts))


def gpu_peak(gpu: str, precision: str) -> tuple[str, float]:
    """Return a GPU's full name and its dense peak, TFLOP/s; of fp32 without TF32, as training runs."""
    from ul_scale.train.throughput import PEAK_TFLOPS, peak_tflops

    names = {name.lower(): name for name in PEAK_TFLOPS}
    if gpu.lower() not in names:
        raise ValueError(f"--gpu is {gpu!r}; expected one of {', '.join(names)}")
    name = names[gpu.lower()]
    peak = peak_tflops(name, precision)
    if peak is None:
        raise ValueError(f"--gpu is {gpu!r}, which has no {precision} arithmetic; expected another")
    return name, peak


def read_plan_config(path: str, overrides: list[str]) -> Any:
    """Return a config; a base model's may leave open whose latents it is trained on."""
    from omegaconf import OmegaConf

    from ul_scale.config import apply_overrides, read_yaml, resolve_any

    values = apply_overrides(read_yaml(path), overrides)
    if values.get("kind") == "base":
        for key, unknown in (("autoencoder.run", ""), ("autoencoder.step", 0)):
            if OmegaConf.select(values, key) is None:
                OmegaConf.update(values, key, unknown, force_add=True)
    return resolve_any(values, path)


def autoencoder_stage(config: Any, source: str) -> Any:
    """Return the stage of an autoencoder's config, on the meta device."""
    import torch

    from ul_scale.config import BaseRun
    from ul_scale.train.prepare import build_autoencoder

    if isinstance(config, BaseRun):
        raise ValueError(f"{source}: kind is {config.kind}; expected an autoencoder's, or --latent instead")
    if config.data.image_size is None:
        raise ValueError(f"{source}: data.image_size is not set; expected pixels")
    with torch.device("meta"):
        return build_autoencoder(config)


def latent_shape_of(config: Any, latent: str | None, autoencoder: str | None) -> tuple[int, ...]:
    """Return the shape of a base model's latents: as given, of the autoencoder's config, or of its run."""
    from ul_scale.checkpoint.files import run_path
    from ul_scale.train.prepare import read_config

    if latent is not None and autoencoder is not None:
        raise ValueError("--latent and --autoencoder are both given; expected one")
    if latent is not None:
        return parse_latent(latent)
    if autoencoder is not None:
        return autoencoder_stage(read_plan_config(autoencoder, []), autoencoder).latent_shape
    run_dir = run_path(config.root) / config.autoencoder.run
    if not config.autoencoder.run or not (run_dir / "config.yaml").is_file():
        raise ValueError(
            f"autoencoder.run is {config.autoencoder.run!r}, of which {config.root} has no run; expected it, "
            "--autoencoder CONFIG or --latent such as 32x32x32"
        )
    return autoencoder_stage(read_config(run_dir), str(run_dir)).latent_shape


def make_plan(
    config: Any,
    source: str,
    *,
    latent: str | None = None,
    autoencoder: str | None = None,
    gpus: int = 8,
    gpu: str = "h100",
    mfu: float = 0.4,
) -> Plan:
    """Return what a run costs.

    Raises:
        ValueError: in one line, if the shape of the latents or the GPU's peak cannot be found.
    """
    import torch

    from ul_scale.config import BaseRun, FixedRun
    from ul_scale.train.prepare import build_stage

    if isinstance(config, FixedRun):
        raise ValueError(f"{source}: kind is {config.kind}, which is not trained; expected one that is")
    if not 0 < mfu <= 1:
        raise ValueError(f"--mfu is {mfu:g}; expected a share above 0, up to 1")
    gpu_name, peak = gpu_peak(gpu, config.train.precision)
    if isinstance(config, BaseRun):
        facts = {
            "shape": latent_shape_of(config, latent, autoencoder),
            "num_pixels": 1,
            "std": 1.0,
            "num_classes": config.model.num_classes or 0,
            "log_snr_max": config.loss.log_snr_max,
            "given_frames": config.model.given_frames,
        }
        with torch.device("meta"):
            stage: Any = build_stage(config, facts)
    elif latent is not None or autoencoder is not None:
        raise ValueError(f"{source}: is an autoencoder; --latent and --autoencoder are for base models")
    else:
        stage = autoencoder_stage(config, source)
    return Plan(
        name=config.name,
        latent_shape=tuple(stage.latent_shape),
        networks={name: network_cost(*network) for name, network in stage.calls().items()},
        batch_size=config.train.batch_size,
        steps=config.train.last_step,
        precision=config.train.precision,
        num_averages=len(config.ema.half_lives_samples) + len(config.ema.power_widths),
        gpus=gpus,
        gpu=gpu_name,
        peak_tflops=peak,
        mfu=mfu,
    )


def size_text(num_bytes: float) -> str:
    """Return bytes in the largest unit that leaves at least 1: 1.5 GB is 1.5e9."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.3g} {unit}"
    return f"{num_bytes / 1e3:.3g} kB"


def time_text(hours: float) -> str:
    return f"{hours:,.3g} hours" if hours >= 0.1 else f"{hours * 3600:,.3g} seconds"


def table(plan: Plan) -> Any:
    """Return the networks as a table for rich."""
    from rich.table import Table

    result = Table(box=None, header_style="bold", pad_edge=False)
    result.add_column("network")
    for heading in ("parameters", "forward\nGFLOPs", "training\nGFLOPs", "tokens\n(blocks)"):
        result.add_column(heading, justify="right")
    kinds = [(precision, kept) for precision in ("fp32", "bf16") for kept in ("none", "full")]
    for precision, kept in kinds:
        result.add_column(f"{precision}\n{'saved' if kept == 'none' else 'checkpointed'}", justify="right")

    def flops(count: float) -> str:
        return f"{count / 1e9:,.4g}" if count < 1e12 else f"{count / 1e9:,.0f}"

    for name, network in plan.networks.items():
        blocks = [f"{tokens:,} ({count})" for tokens, count in network.transformer_blocks.items()]
        result.add_row(
            name,
            f"{network.parameters:,}",
            flops(network.forward_flops),
            flops(network.training_flops),
            "\n".join(blocks) or "-",
            *(size_text(network.activation_bytes[precision][kept]) for precision, kept in kinds),
        )
    if len(plan.networks) > 1:
        networks = plan.networks.values()
        result.add_row(
            "all",
            f"{plan.parameters:,}",
            flops(sum(network.forward_flops for network in networks)),
            flops(sum(network.training_flops for network in networks)),
            "",
            *(size_text(plan.activation_bytes(precision, kept)) for precision, kept in kinds),
        )
    return result


def totals(plan: Plan) -> str:
    """Return the lines about the whole run."""
    examples = -(-plan.batch_size // plan.gpus)
    held = " or ".join(
        f"{size_text(examples * plan.activation_bytes(plan.precision, kept))} {what}"
        for kept, what in (("none", "saved"), ("full", "checkpointed"))
    )
    return "\n".join(
        [
            f"latent       {' × '.join(map(str, plan.latent_shape))}",
            f"state        {size_text(plan.state_bytes)}: weights, gradients, AdamW and averages "
            f"({plan.num_averages}), in fp32; on every GPU, or divided among those that shard it",
            f"activations  {held}, of {examples} examples on each of {plan.gpus} GPUs in {plan.precision}, "
            "but for accumulation",
            f"run          {plan.steps:,} steps of {plan.batch_size:,} examples: {plan.run_flops:.3g} FLOPs",
            f"time         {time_text(plan.hours)} on {plan.gpus} {plan.gpu} at {plan.mfu:.0%} of "
            f"{plan.peak_tflops:g} TFLOP/s ({plan.precision})",
        ]
    )


def flops(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="Overrides, such as model.size=large.")
    ] = None,
    latent: Annotated[
        str | None, typer.Option(help="Of a base model: shape of its latents, CxHxW or CxTxHxW.")
    ] = None,
    autoencoder: Annotated[
        str | None, typer.Option(metavar="CONFIG", help="Of a base model: its autoencoder's config.")
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="That the run is spread over.")] = 8,
    gpu: Annotated[str, typer.Option(help="Their kind: h100, h200, a100, b200, l40s, rtx 4090 …")] = "h100",
    mfu: Annotated[float, typer.Option(help="Share of the dense peak that training reaches.")] = 0.4,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the figures to this file.")
    ] = None,
) -> None:
    """Print what a run takes: parameters, FLOPs, memory by network, and hours. Needs neither data nor GPU.

    A multiply-accumulate is 2 FLOPs, a training step 3 × forward. Memory is per example: what waits for the
    backward pass, with everything saved, or with every block checkpointed.

    Examples:
    - `ul-scale flops configs/quickstart/autoencoder.yaml`
    - `ul-scale flops configs/quickstart/base.yaml model.size=large --latent 32x32x32 --gpus 64 --gpu h200`
    - `ul-scale flops BASE_CONFIG --autoencoder AUTOENCODER_CONFIG --mfu 0.5 --json plan.json`
    """
    from rich.console import Console

    if json_file is not None and (json_file.is_dir() or not json_file.absolute().parent.is_dir()):
        raise ValueError(f"--json is {json_file}; expected a file in an existing folder")
    resolved = read_plan_config(config, overrides or [])
    plan = make_plan(resolved, config, latent=latent, autoencoder=autoencoder, gpus=gpus, gpu=gpu, mfu=mfu)
    Console(width=130).print(table(plan))
    print("\n" + totals(plan))
    if json_file is not None:
        json_file.write_text(json.dumps(plan.as_json(), indent=1) + "\n")
