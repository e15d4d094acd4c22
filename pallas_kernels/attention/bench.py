"""Attention on the GPU at hand, beside cuDNN's and JAX's own Pallas kernel, in turns in one run.

    python -m pallas_kernels.attention.bench [--json FILE]

or, without any, the TPU's kernels beside JAX's own, by cycles that the TPU's compiler simulates (extra: tpu):

    python -m pallas_kernels.attention.bench --static v5e|v5p|v6e|tpu7x [--tune] [--json FILE]

Causal, bfloat16; `ratio` is the smallest of (the best peer's time / ours) over forward and forward and backward.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention import static
from pallas_kernels.attention.api import attention
from pallas_kernels.attention.masks import Causal, Documents, Full, Window
from pallas_kernels.static import CHIPS
from pallas_kernels.timing import Times, in_turns, machine, options, versions, write

CASES = [(2, 8192, 16, 16, 128), (1, 16384, 16, 16, 128), (2, 8192, 32, 8, 128), (2, 8192, 32, 32, 64)]  # B, T, N, K, H


def cudnn(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def stock(q, k, v):
    """JAX's kernel as it comes; it has no causal backward pass."""
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    config = attention_mgpu.TuningConfig(block_q=64, block_kv=128, max_concurrent_steps=2, causal=True)
    return attention_mgpu.attention(q, k, v, config)


def case(B: int, T: int, N: int, K: int, H: int, rounds: int) -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, do = (jax.random.normal(x, (B, T, n, H), jnp.bfloat16) for x, n in zip(keys, (N, K, K, N), strict=True))
    ours = functools.partial(attention, mask=Causal(), implementation="gpu")
    half = [x.astype(jnp.float16) for x in (q * H**-0.5, k, v)]  # it takes no bfloat16, and does not scale

    def gradients(f, q, k, v, do):
        return jax.vjp(f, q, k, v)[1](do)

    both = {name: jax.jit(functools.partial(gradients, f)) for name, f in (("ours", ours), ("cudnn", cudnn))}
    forward = {"ours": jax.jit(ours), "cudnn": jax.jit(cudnn)}
    flops = 4 * B * N * H * T * T / 2
    found = {}
    for name, peers, args, size in (
        ("forward", forward, (q, k, v), flops), ("forward and backward", both, (q, k, v, do), 3.5 * flops)
    ):  # fmt: skip
        runs = {who: functools.partial(f, *args) for who, f in peers.items()}
        if name == "forward":
            runs["stock"] = functools.partial(jax.jit(stock), *half)
        times = in_turns(runs, rounds=rounds)
        found[name] = {who: row(t, size) for who, t in times.items()}
        found[name]["ratio"] = min(t.median for who, t in times.items() if who != "ours") / times["ours"].median
    return {"B": B, "T": T, "N": N, "K": K, "H": H, **found}


def row(times: Times, flops: float) -> dict[str, Any]:
    return {"ms": times.ms, "tflops": flops / times.median / 1e12}


def masked(rounds: int) -> dict[str, float]:
    """Times of masks in those of the full causal one, T = 8192."""
    B, T = 2, 8192
    q, k, v = (jax.random.normal(x, (B, T, 16, 128), jnp.bfloat16) for x in jax.random.split(jax.random.key(0), 3))
    documents = jnp.tile(jnp.repeat(jnp.arange(8), T // 8), (B, 1))
    masks = {
        "causal": Causal(), "full": Full(), "window of 1024": Causal() & Window(1023),
        "8 documents": Causal() & Documents(documents, documents),
    }  # fmt: skip
    run = jax.jit(functools.partial(attention, implementation="gpu"))
    times = in_turns({name: functools.partial(run, q, k, v, mask=mask) for name, mask in masks.items()}, rounds=rounds)
    return {name: t.median / times["causal"].median for name, t in times.items()}


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--static", choices=CHIPS, metavar="CHIP", help=f"one of {', '.join(CHIPS)}")
    parser.add_argument("--tune", action="store_true", help="try all sizes of blocks")
    args = parser.parse_args()
    if args.static:
        return write(args.json, static.measured(args.static, tune=args.tune) | {"versions": versions()})
    cases = [case(*sizes, args.rounds) for sizes in CASES]
    ratio = min(c[name]["ratio"] for c in cases for name in ("forward", "forward and backward"))
    write(args.json, {"ratio": ratio, "machine": machine(), "cases": cases, "masks": masked(args.rounds)})


if __name__ == "__main__":
    main()
