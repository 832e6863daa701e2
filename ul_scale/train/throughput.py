"""How fast a run goes and what it waits for, between logged steps; and the peaks that MFU is measured by."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ul_scale.parallel.engine import Process

PEAK_TFLOPS: dict[str, tuple[float | None, float | None, float]] = {
    # Dense (without 2:4 sparsity) bf16, TF32 and fp32, TFLOP/s, from NVIDIA's datasheets and, for GeForce
    # and RTX boards, the architecture whitepapers (bf16 with fp32 accumulation). None: no such hardware.
    # Datasheets that print sparse numbers only are halved.
    "GB300": (2500, 1250, 80),  # GB300 NVL72, per GPU
    "B300": (2250, 1125, 75),  # HGX B300
    "GB200": (2500, 1250, 80),  # GB200 NVL72, per GPU
    "B200": (2250, 1125, 75),  # HGX B200
    "H200 NVL": (835, 418, 60),
    "H200": (989, 494, 67),  # SXM
    "GH200": (989, 494, 67),
    "H100 NVL": (835, 418, 60),
    "H100 PCIe": (756, 378, 51),
    "H100": (989, 494, 67),  # SXM
    "A100": (312, 156, 19.5),  # SXM and PCIe
    "A10G": (70, 35, 31.5),
    "A10": (125, 62.5, 31.2),
    "A40": (149.7, 74.8, 37.4),
    "L40S": (362, 183, 91.6),
    "L40": (181, 90.5, 90.5),
    "L4": (121, 60, 30.3),
    "V100": (None, None, 15.7),  # SXM2; its tensor cores take fp16 only
    "T4": (None, None, 8.1),
    "RTX 5090": (209.5, 104.8, 104.8),
    "RTX 4090": (165.2, 82.6, 82.6),
    "RTX 3090": (71, 35.6, 35.6),
    "RTX 6000 Ada Generation": (364.2, 182.1, 91.1),
    "RTX A6000": (154.8, 77.4, 38.7),
}
OTHER_BOARDS = {"MIG", "Laptop", "D", "Ti", "SUPER", "Max-Q"}
"""Words that make a name a slice or a variant of the device, with a peak of its own."""


def peak_tflops(device_name: str, precision: str, *, tf32: bool = False) -> float | None:
    """Return a device's dense peak, TFLOP/s, or None if it is not known.

    Args:
        device_name: as torch.cuda.get_device_name returns it, such as ``NVIDIA H100 80GB HBM3``.
        precision: ``bf16`` or ``fp32``.
        tf32: whether fp32 matrix products run on TF32 tensor cores.
    """
    if not OTHER_BOARDS.isdisjoint(device_name.split()):
        return None
    words = device_name.replace("-", " ").split()
    for name in sorted(PEAK_TFLOPS, key=lambda name: -len(name.split())):  # "H100 PCIe" before "H100"
        parts = name.split()
        if any(words[i : i + len(parts)] == parts for i in range(len(words))):
            bf16, tensor_float, fp32 = PEAK_TFLOPS[name]
            if precision == "bf16":
                return bf16
            return tensor_float or fp32 if tf32 else fp32
    return None


def _peak_here(device: torch.device, precision: str) -> tuple[str, str, float | None]:
    """Return this device's name, the arithmetic it computes ``precision`` in, and the peak of that."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    tf32 = precision == "fp32" and torch.get_float32_matmul_precision() != "highest"
    return name, "TF32" if tf32 else precision, peak_tflops(name, precision, tf32=tf32)


def describe_peak(device: torch.device, precision: str) -> str:
    """Return a line for the log: what MFU is measured against, or why there is none."""
    name, arithmetic, peak = _peak_here(device, precision)
    if peak is None:
        return f"no MFU is logged: the {arithmetic} peak of {name} is not known"
    return f"MFU is measured against the dense {arithmetic} peak of {name}: {peak:g} TFLOP/s"


class Throughput:
    """Speed, waits and memory between logged steps, as rank 0 sees them.

    FLOPs are those of the method, 3 × forward of every image once: neither what activation checkpointing
    computes again nor surplus lanes' images count, so a run looks no faster for wasting work.

    Args:
        start_step: completed steps so far.
        batch_size: global, images.
        process: this process.
        train_flops: of one image, once forward and backward.
        precision: ``bf16`` or ``fp32``.
    """

    def __init__(
        self, start_step: int, batch_size: int, *, process: Process, train_flops: int, precision: str
    ):
        self._batch_size, self._process, self._train_flops = batch_size, process, train_flops
        self._peak = _peak_here(process.device, precision)[2]
        self.step_s: float | None = None
        """Seconds per step between the last two logged ones."""
        self._started = time.monotonic()
        self._begin(start_step, self._started)

    def _begin(self, step: int, now: float) -> None:
        self._logged_at, self._since = step, now
        self._data_wait_s = self._checkpoint_stall_s = 0.0

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._data_wait_s += time.monotonic() - began

    @contextmanager
    def saving(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._checkpoint_stall_s += time.monotonic() - began

    def row(self, completed: int) -> dict[str, float]:
        """Return the counters since the last row, and begin anew.

        Call it when the device has caught up, such as after the step's loss was read. A stall is that of
        the saves since the last row: a save at a logged step counts in the next row, as its time does.
        """
        now = time.monotonic()
        elapsed = now - self._since
        self.step_s = elapsed / (completed - self._logged_at)
        images_per_s = (completed - self._logged_at) * self._batch_size / elapsed
        tflops = self._train_flops * images_per_s / self._process.world_size / 1e12
        row = {
            "step": completed,
            "samples_seen": completed * self._batch_size,
            "time_s": round(now - self._started, 3),
            "images_per_s": images_per_s,
            "tflops_per_s_per_device": tflops,
            "data_wait_share": self._data_wait_s / elapsed,
            "checkpoint_stall_s": self._checkpoint_stall_s,
        }
        if self._peak is not None:
            row["mfu"] = tflops / self._peak
        self._begin(completed, now)
        return row | memory_use(self._process.device)


def memory_use(device: torch.device) -> dict[str, float]:
    """Return the GPU's most memory since the last call, or what this process holds now, or nothing."""
    if device.type == "cuda":
        use: dict[str, float] = {
            "memory_bytes": torch.cuda.max_memory_allocated(device),
            "memory_reserved_bytes": torch.cuda.max_memory_reserved(device),
        }
        torch.cuda.reset_peak_memory_stats(device)
        return use
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return {}
    return {"memory_bytes": pages * os.sysconf("SC_PAGE_SIZE")}
