"""torchrun, ending as its workers do: 75 after a save that was asked for, 2 for bad input, not always 1.

Usage: as torchrun.
"""

import os
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

EXIT_RUN_AGAIN = 75
# Workers that have been asked to stop are saving: torchrun would kill them after 30 s.
os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")


def main(arguments: list[str]) -> int:
    """Run torchrun's own command line; return the exit code."""
    try:
        run.run(run.parse_args(arguments))
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        print(f"torchrun: rank {rank} ended with {first.exitcode}", file=sys.stderr)
        return first.exitcode if first.exitcode > 0 else 1
    except SignalException as error:
        print(f"torchrun: {error}; the same command continues", file=sys.stderr)
        return EXIT_RUN_AGAIN
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
