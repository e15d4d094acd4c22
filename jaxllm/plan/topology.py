"""From a name such as `v5p-128` to chips, and to JAX devices that compile but do not compute."""

import difflib
import importlib.util
import itertools
import math
import os
import re
from pathlib import Path
from typing import NamedTuple

from jaxllm.core.errors import UserError
from jaxllm.plan.chips import CHIPS, Chip, Cuda

FORMS = "v5e-256, v6e-256x2 (two slices), v5p-128, tpu7x-64, h100-8x4 (four hosts of 8), h200, cpu-4"
MOST = 2**20  # chips of a topology: more than anybody has


class Topology(NamedTuple):
    """Chips and how they hang together.

    The number in a TPU's name is Google's: it counts chips for v5e and v6e, TensorCores for v4, v5p and tpu7x, which
    have two a chip. So v5p-128 is 64 chips, and tpu7x-64 is 32 chips.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]  # chips of one slice by dimension of its torus; of GPUs and CPUs: those of one host
    slices: int  # groups of chips with a fast network of their own: TPU slices, hosts of GPUs

    @property
    def chips(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def devices(self) -> int:
        """JAX devices."""
        return self.chips * self.chip.devices

    @property
    def group(self) -> str:
        """What a group of chips with a fast network is called."""
        return "slice" if self.chip.platform == "tpu" else "host"

    @property
    def hosts(self) -> int:
        return max(1, math.prod(self.shape) // self.chip.hosts_of) * self.slices

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        what = f"{self.slices} {self.group}s of {shape}" if self.slices > 1 else shape
        devices = f", {self.devices} JAX devices" if self.chip.devices > 1 else ""
        plural = "s" if self.chips > 1 else ""
        return f"{self.name}: {self.chips} {self.chip.name} chip{plural} ({what}){devices}"


def topology(name: str) -> Topology:
    """What `--on NAME` means.

    Raises:
      UserError: no such chip, or no slice of that size; says which there are.
    """
    match = re.fullmatch(r"([a-z0-9]+?)(?:-(\d{1,18})(?:x(\d{1,18}))?)?", name)
    if not match or match[1] not in CHIPS:
        kind = (match[1] if match else name.partition("-")[0]).lower()
        near = difflib.get_close_matches(kind, CHIPS, n=2, cutoff=0.5) or CHIPS
        raise UserError(f"no topology {name!r}: chips are {', '.join(near)}; names look like {FORMS}")
    chip, size = CHIPS[match[1]], match[2]
    if size is None and chip.platform == "tpu":
        raise UserError(f"no topology {name!r}: say how many {chip.names_count}, as in {', '.join(_names(chip)[:4])}")
    count = int(size or 1)
    shape = _slice_shape(chip, count) if chip.platform == "tpu" else _host_shape(chip, count)
    if shape is None:
        raise UserError(f"no topology {name!r}: " + (_no_slice if chip.platform == "tpu" else _no_host)(chip, count))
    on = Topology(name, chip, shape, int(match[3] or 1))
    if not 0 < on.chips <= MOST:
        one, most = f"{chip.name}-{count}", MOST // math.prod(shape)
        raise UserError(
            f"no topology {name!r}: {on.slices} {on.group}s of {one}; there may be 1 to {most}, as in {one}x2"
        )
    return on


def _host_shape(chip: Chip, count: int) -> tuple[int] | None:
    """Of a host with `count` chips; None if there is none."""
    return (count,) if 0 < count <= chip.hosts_of else None


def _no_host(chip: Chip, count: int) -> str:
    most, hosts = chip.hosts_of, max(2, min(-(-count // chip.hosts_of), MOST // chip.hosts_of))
    return f"a host has up to {most} of {chip.name}; {chip.name}-{most}x{hosts} is {hosts} hosts of {most}"


def _no_slice(chip: Chip, count: int) -> str:
    each = f", {chip.cores} a chip" if chip.names_count == "cores" else ""
    near = " and ".join(_near(chip, count))
    return f"there is no slice of {count}; {chip.name} counts {chip.names_count}{each}, nearest are {near}"


def _slice_shape(chip: Chip, count: int) -> tuple[int, ...] | None:
    """Chips by dimension of the slice that Google names with `count`; None if it has none."""
    chips, rest = divmod(count, chip.cores if chip.names_count == "cores" else 1)
    if rest or not 0 < chips <= chip.pod:
        return None
    if chip.links.dims == 2:  # rectangles, the longer side at most twice the shorter; 2 chips are not sold
        side = math.isqrt(chips)
        shape = (side, chips // side) if side * side == chips else (math.isqrt(chips // 2), math.isqrt(2 * chips))
        return shape if math.prod(shape) == chips != 2 and chips & (chips - 1) == 0 else None
    small = {1: (1, 1, 1), 4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4)}
    if chips in small:
        return small[chips] if chips > 1 or chip.devices > 1 else None
    if chips % 64:
        return None
    return min(_boxes(chips // 64), key=sum)  # of 4x4x4 cubes, as near to a cube as can be


def _boxes(cubes: int) -> list[tuple[int, int, int]]:
    """Sides in chips, ascending, of every box made of that many cubes of 4x4x4."""
    sides = [n for n in range(1, cubes + 1) if cubes % n == 0]
    pairs = ((a, b) for a, b in itertools.combinations_with_replacement(sides, 2) if cubes % (a * b) == 0)
    return [(4 * a, 4 * b, 4 * cubes // (a * b)) for a, b in pairs if cubes // (a * b) >= b]


def _names(chip: Chip) -> list[str]:
    """Names of the slices of usual sizes: powers of two."""
    return [f"{chip.name}-{2**k}" for k in range(14) if _slice_shape(chip, 2**k)]


def _near(chip: Chip, count: int) -> list[str]:
    """Names of the next smaller and the next larger slice."""
    found = []
    most = chip.pod * (chip.cores if chip.names_count == "cores" else 1)
    for sizes in (range(min(count - 1, most), 0, -1), range(count + 1, most + 1)):
        found += [f"{chip.name}-{n}" for n in itertools.islice((n for n in sizes if _slice_shape(chip, n)), 1)]
    return found


# --- devices ---------------------------------------------------------------------------------------------------------


def devices(on: Topology) -> list:
    """JAX devices of a topology that nobody has to own: programs compile for them, arrays cannot be put there.

    Call it before JAX is used for anything else. The process computes on its CPU from then on, if nothing else was
    asked for: real accelerators stay free.

    Raises:
      UserError: the compiler of that platform is not installed, or JAX has started with too few CPU devices.
    """
    return {"tpu": _tpu, "cuda": _cuda, "cpu": _cpu}[on.chip.platform](on)


def _tpu(on: Topology) -> list:
    # Else libtpu asks a metadata server who it is, and a second process that compiles dies on a lock.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"planning for {on.name} needs the TPU compiler: pip install 'jaxllm[tpu]' (no TPU is needed)")
    _leave_accelerators_alone()
    from jax.experimental import topologies

    options = {"wrap": on.chip.links.rings(on.shape) + (False,) * (3 - len(on.shape))}
    if on.chips == on.slices:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if on.chip.cores == 2 and on.chip.devices == 1:
        options["chip_config_name"] = "megacore"  # both TensorCores of a chip as one device
    if on.slices > 1:
        options["num_slices"] = on.slices
    shape = "x".join(map(str, on.shape))
    return list(topologies.get_topology_desc(f"{on.chip.name}:{shape}", "tpu", **options).devices)


def _cuda(on: Topology) -> list:
    plugin = next((p for p in ("xla_cuda13", "xla_cuda12") if _plugin(p)), None)
    if plugin is None:
        raise UserError(
            f"planning for {on.name} needs the CUDA compiler: pip install 'jaxllm[cuda]' (no GPU is needed)"
        )
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # else the plugin gives up where there is no driver
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_gpu_autotune_level" not in flags:  # nothing can be timed here
        flags += " --xla_gpu_autotune_level=0"
    if "xla_gpu_enable_triton_gemm" not in flags:  # untimed, it finds no tiling for some products, and gives up
        flags += " --xla_gpu_enable_triton_gemm=false"
    if "xla_gpu_cuda_data_dir" not in flags and (toolkit := _ptxas()):
        flags += f" --xla_gpu_cuda_data_dir={toolkit}"
    os.environ["XLA_FLAGS"] = flags.strip()
    _leave_accelerators_alone()
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(
            on.chip.name, "cuda", target_config=target_config(on.chip), topology=f"1x{on.slices}x{on.shape[0]}"
        ).devices
    except (RuntimeError, NotImplementedError) as e:
        raise UserError(f"the CUDA compiler does not start for {on.name}: {str(e).splitlines()[0]}") from e
    return list(found)


def _plugin(name: str) -> bool:
    try:
        return importlib.util.find_spec(f"jax_plugins.{name}") is not None
    except ModuleNotFoundError:
        return False


def _ptxas() -> Path | None:
    """The folder that holds bin/ptxas of a pip-installed toolkit."""
    spec = importlib.util.find_spec("nvidia")
    for root in spec.submodule_search_locations or [] if spec else []:
        for tool in sorted(Path(root).glob("*/bin/ptxas")):
            return tool.parents[1]
    return None


def _leave_accelerators_alone() -> None:
    """JAX starts none in this process, if nothing else was asked for."""
    import jax

    if not jax.config.jax_platforms:
        jax.config.update("jax_platforms", "cpu")


def _cpu(on: Topology) -> list:
    import jax

    _leave_accelerators_alone()
    # Has no effect on, and is refused by, a JAX that has started.
    try:
        if jax.config.jax_num_cpu_devices < on.devices and not _forced():
            jax.config.update("jax_num_cpu_devices", on.devices)
    except RuntimeError:
        pass
    found = jax.devices("cpu")
    if len(found) < on.devices:
        raise UserError(
            f"{on.name} needs {on.devices} CPU devices and JAX has started with {len(found)}; start Python with "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={on.devices}"
        )
    return found[: on.devices]


def _forced() -> bool:
    return "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")


def target_config(chip: Chip) -> str:
    """The GPU that the CUDA compiler is to believe in, as a `stream_executor.GpuTargetConfigProto` in text form."""
    gpu: Cuda = chip.cuda
    major, minor = gpu.capability
    accelerated = "feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
    rates = "".join(
        f"rate_infos {{ key: {dtype} value {{ clock_rate_ghz: {chip.clock / 1e9} units_per_core: 4 "
        f"ops_per_clock: {ops} }} }} "
        # xla_data.proto: S8, F16, BF16, F32 (as TF32), F64
        for dtype, ops in ((2, 2 * gpu.tensor_ops), (10, gpu.tensor_ops), (16, gpu.tensor_ops),
                           (11, gpu.tensor_ops // 2), (12, 32))
    )  # fmt: skip
    return f"""
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} {accelerated} }}
  name: "{chip.title}" model_str: "{chip.title}" device_vendor: "NVIDIA Corporation"
  core_count: {gpu.cores} fpus_per_core: {64 if major == 8 else 128} clock_rate_ghz: {chip.clock / 1e9}
  device_memory_size: {chip.hbm_usable} memory_bandwidth: {int(chip.hbm_bandwidth)} l2_cache_size: {gpu.l2}
  shared_memory_per_core: {gpu.shared} shared_memory_per_block: 49152
  shared_memory_per_block_optin: {gpu.shared_block}
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  device_address_bits: 64 ecc_enabled: true pcie_bandwidth: {int(chip.pcie)}
  matrix_unit_description {{ {rates}}}
  driver_version: "13.0.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0" dnn_version: "9.10.0"
  device_interconnect_info {{ active_links: 18 }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{chip.title}"
"""
