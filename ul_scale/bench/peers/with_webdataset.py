"""WebDataset: tars, shuffled by shard and in a buffer of 1,000; batches are made in the workers."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import webdataset

SHARDS, BUFFER = 8, 1000


def write(files: list[tuple[str, int]], folder: str) -> None:
    pattern, per_shard = f"{folder}/%06d.tar", -(-len(files) // SHARDS)
    with webdataset.ShardWriter(pattern, maxcount=per_shard, verbose=0) as shards:
        for path, label in files:
            source = Path(path)
            shards.write({"__key__": source.stem, source.suffix[1:]: source.read_bytes(), "cls": str(label)})


def batches(
    folder: str, task: dict[str, Any], decode: Callable[[bytes], Any], collate: Callable[..., Any]
) -> Iterator[tuple[Any, Any]]:
    shards = sorted(str(path) for path in Path(folder).glob("*.tar"))
    data = (
        webdataset.WebDataset(shards, shardshuffle=len(shards))
        .repeat()
        .shuffle(BUFFER)
        .to_tuple("jpg;jpeg;png;webp", "cls")
        .map_tuple(decode, int)
        .batched(task["batch_size"], collation_fn=collate)
    )
    return iter(webdataset.WebLoader(data, batch_size=None, num_workers=task["workers"]))
