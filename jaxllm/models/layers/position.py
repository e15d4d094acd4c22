"""Positions: tables added to embeddings, rotations of queries and keys, penalties on logits."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.core.axes import placement
from jaxllm.core.shapes import Array, Float, Int
from jaxllm.models import config


class Rotation(NamedTuple):
    """Sines and cosines of the angles of each rotated pair; R is half the rotated size of a head."""

    sin_BTR: Float[Array, "B T R"]
    cos_BTR: Float[Array, "B T R"]


def rotation(cfg: config.RoPE, pos_BT: Int[Array, "B T"], rotary_dim: int) -> Rotation:
    """Angles pos * theta^(-2i / rotary_dim) (Su et al. 2021, arXiv:2104.09864, equation 15)."""
    freq_R = cfg.theta ** (-jnp.arange(0, rotary_dim, 2, dtype=jnp.float32) / rotary_dim)
    angle_BTR = pos_BT[..., None].astype(jnp.float32) * freq_R
    return Rotation(jnp.sin(angle_BTR), jnp.cos(angle_BTR))


def rotate(cfg: config.RoPE, x_BTNH: Float[Array, "B T N H"], by: Rotation) -> Float[Array, "B T N H"]:
    """The first 2R elements of each head rotated pair by pair in float32; the rest as they were."""
    rotary_dim = 2 * by.sin_BTR.shape[-1]
    x, rest = x_BTNH[..., :rotary_dim], x_BTNH[..., rotary_dim:]
    place = placement()
    turn = _rotate_by_product if place is not None and place.platform == "tpu" else _rotate_by_halves
    y = turn(cfg, x, by.sin_BTR[:, :, None], by.cos_BTR[:, :, None]).astype(x_BTNH.dtype)
    return jnp.concatenate([y, rest], -1) if rest.shape[-1] else y


def _rotate_by_halves(cfg: config.RoPE, x: Array, sin: Array, cos: Array) -> Array:
    x = x.astype(jnp.float32)
    a, b = (x[..., ::2], x[..., 1::2]) if cfg.interleaved else jnp.split(x, 2, axis=-1)
    pair = (a * cos - b * sin, b * cos + a * sin)
    return jnp.stack(pair, -1).reshape(x.shape) if cfg.interleaved else jnp.concatenate(pair, -1)


def _rotate_by_product(cfg: config.RoPE, x: Array, sin: Array, cos: Array) -> Array:
    """The same on a TPU, where half of a vector register cannot be addressed but a product is nearly free.

    x cos + (x P) sin, where P brings to each element its partner, with the sign of its sine: a matrix of one +-1 a
    column, so nothing is rounded.
    """
    size = x.shape[-1]
    i = np.arange(size)
    partner = i ^ 1 if cfg.interleaved else (i + size // 2) % size
    first = i % 2 == 0 if cfg.interleaved else i < size // 2
    swap = np.zeros((size, size), np.float32)
    swap[partner, i] = np.where(first, -1, 1)
    both = (lambda t: jnp.repeat(t, 2, -1)) if cfg.interleaved else (lambda t: jnp.concatenate([t, t], -1))
    swapped = jax.lax.dot_general(
        x, jnp.asarray(swap, x.dtype), (((x.ndim - 1,), (0,)), ((), ())), precision="highest",
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    return x.astype(jnp.float32) * both(cos) + swapped * both(sin)


def sinusoids(cfg: config.Sinusoidal, pos_BT: Int[Array, "B T"], embed: int) -> Float[Array, "B T D"]:
    """sin in even, cos in odd places (Vaswani et al. 2017, arXiv:1706.03762, section 3.5)."""
    freq = cfg.base ** (-jnp.arange(0, embed, 2, dtype=jnp.float32) / embed)
    angle = pos_BT[..., None].astype(jnp.float32) * freq
    both = jnp.stack([jnp.sin(angle), jnp.cos(angle)], -1)
    return both.reshape(*pos_BT.shape, -1)[..., :embed]


def alibi_slopes(num_heads: int) -> Float[Array, " N"]:
    """2^(-8i/n) for n a power of two; else those of the next lower power and every other of the next higher.

    Press et al. 2021, arXiv:2108.12409, section 3; the rule for other n is that of its published code.
    """

    def powers(n: int) -> list[float]:
        return [2 ** (-8 * (i + 1) / n) for i in range(n)]

    lower = 2 ** math.floor(math.log2(num_heads))
    return jnp.array(powers(lower) + powers(2 * lower)[::2][: num_heads - lower], jnp.float32)
