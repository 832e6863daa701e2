"""Export a run's weights, which ``ul_scale.exported`` loads without the trainer; make checkpoints elastic."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ul_scale.checkpoint import state, store, transfer
from ul_scale.checkpoint.attempts import start_attempt
from ul_scale.checkpoint.average import load_average
from ul_scale.checkpoint.ema_snapshots import Rebuilt, posthoc_average
from ul_scale.checkpoint.files import decode, make_dirs, read, write_atomic
from ul_scale.checkpoint.inspect import ema_names, read_config
from ul_scale.exported import CONFIG, FORMAT, WEIGHTS, build_stage

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NOTEWORTHY_ERROR = 0.05


def pick_step(run_dir: Path, step: int | None) -> int:
    """Return a step that has a complete checkpoint: the one asked for, or the newest.

    Raises:
        ValueError: if there is none.
    """
    if step is not None:
        store.check_step(run_dir, step)
        return step
    newest = store.latest_step(run_dir)
    if newest is None:
        raise ValueError(f"{run_dir}: no complete checkpoint")
    return newest


def export(
    run_dir: Path,
    out: Path,
    *,
    step: int | None = None,
    weights: str = "ema",
    ema_width: float | None = None,
    dtype: str = "fp32",
    log: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Write ``model.safetensors`` and ``config.json``, which ``ul_scale.exported.load_exported`` reads.

    Args:
        run_dir: local or in a bucket; of any engine and world size.
        out: local folder, made if need be.
        step: completed steps; the newest checkpoint, or EMA snapshot, by default.
        weights: ``model``, an EMA's name such as ``2200`` or ``power-0.050``, or ``ema``: the first by
            half-life, which is the one that is evaluated.
        ema_width: rebuild the power-function EMA of this relative width from EMA snapshots instead.
        dtype: of the parameters in the file: fp32, bf16 or fp16. Buffers stay as they are.
        log: takes lines for a person.

    Returns:
        what ``config.json`` holds.

    Raises:
        ValueError: the run has no such step or weights, or they do not fit the dtype.
        BrokenCheckpoint: a file of the checkpoint is missing or is not the one that was saved.
    """
    from safetensors.torch import save_file

    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    config = stage_config(run_dir)
    if config["kind"] == "fixed_autoencoder":
        raise ValueError(f"{run_dir}: is not trained here; there are no weights to export")
    stage = build_stage(config, str(run_dir))
    taken = _load(stage, run_dir, step, weights, ema_width, log)
    if config["kind"] == "base":  # measured by the run, and kept with its weights
        config["data"]["z_std"] = float(stage.z_std)  # type: ignore[arg-type]
    tensors = dict(stage.named_buffers())
    for name, value in stage.named_parameters():
        tensors[name] = value.detach().to(DTYPES[dtype]).contiguous()
        if not tensors[name].isfinite().all():
            raise ValueError(f"dtype is {dtype}, in which {name} is not finite; expected bf16 or fp32")
    config |= {"dtype": dtype, "provenance": _provenance(run_dir) | taken}
    make_dirs(out.absolute())
    (out / CONFIG).unlink(missing_ok=True)  # It comes last: with it, an export is complete.
    temp = out / f".{WEIGHTS}.tmp"
    save_file(tensors, temp)
    os.replace(temp, out / WEIGHTS)
    write_atomic(out / CONFIG, json.dumps(config, indent=1).encode())
    return config


def stage_config(run_dir: Path) -> dict[str, Any]:
    """Return all that builds the stage of a run, as plain values: what ``exported.build_stage`` takes.

    Of a base model, ``z_std`` is 1 here: its value is in the checkpoints.
    """
    config = read_config(run_dir)
    if config["kind"] != "base":
        data = {name: config["data"][name] for name in ("image_size", "channels")}
        if (config["data"].get("frames") or 1) > 1:
            data["frames"] = config["data"]["frames"]
    else:
        parent = run_dir.parent / config["autoencoder"]["run"]
        with torch.device("meta"):
            autoencoder = build_stage(stage_config(parent), str(parent))
        data = {
            "latent_shape": list(autoencoder.latent_shape),
            "num_pixels": autoencoder.num_pixels,
            "z_std": 1.0,
        }
    return {"format": FORMAT, **{name: config[name] for name in ("kind", "model", "loss")}, "data": data}


def _load(
    stage: nn.Module,
    run_dir: Path,
    step: int | None,
    weights: str,
    ema_width: float | None,
    log: Callable[[str], object],
) -> dict[str, Any]:
    """Load what was asked for into an unsharded stage; return which weights they are."""
    names = ema_names(read_config(run_dir))
    if weights not in ("ema", "model", *names):
        raise ValueError(f"{run_dir}: no weights {weights!r}; expected one of ema, model, {', '.join(names)}")
    if ema_width is not None:
        rebuilt = posthoc_average(run_dir, ema_width, step)
        log(_describe(rebuilt, ema_width))
        kept = store.complete_steps(run_dir)
        # For the buffers, which snapshots lack: of that step where its checkpoint is still there.
        load_average(
            stage, names[0], run_dir, pick_step(run_dir, rebuilt.step if rebuilt.step in kept else None)
        )
        if rebuilt.average.keys() != dict(stage.named_parameters()).keys():
            raise ValueError(f"{run_dir}: its EMA snapshots are not of the model in its config.yaml")
        stage.load_state_dict(rebuilt.average, strict=False)
        return {
            "step": rebuilt.step,
            "weights": f"power-{ema_width:g}, rebuilt",
            "profile_error": rebuilt.error,
        }
    step = pick_step(run_dir, step)
    if weights == "model":
        with state.local_copy(run_dir, step) as directory:
            state.load({"model": stage.state_dict()}, directory)
        return {"step": step, "weights": "model"}
    name = names[0] if weights == "ema" else weights
    load_average(stage, name, run_dir, step)
    return {"step": step, "weights": name}


def _describe(rebuilt: Rebuilt, width: float) -> str:
    text = (
        f"EMA of width {width:g} at step {rebuilt.step}, rebuilt from {rebuilt.num_snapshots} snapshots: "
        f"its profile is {rebuilt.error:.2%} off"
    )
    if rebuilt.error > NOTEWORTHY_ERROR:
        text += "; a width nearer to those that were kept, or more snapshots, would fit better"
    return text


def _provenance(run_dir: Path) -> dict[str, Any]:
    record = decode(read(run_dir / "run.json"))
    attempts = record.get("attempts", {})
    return {
        "run_id": record.get("run_id", run_dir.name),
        "batch_size": read_config(run_dir)["train"]["batch_size"],
        "data_identity": record.get("data_identity"),
        "parents": record.get("parents", []),
        "code": attempts[max(attempts, key=int)] if attempts else None,
    }


def convert(run_dir: Path, log: Callable[[str], object] = print) -> int | None:
    """Put a DeepSpeed run's newest checkpoint into the format that loads at any world size, in its place.

    It stays complete at every instant: the old files go once the next checkpoint is saved.

    Args:
        run_dir: local or in a bucket; of a run that nobody trains at the moment.
        log: takes lines for a person.

    Returns:
        its step, or None if it is in that format already.

    Raises:
        ValueError: there is no complete checkpoint.
        RunBusy: a process trains this run.
        BrokenCheckpoint: a file of it is missing or is not the one that was saved.
    """
    from ul_scale.parallel.deepspeed_convert import to_universal, universal_to_dcp_state

    step = pick_step(run_dir, None)
    if store.read_commit(run_dir, step).format == "dcp":
        return None
    scratch = read_config(run_dir)["checkpoint"].get("scratch")
    with start_attempt(run_dir, log=log) as attempt, transfer.scratch(scratch) as work:
        step = pick_step(run_dir, None)  # nobody adds one from here on
        store.adopt(run_dir, attempt, step)
        with state.local_copy(run_dir, step, scratch) as directory:
            to_universal(directory, work / "universal")
            whole = universal_to_dcp_state(work / "universal") | _averages_and_counters(directory)
        state.write(whole, work / "shards")
        target = store.checkpoint_dir(run_dir, step, attempt.number, replaces=True)
        files = transfer.upload(work / "shards", target, log=log)
        store.commit(run_dir, step, attempt, files, replaces=True)
    return step


def _averages_and_counters(directory: Path) -> dict[str, Any]:
    """Read ``ema`` and ``train`` from a verified copy of a checkpoint, whatever averages it has."""
    metadata = FileSystemReader(directory).read_metadata()
    averages: dict[str, dict[str, torch.Tensor]] = {}
    for key, path in metadata.planner_data.items():
        entry = metadata.state_dict_metadata[key]
        if path[0] == "ema" and isinstance(entry, TensorStorageMetadata):
            averages.setdefault(path[1], {})[path[2]] = torch.empty(entry.size, dtype=entry.properties.dtype)
    loaded = {"ema": averages, "train": {"step": 0, "samples_seen": 0}}
    state.load(loaded, directory)
    return loaded
