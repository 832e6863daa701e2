"""Write the files of an index, in memory that does not grow with the number of samples."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ul_scale.data.index import ARRAYS, KEYS, Shard
from ul_scale.data.index_cache import digest_file
from ul_scale.data.tar import ABSENT, ShardScan, check_parts

# A group is decoded whole when one of its keys is read, and has an entry in what is read to open the file.
_KEYS_PER_GROUP = 8192
_KEY_SCHEMA = pa.schema([("key", pa.string())])
_WIDEN_ROWS = 1_000_000


class IndexWriter:
    """Writes an index's files to a local folder, a shard at a time, in the order of the shards' names.

    Memory does not grow with the number of samples.
    """

    def __init__(self, folder: Path) -> None:
        self.num_samples = 0
        self._folder, self._shards, self._parts = folder, list[Shard](), list[str]()
        self._digest = hashlib.blake2b(digest_size=16)
        self._arrays = {name: _ArrayFile(folder / name, dtype) for name, dtype in ARRAYS.items()}
        self._keys = list[str]()
        # Keys differ from each other: neither dictionaries nor bounds help to find or store them.
        self._key_file = pq.ParquetWriter(
            folder / KEYS, _KEY_SCHEMA, compression="zstd", use_dictionary=False, write_statistics=False
        )

    def add(self, shard: Shard, rows: ShardScan) -> None:
        """Append a shard.

        Raises:
            ValueError: if there are too many kinds of parts.
        """
        shard = shard._replace(samples=len(rows.keys))
        parts = sorted({*self._parts, *rows.parts})
        if parts != self._parts:
            check_parts(parts, shard.name)
            self._widen(parts)
        number = np.full(shard.samples, len(self._shards), np.uint32)
        members = _spread(rows.members, rows.parts, parts)
        for name, array in zip(ARRAYS, (rows.offset, rows.size, number, members)):
            self._arrays[name].write(array)
        self._keys += rows.keys
        self._write_keys(len(self._keys) // _KEYS_PER_GROUP * _KEYS_PER_GROUP)
        self._digest.update(json.dumps([shard.name, shard.size, shard.samples]).encode())
        self._digest.update(rows.offset.astype("<u8").tobytes())
        self._digest.update("".join(f"{key}\0" for key in rows.keys).encode())
        self._shards.append(shard)
        self.num_samples += shard.samples

    def finish(self) -> dict[str, Any]:
        """Finish the files, and return what meta.json is to say of them."""
        self._write_keys(len(self._keys))
        self._key_file.close()
        for array in self._arrays.values():
            array.close(self.num_samples)
        files = {}
        for name in (*ARRAYS, KEYS):
            path = self._folder / name
            files[name] = {"size": path.stat().st_size, "digest": digest_file(path)}
        return {
            "fingerprint": self._digest.hexdigest(),
            "parts": self._parts,
            "files": files,
            "shards": [shard._asdict() for shard in self._shards],
        }

    def _write_keys(self, count: int) -> None:
        """Write the first `count` of the waiting keys: whole groups, except at the end."""
        if count:
            table = pa.table({"key": pa.array(self._keys[:count], pa.string())}, schema=_KEY_SCHEMA)
            self._key_file.write_table(table, row_group_size=_KEYS_PER_GROUP)
            del self._keys[:count]

    def _widen(self, parts: list[str]) -> None:
        """Write the members anew, with a column for each of `parts`."""
        narrow, path = self._arrays["members.npy"], self._folder / "members.npy"
        narrow.close(self.num_samples)
        wide = _ArrayFile(path.with_suffix(".wide"), ARRAYS["members.npy"], (len(parts), 2))
        for start in range(0, self.num_samples, _WIDEN_ROWS):
            block = np.load(path, mmap_mode="r")[start : start + _WIDEN_ROWS]
            wide.write(_spread(block, self._parts, parts))
        os.replace(path.with_suffix(".wide"), path)
        self._arrays["members.npy"], self._parts = wide, parts


class _ArrayFile:
    """A `.npy` file that is written from its first row to its last, before their number is known."""

    def __init__(self, path: Path, dtype: str, row: tuple[int, ...] = ()) -> None:
        self._file, self._dtype, self._row = open(path, "wb"), dtype, row
        self._write_header(0)

    def write(self, rows: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(rows, self._dtype).data)

    def close(self, num_rows: int) -> None:
        self._file.seek(0)
        self._write_header(num_rows)
        self._file.close()

    def _write_header(self, num_rows: int) -> None:
        # numpy leaves room for the first dimension to grow, so that all headers of a file are as long.
        header = {"descr": self._dtype, "fortran_order": False, "shape": (num_rows, *self._row)}
        np.lib.format.write_array_header_1_0(self._file, header)


def _spread(members: np.ndarray, parts: list[str], all_parts: list[str]) -> np.ndarray:
    """Return members with a column for each of `all_parts`, [N, all parts, 2]."""
    if parts == all_parts:
        return members
    spread = np.zeros((len(members), len(all_parts), 2), np.uint32)
    spread[:, :, 0] = ABSENT
    spread[:, [all_parts.index(part) for part in parts]] = members
    return spread
