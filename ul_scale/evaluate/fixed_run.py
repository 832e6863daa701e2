"""Run directories of autoencoders that are not trained here, so that base models find them as others."""

import json
from dataclasses import replace
from pathlib import Path

from ul_scale.checkpoint.files import make_dirs, read, require_bucket, run_path, write_atomic
from ul_scale.config import FixedRun, load_any, loads, run_id, to_yaml
from ul_scale.data.index import open_index
from ul_scale.stages.fixed import weights_sha256
from ul_scale.train.prepare import build_autoencoder, check_held_out
from ul_scale.train.provenance import git_revision


def fixed_run(path: str, overrides: list[str]) -> Path:
    """Write the run directory of an autoencoder that is not trained, and return it; again, it is the same.

    Where ``data.val`` is not given, the directory keeps what it has: held-out data are no part of identity.

    Args:
        path: of its config.
        overrides: of the config.

    Raises:
        ValueError: if it is one that is trained, or if its data or its weights are not there or do not fit.
    """
    config = load_any(path, overrides)
    if not isinstance(config, FixedRun):
        raise ValueError(f"{path}: kind is {config.kind}; expected a run directory, or a fixed_autoencoder")
    if config.data.train is None or config.data.image_size is None:
        raise ValueError(
            "data.train and data.image_size are not both set; expected a folder of shards, and pixels"
        )
    train = config.data.train
    config = replace(config, model=replace(config.model, weights_sha256=weights_sha256(config.model)))
    build_autoencoder(config)
    index = open_index(train)
    check_held_out(config, index)
    run_dir = run_path(config.root) / run_id(config, index.identity)
    require_bucket(run_dir)
    before = read(run_dir / "config.yaml")
    if config.data.val is None and before is not None:
        val = loads(before.decode(), f"{run_dir}/config.yaml").data.val
        config = replace(config, data=replace(config.data, val=val))
    make_dirs(run_dir)
    record = {
        "run_id": run_dir.name,
        "kind": config.kind,
        "data_identity": index.identity,
        "code": git_revision(),
    }
    write_atomic(run_dir / "run.json", json.dumps(record, indent=1).encode())
    write_atomic(run_dir / "config.yaml", to_yaml(config).encode())
    return run_dir
