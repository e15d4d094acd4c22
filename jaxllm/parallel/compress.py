"""Sums over a mesh axis that travel as 8-bit integers.

A float32 all-reduce sends every value twice (reduce-scatter, all-gather), 4 bytes each time. Here both times it is one
byte, and a float32 scale a block: what each rounding loses comes back, to be added to what is summed next (error
feedback: Seide et al. 2014, "1-bit stochastic gradient descent"; Karimireddy et al. 2019, arXiv:1901.09847, show that
it converges where rounding alone does not).
"""

import jax
import jax.numpy as jnp

from jaxllm.core.shapes import Array, Float, Int

LARGEST = 127  # int8 without -128: symmetric


def quantise(x: Float[Array, "... n b"]) -> tuple[Int[Array, "... n b"], Float[Array, "... n"]]:
    """Blocks of `b` values as integers times one scale each: absmax / 127 (Dettmers et al. 2021, arXiv:2110.02861).

    A block that is not finite has a scale that is not: `dequantise` gives nan there.
    """
    scale = jnp.max(jnp.abs(x), -1) / LARGEST
    return jnp.round(x / jnp.where(scale == 0, 1, scale)[..., None]).astype(jnp.int8), scale


def dequantise(q: Int[Array, "... n b"], scale: Float[Array, "... n"]) -> Float[Array, "... n b"]:
    return q.astype(jnp.float32) * scale[..., None]


def all_reduce(x: Float[Array, "..."], axis: str, block: int) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """The sum of `x` over mesh axis `axis` (under shard_map), about; and what this device's roundings took from it.

    Each device sums the share of the values that it owns, of which it gets everyone's integers, and sends it to all,
    rounded again. Over all devices and values, sum + lost = exact sum, up to float32's own rounding; the sum has the
    same bits everywhere.
    """
    n = jax.lax.axis_size(axis)
    blocks = -(-x.size // (n * block))  # of a share
    flat = jnp.pad(x.astype(jnp.float32).reshape(-1), (0, n * blocks * block - x.size))
    mine = flat.reshape(n, blocks, block)  # by owner

    q, scale = quantise(mine)
    lost = mine - dequantise(q, scale)
    exchange = lambda a: jax.lax.all_to_all(a, axis, split_axis=0, concat_axis=0, tiled=True)
    share = jnp.sum(dequantise(exchange(q), exchange(scale)), 0)  # by sender, before

    q, scale = quantise(share)
    lost = lost.at[jax.lax.axis_index(axis)].add(share - dequantise(q, scale))
    gather = lambda a: jax.lax.all_gather(a, axis)
    total = dequantise(gather(q), gather(scale))
    cut = lambda a: a.reshape(-1)[: x.size].reshape(x.shape)
    return cut(total), cut(lost)
