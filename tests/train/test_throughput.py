import time

import pytest
import torch

from ul_scale.parallel.engine import Process
from ul_scale.train import throughput
from ul_scale.train.throughput import Throughput, describe_peak, peak_tflops

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """Return a list whose only number is the time, seconds."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def meter(world_size=4, **changes):
    process = Process(rank=0, world_size=world_size, device=CPU)
    return Throughput(100, 256, process=process, train_flops=10**12, precision="bf16", **changes)


def test_rates_shares_and_stalls_are_of_the_time_since_the_last_row(clock):
    speed = meter()
    with speed.waiting_for_data():
        clock[0] += 2.0
    clock[0] += 6.0
    with speed.saving():
        clock[0] += 2.0
    row = speed.row(110)
    assert row["step"] == 110 and row["samples_seen"] == 110 * 256 and row["time_s"] == 10.0
    assert row["images_per_s"] == 10 * 256 / 10 and row["data_wait_share"] == 0.2
    assert row["checkpoint_stall_s"] == 2.0
    assert row["tflops_per_s_per_device"] == pytest.approx(256.0 / 4)  # 10¹² FLOPs an image, 4 devices
    clock[0] += 5.0
    second = speed.row(111)
    assert second["images_per_s"] == 256 / 5 and second["time_s"] == 15.0
    assert second["data_wait_share"] == second["checkpoint_stall_s"] == 0.0


def test_mfu_is_the_share_of_the_devices_peak(clock, monkeypatch):
    monkeypatch.setattr(throughput, "_peak_here", lambda device, precision: ("NVIDIA H200", precision, 989.0))
    speed = meter()
    clock[0] += 1.0
    row = speed.row(105)
    # 5 × 256 images of 10¹² FLOPs in 1 s on 4 devices: 320 TFLOP/s on each.
    assert row["mfu"] == pytest.approx(320 / 989)


def test_an_unknown_device_has_no_mfu(clock):
    speed = meter()
    clock[0] += 1.0
    row = speed.row(101)
    assert "mfu" not in row and row["tflops_per_s_per_device"] == 64.0
    assert describe_peak(CPU, "bf16") == "no MFU is logged: the bf16 peak of cpu is not known"


@pytest.mark.parametrize(
    "name,bf16",
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA GB200", 2500),
        ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA A10", 125),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("Tesla V100-SXM2-16GB", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA H1000", None),
    ],
)
def test_devices_are_told_apart_by_whole_words(name, bf16):
    assert peak_tflops(name, "bf16") == bf16


def test_fp32_has_its_own_columns():
    assert peak_tflops("NVIDIA H100 80GB HBM3", "fp32") == 67
    assert peak_tflops("NVIDIA H100 80GB HBM3", "fp32", tf32=True) == 494
    assert peak_tflops("Tesla V100-SXM2-16GB", "fp32", tf32=True) == 15.7


def test_the_log_says_which_peak(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    line = describe_peak(torch.device("cuda", 0), "bf16")
    assert line == "MFU is measured against the dense bf16 peak of NVIDIA H200: 989 TFLOP/s"
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert describe_peak(torch.device("cuda", 0), "fp32").endswith(
        "dense TF32 peak of NVIDIA H200: 494 TFLOP/s"
    )


def test_a_processs_memory_is_in_bytes(clock):
    speed = meter()
    clock[0] += 1.0
    assert 30e6 < speed.row(101)["memory_bytes"] < 100e9
