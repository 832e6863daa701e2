"""Progress of a sweep: what runs, how far it is, how long still."""

import sys
import time
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ul_scale.sweep.plan import Node
from ul_scale.train.metrics import LOSS, last_row


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {rest:02d}s"


class Progress:
    """A live display on a terminal; a line per started and finished node elsewhere.

    The time left is estimated from the FLOPs done so far by this call against those that remain.
    """

    def __init__(self, nodes: list[Node], done: set[str]):
        self._nodes = nodes
        self._done = set(done)
        self._earlier = sum(node.flops for node in nodes if node.id in done)
        self._total = sum(node.flops for node in nodes)
        self._since = time.monotonic()
        self._running: dict[str, tuple[Node, float]] = {}
        live = Live(self._render(), console=Console(stderr=True), refresh_per_second=2)
        self._live = live if sys.stderr.isatty() else None

    def __enter__(self) -> "Progress":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def started(self, node: Node) -> None:
        self._running[node.id] = (node, time.monotonic())
        self._line(f"start  {node.id}")

    def finished(self, node: Node, seconds: float) -> None:
        self._done.add(node.id)
        self._running.pop(node.id, None)
        self._line(f"done   {node.id} in {duration(seconds)}")

    def failed(self, node: Node) -> None:
        self._running.pop(node.id, None)
        self._line(f"FAILED {node.id}")

    def update(self, running: list[Node]) -> None:
        self._running = {node.id: self._running[node.id] for node in running}
        if self._live is not None:
            self._live.update(self._render())

    def _line(self, text: str) -> None:
        if self._live is None:
            print(f"[{duration(time.monotonic() - self._since)}] {text}   {self._summary()}", flush=True)

    def _share(self, node: Node) -> float:
        """Return how much of a running node is done; unknown counts as nothing."""
        row = last_row(node.run_dir) if node.steps else None
        return min(1.0, row["step"] / node.steps) if row else 0.0

    def _left_s(self) -> float | None:
        flops = sum(node.flops for node in self._nodes if node.id in self._done)
        flops += sum(node.flops * self._share(node) for node, _ in self._running.values())
        now, gained = time.monotonic() - self._since, flops - self._earlier
        if now < 10 or gained <= 0:
            return None
        return now * (self._total - flops) / gained

    def _summary(self) -> str:
        left = self._left_s()
        text = f"{len(self._done)} of {len(self._nodes)} done"
        return text if left is None else f"{text}, about {duration(left)} left"

    def _render(self) -> Group:
        table = Table.grid(padding=(0, 2))
        for node, since in self._running.values():
            row = last_row(node.run_dir) if node.steps else None
            note = ""
            if row:
                note = f"step {row['step']}/{node.steps}"
                if row[LOSS] is not None:  # null stands for a loss that was not finite
                    note += f"  loss {row[LOSS]:.3f}"
            bar = ProgressBar(total=1.0, completed=self._share(node), width=20, pulse=not node.steps)
            table.add_row(node.kind, node.id.split("/")[0], bar, note, duration(time.monotonic() - since))
        elapsed = duration(time.monotonic() - self._since)
        return Group(Text(f"sweep: {self._summary()}, {elapsed} elapsed", style="bold"), table)
