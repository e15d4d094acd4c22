"""RMSNorm as it is defined: what every kernel is tested against."""

import jax
import jax.numpy as jnp


def rms_norm(
    x: jax.Array,
    weight_D: jax.Array | None = None,
    residual: jax.Array | None = None,
    *,
    eps: float = 1e-6,
    offset: float = 0.0,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """x / rms(x) * (offset + weight) over the last dimension, in float32, rounded to x's dtype once.

    With a residual: of x + residual, rounded to x's dtype, which is returned too. Zhang and Sennrich 2019,
    arXiv:1910.07467, equation 4.
    """
    total = x if residual is None else x + residual
    y = total.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    if weight_D is not None:
        y = y * (offset + weight_D.astype(jnp.float32))
    y = y.astype(x.dtype)
    return y if residual is None else (y, total)
