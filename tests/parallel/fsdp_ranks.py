"""What two ranks of engine fsdp do, for ``test_fsdp.py``: ``torchrun … fsdp_ranks.py RESULT.json``."""

import json
import sys

import torch
import torch.distributed as dist
from parallel.parity import BATCH_SIZE, batch_of, build

from ul_scale.parallel.build import build_engine
from ul_scale.parallel.engine import ParallelConfig, Process
from ul_scale.parallel.mesh import distributed
from ul_scale.stages.noise import draw_noise
from ul_scale.train.optim import OptimConfig, build_optimizer


def engine_of(process: Process, precision: str = "fp32", stage: str = "base on images", **config):
    return build_engine(
        ParallelConfig(engine="fsdp", **config),
        build(stage),
        lambda module: build_optimizer(module, OptimConfig()),
        clip_norm=1.0,
        precision=precision,
        process=process,
        samples_per_rank=BATCH_SIZE // process.world_size,
    )


def steps(engine, process: Process, count: int, poison: int | None = None):
    """Return each step's loss, over both ranks, and norm; at step ``poison``, rank 1's first image is NaN."""
    losses, norms = [], []
    rows = slice(process.rank * BATCH_SIZE // 2, (process.rank + 1) * BATCH_SIZE // 2)
    for step in range(count):
        noise = draw_noise(
            engine.stage.noise_spec,
            seed=0,
            step=step,
            lanes=range(BATCH_SIZE),
            lane_size=1,
            batch_size=BATCH_SIZE,
        )
        batch = {name: value[rows] for name, value in batch_of(engine.stage, step).items()}
        if step == poison and process.rank == 1:
            batch["x"][0] = float("nan")
        terms = engine.forward(batch, {name: value[rows] for name, value in noise.items()}, step)
        assert terms["loss"].dtype == torch.float32
        loss = terms["loss"].sum() / BATCH_SIZE
        engine.backward(loss, last=True)
        norms.append(float(engine.step(1e-3)))
        share = loss.detach().clone()
        dist.all_reduce(share)
        losses.append(float(share))
    return losses, norms


def local_state(engine):
    """Return this rank's shards of weights and optimizer state."""
    optim = engine.state_dict()["optim"]["state"]
    values = {name: p.to_local().detach().clone() for name, p in engine.parameters().items()}
    for name, moments in optim.items():
        for key, value in moments.items():
            values[f"{name}/{key}"] = (value.to_local() if hasattr(value, "to_local") else value).clone()
    return values


def main() -> None:
    torch.set_num_threads(1)
    result = {}
    with distributed(60.0) as process:
        engine = engine_of(process)
        steps(engine, process, 1)
        before = local_state(engine)
        _, norms = steps(engine, process, 1, poison=0)
        after = local_state(engine)
        result["poisoned norm"] = norms[0]
        result["unchanged"] = all(torch.equal(before[name], after[name]) for name in before)
        result["frozen is sharded"] = all(
            p.to_local().numel() < p.numel() or p.numel() == 1 for p in engine.stage.encoder.parameters()
        )
        result["saved"] = sorted(engine.state_dict()["model"])
        result["fp32"] = steps(engine_of(process), process, 4)
        result["kept gathered"] = steps(
            engine_of(process, reshard_after_forward=False, prefetch_blocks=0), process, 4
        )
        engine = engine_of(process, "bf16")
        result["bf16"] = steps(engine, process, 4)
        result["master weights"] = sorted({str(p.dtype) for p in engine.parameters().values()})
    with open(f"{sys.argv[1]}.{process.rank}", "w") as file:
        json.dump(result, file)


if __name__ == "__main__":
    main()
