"""Attention over a paged cache on the GPU at hand: bytes of cache read a second.

    python -m pallas_kernels.paged_attention.bench [--json FILE]

Beside it, in turns: cuDNN's attention over the same keys and values where they lie in one piece, without a mask; and
what a copy moves, read and written. `ratio` is the smallest of (cuDNN's time / ours) of one token, bfloat16.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.paged_attention.api import paged_attention
from pallas_kernels.timing import in_turns, machine, options, write

GROUPS, HEADS, SIZE = 8, 8, 128  # query heads of a key head, key heads, their size
CASES = [
    (128, 8192, 1, 64, "bfloat16"),
    (128, 8192, 1, 128, "bfloat16"),
    (128, 8192, 1, 16, "bfloat16"),
    (128, 8192, 8, 64, "bfloat16"),
    (128, 8192, 1, 64, "int8"),
    (128, 8192, 1, 64, "float8_e4m3fn"),
    (8, 32768, 1, 64, "bfloat16"),
    (1, 131072, 1, 64, "bfloat16"),
]  # fmt: skip; sequences, their tokens, tokens of a query, of a page


def case(B: int, S: int, T: int, L: int, dtype: str, rounds: int) -> dict[str, Any]:
    P, N = B * S // L, GROUPS * HEADS
    keys = jax.random.split(jax.random.key(0), 4)

    @functools.partial(jax.jit, static_argnums=1)
    def drawn(key, shape):
        x = jax.random.normal(key, shape, jnp.bfloat16)
        return x if dtype == "bfloat16" else (20 * x).astype(dtype)

    k, v = (drawn(key, (P, HEADS, L, SIZE)) for key in keys[:2])
    scales = {} if dtype == "bfloat16" else {n: jnp.full((P, HEADS, L), 0.05) for n in ("k_scale_PKL", "v_scale_PKL")}
    table = jax.random.permutation(keys[2], P).reshape(B, -1).astype(jnp.int32)
    q = jax.random.normal(keys[3], (B, T, N, SIZE), jnp.bfloat16)
    run = jax.jit(functools.partial(paged_attention, scale=SIZE**-0.5, implementation="gpu"))
    runs = {"ours": functools.partial(run, q, k, v, table, jnp.full(B, S), **scales)}
    if dtype == "bfloat16":
        shape = (B, S, HEADS, SIZE)
        whole = jax.jit(functools.partial(jax.nn.dot_product_attention, implementation="cudnn"))
        runs["cudnn, not paged"] = functools.partial(whole, q, k.reshape(shape), v.reshape(shape))
    times = in_turns(runs, rounds=rounds)
    size = sum(x.nbytes for x in (k, v, *scales.values()))
    found = {n: {"ms": t.ms, "terabytes_per_second": size / t.median / 1e12} for n, t in times.items()}
    return {"B": B, "S": S, "T": T, "page": L, "dtype": dtype, "bytes": size, **found}


def copy(rounds: int) -> float:
    """Terabytes a second, read and written."""
    x = jnp.zeros(1 << 30, jnp.bfloat16)
    times = in_turns({"copy": functools.partial(jax.jit(lambda x: x + 1), x)}, rounds=rounds)
    return 2 * x.nbytes / times["copy"].median / 1e12


def main() -> None:
    args = options(__doc__).parse_args()
    cases = [case(*sizes, args.rounds) for sizes in CASES]
    peer, rate = "cudnn, not paged", "terabytes_per_second"
    ratio = min(c["ours"][rate] / c[peer][rate] for c in cases if peer in c and c["T"] == 1)
    write(args.json, {"ratio": ratio, "copy": copy(args.rounds), "machine": machine(), "cases": cases})


if __name__ == "__main__":
    main()
