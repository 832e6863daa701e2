"""Randomness that is keyed, never carried: every draw is a pure function of what it is for.

A key is a JSON array such as ``[seed, "t/prior", step]``. Nothing here depends on rank, process or
history, so a resumed run, or one at another world size, draws the very same numbers.
"""

import hashlib
import json
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # Processes that read data need no torch, which takes seconds to import.
    import torch

Key = str | int
_JSON = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False)


def seed_of(*key: Key) -> int:
    """Return the 64-bit seed of a key: blake2b (8 bytes, little-endian) of the key as a JSON array."""
    digest = hashlib.blake2b(_JSON.encode(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def permutation(size: int, *key: Key) -> np.ndarray:
    """Return a permutation of ``range(size)``, int64.

    It is the stable argsort of raw Philox output: numpy's own ``permutation`` is not promised to
    stay the same across versions, the bit stream is.
    """
    return np.argsort(np.random.Philox(key=seed_of(*key)).random_raw(size), kind="stable")


def uniform(*key: Key) -> float:
    """Return one number in [0, 1), with the 53 bits that a float64 holds."""
    return (seed_of(*key) >> 11) * 2.0**-53


def generator(device: "torch.device | str", *key: Key) -> "torch.Generator":
    """Return a torch generator for a key. CPU and CUDA streams of the same key differ."""
    import torch

    return torch.Generator(device=device).manual_seed(seed_of(*key) >> 1)
