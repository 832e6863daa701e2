"""Snapshots of power-function EMAs, from which an EMA of any width is rebuilt after the training.

A power-function EMA (Karras et al. 2024, arXiv 2312.02696, section 3) at step t weighs the parameters of
step τ by p(τ) = (γ + 1) τ^γ / t^(γ+1): its width is a fixed share of the run so far, its *relative width*,
and the initial weights never count. The profile of another width or step is nearly a sum of the profiles
of some snapshots, so the same sum of the snapshots is nearly that EMA.

``<run>/ema_snapshots/step_00001000.safetensors`` holds ``power-0.050/<parameter>`` for every width, in
fp16: half the bytes, and the rounding (2^-11 of a weight) is small beside what the averages differ by.
"""

import functools
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ul_scale.checkpoint.files import is_local, list_names, make_dirs, request, write_atomic

FOLDER = "ema_snapshots"
MAX_WIDTH = 12**-0.5
"""Relative width of the flat profile, γ = 0."""
ROUNDING = 2.0**-11
"""Relative precision of fp16."""
NEGLIGIBLE = 1e-5
"""Coefficients far below the rounding: not worth reading gigabytes for."""


# Profiles -----------------------------------------------------------------------------------------


def ema_name(width: float) -> str:
    """Return the name of the power-function EMA of a relative width, such as ``power-0.050``."""
    return f"power-{width:.3f}"


@functools.cache
def exponent(width: float) -> float:
    """Return γ of a relative width σ_rel, the profile's standard deviation as a share of t.

    σ_rel² = (γ + 1) / ((γ + 2)² (γ + 3)), a cubic in γ (equation 126 and algorithm 2 of the paper).
    """
    inverse = width**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def decay(width: float, step: int) -> float:
    """Return β of the update after ``step`` completed steps; 0 at the first: the average is the weights.

    With it the parameters of step τ have weight (τ/t)^(γ+1) − ((τ−1)/t)^(γ+1) at step t: the integral of
    the profile over that step.
    """
    return (1 - 1 / step) ** (exponent(width) + 1)


def _inner_products(t_a: np.ndarray, gamma_a: np.ndarray, t_b: np.ndarray, gamma_b: np.ndarray) -> np.ndarray:
    """Return ∫ p_a p_b, in closed form (equation 151)."""
    power = np.where(t_a < t_b, gamma_b, -gamma_a)
    scale = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1)
    return scale * (t_a / t_b) ** power / np.maximum(t_a, t_b)


def fit(steps: np.ndarray, widths: np.ndarray, step: int, width: float) -> tuple[np.ndarray, float]:
    """Return the coefficients of snapshots whose sum is nearest to one profile, and how near it is.

    Least squares over the profiles in float64, of coefficients that sum to 1, so that a weight that does
    not move is kept. Stored averages are rounded, so the coefficients must not grow just to fit what the
    rounding hides: a ridge of that size.

    Args:
        steps: of the snapshots, (n,).
        widths: their relative widths, (n,).
        step: at which the profile ends.
        width: its relative width.

    Returns:
        coefficients (n,), and the L2 distance of the profiles as a share of the wanted one's norm.
    """
    t, gamma = steps.astype(np.float64), np.array([exponent(w) for w in widths])
    t_out, gamma_out = np.array(float(step)), np.array(exponent(width))
    norm = np.sqrt(_inner_products(t, gamma, t, gamma))
    norm_out = np.sqrt(_inner_products(t_out, gamma_out, t_out, gamma_out))
    gram = _inner_products(t[:, None], gamma[:, None], t, gamma) / np.outer(norm, norm)
    target = _inner_products(t, gamma, t_out, gamma_out) / (norm * norm_out)
    unit = norm_out / norm  # a coefficient of profiles of norm 1, times this, is one of the profiles
    free, towards_sum = np.linalg.solve(
        gram + ROUNDING**2 * np.eye(len(t)), np.stack([target, unit], axis=1)
    ).T
    solution = free + towards_sum * (1 - unit @ free) / (unit @ towards_sum)
    error = 1 - 2 * solution @ target + solution @ gram @ solution
    return solution * unit, float(np.sqrt(max(error, 0.0)))


# Files --------------------------------------------------------------------------------------------


def compact(average: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return an average as it is stored: fp16, or as it is where that overflows.

    Raises:
        FloatingPointError: a value is not finite.
    """
    result = {}
    for name, value in average.items():
        half = value.to(torch.float16)
        if not half.isfinite().all():
            if not value.isfinite().all():
                raise FloatingPointError(f"the EMA of {name} is not finite: no snapshot of it")
            half = value
        result[name] = half.contiguous()
    return result


def _path(run_dir: Path, step: int) -> Path:
    return run_dir / FOLDER / f"step_{step:08d}.safetensors"


def snapshot_steps(run_dir: Path) -> list[int]:
    """Return the completed steps that have a snapshot, ascending."""
    names = list_names(run_dir / FOLDER)
    return sorted(int(name[5:-12]) for name in names if re.fullmatch(r"step_\d{8,}\.safetensors", name))


def save_snapshot(
    run_dir: Path, step: int, samples_seen: int, averages: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Write a snapshot in one step, unless it is there: a run that repeats a step repeats its averages.

    Args:
        run_dir: the run's directory.
        step: completed steps.
        samples_seen: samples until then.
        averages: ``{power-…: {parameter: average}}``, fp32, on the CPU.

    Raises:
        FloatingPointError: if an average is not finite.
    """
    from safetensors.torch import save

    if step in snapshot_steps(run_dir):
        return
    tensors = {
        f"{name}/{key}": value
        for name, average in averages.items()
        for key, value in compact(average).items()
    }
    metadata = {
        "step": str(step),
        "samples_seen": str(samples_seen),
        "widths": json.dumps([float(name.removeprefix("power-")) for name in averages]),
    }
    make_dirs(run_dir / FOLDER)
    write_atomic(_path(run_dir, step), save(tensors, metadata))


def _widths(path: Path) -> list[float]:
    """Return the widths in a snapshot: of a file in a bucket, only its header is fetched."""

    def part(fs: Any, key: str) -> bytes:
        return fs.cat_file(key, 8, 8 + int.from_bytes(fs.cat_file(key, 0, 8), "little"))

    if is_local(path):
        with path.open("rb") as file:
            header = file.read(int.from_bytes(file.read(8), "little"))
    else:
        header = request(path, part, "read")
    return json.loads(json.loads(header)["__metadata__"]["widths"])


@contextmanager
def _local(path: Path) -> Iterator[Path]:
    if is_local(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        request(path, lambda fs, key: fs.get_file(key, str(copy)), "download")
        yield copy


@dataclass(frozen=True)
class Rebuilt:
    """An EMA rebuilt from snapshots.

    Attributes:
        step: completed steps at which it ends.
        num_snapshots: how many steps' snapshots it is made of.
        error: L2 distance of its profile from the wanted one, as a share of that one's norm.
        average: fp32, by parameter.
    """

    step: int
    num_snapshots: int
    error: float
    average: dict[str, Tensor]


def _add(total: dict[str, Tensor], path: Path, coefficients: dict[str, float]) -> None:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:  # mapped: one tensor in memory at a time
        for full_name in file.keys():
            name, _, parameter = full_name.partition("/")
            value = file.get_tensor(full_name).float()
            total.setdefault(parameter, torch.zeros_like(value)).add_(value, alpha=coefficients[name])


def posthoc_average(run_dir: Path, width: float, step: int | None = None) -> Rebuilt:
    """Rebuild the power-function EMA of any relative width at a step, from all snapshots until then.

    One file is read at a time: memory for one model in fp32 and one file.

    Args:
        run_dir: the run's directory.
        width: relative width, such as 0.07.
        step: completed steps; the newest snapshot's by default.

    Raises:
        ValueError: there is no snapshot until then, or no profile has this width.
    """
    if not 0 < width < MAX_WIDTH:
        raise ValueError(f"EMA width is {width}; expected a relative width above 0 and below {MAX_WIDTH:.3f}")
    found = snapshot_steps(run_dir)
    used = [each for each in found if step is None or each <= step]
    if not used:
        raise ValueError(
            f"{run_dir}: no EMA snapshot{f' up to step {step}' if found else ''}; expected a run with "
            "ema.power_widths and ema.snapshot_every_steps"
            + (f", or from step {found[0]} on" if found else "")
        )
    step = used[-1] if step is None else step
    widths = _widths(_path(run_dir, used[-1]))
    coefficients, error = fit(np.repeat(used, len(widths)), np.tile(widths, len(used)), step, width)
    average: dict[str, Tensor] = {}
    for at, row in zip(used, coefficients.reshape(len(used), len(widths))):
        if abs(row).max() > NEGLIGIBLE:
            with _local(_path(run_dir, at)) as path:
                _add(average, path, dict(zip(map(ema_name, widths), row.tolist())))
    return Rebuilt(step, len(used), error, average)
