import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxllm.train.throughput import Meter, memory, peak_flops


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    "kind, dtype, tera",
    [
        ("TPU v4", "bfloat16", 275),
        ("TPU v5 lite", "bfloat16", 197),
        ("TPU v5p", "bfloat16", 459),
        ("TPU v6 lite", "bfloat16", 918),
        ("TPU7x", "bfloat16", 2307 / 2),
        ("TPU v3", "float32", 123 / 2),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.5),
        ("NVIDIA H100 PCIe", "bfloat16", 756),
        ("NVIDIA H200", "float32", 494.5),
        ("NVIDIA A100-SXM4-80GB", "float16", 312),
        ("NVIDIA A100-SXM4-80GB", "float32", 156),
        ("NVIDIA A10", "bfloat16", 125),
        ("NVIDIA B200", "bfloat16", 2250),
        ("NVIDIA GB200", "bfloat16", 2500),
        ("NVIDIA L4", "bfloat16", 121),
        ("NVIDIA L40S", "bfloat16", 362),
        ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2),
        ("Tesla T4", "float16", 65),
        ("Tesla T4", "bfloat16", 8.1),
        ("Tesla V100-SXM2-16GB", "float16", 125),
        ("Tesla V100-PCIE-16GB", "bfloat16", 14),
    ],
)
def test_the_peak_of_a_device_is_that_of_its_data_sheet(kind, dtype, tera):
    assert peak_flops(kind, jnp.dtype(dtype)) == pytest.approx(tera * 1e12)


@pytest.mark.parametrize(
    "kind", ["cpu", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA GeForce RTX 4090 Laptop GPU", "TPU v99"]
)
def test_a_device_that_is_not_in_the_table_has_no_peak(kind):
    assert peak_flops(kind, jnp.bfloat16) is None


def test_a_steady_run_is_measured_exactly():
    clock = Clock()
    meter = Meter(devices=4, flops_per_token=6e6, peak=1e9, clock=clock)
    for _ in range(3):
        clock.now += 0.5
        seen = meter.tick(tokens=1000, waited=0.1)
    assert seen == pytest.approx(
        {
            "step_time": 0.5,
            "tokens_per_second": 2000,
            "tokens_per_second_per_device": 500,
            "data_wait": 0.2,
            "mfu": 2000 * 6e6 / (4 * 1e9),
        }
    )


def test_several_steps_in_a_tick_share_its_time():
    clock = Clock()
    meter = Meter(devices=1, clock=clock)
    clock.now += 5
    seen = meter.tick(tokens=10_000, waited=0.0, steps=10)
    assert (seen["step_time"], seen["tokens_per_second"]) == (0.5, 2000)


def test_one_slow_step_moves_nothing_and_the_window_forgets():
    clock = Clock()
    meter = Meter(devices=1, window=5, clock=clock)
    for seconds in (1, 1, 30, 1, 1):
        clock.now += seconds
        seen = meter.tick(tokens=100, waited=0.0)
    assert seen["step_time"] == 1
    for _ in range(5):
        clock.now += 2
        seen = meter.tick(tokens=100, waited=0.0)
    assert seen["step_time"] == 2


def test_time_before_a_restart_is_not_counted():
    clock = Clock()
    meter = Meter(devices=1, clock=clock)
    clock.now += 60  # compiling
    meter.restart()
    clock.now += 2
    assert meter.tick(tokens=100, waited=0.0)["step_time"] == 2


def test_without_a_peak_there_is_no_mfu():
    assert "mfu" not in Meter(devices=1, flops_per_token=6e6, peak=peak_flops("cpu", jnp.float32)).tick(10, 0.0)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the oracle is Linux's /proc")
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="on an accelerator the device's own count is reported")
def test_on_cpu_memory_is_the_peak_the_kernel_counts_for_the_process():
    kib = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
    assert memory() == {"memory_peak": pytest.approx(kib * 1024, rel=0.02)}
