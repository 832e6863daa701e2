"""What each process of the tests of engine ``deepspeed`` runs: all cases of one world size, in one go."""

import functools
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from omegaconf import OmegaConf
from templates import AUTOENCODER, TINY_CONV, TINY_VIT

from ul_scale import config as configs
from ul_scale.parallel.build import build_engine
from ul_scale.parallel.engine import ParallelConfig, Process
from ul_scale.stages.autoencoder import AutoencoderStage
from ul_scale.stages.noise import draw_noise
from ul_scale.train.optim import OptimConfig, build_optimizer

STEPS, SAVED, BROKEN, BATCH = 6, 3, 4, 12
"""Saved after 3 steps; the batch of step 4 (from 0) holds a NaN, on rank 0."""
# Some gradients are zero but for rounding, which Adam would blow up to steps of lr with a tiny eps.
OPTIM = OptimConfig(lr=3e-3, warmup_steps=0, eps=1e-5, weight_decay=0.1, clip_norm=0.5)


@functools.cache
def run_config():
    levels = [TINY_CONV | {"blocks": 1}, TINY_VIT | {"dropout": 0.0}]
    networks = {
        "prior": {"patch": 1, "levels": levels[1:], "head_dim": 8},
        "decoder": {"patch": 2, "levels": levels, "head_dim": 8},
    }
    values = AUTOENCODER | {"model": AUTOENCODER["model"] | networks}
    return configs.resolve(OmegaConf.create(values), "test")


def make_engine(process, *, seed=0, precision="fp32", samples=BATCH, **parallel):
    """Build an engine on a stage without dropout whose encoder begins with a frozen layer."""
    run = run_config()
    torch.manual_seed(7)
    stage = AutoencoderStage(run.model, run.loss, image_size=16, channels=1)
    stage.register_buffer("mark", torch.tensor(float(seed)))
    stage.encoder.stem.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in stage.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return build_engine(
        ParallelConfig(**parallel),
        stage,
        lambda module: build_optimizer(module, OPTIM),
        clip_norm=OPTIM.clip_norm,
        precision=precision,
        process=process,
        samples_per_rank=samples,
    )


def batch_of(stage, step):
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(BATCH, *stage.image_shape, generator=generator)
    if step == BROKEN:
        x[0, 0, 0, 0] = float("nan")
    lanes = {"lanes": range(4), "lane_size": BATCH // 4, "batch_size": BATCH}
    return {"x": x}, draw_noise(stage.noise_spec, seed=1, step=step, **lanes)


def train(engine, process, steps, accumulation=1):
    """Train over the given steps; return the mean loss and the gradient norm of each."""
    rows = torch.arange(BATCH).chunk(process.world_size)[process.rank]
    results = []
    for step in steps:
        total = torch.zeros(())
        batch, noise = batch_of(engine.stage, step)
        for number, part in enumerate(micro := rows.chunk(accumulation)):
            pick = [{name: value[part] for name, value in each.items()} for each in (batch, noise)]
            loss = (engine.forward(*pick, step)["loss"] / BATCH).sum()
            engine.backward(loss, last=number == len(micro) - 1)
            total += loss.detach()
        norm = engine.step(OPTIM.lr)
        if process.world_size > 1:
            dist.all_reduce(total)
            norms = [torch.zeros_like(norm) for _ in range(process.world_size)]
            dist.all_gather(norms, norm)
            assert len({str(float(each)) for each in norms}) == 1
        results.append((float(total), float(norm)))
    return torch.tensor(results)


def cases(world_size):
    yield from ({"zero_stage": stage} for stage in (1, 2, 3))
    if world_size == 2:
        yield from ({"zero_stage": stage, "offload_optimizer": True} for stage in (2, 3))
        yield {"zero_stage": 2, "precision": "bf16"}
        yield {"zero_stage": 3, "activation_checkpointing": "full"}


def run_case(process, case, folder):
    """Train, save after SAVED steps and go on; return what the tests look at."""
    engine = make_engine(
        process, engine="deepspeed", accumulation_steps=2, samples=BATCH // process.world_size, **case
    )
    before = train(engine, process, range(SAVED), accumulation=2)
    saved = engine.state_dict()
    if folder is not None:
        engine.save_files(folder)
        dcp.save(saved | {"train": {"step": SAVED}}, checkpoint_id=folder / "dcp")
    after = train(engine, process, range(SAVED, STEPS), accumulation=2)
    pieces = engine.parameters()
    whole = engine.whole(pieces)
    box = [whole]
    dist.broadcast_object_list(box)
    shapes = {name: value.shape for name, value in box[0].items()}
    assert {name: value.shape for name, value in engine.blank(pieces).items()} == shapes
    again = {name: torch.zeros_like(value) for name, value in pieces.items()}
    engine.restore(again, box[0])
    assert all(torch.equal(pieces[name], again[name]) for name in pieces)
    return {
        "curve": torch.cat([before, after]),
        "saved": saved["model"],
        "final": engine.state_dict()["model"],
    }


def resume(process, zero_stage, folder):
    """Go on from the files of ``run_case`` with other initial weights; also try the files of stage 1."""
    options = {"engine": "deepspeed", "accumulation_steps": 2, "samples": BATCH // process.world_size}
    engine = make_engine(process, seed=5, zero_stage=zero_stage, **options)
    refusal = None
    try:
        engine.load_files(folder.parent / "zero1")
    except ValueError as error:
        refusal = str(error)
    engine.load_files(folder)
    loaded = engine.state_dict()["model"]
    curve = train(engine, process, range(SAVED, STEPS), accumulation=2)
    return {"curve": curve, "loaded": loaded, "final": engine.state_dict()["model"], "refusal": refusal}


def take_over(process, zero_stage, folder):
    """Go on from a checkpoint in the layout of engine none, with other initial weights."""
    options = {"engine": "deepspeed", "samples": BATCH // process.world_size}
    engine = make_engine(process, seed=5, zero_stage=zero_stage, **options)
    state = engine.blank_state("dcp")
    dcp.load(state, checkpoint_id=folder)
    engine.load_state_dict(state)
    curve = train(engine, process, range(SAVED, STEPS))
    return {"curve": curve, "final": engine.state_dict()["model"]}


def main():
    rank, world_size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    store = f"file://{folder}/store{world_size}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    process = Process(rank, world_size, torch.device("cpu"))
    results = {}
    for case in cases(world_size):
        stage, plain = case["zero_stage"], len(case) == 1
        saved = folder / f"zero{stage}" if plain and world_size == 2 else None
        results[tuple(case.values())] = run_case(process, case, saved)
        if saved is not None:
            results["resumed", stage] = resume(process, stage, saved)
        if plain and world_size == 3 and stage != 2:
            results["converted", stage] = take_over(process, stage, folder / f"converted{4 - stage}")
    if rank == 0:
        torch.save(results, folder / f"world{world_size}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
