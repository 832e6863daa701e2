"""A WebDataset tar that takes its name when it is committed."""

from collections.abc import Mapping
from typing import Any

import webdataset

from ul_scale.data.tar import split_name


class ShardWriter:
    """A tar that takes its name when it is committed, so that a shard is there whole or not at all."""

    def __init__(self, fs: Any, path: str) -> None:
        self._fs, self._path, self._keys = fs, path, set[str]()
        self._file = fs.open(f"{path}.partial", "wb")
        # A fractional time, webdataset's default, would put a PAX header of 1 KB before every member.
        self._tar = webdataset.TarWriter(self._file, mtime=0, compress=False, encoder=False)

    def __len__(self) -> int:
        return len(self._keys)

    def write(self, key: str, parts: Mapping[str, bytes]) -> None:
        """Append a sample.

        Raises:
            ValueError: if the key is taken, or would not be read back as it is.
        """
        for part in parts:
            if split_name(f"{key}.{part}") != (key, part):
                raise ValueError(f"{key!r} with part {part!r} is not a name that a shard can hold")
        if key in self._keys:
            raise ValueError(f"the key {key!r} comes twice in one shard")
        self._keys.add(key)
        self._tar.write({"__key__": key, **parts})

    def commit(self) -> int:
        """Finish the tar, give it its name and return its size in bytes."""
        self._close()
        self._fs.mv(f"{self._path}.partial", self._path)
        return self._fs.size(self._path)

    def discard(self) -> None:
        """Drop what was written."""
        self._close()
        self._fs.rm_file(f"{self._path}.partial")

    def _close(self) -> None:
        self._tar.close()
        self._file.close()
