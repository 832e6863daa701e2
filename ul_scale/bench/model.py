"""How fast models train on this device: ours in our loop, beside DiTs of equal FLOPs in a plain one."""

import bisect
import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor, nn

from ul_scale.bench.dit import HEAD_DIM, DiT
from ul_scale.bench.workload import NEVER, Spread, Workload, base_config, latent_facts, our_loop, synchronize
from ul_scale.config import RunConfig, resolve
from ul_scale.models.flops import TRAINING_FACTOR, forward_flops, meta, num_parameters
from ul_scale.models.uvit import LevelConfig, UViTConfig
from ul_scale.parallel.engine import Process
from ul_scale.stages.base import BaseLoss, BaseModel, BaseStage
from ul_scale.train.throughput import peak_tflops

SIZES_GFLOPS = (100.0, 200.0, 300.0, 480.0, 700.0, 970.0)
"""Forward, of one latent."""
WARMUP_STEPS = 5

Run = Callable[[int], object]
Make = Callable[[int], AbstractContextManager[tuple[Run, int, int]]]
"""From a batch size to what trains for so many steps, its parameters and its forward FLOPs per image."""


@dataclass(frozen=True)
class Settings:
    """What is compared, and how."""

    sizes_gflops: tuple[float, ...] = SIZES_GFLOPS
    latent_shape: tuple[int, int, int] = (32, 32, 32)
    width_step: int = 128
    """Widths of the coarse level are multiples of it; the fine level has half."""
    dit_depth: int = 28
    autoencoder: str = "imagenet512"
    image_size: int = 512
    batch_size: int = 64
    """The most; halved until it fits."""
    steps: int = 10
    """Of a round."""
    rounds: int = 5
    precision: str = "bf16"
    compiled: bool = True


SMOKE = Settings(
    sizes_gflops=(0.01,),
    latent_shape=(4, 8, 8),
    width_step=32,
    dit_depth=2,
    autoencoder="tiny32",
    image_size=32,
    batch_size=2,
    steps=1,
    rounds=1,
    precision="fp32",
    compiled=False,
)


@dataclass(frozen=True)
class Row:
    """One model's figures; FLOPs are of the method, 3 × forward, whatever is computed again."""

    model: str
    parameters: int
    forward_gflops: float
    batch_size: int
    images_per_s: Spread
    mfu: float | None
    """None where the device's peak is not known."""
    memory_gb: float | None
    """Most allocated on the GPU."""

    @property
    def tflops_per_s(self) -> float:
        return TRAINING_FACTOR * self.forward_gflops * self.images_per_s.median / 1e3


# The contestants ----------------------------------------------------------------------------------


def base_net(width: int) -> UViTConfig:
    """Return the zoo's two-level base model at another width, without dropout."""
    levels = [
        LevelConfig(kind="transformer", channels=width // 2, blocks=6),
        LevelConfig(kind="transformer", channels=width, blocks=16),
    ]
    return UViTConfig(patch=1, levels=levels)


def base_gflops(net: UViTConfig, latent_shape: tuple[int, int, int]) -> float:
    with torch.device("meta"):
        model = BaseModel(net=net, num_classes=1000)
        stage = BaseStage(model, BaseLoss(), latent_shape=latent_shape, num_pixels=1, z_std=1.0)
    return stage.forward_flops()["base"] / 1e9


def base_width(target_gflops: float, settings: Settings) -> int:
    """Return the width of the coarse level whose base model comes nearest to so many forward GFLOPs."""
    step, shape = settings.width_step, settings.latent_shape
    return step * nearest_size(lambda n: base_gflops(base_net(step * n), shape), target_gflops)


def dit_gflops(heads: int, settings: Settings) -> float:
    with torch.device("meta"):
        return _dit_flops(_dit(heads, settings), heads, settings) / 1e9


def _dit(heads: int, settings: Settings) -> DiT:
    channels, grid, _ = settings.latent_shape
    return DiT(heads=heads, depth=settings.dit_depth, channels=channels, grid=grid)


def _dit_flops(model: nn.Module, heads: int, settings: Settings) -> int:
    """Return a DiT's forward FLOPs: those of its layers, and of attention, which has none of its own."""
    z, t, label = meta(settings.latent_shape), meta(()), meta((), dtype=torch.long)
    tokens = (settings.latent_shape[-1] // 2) ** 2
    attention = settings.dit_depth * 4 * tokens**2 * HEAD_DIM * heads
    return forward_flops(model, lambda net: net(z, t, label)) + attention


def nearest_size(gflops_of: Callable[[int], float], target: float) -> int:
    """Return the number from 1 on whose GFLOPs, which rise with it, come nearest to a target."""
    gflops_of = functools.cache(gflops_of)
    high = 1
    while gflops_of(high) < target:
        high *= 2
    above = 1 + bisect.bisect_left(range(1, high), target, key=gflops_of)
    return min(max(1, above - 1), above, key=lambda n: abs(gflops_of(n) - target))


@contextmanager
def ours(
    config: RunConfig, latents: dict[str, Any] | None, process: Process, batch_size: int
) -> Iterator[tuple[Run, int, int]]:
    train = dataclasses.replace(config.train, batch_size=batch_size)
    work = Workload(dataclasses.replace(config, train=train), process, latents)
    with (
        tempfile.TemporaryDirectory(prefix="ul-scale-bench-") as folder,
        our_loop(work, Path(folder)) as loop,
    ):
        yield loop.run, work.num_parameters, work.forward_flops


@contextmanager
def plain(
    make: Callable[[], nn.Module], heads: int, settings: Settings, device: torch.device, batch_size: int
) -> Iterator[tuple[Run, int, int]]:
    """Train a DiT in a plain loop: autocast, fused AdamW, one average, no clipping and no logs."""
    flops = _dit_flops(make(), heads, settings)
    with device:
        model = make()
        z = torch.randn(batch_size, *settings.latent_shape)
        label = torch.zeros(batch_size, dtype=torch.long)
    if settings.compiled:
        model.compile()
    parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)

    def run(steps: int) -> None:
        for _ in range(steps):
            t, eps = torch.rand(batch_size, device=device), torch.randn_like(z)
            mixed = t.view(-1, 1, 1, 1)
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
                predicted = model((1 - mixed) * z + mixed * eps, t, label)
            F.mse_loss(predicted.float(), eps - z).backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                torch._foreach_lerp_(average, parameters, 1e-4)

    yield run, num_parameters(model), flops


class Diffusers(nn.Module):
    """diffusers' DiTTransformer2DModel with the arguments of ``DiT``."""

    def __init__(self, heads: int, settings: Settings):
        super().__init__()
        from diffusers import DiTTransformer2DModel

        channels, grid, _ = settings.latent_shape
        self.net: nn.Module = DiTTransformer2DModel(  # type: ignore[assignment]
            num_attention_heads=heads,
            attention_head_dim=HEAD_DIM,
            in_channels=channels,
            out_channels=channels,
            num_layers=settings.dit_depth,
            sample_size=grid,
            patch_size=2,
            num_embeds_ada_norm=1000,
        )

    def forward(self, z_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return self.net(z_t, timestep=1000 * t, class_labels=label).sample


def contestants(settings: Settings, process: Process) -> Iterator[tuple[str, Make]]:
    """Give the name of each model, and what makes it."""
    facts = latent_facts(settings.latent_shape)
    for target in settings.sizes_gflops:
        width = base_width(target, settings)
        config = base_config(
            base_net(width),
            batch_size=settings.batch_size,
            precision=settings.precision,
            compiled=settings.compiled,
        )
        yield f"ours, base {width // 2}/{width}", functools.partial(ours, config, facts, process)
        heads = nearest_size(lambda n: dit_gflops(n, settings), target)
        rivals: dict[str, Callable[[int, Settings], nn.Module]] = {"DiT": _dit}
        if find_spec("diffusers"):
            rivals["diffusers"] = Diffusers
        for name, make in rivals.items():
            label = f"{name} {HEAD_DIM * heads} × {settings.dit_depth}, plain loop"
            yield (
                label,
                functools.partial(
                    plain, functools.partial(make, heads, settings), heads, settings, process.device
                ),
            )
    name = f"ours, stage 1 at {settings.image_size} px"
    yield name, functools.partial(ours, autoencoder_config(settings), None, process)


def autoencoder_config(settings: Settings) -> RunConfig:
    values = {
        "kind": "autoencoder",
        "name": "bench",
        "data": {"image_size": settings.image_size},
        "model": {"size": settings.autoencoder},
        "loss": {"loss_factor": 1.5, "loss_bias": 0.0},
        "train": {"steps": NEVER, "batch_size": settings.batch_size, "precision": settings.precision},
        "optim": {},
        "ema": {"half_lives_samples": [10_000_000]},
        "parallel": {"compile": settings.compiled},
        "checkpoint": {"every_steps": NEVER},
    }
    return resolve(OmegaConf.create(values), "bench")


# Measuring ----------------------------------------------------------------------------------------


def measure(settings: Settings, process: Process, say: Callable[[str], object] = print) -> list[Row]:
    """Train each model for a while, one after the other.

    Args:
        settings: which and how.
        process: this process.
        say: takes a line per model.
    """
    rows = []
    for name, make in contestants(settings, process):
        row = measure_one(name, make, settings, process.device)
        say(f"{name}: {row.images_per_s.show(1, ' images/s')}")
        rows.append(row)
    return rows


def measure_one(name: str, make: Make, settings: Settings, device: torch.device) -> Row:
    """Measure one model, at the largest batch that fits."""
    batch_size = settings.batch_size
    while True:
        try:
            return _measure_at(name, make, batch_size, settings, device)
        except torch.OutOfMemoryError:
            if batch_size == 1:
                raise
            batch_size //= 2
        torch.cuda.empty_cache()


def _measure_at(name: str, make: Make, batch_size: int, settings: Settings, device: torch.device) -> Row:
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    with make(batch_size) as (run, parameters, flops):
        run(min(WARMUP_STEPS, settings.steps))
        rates = []
        for _ in range(settings.rounds):
            synchronize(device)
            began = time.perf_counter()
            run(settings.steps)
            synchronize(device)
            rates.append(settings.steps * batch_size / (time.perf_counter() - began))
        memory_gb = torch.cuda.max_memory_allocated(device) / 1e9 if cuda else None
    images_per_s = Spread.of(rates)
    peak = peak_tflops(torch.cuda.get_device_name(device), settings.precision) if cuda else None
    mfu = TRAINING_FACTOR * flops * images_per_s.median / 1e12 / peak if peak else None
    return Row(name, parameters, flops / 1e9, batch_size, images_per_s, mfu, memory_gb)


def table(rows: list[Row]) -> str:
    """Return the rows as a Markdown table."""
    lines = [
        "| model | parameters | forward GFLOPs | batch | images/s (middle half) | TFLOP/s | MFU | memory |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        rate = row.images_per_s
        mfu = "–" if row.mfu is None else f"{100 * row.mfu:.1f} %"
        memory = "–" if row.memory_gb is None else f"{row.memory_gb:.1f} GB"
        lines.append(
            f"| {row.model} | {row.parameters / 1e6:.1f} M | {row.forward_gflops:.3g} | {row.batch_size} "
            f"| {rate.median:.1f} ({rate.low:.1f} to {rate.high:.1f}) | {row.tflops_per_s:.3g} | {mfu} "
            f"| {memory} |"
        )
    return "\n".join(lines)
