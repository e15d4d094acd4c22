"""Cycles of TPU kernels as the TPU's own compiler simulates them, without a TPU.

A kernel compiles in a process of its own, whose libtpu simulates its final instructions, all loops unrolled, with a
model of copies' latency. Good for comparing kernels on one chip. The simulator does not know what stands in scalar
memory, nor that copies share the bandwidth of the memory: a loop of unknown length counts too little, and cycles here
are no fewer than what moving a kernel's operands and results once takes.
"""

import importlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple


class Chip(NamedTuple):
    """A TPU: its topology's name, its kind of accelerator, Hz, bytes a second of its memory, and FLOP/s in bfloat16."""

    topology: str
    accelerator: str
    hz: float
    bandwidth: float
    flops: float


CHIPS = {
    "v5e": Chip("v5e:2x2", "v5litepod-4", 1.5e9, 819e9, 197e12),
    "v5p": Chip("v5p:2x2x1", "v5p-8", 1.75e9, 2765e9, 459e12),
    "v6e": Chip("v6e:2x2", "v6e-4", 1.75e9, 1640e9, 918e12),
    "tpu7x": Chip("tpu7x:2x2x1", "tpu7x-8", 2.2e9, 3690e9, 1154e12),  # half a chip: as JAX sees it
}
BYTES = {"bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "s8": 1, "u8": 1, "pred": 1}


def environment(chip: str) -> dict[str, str]:
    """What libtpu needs to be told to compile for a chip that is not here.

    Else it looks for the metadata server of a TPU machine, for many seconds, and a second process that compiles dies.
    """
    return {
        "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
        "TPU_ACCELERATOR_TYPE": CHIPS[chip].accelerator, "JAX_PLATFORMS": "cpu", "TPU_STDERR_LOG_LEVEL": "3",
    }  # fmt: skip


def device(chip: str) -> Any:
    """One of the chip's devices, to compile for, none of which is here; `environment` is to be set."""
    from jax.experimental import topologies

    return topologies.get_topology_desc(CHIPS[chip].topology, "tpu").devices[0]


def instructions(text: str) -> list[str]:
    """The lines of a compiled program's text, without the metadata of kernels, which has lines of its own."""
    return re.sub(r"kernel_metadata=\{\n(.*\n)?\}", "", text).splitlines()


def simulated(chip: str, make: str, *, bundles: bool = False, timeout: float = 900, **arguments: Any) -> dict[str, Any]:
    """The kernels of a program: `cycles` of all together, and of each its name, `cycles`, `bytes` that it must move.

    Args:
      make: `module:function`, which gives a function to compile and the shapes of its arguments.
      arguments: of that function.
      bundles: says of each kernel too how many bundles of instructions it has, the share of their slots for products
        that are used, and how many values are spilled to memory; takes longer.

    Raises:
      RuntimeError: the program does not compile, or the simulator ended the process.
    """
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_static_llo_profile_to={folder}/profile"
        if bundles:
            flags += (
                f" --xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_html=false"
                " --xla_jf_dump_llo_pass_label_regex=.*final.*utilization.*"
            )
        env = os.environ | environment(chip) | {"LIBTPU_INIT_ARGS": flags}
        command = [sys.executable, "-m", __spec__.name, chip, make, json.dumps(arguments), folder]
        ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout, check=False)
    if ended.returncode:
        raise RuntimeError(f"{make} {arguments} on {chip}: {ended.stderr.strip()[-2000:]}")
    return json.loads(ended.stdout.splitlines()[-1])


def kernels(chip: str, text: str, folder: Path) -> list[dict[str, Any]]:
    """The kernels of a compiled program's text."""
    found = []
    for line in instructions(text):
        if 'custom_call_target="tpu_custom_call"' not in line:
            continue
        name, rest = re.search(r"%?([\w.\-]+) = (.*)", line).groups()
        results, _, call = rest.partition(" custom-call(")
        operands = call.partition("operand_layout_constraints={")[2].partition("}}")[0]  # without: names alone
        cycles = re.search(r'estimated_cycles\\?":\\?"(\d+)', line)
        if cycles is None:
            raise RuntimeError(f"the compiler says no cycles of {name}")
        moved = size(results) + size(operands)
        floor = math.ceil(moved / CHIPS[chip].bandwidth * CHIPS[chip].hz)
        said = {"name": name, "cycles": max(int(cycles.group(1)), floor), "bytes": moved}
        found.append(said | slots(folder, name))
    return found


def size(shapes: str) -> int:
    """Bytes of all arrays whose types stand in a text of HLO."""
    arrays = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shapes)
    return sum(BYTES.get(dtype, 0) * math.prod(int(n) for n in dims.split(",") if n) for dtype, dims in arrays)


def slots(folder: Path, name: str) -> dict[str, Any]:
    """Bundles, share of slots for products, and spills, of the dump of a kernel if there is one."""
    dump = next(folder.glob(f"*-{name}-*utilization.txt"), None)
    if dump is None:
        return {}
    lines = dump.read_text().splitlines()
    kinds, most = ([x.strip() for x in line.split(sep)] for line, sep in ((lines[1], ","), (lines[2], None)))
    rows = [[int(x) for x in line.split()] for line in lines[4:] if line.strip()]
    used = dict(zip(kinds, map(sum, zip(*rows, strict=True)), strict=True))
    capacity = dict(zip(kinds, map(int, most), strict=True))
    return {
        "bundles": len(rows), "mxu": used["MXU"] / (capacity["MXU"] * len(rows)),
        "spills": used["VSTORE:SPILL"], "fills": used["VLOAD:FILL"],
    }  # fmt: skip


def main(chip: str, make: str, arguments: str, folder: str) -> None:
    import jax

    module, name = make.split(":")
    function, shapes = getattr(importlib.import_module(module), name)(**json.loads(arguments))
    here = jax.sharding.SingleDeviceSharding(device(chip))
    args = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here) for x in shapes]
    text = jax.jit(function).lower(*args).compile().as_text()
    found = kernels(chip, text, Path(folder))
    print(json.dumps({"cycles": sum(k["cycles"] for k in found), "kernels": found}))


if __name__ == "__main__":
    main(*sys.argv[1:])
