"""What kernels make of products: logits, in exponents of 2, and what the backward pass needs to know of a query."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.attention.masks import Mask

LOG2E = math.log2(math.e)


def unit(scale: float, softcap: float | None, sloped: bool) -> float:
    """What turns logits, as `bent` gives them and slopes are taken off, into exponents of 2."""
    return LOG2E * (scale if softcap is None and not sloped else 1)


def bent(s, scale: float, softcap: float | None, sloped: bool, tanh: Callable = jnp.tanh):
    """Logits of products, before slopes are taken off, and their derivatives, but for `scale`.

    If nothing bends them, they are left undivided by `scale`, and the derivatives, all 1, are None.
    """
    if softcap is not None:
        t = tanh(s * (scale / softcap))
        return softcap * t, 1 - t * t
    return (s * scale if sloped else s), None


def of_queries(o_BTNV: jax.Array, do_BTNV: jax.Array, lse_BNT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log-sum-exps as exponents of 2, and sums of o * do, [B, N, T]: what the gradients of logits are made of.

    Of a query that sees nothing, or is there to fill a block, weights are to be 0: its exponent is infinite.
    """
    delta_BNT = jnp.einsum("BTNV,BTNV->BNT", o_BTNV, do_BTNV, preferred_element_type=jnp.float32)
    return jnp.where(lse_BNT == -jnp.inf, jnp.inf, lse_BNT * LOG2E), delta_BNT


def any_head(q_BTNH: jax.Array, v_BSKV: jax.Array) -> str | None:
    """Why kernels that take floating-point numbers, and heads of 32 to 256, do not take these; None if they do."""
    H, V = q_BTNH.shape[3], v_BSKV.shape[3]
    if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"it takes bfloat16, float16 and float32, not {q_BTNH.dtype}"
    if not (32 <= H <= 256 and 32 <= V <= 256):
        return f"it takes heads of 32 to 256, not of {H} with values of {V}"
    return None


def padded(mask: Mask, q_block: int, k_block: int) -> Mask:
    """With arrays of whole blocks of queries and of keys."""
    return mask.mapped(lambda x, role: x if role == "row" else whole(x, q_block if role == "queries" else k_block))


def whole(x: jax.Array, block: int, axis: int = 1, fill: float = 0.0) -> jax.Array:
    """Padded to whole blocks."""
    pads = [(0, -n % block if i == axis else 0) for i, n in enumerate(x.shape)]
    return jnp.pad(x, pads, constant_values=fill) if any(p[1] for p in pads) else x
