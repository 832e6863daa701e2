"""MosaicML Streaming: its MDS format, shuffled, through its own dataset and loader."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from streaming import MDSWriter, StreamingDataLoader, StreamingDataset
from streaming.base.util import clean_stale_shared_memory


class Images(StreamingDataset):
    def __init__(self, folder: str, batch_size: int, decode: Callable[[bytes], Any]) -> None:
        super().__init__(local=folder, shuffle=True, batch_size=batch_size)
        self.decode = decode

    def __getitem__(self, at: Any) -> tuple[Any, int]:
        item = super().__getitem__(at)
        return self.decode(item["image"]), item["label"]


def write(files: list[tuple[str, int]], folder: str) -> None:
    with MDSWriter(out=folder, columns={"image": "bytes", "label": "int"}) as shards:
        for path, label in files:
            shards.write({"image": Path(path).read_bytes(), "label": label})


def batches(
    folder: str, task: dict[str, Any], decode: Callable[[bytes], Any], collate: Callable[..., Any]
) -> Iterator[tuple[Any, Any]]:
    clean_stale_shared_memory()
    workers = task["workers"]
    loader = StreamingDataLoader(
        Images(folder, task["batch_size"], decode),
        batch_size=task["batch_size"],
        num_workers=workers,
        collate_fn=collate,
        persistent_workers=workers > 0,
        drop_last=True,
    )
    while True:
        yield from loader
