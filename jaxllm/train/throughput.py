"""Speed of a run on the host's clock: step time, tokens per second, waiting for data, MFU, memory."""

import re
import resource
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable

import jax
import jax.numpy as jnp

# Dense TFLOP/s of one JAX device: (16-bit, float32). float32 is what JAX multiplies float32 matrices in by default:
# bfloat16 passes on TPU, TF32 on NVIDIA since Ampere (docs.jax.dev, "Matmul precision"), plain float32 before.
# TPU: cloud.google.com/tpu/docs (one page per version). v2, v3 and 7x show each of a chip's two cores as a device.
_TPU = {
    "TPU v2": (23.0, 23.0),  # 46 a chip
    "TPU v3": (61.5, 61.5),  # 123 a chip
    "TPU v4": (275.0, 275.0),
    "TPU v5 lite": (197.0, 197.0),  # v5e
    "TPU v5e": (197.0, 197.0),
    "TPU v5": (459.0, 459.0),  # v5p
    "TPU v5p": (459.0, 459.0),
    "TPU v6 lite": (918.0, 918.0),  # v6e, Trillium
    "TPU v6e": (918.0, 918.0),
    "TPU7x": (1153.5, 1153.5),  # Ironwood: 2307 a chip
}
# NVIDIA: data sheets of each card, the numbers without sparsity (half of those with); for GeForce and RTX the
# architecture white papers, with float32 accumulation. The first name found in the device kind counts.
_NVIDIA = {
    "GB200": (2500.0, 1250.0),
    "B200": (2250.0, 1100.0),
    "H200 NVL": (835.5, 417.5),
    "H200|GH200": (989.5, 494.5),
    "H100 NVL": (835.5, 417.5),
    "H100 PCIe|H800 PCIe": (756.0, 378.0),
    "H100|H800": (989.5, 494.5),
    "A100|A800": (312.0, 156.0),
    "A40": (149.7, 74.8),
    "A30": (165.0, 82.0),
    "A10G": (70.0, 35.0),
    "A10": (125.0, 62.5),
    "L40S": (362.0, 183.0),
    "L40": (181.0, 90.5),
    "L4": (121.0, 60.5),
    "RTX A6000": (154.8, 77.4),
    "RTX 6000 Ada": (364.2, 182.1),
    "RTX 5090": (209.5, 104.8),
    "RTX 4090": (165.2, 82.6),
    "RTX 3090": (71.0, 35.6),
    "T4": (65.0, 8.1),
    "V100-PCIE": (112.0, 14.0),
    "V100": (125.0, 15.7),
}
_NO_BFLOAT16 = ("T4", "V100")  # Turing and Volta: bfloat16 is computed as float32
_CUT_DOWN = re.compile(r"\b(MIG|Laptop|Max-Q|D|Ti|SUPER)\b")  # shares of a card, or other chips under its name


def peak_flops(device_kind: str, dtype: jax.typing.DTypeLike) -> float | None:
    """Dense peak FLOP/s of one device (`jax.Device.device_kind`) for matrices of `dtype`; None where not known: CPUs.

    MFU is reported against this number only (Chowdhery et al. 2022, arXiv:2204.02311, appendix B).
    """
    name, pair = device_kind, _TPU.get(device_kind)
    if pair is None and not _CUT_DOWN.search(device_kind):
        name, pair = next(((n, p) for n, p in _NVIDIA.items() if re.search(rf"\b({n})\b", device_kind)), (None, None))
    if pair is None:
        return None
    half = jnp.dtype(dtype).itemsize == 2
    if jnp.dtype(dtype) == jnp.bfloat16 and name.startswith(_NO_BFLOAT16):
        half = False
    return pair[0 if half else 1] * 1e12


class Meter:
    """Speed over the last `window` ticks, by medians: a slow step now and then does not move it.

    Tick when a step's loss has come back to the host: JAX returns before it computes, so between two calls of the
    step function alone there is nothing to measure.
    """

    def __init__(
        self,
        devices: int,
        flops_per_token: float | None = None,
        peak: float | None = None,
        window: int = 20,
        clock: Callable[[], float] = time.perf_counter,
    ):
        """
        Args:
          devices: over all hosts.
          flops_per_token: of the model, forward and backward, without recomputation.
          peak: `peak_flops` of one device; None: no MFU.
        """
        self._devices, self._flops, self._peak, self._clock = devices, flops_per_token, peak, clock
        self._ticks: deque[tuple[float, float, float]] = deque(maxlen=window)  # seconds a step, tokens/s, share waited
        self._last = clock()

    def restart(self) -> None:
        """Forgets the time since the last tick: call it after compiling, an evaluation, a checkpoint."""
        self._last = self._clock()

    def tick(self, tokens: int, waited: float, steps: int = 1) -> dict[str, float]:
        """Metrics after `steps` more steps that trained on `tokens` tokens (all devices) and waited `waited` seconds.

        step_time in s, tokens_per_second and tokens_per_second_per_device, data_wait (share of the time that went
        into waiting for batches), and mfu (share of peak) where the peak is known.
        """
        now = self._clock()
        elapsed, self._last = max(now - self._last, 1e-9), now  # two reads of a coarse clock may agree
        self._ticks.append((elapsed / steps, tokens / elapsed, waited / elapsed))
        step_time, speed, wait = (statistics.median(column) for column in zip(*self._ticks))
        metrics = {
            "step_time": step_time,
            "tokens_per_second": speed,
            "tokens_per_second_per_device": speed / self._devices,
            "data_wait": wait,
        }
        if self._flops and self._peak:
            metrics["mfu"] = speed * self._flops / (self._devices * self._peak)
        return metrics


def memory() -> dict[str, int]:
    """Bytes: memory_peak of the fullest local device, memory_limit of one; on CPU the process's peak alone."""
    stats = [d.memory_stats() or {} for d in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    limits = [s["bytes_limit"] for s in stats if "bytes_limit" in s]  # some allocators have none
    if not peaks:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {"memory_peak": peak * (1 if sys.platform == "darwin" else 1024)}  # macOS counts bytes, Linux KiB
    return {"memory_peak": max(peaks)} | ({"memory_limit": min(limits)} if limits else {})
