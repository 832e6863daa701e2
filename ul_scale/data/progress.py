"""How far a long piece of work is, on stderr: a bar on a terminal, else a line now and then."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, TextColumn

LINE_EVERY_S = 30.0
"""Between lines; work that takes less is silent without a terminal."""


@contextmanager
def progress_bar(
    title: str, total: int, unit: str = "samples", *, shown: bool = True
) -> Iterator[Callable[[int], None]]:
    """Show how far something is, its speed, and when it will be done.

    Args:
        title: what is done.
        total: how many there are to do.
        unit: of what, for a person.
        shown: whether to tell at all.

    Yields:
        The function that advances it, from any thread.
    """
    terminal, done, lock = sys.stderr.isatty(), 0, threading.Lock()
    began = told = time.monotonic()
    columns = [*Progress.get_default_columns(), TextColumn("{task.fields[state]}")]
    with Progress(*columns, console=Console(stderr=True), disable=not (shown and terminal)) as bar:
        task = bar.add_task(title, total=total, state="")

        def advance(count: int) -> None:
            nonlocal done, told
            with lock:
                done, now = done + count, time.monotonic()
                elapsed_s = max(now - began, 1e-9)
                state = f"{done:,} of {total:,} {unit}, {done / elapsed_s:,.0f} {unit}/s"
                bar.update(task, completed=done, state=state)
                if shown and not terminal and now - told > LINE_EVERY_S:
                    told, left_s = now, elapsed_s * (total - done) / max(done, 1)
                    print(f"{title}: {state}, {left_s:,.0f} s left", file=sys.stderr, flush=True)

        yield advance
