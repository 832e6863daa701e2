"""Write encoded latents as shards, with their statistics in the index."""

import io
from types import TracebackType
from typing import Any

import numpy as np

from ul_scale.data import storage
from ul_scale.data.build import ShardWriter
from ul_scale.data.decode import LATENT_PART
from ul_scale.data.index import INDEX_FOLDER, Index, build_index


class LatentWriter:
    """Writes `KEY.z_clean.npy`, with `KEY.cls` and `KEY.txt` where given, and at the end the index.

    The index is written last and only if no exception leaves the `with` block, so a set that has one is
    complete; what an interrupted writer left is written over.

    Args:
        dest: folder to write to, on any fsspec filesystem.
        dataset: first part of the samples' names.
        samples_per_shard: samples in every shard but the last.

    Attributes:
        extra: statistics to keep with the set, such as {"mean": …, "std": …}; fill it before the end.
        index: the index, once the set is complete.

    Raises:
        ValueError: if dest holds a complete set, or shards of another origin.
    """

    def __init__(self, dest: str, dataset: str, samples_per_shard: int = 1000) -> None:
        self.dest, self.dataset, self.samples_per_shard = dest, dataset, samples_per_shard
        self.extra: dict[str, Any] = {}
        self.index: Index | None = None
        self._num_shards, self._shape = 0, tuple[int, ...]()
        self._shard: ShardWriter | None = None
        self._fs, self._root = storage.open_folder(dest)

    @staticmethod
    def is_complete(dest: str) -> bool:
        """Say whether a folder holds a complete set."""
        fs, root = storage.open_folder(dest)
        return fs.exists(f"{root}/{INDEX_FOLDER}/meta.json")

    def __enter__(self) -> "LatentWriter":
        if self.is_complete(self.dest):
            raise ValueError(f"{self.dest} holds a complete set of latents; delete it to encode again")
        self._fs.makedirs(self._root, exist_ok=True)
        leftovers = [name for name in storage.list_files(self.dest) if name.endswith(".tar")]
        for name in leftovers:
            if not name.startswith("latents-"):
                raise ValueError(f"{self.dest}/{name} is not from encoding; choose an empty folder")
            self._fs.rm_file(f"{self._root}/{name}")
        return self

    def write(self, key: str, z_clean: np.ndarray, *, label: int = -1, text: str | None = None) -> None:
        """Append a sample's latent, (C, h, w) or (C, t, h, w); a label of -1 means that it has none.

        Raises:
            ValueError: if the latent is not finite or has another shape than the first, or the key is taken.
        """
        self._shape = self._shape or z_clean.shape
        if z_clean.ndim not in (3, 4) or z_clean.shape != self._shape:
            raise ValueError(f"the latent of {key!r} has shape {z_clean.shape}; the first had {self._shape}")
        if z_clean.dtype.kind != "f" or not np.isfinite(z_clean).all():
            raise ValueError(f"the latent of {key!r} is not all finite floats")
        stream = io.BytesIO()
        np.save(stream, z_clean, allow_pickle=False)
        parts = {LATENT_PART: stream.getvalue()}
        if label >= 0:
            parts["cls"] = str(label).encode()
        if text is not None:
            parts["txt"] = text.encode()
        if self._shard is None:
            self._shard = ShardWriter(self._fs, f"{self._root}/latents-{self._num_shards:06d}.tar")
        self._shard.write(key, parts)
        if len(self._shard) == self.samples_per_shard:
            self._commit()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._commit()
            self.index = build_index(self.dest, dataset=self.dataset, extra=self.extra)
        elif self._shard is not None:
            self._shard.discard()

    def _commit(self) -> None:
        if self._shard is not None:
            self._shard.commit()
            self._shard, self._num_shards = None, self._num_shards + 1
