"""Fréchet distance between two sets of features, and reference features that many processes share."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ul_scale.checkpoint.files import write_atomic


def _factor(features: Tensor, which: str) -> tuple[Tensor, Tensor]:
    """Return the mean and a matrix F with FᵀF = the unbiased covariance, of at most min(n, d) rows."""
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"{which} features: expected (n, d) with n >= 2, got {tuple(features.shape)}")
    features = features.to("cpu", torch.float64)
    if not torch.isfinite(features).all():
        bad = int((~torch.isfinite(features)).any(1).sum())
        raise ValueError(f"{which} features: {bad} of {len(features)} images have values that are not finite")
    mean = features.mean(0)
    factor = (features - mean) / (len(features) - 1) ** 0.5
    if len(factor) > factor.shape[1]:
        factor = torch.linalg.qr(factor, mode="r").R
    return mean, factor


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Return the squared Fréchet distance between Gaussians fitted to two feature sets, in float64.

    |μ_a − μ_b|² + tr Σ_a + tr Σ_b − 2 tr (Σ_a Σ_b)^½, with unbiased covariances. With Σ = FᵀF, the last trace
    is the sum of the singular values of F_a F_bᵀ. That is exact, needs neither a covariance nor its square
    root, and holds for fewer images than features.

    The value falls with the number of images, so compare only distances at equal n.

    Args:
        features_a: (n, d).
        features_b: (m, d).

    Raises:
        ValueError: if shapes disagree, a set has fewer than 2 rows, or a value is not finite.

    Source: Dowson & Landau, 1982; used for images by Heusel et al., arXiv 1706.08500.
    """
    mean_a, factor_a = _factor(features_a, "first")
    mean_b, factor_b = _factor(features_b, "second")
    if len(mean_a) != len(mean_b):
        raise ValueError(f"features of {len(mean_a)} and {len(mean_b)} dimensions: expected the same network")
    cross = torch.linalg.svdvals(factor_a @ factor_b.T).sum()
    traces = factor_a.square().sum() + factor_b.square().sum()
    distance = (mean_a - mean_b).square().sum() + traces - 2 * cross
    return max(distance.item(), 0.0)  # rounding can leave equal sets at -1e-12


def reference_path(directory: Path, *, network: str, fingerprint: str, n: int) -> Path:
    """Return where `cached_features` keeps the reference features of n images of one data set."""
    return directory / f"{network}-{fingerprint}-{n}.npy"


def cached_features(path: Path, compute: Callable[[], Tensor]) -> Tensor:
    """Return the features in ``path``, computing and writing them if they are not there.

    The file appears complete or not at all, so processes that start together may share it: each that finds
    none computes the same features, and the last one's file stays. A damaged file is written anew.
    """
    try:
        return torch.from_numpy(np.load(path, allow_pickle=False))
    except (FileNotFoundError, EOFError, ValueError):
        features = compute()
    data = io.BytesIO()
    np.save(data, features.cpu().numpy(), allow_pickle=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, data.getvalue())
    return features
