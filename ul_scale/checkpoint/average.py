"""One average of a checkpoint, loaded into an unsharded stage: for evaluation, encoding and export."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ul_scale.checkpoint import state, store


def load_average(
    stage: nn.Module, name: str, run_dir: Path, step: int, group: dist.ProcessGroup | None = None
) -> None:
    """Load an EMA's parameters, and the model's buffers, into a stage; collective if there are several ranks.

    Args:
        stage: unsharded; its frozen parameters are left as they are.
        name: of the average, such as ``2200`` or ``power-0.050``.
        run_dir: the run's directory.
        step: of a complete checkpoint.
        group: of all ranks, on CPU, where a download may take long.

    Raises:
        ValueError: if there is no complete checkpoint at that step.
        BrokenCheckpoint: if a file of it is not the one that was saved, or it has no such average.
    """
    store.check_step(run_dir, step)
    average: dict[str, Any] = {
        name: torch.empty_like(p) for name, p in stage.named_parameters() if p.requires_grad
    }
    buffers = dict(stage.named_buffers())
    with state.local_copy(run_dir, step, group=group) as directory:
        state.load({"ema": {name: average}, "model": buffers}, directory)
    stage.load_state_dict(average | buffers, strict=False)
