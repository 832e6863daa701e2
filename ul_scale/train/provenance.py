"""What a run directory says of its origin: the config, the data, the code of every attempt."""

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from ul_scale import config as configs
from ul_scale.checkpoint.files import decode, read, write_atomic
from ul_scale.config import BaseRun
from ul_scale.train.prepare import Prepared


def write_provenance(prepared: Prepared, attempt: int, world_size: int) -> None:
    """Write config.yaml and run.json: enough to say what was run, on what data, by which code.

    Raises:
        ValueError: if the run was begun on other data; for latents, on another encoding.
    """
    config, path = prepared.config, prepared.run_dir / "run.json"
    earlier = decode(read(path))
    identity = prepared.index.identity
    if earlier.get("data_identity", identity) != identity:
        raise ValueError(
            f"{prepared.run_dir}: was begun on data {earlier['data_identity']}, which are now {identity}"
        )
    code = {
        "git": git_revision(),
        "versions": {name: metadata.version(name) for name in ("torch", "numpy", "ul-scale")}
        | {"python": sys.version.split()[0]},
        "engine": config.parallel.engine,
        "world_size": world_size,
        "zero_stage": config.parallel.zero_stage,
    }
    record = {
        "run_id": prepared.run_id,
        "kind": config.kind,
        "data_identity": identity,
        "parents": [{"run": config.autoencoder.run, "step": config.autoencoder.step}]
        if isinstance(config, BaseRun)
        else [],
        "attempts": earlier.get("attempts", {}) | {str(attempt): code},
    }
    write_atomic(prepared.run_dir / "config.yaml", configs.to_yaml(config).encode())
    write_atomic(path, json.dumps(record, indent=1).encode())


def git_revision() -> dict[str, Any] | None:
    """Return the commit of the code that runs and whether it was changed, or None outside a checkout."""
    here = Path(__file__)

    def git(*args: str | Path) -> str:
        command = ["git", "-C", here.parent, *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    try:
        git("ls-files", "--error-unmatch", here.name)  # or it is somebody else's checkout around us
        return {
            "sha": git("rev-parse", "HEAD").strip(),
            "dirty": bool(git("status", "--porcelain", "--", ".")),
        }
    except (OSError, subprocess.CalledProcessError):
        return None
