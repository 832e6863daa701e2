"""Train the same stage on the same batches under different engines and layouts, and compare.

``python tests/parallel/parity.py FOLDER`` runs the cases in FOLDER/cases.json; ``test_parity.py`` does so for
a covering selection, and for the whole table on request.
"""

import itertools
import json
import multiprocessing
import os
import socket
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from templates import AUTOENCODER, BASE

from ul_scale.config import structure
from ul_scale.parallel.build import build_engine
from ul_scale.parallel.engine import ParallelConfig, Process
from ul_scale.parallel.mesh import distributed
from ul_scale.stages.autoencoder import AutoencoderLoss, AutoencoderModel, AutoencoderStage
from ul_scale.stages.base import BaseLoss, BaseModel, BaseStage
from ul_scale.stages.noise import draw_noise
from ul_scale.train.optim import OptimConfig, build_optimizer

STAGES = ("autoencoder", "base", "base on images")
ENGINES = ("none", "fsdp", "hsdp", "zero1", "zero2", "zero3")
WORLD_SIZES = (1, 2, 3, 4)
ACCUMULATION_STEPS = (1, 2)
ACTIVATION_CHECKPOINTING = ("none", "selective", "full")
BATCH_SIZE, STEPS = 24, 20
LOSS_TOLERANCE, PARAMETER_TOLERANCE = 5e-6, 1e-4
"""Relative, of each step's loss and gradient norm; absolute, of parameters, which may move by 0.02."""


@dataclass(frozen=True)
class Case:
    stage: str
    engine: str
    world_size: int
    accumulation_steps: int
    activation_checkpointing: str

    @property
    def possible(self) -> bool:
        if self.engine == "none":
            return self.world_size == 1
        return self.engine != "hsdp" or self.world_size % 2 == 0

    def config(self) -> ParallelConfig:
        engine = {"hsdp": "fsdp", "zero1": "deepspeed", "zero2": "deepspeed", "zero3": "deepspeed"}
        return ParallelConfig(
            engine=engine.get(self.engine, self.engine),
            dp_replicate=2 if self.engine == "hsdp" else 1,
            zero_stage=int(self.engine[4]) if self.engine.startswith("zero") else 2,
            accumulation_steps=self.accumulation_steps,
            activation_checkpointing=self.activation_checkpointing,
        )


def all_cases() -> list[Case]:
    product = itertools.product(STAGES, ENGINES, WORLD_SIZES, ACCUMULATION_STEPS, ACTIVATION_CHECKPOINTING)
    return [case for case in itertools.starmap(Case, product) if case.possible]


def without_dropout(value):
    if isinstance(value, dict):
        return {key: without_dropout(item) for key, item in value.items() if key != "dropout"}
    return [without_dropout(item) for item in value] if isinstance(value, list) else value


def build(stage: str) -> torch.nn.Module:
    from omegaconf import OmegaConf

    def section(schema, values):
        return structure(schema, OmegaConf.create(without_dropout(values)), "parity")

    torch.manual_seed(1)
    autoencoder = AutoencoderStage(
        section(AutoencoderModel, AUTOENCODER["model"]),
        section(AutoencoderLoss, AUTOENCODER["loss"]),
        image_size=16,
        channels=1,
    )
    if stage == "autoencoder":
        module = autoencoder
    else:
        torch.manual_seed(2)
        module = BaseStage(
            section(BaseModel, BASE["model"]),
            section(BaseLoss, BASE["loss"]),
            latent_shape=autoencoder.latent_shape,
            num_pixels=256,
            z_std=0.5,
            encoder=autoencoder.encoder if stage == "base on images" else None,
        )
    # Zero-initialised outputs would leave most gradients zero at first.
    generator = torch.Generator().manual_seed(3)
    for parameter in module.parameters():
        if not parameter.any():
            parameter.data.normal_(0, 0.02, generator=generator)
    return module


def batch_of(stage: torch.nn.Module, step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    batch = {
        "label": torch.randint(0, 2, (BATCH_SIZE,), generator=generator),
        "uniform": torch.rand(BATCH_SIZE, generator=generator),
        "weight": torch.ones(BATCH_SIZE),
    }
    images = isinstance(stage, AutoencoderStage) or stage.encoder is not None
    shape = (1, 16, 16) if images else stage.latent_shape
    return batch | {"x" if images else "z_clean": torch.randn(BATCH_SIZE, *shape, generator=generator)}


def train(case: Case, process: Process) -> dict[str, torch.Tensor]:
    """Return each step's loss and gradient norm, and the trained parameters in the end (on rank 0)."""
    stage, optim = build(case.stage), OptimConfig(lr=1e-3, warmup_steps=0, clip_norm=0.5, eps=1e-5)
    noise_spec, world_size = stage.noise_spec, process.world_size
    batches = [batch_of(stage, step) for step in range(STEPS)]
    engine = build_engine(
        case.config(),
        stage,
        lambda module: build_optimizer(module, optim),
        clip_norm=optim.clip_norm,
        precision="fp32",
        process=process,
        samples_per_rank=BATCH_SIZE // world_size,
    )
    losses, norms = [], []
    size = BATCH_SIZE // world_size // case.accumulation_steps
    for step, batch in enumerate(batches):
        noise = draw_noise(noise_spec, seed=0, step=step, lanes=range(24), lane_size=1, batch_size=BATCH_SIZE)
        share = torch.zeros(())
        for micro in range(case.accumulation_steps):
            start = process.rank * (BATCH_SIZE // world_size) + micro * size
            rows = slice(start, start + size)
            terms = engine.forward(
                {name: value[rows] for name, value in batch.items()},
                {name: value[rows] for name, value in noise.items()},
                step,
            )
            loss = terms["loss"].sum() / BATCH_SIZE
            engine.backward(loss, last=micro == case.accumulation_steps - 1)
            share = share + loss.detach()
        norms.append(float(engine.step(optim.lr)))
        if world_size > 1:
            torch.distributed.all_reduce(share)
        losses.append(float(share))
    return {
        "loss": torch.tensor(losses),
        "norm": torch.tensor(norms),
        **{f"parameter/{name}": value for name, value in engine.whole(engine.parameters()).items()},
    }


def compare(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return the largest deviations: relative of losses and norms, absolute of parameters."""
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    relative = {
        name: ((found[name] - expected[name]).abs() / expected[name].abs()).max().item()
        for name in ("loss", "norm")
    }
    names = [name for name in expected if name.startswith("parameter/")]
    return relative | {"parameters": max((found[n] - expected[n]).abs().max().item() for n in names)}


def run_rank(rank: int, world_size: int, port: int, cases: list[Case], folder: Path) -> None:
    """Run the cases of one world size as one of its processes; rank 0 writes what it found."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    results = []
    with distributed(120.0) as process:
        for case in cases:
            found = train(case, process)
            if rank == 0:
                results.append(asdict(case) | compare(found, expected(case.stage, folder)))
    if rank == 0:
        (folder / f"results-{world_size}.json").write_text(json.dumps(results, indent=1))


def expected(stage: str, folder: Path) -> dict[str, torch.Tensor]:
    """Return what one plain process gives; computed once."""
    path = folder / f"{stage}.pt"
    if not path.exists():
        alone = Process(0, 1, torch.device("cpu"))
        torch.save(train(Case(stage, "none", 1, 1, "none"), alone), path)
    return torch.load(path)


def main() -> None:
    """Run the cases in CASES.json, one world size after the other, in processes forked from this one."""
    import deepspeed  # noqa: F401  (seconds, which the forked processes need not spend again)

    folder = Path(sys.argv[1])
    cases = [Case(**values) for values in json.loads((folder / "cases.json").read_text())]
    fork = multiprocessing.get_context("fork")
    for world_size in sorted({case.world_size for case in cases}):
        own = [case for case in cases if case.world_size == world_size]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        ranks = [
            fork.Process(target=run_rank, args=(rank, world_size, port, own, folder))
            for rank in range(world_size)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        if any(rank.exitcode for rank in ranks):
            sys.exit(f"{world_size} processes ended with {[rank.exitcode for rank in ranks]}")


if __name__ == "__main__":
    main()
