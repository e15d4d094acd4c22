"""Options for the compilers, in one place: what makes collectives run while the chip computes.

Whether an option does what it says shows in a plan: the share of collective bytes that move while the chip computes,
and the compiler's own cycles. What is given here was kept because both together got better; of a step of a small
decoder, sharded over the chips of one host (v5e: of Llama 2 7B over 256 chips):

  v5e     0.62 of the bytes overlap; letting them run beside elementwise fusions too: 0.65, at 4% more cycles
  v5p     0.00 -> 0.53 at as many cycles: libtpu overlaps nothing there unless asked to
  v6e     0.00 -> 0.63 at 6% more cycles, likewise; 96 of 128 MiB of scratchpad for fusions (the default: 32): 28% fewer
          cycles of Llama 2 13B over 64 chips, at three times the time to compile
  tpu7x   1.00 without any option: gathers and sums run on the SparseCores
  GPU     0.57 -> 0.85 with JAX 0.10; that of 0.11 knows the first of these options only

Left out: reduce-scatters as asynchronous fusions (`xla_enable_async_reduce_scatter_fusion`) run out of scratchpad on
v5e; v6e's SparseCores overlap 0.96, at 22% more cycles; several steps to a fusion are refused on v5p.
"""

import logging
from collections.abc import Mapping
from typing import Any

import jax

_log = logging.getLogger(__name__)
_known: dict[str, dict[str, Any]] = {}  # device kind -> options its compiler takes

_FUSION = "xla_tpu_enable_async_collective_fusion"
_BESIDE_KERNELS = {"xla_tpu_enable_async_collective_fusion_with_mosaic_custom_call": True}
_BESIDE_LOOPS = {"xla_tpu_enable_async_collective_fusion_while_loops": True}
_BESIDE_ELEMENTWISE = {"xla_tpu_enable_async_collective_fusion_fuse_kloop_fusions": True}
_ASYNCHRONOUS = {
    "xla_enable_async_all_gather": True,
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_overlap_compute_collective_tc": True,
}
_SCRATCHPAD = {"xla_tpu_scoped_vmem_limit_kib": 96 * 1024}
_TPU: dict[str, dict[str, Any]] = {  # by kind of device
    "TPU v5 lite": _BESIDE_KERNELS | _BESIDE_LOOPS,
    "TPU v5": _ASYNCHRONOUS | _BESIDE_KERNELS,
    "TPU v6 lite": _ASYNCHRONOUS | _BESIDE_KERNELS | _BESIDE_LOOPS | _BESIDE_ELEMENTWISE | _SCRATCHPAD,
}
_GPU: dict[str, Any] = {
    "xla_gpu_enable_latency_hiding_scheduler": True,
    "xla_gpu_enable_pipelined_all_gather": True,
    "xla_gpu_enable_pipelined_reduce_scatter": True,
    "xla_gpu_enable_pipelined_all_reduce": True,
}


def compiler_options(device: jax.Device) -> dict[str, Any]:
    """For compiling a training step for devices like this one.

    Options that the installed compiler does not know are left out, and logged: versions come and go with them.
    """
    kind = device.device_kind
    if kind not in _known:
        _known[kind] = _accepted(device, _wanted(device))
    return dict(_known[kind])


def compile_with(lowered: jax.stages.Lowered, options: Mapping[str, Any]) -> tuple[jax.stages.Compiled, dict, str]:
    """The program compiled with the options, or fewer if the compiler gives up over them: without fusions of
    asynchronous collectives, which newer libtpus (0.0.46) have for v5e alone, then without any; the options used, and
    what it said when it gave up first.

    Raises:
      JaxRuntimeError: the program does not compile, or has no room in the device's memory.
    """
    said, tried = "", []
    for fewer in (dict(options), {n: v for n, v in options.items() if not n.startswith(_FUSION)}, {}):
        if fewer in tried:
            continue
        tried.append(fewer)
        try:
            return lowered.compile(compiler_options=fewer or None), fewer, said
        except jax.errors.JaxRuntimeError as e:
            if not fewer or (no_room(e) and not said):
                raise
            said = said or str(e)
            _log.warning("compiled with fewer options; with %s: %s", ", ".join(fewer), e)
    raise AssertionError("the last try has no options")


def no_room(e: Exception) -> bool:
    """Whether a compiler gave up because the program does not fit the device's memory."""
    return any(sign in str(e) for sign in ("on HBM", "space hbm", "HbmOom"))


def _wanted(device: jax.Device) -> dict[str, Any]:
    if device.platform == "tpu":
        return _TPU.get(device.device_kind, {})
    return _GPU if device.platform == "gpu" else {}


def _accepted(device: jax.Device, options: dict[str, Any]) -> dict[str, Any]:
    """Those of the options with which something small compiles: all, or each that does alone."""
    if not options or _compiles(device, options):
        return options
    known = {name: value for name, value in options.items() if _compiles(device, {name: value})}
    _log.info("this compiler for %s does not take %s", device.device_kind, ", ".join(options.keys() - known.keys()))
    return known


def _compiles(device: jax.Device, options: dict[str, Any]) -> bool:
    x = jax.ShapeDtypeStruct((8, 128), "float32", sharding=jax.sharding.SingleDeviceSharding(device))
    try:
        jax.jit(lambda x: x + 1).lower(x).compile(compiler_options=options)
    except jax.errors.JaxRuntimeError:
        return False
    return True
