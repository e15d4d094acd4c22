"""JAX's own TPU flash attention (`jax.experimental.pallas.ops.tpu.splash_attention`) for packed rows.

Forward and backward without an array of [T, S] (Dao et al. 2022, arXiv:2205.14135). JAX is imported as a kernel is
asked for: its package is slow to load and no CPU run needs it.
"""

import functools

import jax
import jax.numpy as jnp

LANES = 128  # of a TPU's vector registers: what block sizes are multiples of
BLOCK = 512  # queries and keys of a block


def applies(q_BTNH: jax.Array, k_BSKH: jax.Array) -> bool:
    """Whether the kernel takes arrays of these shapes."""
    T, S, H = q_BTNH.shape[1], k_BSKH.shape[1], q_BTNH.shape[3]
    return T == S and T % LANES == 0 and H % 64 == 0


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    document_BT: jax.Array,
    *,
    causal: bool,
    window: int | None = None,
    scale: float,
    softcap: float | None = None,
    name: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """softmax(q k^T * scale) v within documents, [B, T, N, H]; grouped heads as they are.

    Args:
      document_BT: tokens see their own document only.
      window: a query sees itself and `window` - 1 tokens before it (and, unless causal, all after it).
      name: what rematerialisation policies know the result (and its log-sum-exp) by.
      interpret: runs on any platform, slowly: for tests.
    """
    N, T = q_BTNH.shape[2], q_BTNH.shape[1]
    kernel = _kernel(N, T, causal, window, softcap, name, interpret)
    q_BNTH = (q_BTNH * jnp.asarray(scale, q_BTNH.dtype)).swapaxes(1, 2)
    o_BNTH = jax.vmap(kernel)(q_BNTH, k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2), document_BT)
    return o_BNTH.swapaxes(1, 2)


@functools.cache
def _kernel(
    heads: int, T: int, causal: bool, window: int | None, softcap: float | None, name: str | None, interpret: bool
):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    if window is not None:
        mask = masks.LocalMask((T, T), (window - 1, 0 if causal else None), 0)
    else:
        mask = masks.CausalMask((T, T)) if causal else masks.FullMask((T, T))
    b = next(n for n in (BLOCK, 256, LANES) if T % n == 0)
    sizes = splash.BlockSizes(
        block_q=b, block_kv=b, block_kv_compute=b, block_q_dkv=b, block_kv_dkv=b, block_kv_dkv_compute=b,
        block_q_dq=b, block_kv_dq=b,
    )  # fmt: skip
    with jax.ensure_compile_time_eval():
        made = splash.make_splash_mha(
            masks.MultiHeadMask([mask] * heads), block_sizes=sizes, head_shards=1, q_seq_shards=1,
            attn_logits_soft_cap=softcap, residual_checkpoint_name=name, interpret=interpret,
        )  # fmt: skip
    return lambda q, k, v, document: made(q, k, v, segment_ids=splash.SegmentIds(document, document))
