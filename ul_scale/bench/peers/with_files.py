"""Plain files, read by torch's DataLoader: what everybody starts with."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset, RandomSampler

FOREVER = 10**12


class Files(Dataset[tuple[Any, int]]):
    def __init__(self, folder: str, decode: Callable[[bytes], Any]) -> None:
        self.paths, self.decode = sorted(Path(folder).glob("*/*")), decode

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> tuple[Any, int]:
        path = self.paths[number]
        return self.decode(path.read_bytes()), int(path.parent.name)


def batches(
    folder: str, task: dict[str, Any], decode: Callable[[bytes], Any], collate: Callable[..., Any]
) -> Iterator[tuple[Any, Any]]:
    files = Files(folder, decode)
    sampler = RandomSampler(files, num_samples=FOREVER)
    return iter(
        DataLoader(
            files, task["batch_size"], sampler=sampler, num_workers=task["workers"], collate_fn=collate
        )
    )
