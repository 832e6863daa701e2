"""DeepSpeed's checkpoint files as the state of engine ``none``, through DeepSpeed's universal format."""

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ul_scale.parallel.deepspeed import FILES, MOMENTS, import_deepspeed


def to_universal(source: Path, target: Path) -> None:
    """Rewrite the files of ``save_files`` as a universal checkpoint: one folder per parameter.

    All files are pickles: call this only after their hashes were compared with those in COMMIT.

    Args:
        source: the directory given to ``save_files``, with the files of all ranks.
        target: a new directory; DeepSpeed also writes ``latest_universal`` beside it.
    """
    import_deepspeed("cpu")
    from deepspeed.checkpoint import ds_to_universal

    options = argparse.Namespace(
        input_folder=str(source / FILES),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        # What Megatron's checkpoints say of tensor parallelism; stages 1 and 2 insist on it.
        inject_missing_state=True,
    )
    with contextlib.redirect_stdout(sys.stderr):
        ds_to_universal.main(options)


def universal_to_dcp_state(universal: Path) -> dict[str, Any]:
    """Return ``model`` and ``optim`` as ``torch.distributed.checkpoint.state_dict`` gives them.

    They are whole, in fp32, have the names of the unwrapped stage, and load into every engine at any
    world size. Frozen parameters are not among them.

    Args:
        universal: what ``to_universal`` wrote.
    """
    about = _load(min(universal.glob("*model_states.pt")))
    common = _load(universal / "zero" / "optimizer_state.pt")
    shapes = {name: shape for group in about["param_shapes"] for name, shape in group.items()}
    buffers = about["buffer_names"]
    model = {name: value for name, value in about["module"].items() if name in buffers}
    moments: dict[str, dict[str, Tensor]] = {}
    for name, shape in shapes.items():
        folder = universal / "zero" / name
        model[name] = _tensor(folder / "fp32.pt", shape)
        moments[name] = {key: _tensor(folder / f"{key}.pt", shape) for key in MOMENTS}
        # Stage 3 counts steps once, for all parameters.
        moments[name]["step"] = (
            _load(folder / "step.pt")
            if (folder / "step.pt").exists()
            else common["optimizer_state_dict"]["state"][0]["step"].clone()
        )
    group = common["param_groups"][0] | {"params": list(shapes)}
    return {"model": model, "optim": {"state": moments, "param_groups": [group]}}


def _tensor(path: Path, shape: torch.Size) -> Tensor:
    value = _load(path)  # flat at stage 3, else whole and with a remark on tensor parallelism
    return (value["param"] if isinstance(value, dict) else value).detach().reshape(shape)


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=False)
