"""What is computed in which type, and the loss scale that keeps float16 gradients from vanishing."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.core.shapes import Array, Bool, Float, Int, PyTree
from jaxllm.train.config import Float16, Precision

MAX_SCALE = 2.0**24  # where doubling stops: float32 holds loss x scale exactly enough, gradients overflow well before


class Policy(NamedTuple):
    """Master weights, gradients of them and optimizer state are float32; the model computes in `compute`."""

    compute: jnp.dtype

    def cast(self, params: PyTree) -> PyTree:
        """`params` as the model computes with them; integer leaves stay. Differentiate through it: gradients come
        back in the type of the master weights."""
        return jax.tree.map(lambda x: x.astype(self.compute) if jnp.issubdtype(x.dtype, jnp.floating) else x, params)


def policy(cfg: Precision) -> Policy:
    """The policy that `precision:` names."""
    return Policy(jnp.dtype(cfg.kind))


class LossScale(NamedTuple):
    """Dynamic loss scale (Micikevicius et al. 2017, arXiv:1710.03740, section 3.2): part of the train state."""

    scale: Float[Array, ""]  # what the loss is multiplied by, the gradients divided by
    good_steps: Int[Array, ""]  # finite steps since it last changed
    overflows: Int[Array, ""]  # steps skipped for an overflow, over the whole run


def init_scale(cfg: Precision) -> LossScale | None:
    """The scale a run starts with; None where the type needs none (bfloat16 has float32's exponent)."""
    if not isinstance(cfg, Float16):
        return None
    return LossScale(jnp.float32(cfg.initial_scale), jnp.int32(0), jnp.int32(0))


def adjust(cfg: Float16, state: LossScale, finite: Bool[Array, ""]) -> LossScale:
    """The scale after a step whose gradients were finite, or overflowed (and are to be thrown away).

    An overflow halves it, not below `min_scale`; `growth_interval` finite steps in a row double it, up to MAX_SCALE.
    """
    good = jnp.where(finite, state.good_steps + 1, 0)
    grow = good >= cfg.growth_interval
    larger = jnp.maximum(jnp.minimum(2 * state.scale, MAX_SCALE), state.scale)  # a start above the cap stays there
    smaller = jnp.maximum(state.scale / 2, jnp.minimum(cfg.min_scale, state.scale))
    scale = jnp.where(finite, jnp.where(grow, larger, state.scale), smaller)
    return LossScale(scale, jnp.where(grow, 0, good), state.overflows + jnp.where(finite, 0, 1))
