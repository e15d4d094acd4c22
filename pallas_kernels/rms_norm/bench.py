"""RMSNorm on the GPU at hand, beside XLA's program for the reference, in turns in one run.

    python -m pallas_kernels.rms_norm.bench [--json FILE]

or, without any, the TPU's kernels beside XLA's programs, by cycles that the TPU's compiler simulates of both (extra:
tpu; its simulator for tpu7x crashes at either):

    python -m pallas_kernels.rms_norm.bench --static v5e|v5p|v6e [--resident] [--json FILE]

bfloat16; `ratio` is the smallest of (XLA's time / ours). Simulated arrays are read from and written to the chip's
memory, as those too large for its vector memory are; with `--resident` XLA may keep these small ones there.
"""

import functools
import math
import os
import re
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import static
from pallas_kernels.rms_norm.api import rms_norm
from pallas_kernels.timing import in_turns, machine, options, versions, write

SIZES = (2048, 4096), (8192, 1024), (512, 16384), (65536, 128)  # rows and their lengths
CASES = [(*sizes, residual) for sizes in SIZES for residual in (True, False)]
VECTOR_MEMORY = {"v5e": 126_000, "v5p": 62_000, "v6e": 126_000}  # KiB
MODES = {"forward": False, "forward and backward": True}
Made = tuple[Callable, list[jax.ShapeDtypeStruct]]  # a function, and shapes of what it takes


def made(R: int, D: int, residual: bool, backward: bool, implementation: str, kind: str | None = None) -> Made:
    """RMSNorm, alone or with its gradients, not before it is done; `kind`: what it is compiled for."""
    x, weight = jax.ShapeDtypeStruct((R, D), jnp.bfloat16), jax.ShapeDtypeStruct((D,), jnp.float32)
    norm = functools.partial(rms_norm, implementation=implementation, chip=kind)
    given = [x, weight, x] if residual else [x, weight]
    if not backward:
        return norm, given

    def both(*args):
        out, pull = jax.vjp(norm, *args[: len(given)])
        out, of_out = jax.lax.optimization_barrier((out, args[len(given) :]))  # where there is the rest of a model
        return out, pull(of_out if residual else of_out[0])[:2]  # a residual has x's

    return both, given + [x] * (1 + residual)


def size(make: Made) -> int:
    """Bytes of arguments and results: no program moves fewer."""
    function, shapes = make
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((shapes, jax.eval_shape(function, *shapes))))


def timed(R: int, D: int, residual: bool, rounds: int) -> dict[str, Any]:
    found: dict[str, Any] = {"R": R, "D": D, "residual": residual}
    for name, backward in MODES.items():
        makes = {who: made(R, D, residual, backward, how) for who, how in (("ours", "gpu"), ("xla", "reference"))}
        shapes = makes["xla"][1]
        keys = jax.random.split(jax.random.key(0), len(shapes))
        args = [jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, shapes, strict=True)]
        times = in_turns({w: functools.partial(jax.jit(f), *args) for w, (f, _) in makes.items()}, rounds=rounds)
        moved = size(makes["xla"]) / 1e12
        rows = {w: {"ms": t.ms, "terabytes_per_second": moved / t.median} for w, t in times.items()}
        found[name] = rows | {"ratio": times["xla"].median / times["ours"].median}
    return found


def cycles(chip: str, text: str) -> int:
    """Of a compiled program: of each instruction those simulated, or those that its memory traffic takes, if more."""
    of_bytes = static.CHIPS[chip].hz / static.CHIPS[chip].bandwidth
    types: dict[str, str] = {}
    total = 0
    entry = text[text.index("\nENTRY") :]
    for line in static.instructions(entry):
        found = re.match(r"\s*(?:ROOT )?%([\w.\-]+) = (\([^=]*?\)|\S+) [\w\-]+\((.*?)\)", line)
        if found is None:
            continue
        name, of_result, operands = found.groups()
        # What stands in vector memory, S(1), is not moved.
        types[name] = re.sub(r"\w+\[[\d,]*\]\{[^}]*S\(1\)\}", "", of_result)
        if simulated := re.search(r'bundle_analysis_data\\?":\{\\?"estimated_cycles\\?":\\?"(\d+)', line):
            moved = static.size(" ".join([types[name], *(types[x] for x in re.findall(r"%([\w.\-]+)", operands))]))
            total += max(int(simulated[1]), math.ceil(moved * of_bytes))
    return total


def compiled(device: jax.Device, make: Made) -> str:
    function, shapes = make
    here = jax.sharding.SingleDeviceSharding(device)
    args = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here) for x in shapes]
    return jax.jit(function).lower(*args).compile().as_text()


def simulated(chip: str, *, resident: bool) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_static_llo_profile_to={folder}/profile"
        if not resident:  # all is lent to what runs, and no array stays there
            flags += f" --xla_tpu_scoped_vmem_limit_kib={VECTOR_MEMORY[chip]}"
        os.environ.update(static.environment(chip) | {"LIBTPU_INIT_ARGS": flags})
        device = static.device(chip)
        cases = []
        for R, D, residual in CASES:
            found: dict[str, Any] = {"R": R, "D": D, "residual": residual}
            for name, backward in MODES.items():
                how = functools.partial(made, R, D, residual, backward, kind=device.device_kind)
                makes = {"ours": how("tpu"), "xla": how("reference")}
                least = math.ceil(size(makes["xla"]) / static.CHIPS[chip].bandwidth * static.CHIPS[chip].hz)
                taken = {who: max(least, cycles(chip, compiled(device, make))) for who, make in makes.items()}
                found[name] = taken | {"least": least, "ratio": taken["xla"] / taken["ours"]}
            cases.append(found)
    return cases


def main() -> None:
    parser = options(__doc__)
    chips = [chip for chip in static.CHIPS if chip != "tpu7x"]
    parser.add_argument("--static", choices=chips, metavar="CHIP", help=f"one of {', '.join(chips)}")
    parser.add_argument("--resident", action="store_true", help="arrays as small as these may stay in vector memory")
    args = parser.parse_args()
    if args.static:
        found = {"chip": args.static, "versions": versions(), "cases": simulated(args.static, resident=args.resident)}
    else:
        found = {"machine": machine(), "cases": [timed(*sizes, args.rounds) for sizes in CASES]}
    write(args.json, {"ratio": min(c[name]["ratio"] for c in found["cases"] for name in MODES)} | found)


if __name__ == "__main__":
    main()
