"""A shard of latents as it is made in memory, and what its set is told to hold."""

import io
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import webdataset

from ul_scale.data.decode import (
    FLIPPED_GIVEN_PART,
    FLIPPED_LATENT_PART,
    GIVEN_PART,
    LATENT_PART,
    TEXT_PART,
)
from ul_scale.data.index import read_meta
from ul_scale.data.tar import split_name

DTYPES: dict[str, type[np.floating[Any]]] = {"fp32": np.float32, "fp16": np.float16}
"""Of stored latents. A .npy file holds no bf16."""

# Rounding leaves no variance of exactly 0; that of latents in use is far above this share of their power.
_NO_VARIANCE = 1e-12


@dataclass(frozen=True)
class Summary:
    """What a shard holds, and its share in the statistics of its set.

    Attributes:
        size: bytes of the tar.
        samples: in it.
        entries: numbers in its latents; the mirror images' are not counted here, nor in the sums.
        total: sum of the entries, in float64.
        total_square: sum of their squares.
        last_class: highest class id, -1 if no sample has one.
    """

    size: int
    samples: int
    entries: int
    total: float
    total_square: float
    last_class: int


class LatentShard:
    """A tar of latents in memory, to be written in one step: `z_clean.npy` and what belongs to it.

    Args:
        dtype: one of `DTYPES`, to which latents are rounded.
    """

    def __init__(self, dtype: str = "fp32") -> None:
        self._dtype, self._keys, self._shapes = dtype, set[str](), dict[str, tuple[int, ...]]()
        self._entries, self._last_class = 0, -1
        self._total, self._total_square = 0.0, 0.0
        self._stream = io.BytesIO()
        # A fractional time, webdataset's default, would put a PAX header of 1 KB before every member.
        self._tar = webdataset.TarWriter(self._stream, mtime=0, compress=False, encoder=False)

    def write(
        self,
        key: str,
        z_clean: np.ndarray,
        *,
        flipped: np.ndarray | None = None,
        given: np.ndarray | None = None,
        flipped_given: np.ndarray | None = None,
        label: int = -1,
        text: str | None = None,
        embedding: np.ndarray | None = None,
    ) -> None:
        """Append a sample.

        Args:
            key: unique in the shard.
            z_clean: its latent, (C, h, w) or (C, t, h, w).
            flipped: the latent of its mirror image, if it is to be kept.
            given: the latent of a clip's first frames alone, (C, t, h, w), if it is to be kept.
            flipped_given: that of their mirror images.
            label: its class, -1 if it has none.
            text: its caption, if it has one.
            embedding: of the caption's tokens, (n, width), if it is to be kept; in fp16.

        Raises:
            ValueError: if a latent is not finite in the shard's dtype or has another shape than the first,
                if an embedding is not finite in fp16, or if the key is taken or would not be read back as it
                is.
        """
        if split_name(f"{key}.cls") != (key, "cls"):
            raise ValueError(f"{key!r} is not a key that a shard can hold")
        if key in self._keys:
            raise ValueError(f"the key {key!r} comes twice in one shard")
        stored = self._stored(key, z_clean, "latent")
        parts = {LATENT_PART: _npy(stored)}
        if flipped is not None:
            parts[FLIPPED_LATENT_PART] = _npy(self._stored(key, flipped, "latent"))
        if given is not None:
            parts[GIVEN_PART] = _npy(self._stored(key, given, "latent of given frames"))
        if flipped_given is not None:
            parts[FLIPPED_GIVEN_PART] = _npy(self._stored(key, flipped_given, "latent of given frames"))
        if embedding is not None:
            parts[TEXT_PART] = _npy(_rounded(key, embedding, "fp16", "embedding"))
        if label >= 0:
            parts["cls"] = str(label).encode()
        if text is not None:
            parts["txt"] = text.encode()
        self._tar.write({"__key__": key, **parts})
        self._keys.add(key)
        exact = stored.astype(np.float64)
        self._entries += exact.size
        self._total += float(exact.sum())
        self._total_square += float(np.square(exact).sum())
        self._last_class = max(self._last_class, label)

    def finish(self) -> tuple[bytes, Summary]:
        """Return the tar, and what it holds."""
        self._tar.close()
        data = self._stream.getvalue()
        return data, Summary(
            size=len(data),
            samples=len(self._keys),
            entries=self._entries,
            total=self._total,
            total_square=self._total_square,
            last_class=self._last_class,
        )

    def _stored(self, key: str, z: np.ndarray, what: str) -> np.ndarray:
        """Return a latent in the shard's dtype."""
        shape = self._shapes.setdefault(what, z.shape)
        if z.ndim not in (3, 4) or z.shape != shape:
            raise ValueError(f"the {what} of {key!r} has shape {z.shape}; the first had {shape}")
        return _rounded(key, z, self._dtype, what)


def _rounded(key: str, array: np.ndarray, dtype: str, what: str) -> np.ndarray:
    if array.dtype.kind != "f" or not np.isfinite(array).all():
        raise ValueError(f"the {what} of {key!r} is not all finite floats")
    with np.errstate(over="ignore"):
        stored = array.astype(DTYPES[dtype], copy=False)
    if not np.isfinite(stored).all():
        remedy = "; expected fp32" if what != "embedding" else ""
        raise ValueError(f"the {what} of {key!r} is too large for {dtype}{remedy}")
    return stored


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def statistics(summaries: Iterable[Summary]) -> dict[str, Any]:
    """Return a set's mean and std over all entries, as stored, and its number of classes.

    Sums are rounded once, so that the order of the shards does not matter.

    Raises:
        ValueError: if all entries are the same, or there are none.
    """
    summaries = list(summaries)
    entries = sum(summary.entries for summary in summaries)
    if not entries:
        raise ValueError("there are no latents")
    mean = math.fsum(summary.total for summary in summaries) / entries
    square = math.fsum(summary.total_square for summary in summaries) / entries
    variance = square - mean**2
    if variance <= _NO_VARIANCE * square:
        raise ValueError("every latent is the same: the autoencoder has collapsed; raise c_lf")
    return {
        "mean": mean,
        "std": math.sqrt(variance),
        "num_classes": 1 + max(summary.last_class for summary in summaries),
    }


def shard_name(number: int) -> str:
    return f"latents-{number:06d}"


def is_complete(dest: str) -> bool:
    """Say whether a folder holds a complete set of latents: its index is written last."""
    _, meta = read_meta(dest)
    return bool(meta) and meta.get("complete", True)  # older formats were written in one go
