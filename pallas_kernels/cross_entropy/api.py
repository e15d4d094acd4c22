"""Cross-entropy fused with the projection onto the vocabulary: logits never stand in memory whole.

Going forward, blocks of the vocabulary add to a running log-sum-exp; going backward, each block's logits are computed
again and become its gradients at once: 4 products in place of 3 (Wijmans et al. 2024, arXiv:2411.09009, without their
filter). The blocks are products that XLA does as well as can be, on every platform; what is fused is what it cannot
see: that a softmax over 128,000 logits needs few of them at a time.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.cross_entropy.terms import Terms

BLOCK = 8192  # logits of a row that stand at the same time


class _Static(NamedTuple):
    softcap: float | None
    label_smoothing: float
    z_loss: float
    block: int
    axis: str | None


def cross_entropy(
    x_RD: jax.Array,
    w_VD: jax.Array,
    targets_R: jax.Array,
    *,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    block: int = BLOCK,
    axis: str | None = None,
) -> Terms:
    """Cross-entropy of softmax(x w^T) under `targets_R`, with label smoothing and z_loss * log(Z)^2, [R] each.

    Differentiable in x and w: `loss` is, the other terms are not.

    Args:
      targets_R: ids; one that the vocabulary lacks has a logit of 0.
      softcap: logits become softcap * tanh(logits / softcap) (Gemma Team 2024, arXiv:2408.00118, section 2).
      label_smoothing: the uniform share of the target (Szegedy et al. 2015, arXiv:1512.00567, section 7).
      z_loss: Chowdhery et al. 2022, arXiv:2204.02311, section 5.
      block: logits of a row at the same time.
      axis: the mesh axis, inside `jax.shard_map`, along which the vocabulary is cut: w_VD is this device's part, and
        targets count over all. Each device has all terms, and the gradient of its x is summed over the axis.

    Raises:
      ValueError: shapes that do not match.
    """
    if x_RD.ndim != 2 or w_VD.ndim != 2 or x_RD.shape[1] != w_VD.shape[1] or targets_R.shape != x_RD.shape[:1]:
        raise ValueError(f"x {x_RD.shape}, w {w_VD.shape} and targets {targets_R.shape} must be [R, D], [V, D] and [R]")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing={label_smoothing} must be at least 0 and less than 1")
    static = _Static(softcap, label_smoothing, z_loss, min(block, w_VD.shape[0]), axis)
    return _cross_entropy(static, x_RD, w_VD, targets_R)


def _logits(static: _Static, x_RD: jax.Array, w_VD: jax.Array) -> jax.Array:
    logits_RV = jnp.einsum("RD,VD->RV", x_RD, w_VD, preferred_element_type=jnp.float32)
    return logits_RV if static.softcap is None else static.softcap * jnp.tanh(logits_RV / static.softcap)


class _Part(NamedTuple):
    """A block of the vocabulary: where it begins, its weights, and which of its ids no block before it had."""

    start: jax.Array
    w_VD: jax.Array
    ids_V: jax.Array
    new_V: jax.Array


def _part(static: _Static, w_VD: jax.Array, i: jax.Array) -> _Part:
    """The last block ends with the vocabulary, and so may begin in the one before."""
    V, block = w_VD.shape[0], static.block
    start = jnp.minimum(i * block, V - block)
    ids_V = start + jnp.arange(block)
    first = 0 if static.axis is None else lax.axis_index(static.axis) * V
    return _Part(start, lax.dynamic_slice_in_dim(w_VD, start, block), ids_V + first, ids_V >= i * block)


def _blocks(static: _Static, w_VD: jax.Array) -> int:
    return -(-w_VD.shape[0] // static.block)


def _vocabulary(static: _Static, w_VD: jax.Array) -> jax.Array | int:
    return w_VD.shape[0] * (1 if static.axis is None else lax.axis_size(static.axis))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(static: _Static, x_RD: jax.Array, w_VD: jax.Array, targets_R: jax.Array) -> Terms:
    def add(i, carry):
        top_R, sum_R, target_R, all_R = carry
        part = _part(static, w_VD, i)
        logits_RV = _logits(static, x_RD, part.w_VD)
        seen_RV = jnp.where(part.new_V, logits_RV, -jnp.inf)
        new_R = jnp.maximum(top_R, seen_RV.max(-1))
        sum_R = sum_R * jnp.exp(top_R - new_R) + jnp.exp(seen_RV - new_R[:, None]).sum(-1)
        is_target_RV = (targets_R[:, None] == part.ids_V) & part.new_V
        target_R += jnp.where(is_target_RV, logits_RV, 0).sum(-1)
        return new_R, sum_R, target_R, all_R + jnp.where(part.new_V, logits_RV, 0).sum(-1)

    zero_R = jnp.zeros_like(targets_R, jnp.float32)
    begin = zero_R - jnp.inf, zero_R, zero_R, zero_R
    if static.axis is not None:  # what devices of the axis know differs
        begin = jax.tree.map(lambda x: lax.pcast(x, static.axis, to="varying"), begin)
    top_R, sum_R, target_R, all_R = lax.fori_loop(0, _blocks(static, w_VD), add, begin)
    if static.axis is not None:
        most_R = lax.pmax(top_R, static.axis)
        sum_R, target_R, all_R = lax.psum((sum_R * jnp.exp(top_R - most_R), target_R, all_R), static.axis)
        top_R = most_R
    log_z_R = top_R + jnp.log(sum_R)
    xent_R = log_z_R - target_R
    smooth_R = log_z_R - all_R / _vocabulary(static, w_VD)
    loss_R = (1 - static.label_smoothing) * xent_R + static.label_smoothing * smooth_R + static.z_loss * log_z_R**2
    return Terms(loss_R, xent_R, log_z_R, target_R >= top_R)


def _forward(static: _Static, x_RD, w_VD, targets_R):
    terms = _cross_entropy(static, x_RD, w_VD, targets_R)
    return terms, (x_RD, w_VD, targets_R, terms.log_z)


def _backward(static: _Static, kept, given: Terms):
    x_RD, w_VD, targets_R, log_z_R = kept
    g_R1 = given.loss[:, None]
    of_p_R1 = g_R1 * (1 + 2 * static.z_loss * log_z_R[:, None])
    uniform = static.label_smoothing / _vocabulary(static, w_VD)

    def add(i, carry):
        dx_RD, dw_VD = carry
        part = _part(static, w_VD, i)
        logits_RV = _logits(static, x_RD, part.w_VD)
        is_target_RV = targets_R[:, None] == part.ids_V
        d_RV = of_p_R1 * jnp.exp(logits_RV - log_z_R[:, None])
        d_RV -= g_R1 * (jnp.where(is_target_RV, 1 - static.label_smoothing, 0) + uniform)
        if static.softcap is not None:
            d_RV *= 1 - jnp.square(logits_RV / static.softcap)
        d_RV = jnp.where(part.new_V, d_RV, 0).astype(x_RD.dtype)
        dx_RD += jnp.einsum("RV,VD->RD", d_RV, part.w_VD, preferred_element_type=jnp.float32)
        mine_VD = jnp.einsum("RV,RD->VD", d_RV, x_RD, preferred_element_type=jnp.float32).astype(w_VD.dtype)
        there_VD = lax.dynamic_slice_in_dim(dw_VD, part.start, static.block)
        return dx_RD, lax.dynamic_update_slice_in_dim(dw_VD, there_VD + mine_VD, part.start, 0)

    begin = jnp.zeros_like(x_RD, jnp.float32), jnp.zeros_like(w_VD)
    if static.axis is not None:
        begin = lax.pcast(begin[0], static.axis, to="varying"), begin[1]
    dx_RD, dw_VD = lax.fori_loop(0, _blocks(static, w_VD), add, begin)
    if static.axis is not None:
        dx_RD = lax.psum(dx_RD, static.axis)
    return dx_RD.astype(x_RD.dtype), dw_VD, None


_cross_entropy.defvjp(_forward, _backward)
