"""Positions: tables added to embeddings, rotations of queries and keys, penalties on logits."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.core.axes import placement
from jaxllm.core.shapes import Array, Float, Int, Key
from jaxllm.models import positions as config


class Rotation(NamedTuple):
    """Sines and cosines of the angles of each rotated pair; R is half the rotated size of a head."""

    sin_BTR: Float[Array, "B T R"]
    cos_BTR: Float[Array, "B T R"]
    growth_BTR: Float[Array, "B T R"] | None = None  # of queries with the position; keys shrink by it (xPos)


def rotation(
    cfg: config.RoPE, pos_BT: Int[Array, "B T"], length_BT: Int[Array, "B T"] | None, rotary_dim: int
) -> Rotation:
    """Angles pos * frequency; sines and cosines times the temperature that a scaling asks for.

    Args:
      length_BT: length of the document that a token is of, for a `cfg` of which it is asked (`by_length`).
    """
    angle_BTR = pos_BT[..., None].astype(jnp.float32) * frequencies(cfg, length_BT, rotary_dim)
    by, growth_BTR = getattr(cfg.scaling, "temperature", 1.0), None
    if cfg.xpos:  # Sun et al. 2022, arXiv:2212.10554, algorithm 1: gamma = 0.4
        rate_R = (jnp.arange(0, rotary_dim, 2) / rotary_dim + 0.4) / 1.4
        growth_BTR = rate_R ** (pos_BT[..., None].astype(jnp.float32) / cfg.xpos)
    return Rotation(by * jnp.sin(angle_BTR), by * jnp.cos(angle_BTR), growth_BTR)


def rotation_2d(
    cfg: config.RoPE2D, place_BT: Int[Array, "B T"], block_BT: Int[Array, "B T"], rotary_dim: int
) -> Rotation:
    """Angles of the first half of a head, then of the second.

    Args:
      place_BT: place in the prompt; of what follows, that of the prompt's last token.
      block_BT: place in what follows the prompt, from 1; 0 in it.
    """
    freq_R = cfg.theta ** -(jnp.arange(0, rotary_dim // 2, 2, dtype=jnp.float32) / (rotary_dim // 2))
    angle_BTR = jnp.concatenate([x[..., None].astype(jnp.float32) * freq_R for x in (place_BT, block_BT)], -1)
    return Rotation(jnp.sin(angle_BTR), jnp.cos(angle_BTR))


def frequencies(cfg: config.RoPE, length_BT: Int[Array, "B T"] | None, rotary_dim: int) -> Float[Array, "*BT R"]:
    """theta^(-2i / rotary_dim) (Su et al. 2021, arXiv:2104.09864, equation 15), as `cfg.scaling` changes it."""
    power_R = jnp.arange(0, rotary_dim, 2, dtype=jnp.float32) / rotary_dim
    freq_R = cfg.theta**-power_R
    scaling, stretch = cfg.scaling, rotary_dim / max(rotary_dim - 2, 1)
    match scaling and scaling.kind:
        case "linear":
            return freq_R / scaling.factor
        case "ntk":
            return (cfg.theta * scaling.factor**stretch) ** -power_R
        case "dynamic_ntk":
            longer_BT1 = jnp.maximum(length_BT, scaling.original)[..., None] / scaling.original
            if scaling.doubling:
                longer_BT1 = 2.0 ** jnp.sum(longer_BT1 > 2.0 ** jnp.arange(24), -1, keepdims=True)
            return (cfg.theta * (scaling.factor * longer_BT1 - (scaling.factor - 1)) ** stretch) ** -power_R
        case "yarn":
            # The dimension whose frequency turns so many times within `original`.
            at = lambda turns: (
                rotary_dim * math.log(scaling.original / (turns * 2 * math.pi)) / (2 * math.log(cfg.theta))
            )
            low, high = at(scaling.beta_fast), at(scaling.beta_slow)
            if scaling.truncate:
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, rotary_dim - 1)
            ramp_R = jnp.clip((jnp.arange(rotary_dim // 2) - low) / max(high - low, 1e-3), 0, 1)
            return freq_R * (1 - ramp_R + ramp_R / scaling.factor)
        case "llama3":
            turns_R = scaling.original * freq_R / (2 * math.pi)
            keep_R = jnp.clip((turns_R - scaling.low) / (scaling.high - scaling.low), 0, 1)
            return freq_R * (keep_R + (1 - keep_R) / scaling.factor)
        case "longrope":
            short_R, long_R = jnp.array(scaling.short), jnp.array(scaling.long)
            return freq_R / jnp.where(length_BT[..., None] > scaling.original, long_R, short_R)
    return freq_R


def document_lengths(pos_BT: Int[Array, "B T"], document_BT: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """One more than the highest position in the document of each token."""
    B, T = pos_BT.shape
    place_BT = jnp.clip(document_BT, 0, T)  # a row has no more documents than tokens, and padding
    row_BT = jnp.arange(B)[:, None]
    return jnp.zeros((B, T + 1), pos_BT.dtype).at[row_BT, place_BT].max(pos_BT + 1)[row_BT, place_BT]


def rotate(
    cfg: config.RoPE | config.RoPE2D, x_BTNH: Float[Array, "B T N H"], by: Rotation, *, keys: bool = False
) -> Float[Array, "B T N H"]:
    """The first 2R elements of each head rotated pair by pair in float32; the rest as they were."""
    if by.growth_BTR is not None:
        by = Rotation(*(x / by.growth_BTR if keys else x * by.growth_BTR for x in (by.sin_BTR, by.cos_BTR)))
    rotary_dim = 2 * by.sin_BTR.shape[-1]
    x, rest = x_BTNH[..., :rotary_dim], x_BTNH[..., rotary_dim:]
    place = placement()
    if cfg.kind == "rope_2d":  # each half of a head has halves: first those that stand first
        quarters = (*x.shape[:-1], 2, 2, rotary_dim // 4)
        x = x.reshape(quarters).swapaxes(-3, -2).reshape(x.shape)
    turn = _rotate_by_product if place is not None and place.platform == "tpu" else _rotate_by_halves
    y = turn(cfg, x, by.sin_BTR[:, :, None], by.cos_BTR[:, :, None]).astype(x_BTNH.dtype)
    if cfg.kind == "rope_2d":
        y = y.reshape(quarters).swapaxes(-3, -2).reshape(x.shape)
    return jnp.concatenate([y, rest], -1) if rest.shape[-1] else y


def _rotate_by_halves(cfg: config.RoPE | config.RoPE2D, x: Array, sin: Array, cos: Array) -> Array:
    x = x.astype(jnp.float32)
    a, b = (x[..., ::2], x[..., 1::2]) if cfg.interleaved else jnp.split(x, 2, axis=-1)
    pair = (a * cos - b * sin, b * cos + a * sin)
    return jnp.stack(pair, -1).reshape(x.shape) if cfg.interleaved else jnp.concatenate(pair, -1)


def _rotate_by_product(cfg: config.RoPE | config.RoPE2D, x: Array, sin: Array, cos: Array) -> Array:
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
    """sin in even, cos in odd places (Vaswani et al. 2017, arXiv:1706.03762, section 3.5), or one half each."""
    steps = jnp.arange((embed + 1) // 2, dtype=jnp.float32)
    freq = cfg.base ** -(steps / (embed // 2 - 1) if cfg.reaches_base else 2 * steps / embed)
    angle = (pos_BT[..., None] + cfg.offset).astype(jnp.float32) * freq
    both = (jnp.sin(angle), jnp.cos(angle))
    if cfg.halves:
        return jnp.concatenate(both, -1)[..., :embed]
    return jnp.stack(both, -1).reshape(*pos_BT.shape, -1)[..., :embed]


def spread(pos_BT: Int[Array, "B T"], context: int, among: int, key: Key[Array, ""] | None) -> Int[Array, "B T"]:
    """Positions below `context` as others below `among`, in the same order (Ruoss et al. 2023, arXiv:2305.16843).

    Each row draws its own without repetition; without a key, all rows have the same ones, always.
    """
    rows = 1 if key is None else pos_BT.shape[0]
    drawn_BL = jax.random.uniform(jax.random.key(0) if key is None else jax.random.fold_in(key, among), (rows, among))
    table_BC = jnp.sort(jnp.argsort(drawn_BL, axis=-1)[:, :context], axis=-1)
    table_BC = jnp.broadcast_to(table_BC, (pos_BT.shape[0], context))
    return jnp.take_along_axis(table_BC, jnp.clip(pos_BT, 0, context - 1), axis=-1)


def alibi_slopes(cfg: config.ALiBi, num_heads: int) -> Float[Array, " N"]:
    """2^(-steepest i/n) for n a power of two; else those of the next lower power and every other of the next higher.

    Press et al. 2021, arXiv:2108.12409, section 3; the rule for other n is that of its published code. MPT takes those
    of the next higher power, the odd ones first.
    """

    def powers(n: int) -> list[float]:
        return [2 ** (-cfg.steepest * (i + 1) / n) for i in range(n)]

    lower = 2 ** math.floor(math.log2(num_heads))
    if lower == num_heads:
        slopes = powers(lower)
    elif cfg.order == "odd_first":
        higher = powers(2 * lower)
        slopes = (higher[1::2] + higher[::2])[:num_heads]
    else:
        slopes = powers(lower) + powers(2 * lower)[::2][: num_heads - lower]
    return jnp.array(slopes, jnp.float32)
