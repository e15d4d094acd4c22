"""Attention over a paged cache as it is defined."""

import jax
import jax.numpy as jnp

from pallas_kernels.attention.reference import capped, softmax


def paged_attention(
    q_BTNH: jax.Array,
    k_PKLH: jax.Array,
    v_PKLH: jax.Array,
    table_BM: jax.Array,
    length_B: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    sinks: int = 0,
    softcap: float | None = None,
    k_scale_PKL: jax.Array | None = None,
    v_scale_PKL: jax.Array | None = None,
) -> jax.Array:
    """What the last T tokens of each sequence gather from it, [B, T, N, H] of q's dtype; 0 of what sees nothing.

    Kwon et al. 2023, arXiv:2309.06180, section 4.1.

    Args:
      k_PKLH: P pages of L tokens, heads before tokens.
      table_BM: the pages of each sequence in order; those behind its last one must exist, and hold finite numbers.
      length_B: tokens of each sequence, those of q included.
      window: a token sees itself and `window` - 1 before it.
      sinks: the first tokens, seen by all in spite of the window.
      k_scale_PKL: what keys are to be multiplied with, of a quantised cache.
    """
    (B, T, N, H), (_, K, L, _) = q_BTNH.shape, k_PKLH.shape

    def gathered(pages_PKLX: jax.Array) -> jax.Array:
        x_BMKLX = pages_PKLX[table_BM].astype(jnp.float32)
        return x_BMKLX.swapaxes(1, 2).reshape(B, K, -1, *pages_PKLX.shape[3:])

    k_BKSH, v_BKSH = gathered(k_PKLH), gathered(v_PKLH)
    if k_scale_PKL is not None:
        k_BKSH *= gathered(k_scale_PKL)[..., None]
    if v_scale_PKL is not None:
        v_BKSH *= gathered(v_scale_PKL)[..., None]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H).astype(jnp.float32)
    high = dict(precision="highest", preferred_element_type=jnp.float32)
    logits_BKGTS = jnp.einsum("BTKGH,BKSH->BKGTS", q_BTKGH, k_BKSH, **high) * scale
    q_BT1 = (length_B[:, None] - T + jnp.arange(T))[..., None]
    k_S = jnp.arange(table_BM.shape[1] * L)
    seen_BTS = (k_S <= q_BT1) & (q_BT1 >= 0)
    if window is not None:
        seen_BTS &= (k_S > q_BT1 - window) | (k_S < sinks)
    weights_BKGTS, _ = softmax(capped(logits_BKGTS, softcap), seen_BTS[:, None, None])
    o_BTKGH = jnp.einsum("BKGTS,BKSH->BTKGH", weights_BKGTS, v_BKSH, **high)
    return o_BTKGH.reshape(B, T, N, H).astype(q_BTNH.dtype)
