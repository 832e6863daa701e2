"""What two ranks do with one saver, for ``test_saver.py``: ``torchrun … saver_ranks.py RUN_DIR``."""

import json
import sys
from pathlib import Path

import torch

from ul_scale.checkpoint import store
from ul_scale.checkpoint.attempts import start_attempt
from ul_scale.checkpoint.saver import Saver
from ul_scale.checkpoint.store import CheckpointConfig
from ul_scale.checkpoint.transfer import SaveFailed
from ul_scale.parallel.mesh import distributed


def full_disk(directory: Path) -> None:
    raise OSError(28, "No space left on device")


def main() -> None:
    run_dir = Path(sys.argv[1])
    with distributed(60.0) as process:
        attempt = start_attempt(run_dir, log=str) if process.rank == 0 else None
        if attempt is not None:
            store.adopt(run_dir, attempt, 0)
        saver = Saver(run_dir, attempt, 1, CheckpointConfig(every_steps=1), process)
        state = {"model": {"w": torch.arange(4.0)}}
        saver.save(state, 1)
        saver.save(state, 2, save_files=full_disk if process.rank == 1 else lambda directory: None)
        try:
            saver.wait()
            failure = None
        except SaveFailed as error:
            failure = str(error)
        saver.save(state, 3)
        saver.close()
        if attempt is not None:
            attempt.close()
    Path(f"{run_dir}-{process.rank}.json").write_text(json.dumps(failure))


if __name__ == "__main__":
    main()
