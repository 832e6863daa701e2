"""LitData: its chunks of 64 MB, shuffled, through its own dataset and loader."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from litdata import StreamingDataLoader, StreamingDataset, optimize


class Images(StreamingDataset):
    def __init__(self, folder: str, decode: Callable[[bytes], Any]) -> None:
        super().__init__(folder, shuffle=True, drop_last=True)
        self.decode = decode

    def __getitem__(self, at: Any) -> tuple[Any, int]:
        item = super().__getitem__(at)
        return self.decode(item["image"]), item["label"]


def read_file(file: tuple[str, int]) -> dict[str, Any]:
    return {"image": Path(file[0]).read_bytes(), "label": file[1]}


def write(files: list[tuple[str, int]], folder: str) -> None:
    optimize(read_file, files, folder, chunk_bytes="64MB", num_workers=2)


def batches(
    folder: str, task: dict[str, Any], decode: Callable[[bytes], Any], collate: Callable[..., Any]
) -> Iterator[tuple[Any, Any]]:
    workers = task["workers"]
    loader = StreamingDataLoader(
        Images(folder, decode),
        batch_size=task["batch_size"],
        num_workers=workers,
        collate_fn=collate,
        persistent_workers=workers > 0,
    )
    while True:
        yield from loader
