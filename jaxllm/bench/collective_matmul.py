"""A product whose sum is scattered over `tensor`, by XLA and as a collective matmul, compiled for TPUs. Not executed.

Sequence parallelism ends attention and feed-forward with such a product (Korthikanti et al. 2022, arXiv:2205.05198,
section 4.2.2). libtpu lets gathers run beside products, and not these scatters. Cut into a ring of smaller products
whose sums travel meanwhile (Wang et al. 2023, "Overlap communication with dependent computation via decomposition",
section 3), they would hide; whether that pays, this says, by the compiler's cycles and
the planner's network: predicted.
"""

import statistics
import time
from typing import Any

LENGTH, ROWS, WIDE, EMBED = 2048, 8, 11008, 4096  # Llama 2 7B's feed-forward, out
CHIPS = ("v5e-4", "v5p-8", "v6e-4")  # four chips each


def measure(rounds: int) -> dict[str, Any]:
    """Milliseconds on each kind of chip; `ratio` is XLA's over the better ring's, the smallest of the chips'."""
    started = time.perf_counter()
    chips = {name: {way: predicted(name, way) for way in WAYS} for name in CHIPS}
    ratios = {n: t["xla"]["ms"] / min(t["ring"]["ms"], t["both_ways"]["ms"]) for n, t in chips.items()}
    return {
        "unit": "predicted ms of one product and its scattered sum, compiled, not executed",
        "ours": statistics.median(min(t["ring"]["ms"], t["both_ways"]["ms"]) for t in chips.values()),
        "peer": statistics.median(t["xla"]["ms"] for t in chips.values()),
        "ratio": min(ratios.values()), "ratios": ratios, "chips": chips,
        "config": {"rows": ROWS, "length": LENGTH, "wide": WIDE, "embed": EMBED, "devices": 4, "dtype": "bfloat16"},
        "seconds": time.perf_counter() - started,
        "peer_is": "XLA's reduce-scatter of the product; rounds make no difference",
    }  # fmt: skip


def xla(x, w):
    """[B, T, F / n] [F / n, D] -> [B, T / n, D], under shard_map."""
    import jax

    return jax.lax.psum_scatter(jax.numpy.einsum("BTF,FD->BTD", x, w), "tensor", scatter_dimension=1, tiled=True)


def ring(x, w, way: int = 1):
    """The same: each device's sum for a share of the tokens goes round, towards the next device or (-1) the last."""
    import jax

    n, me = jax.lax.axis_size("tensor"), jax.lax.axis_index("tensor")
    size = x.shape[1] // n

    def part(owner):
        return jax.numpy.einsum("BTF,FD->BTD", jax.lax.dynamic_slice_in_dim(x, owner % n * size, size, 1), w)

    total = part(me - way)  # the share of the device before, which it reaches after n - 1 steps
    for step in range(2, n + 1):
        total = jax.lax.ppermute(total, "tensor", [(i, (i + way) % n) for i in range(n)])
        total = total + part(me - way * step)
    return total


def both_ways(x, w):
    """Half of the width each way round, on all links of a ring."""
    import jax

    half = w.shape[1] // 2
    return jax.numpy.concatenate([ring(x, w[:, :half]), ring(x, w[:, half:], -1)], -1)


WAYS = {"xla": xla, "ring": ring, "both_ways": both_ways}


def over_tensor(way: str, mesh):
    """One of `WAYS` of global arrays."""
    import jax
    from jax.sharding import PartitionSpec as P

    specs = P(None, None, "tensor"), P("tensor")
    return jax.shard_map(WAYS[way], mesh=mesh, in_specs=specs, out_specs=P(None, "tensor"), check_vma=False)


def predicted(name: str, way: str) -> dict[str, Any]:
    """Milliseconds on a topology, less what runs beside something else."""
    import jax
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from jaxllm.parallel.config import Mesh
    from jaxllm.parallel.flags import compile_with, compiler_options
    from jaxllm.parallel.sharding import make_mesh
    from jaxllm.plan.account import Layout, account
    from jaxllm.plan.hlo import parse
    from jaxllm.plan.predict import seconds
    from jaxllm.plan.topology import devices, topology

    on = topology(name)
    mesh = make_mesh(Mesh(fsdp=1, tensor=-1), devices(on))

    def shape(*sizes: int, spec: P):
        return jax.ShapeDtypeStruct(sizes, "bfloat16", sharding=NamedSharding(mesh, spec))

    x, w = shape(ROWS, LENGTH, WIDE, spec=P(None, None, "tensor")), shape(WIDE, EMBED, spec=P("tensor"))
    lowered = jax.jit(over_tensor(way, mesh)).lower(x, w)
    compiled, _, _ = compile_with(lowered, compiler_options(devices(on)[0]))
    program = parse(compiled.as_text())
    found = account(program, Layout.of(mesh, program.partitions), on.chip)
    compute, moved, hidden = sum(found.cycles.values()) / on.chip.clock, 0.0, 0.0
    for c in found.collectives:
        each = seconds(c, on, dict(mesh.shape))
        moved += c.count * each
        hidden += c.count * min(each, c.between / on.chip.clock) if c.overlapped else 0.0
    return {
        "ms": 1e3 * (compute + moved - hidden), "compute_ms": 1e3 * compute, "collectives_ms": 1e3 * moved,
        "hidden_ms": 1e3 * hidden, "collective_bytes": found.collective_bytes,
    }  # fmt: skip
