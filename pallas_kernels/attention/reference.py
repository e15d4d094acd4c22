"""Attention as it is defined: what every kernel is tested against."""

import jax
import jax.numpy as jnp

from pallas_kernels.attention import dropout
from pallas_kernels.attention.masks import Mask, dense


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKV: jax.Array,
    mask: Mask,
    *,
    scale: float,
    softcap: float | None = None,
    slopes_N: jax.Array | None = None,
    values_NX: jax.Array | None = None,
    shift: int = 0,
    rate: float = 0.0,
    seed: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """softmax(q k^T * scale) v over the visible keys, and the log of its denominator, [B, N, T] in float32.

    A query that sees nothing gathers 0, and its log is -inf. Vaswani et al. 2017, arXiv:1706.03762, equation 1;
    grouped heads: Ainslie et al. 2023, arXiv:2305.13245; soft cap: Gemma Team 2024, arXiv:2408.00118, section 2;
    slopes: Press et al. 2021, arXiv:2108.12409.

    Args:
      slopes_N: -slope * distance is added to logits.
      values_NX: values of k - q + T - 1, added to logits.
      shift: query i stands at place i + shift of the keys, for slopes.
      rate: share of the weights that are dropped (Srivastava et al. 2014), chosen by `dropout.grown` of `seed`.
    """
    (B, T, N, H), (S, K) = q_BTNH.shape, k_BSKH.shape[1:3]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    high = dict(precision="highest", preferred_element_type=jnp.float32)
    logits_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, **high) * scale
    logits_BKGTS = capped(logits_BKGTS, softcap)
    if slopes_N is not None:
        distance_TS = jnp.abs(jnp.arange(T)[:, None] + shift - jnp.arange(S)[None, :])
        logits_BKGTS -= slopes_N.reshape(K, N // K, 1, 1) * distance_TS
    if values_NX is not None:
        x_TS = jnp.arange(S)[None, :] - jnp.arange(T)[:, None] + T - 1
        logits_BKGTS += values_NX.astype(jnp.float32)[:, x_TS].reshape(K, N // K, T, S)
    seen_B11TS = jnp.asarray(dense(mask, T, S))[:, None, None]
    weights_BKGTS, log_BKGT = softmax(logits_BKGTS, seen_B11TS)
    if rate:
        head = jnp.arange(B * N, dtype=jnp.int32).reshape(B, K, N // K, 1, 1)
        places = (jnp.arange(n, dtype=jnp.int32) for n in (T, S))
        weights_BKGTS *= dropout.grown(rate, seed, head, *jnp.meshgrid(*places, indexing="ij"))
    o_BTKGV = jnp.einsum("BKGTS,BSKV->BTKGV", weights_BKGTS, v_BSKV.astype(jnp.float32), **high)
    return o_BTKGV.reshape(B, T, N, -1).astype(v_BSKV.dtype), log_BKGT.reshape(B, N, T)


def capped(logits: jax.Array, softcap: float | None) -> jax.Array:
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def softmax(logits: jax.Array, seen: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Over the last axis, of what is seen, and the log of its denominator; 0 and -inf where nothing is."""
    logits = jnp.where(seen, logits, -jnp.inf)
    top = jnp.maximum(logits.max(-1, keepdims=True), jnp.finfo(jnp.float32).min)
    weights = jnp.where(seen, jnp.exp(logits - jax.lax.stop_gradient(top)), 0)
    total = weights.sum(-1, keepdims=True)
    some = total > 0
    total = jnp.where(some, total, 1)
    return weights / total, jnp.where(some, top + jnp.log(total), -jnp.inf)[..., 0]
