"""ul_scale's own stream with its default settings, on plain tars with an index."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec

from ul_scale.data.config import DataConfig
from ul_scale.data.decode import IMAGE_PARTS, label_of
from ul_scale.data.fetch import Fetcher, LaneReader
from ul_scale.data.index import Index, open_index
from ul_scale.data.indexing import build_index
from ul_scale.data.plan import LanePlan, lane_slots
from ul_scale.data.storage import ReadPolicy
from ul_scale.data.stream import LaneStream, make_plan
from ul_scale.data.writing.shards import ShardWriter

SAMPLES_PER_SHARD = 1000


def write(files: list[tuple[str, int]], folder: str) -> None:
    fs, root = fsspec.core.url_to_fs(folder)
    fs.makedirs(root, exist_ok=True)
    for number, first in enumerate(range(0, len(files), SAMPLES_PER_SHARD)):
        shard = ShardWriter(fs, f"{root}/{number:06d}.tar")
        for path, label in files[first : first + SAMPLES_PER_SHARD]:
            file = Path(path)
            shard.write(file.stem, {file.suffix[1:]: file.read_bytes(), "cls": str(label).encode()})
        shard.commit()
    build_index(folder, dataset="bench")


def batches(folder: str, task: dict[str, Any], *_: Any) -> Iterator[tuple[Any, Any]]:
    index = open_index(folder)
    config = DataConfig(image_size=task["size"], frames=task["frames"] or None, workers=task["workers"])
    plan = make_plan(index, config, seed=0, batch_size=task["batch_size"])
    if task["kind"] == "bytes":
        yield from _undecoded(index, plan, config)
    for batch in LaneStream(index, plan, config, lane_slots(plan.lanes, 0, 1)).batches():
        yield batch["x"], batch["label"]


def _undecoded(index: Index, plan: LanePlan, config: DataConfig) -> Iterator[tuple[Any, Any]]:
    """Yield what a worker reads before it decodes: each reads for itself, so this is in one process."""
    fetcher = Fetcher(index, ReadPolicy.of(config))
    readers = [LaneReader(plan, lane, 0, fetcher) for lane in range(plan.lanes)]
    for step in itertools.count():
        samples = [taken.sample for reader in readers for taken in reader.take(step)]
        images = [
            next(sample.parts[part] for part in IMAGE_PARTS if part in sample.parts) for sample in samples
        ]
        yield images, [label_of(sample) for sample in samples]
