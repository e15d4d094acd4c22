"""Gradients that cross mesh axis `data` as 8-bit integers, and what that leaves out, added to the next step's.

Each share of `data` is a replica that computes the gradient of its rows alone; the replicas exchange them by
`parallel.compress.all_reduce`. What rounding has taken so far is part of the train state, one residual a replica:
over a run, the sum of all gradients used and of the last residuals is the sum of the exact gradients.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.core.shapes import Array, Key, PyTree
from jaxllm.models.module import Axes, Params
from jaxllm.parallel.collectives import by_device
from jaxllm.parallel.compress import all_reduce
from jaxllm.parallel.config import Compression, Rules
from jaxllm.parallel.sharding import shardings
from jaxllm.train import replicas


class Fed(NamedTuple):
    """`TrainState.opt` of such a run."""

    opt: PyTree  # optimizer state
    residual: Params  # what each replica has yet to give to the mean gradient


def start(params: Params, axes: Axes, count: int) -> Params:
    """Residuals before the first step."""
    return {name: jnp.zeros_like(replicas.copies(x, axes[name], count), jnp.float32) for name, x in params.items()}


def places(mesh: jax.sharding.Mesh, gradients: Rules, residual: Params, axes: Axes) -> dict[str, Any]:
    """Where residuals of these shapes lie."""
    return shardings(mesh, gradients, {name: replicas.spread(axes[name]) for name in residual}, residual)


def by_replica(gradients: Callable, axes: Axes, count: int) -> Callable:
    """Like `gradients`: (batch, key) -> (gradients, weight, sums), but with an axis of replicas in each gradient."""
    dims = {name: replicas.dim(a) for name, a in axes.items()}

    def run(batch: PyTree, key: Key[Array, ""] | None) -> tuple[Params, Array, PyTree]:
        keys = None if key is None else jax.random.split(key, count)
        mapped = replicas.over(gradients, in_axes=(0, 0), out_axes=(dims, 0, 0))
        grads, weight, sums = mapped(replicas.rows(batch, count), keys)
        return grads, jnp.sum(weight), jax.tree.map(lambda x: jnp.sum(x, 0), sums)

    return run


def exchange(
    cfg: Compression,
    mesh: jax.sharding.Mesh,
    residual_at: dict[str, Any],
    gradients_at: dict[str, Any],
    axes: Axes,
    grads: Params,
    residual: Params,
) -> tuple[Params, Params]:
    """The sum over replicas of gradients and residuals, and the residuals that are left.

    Args:
      residual_at: shardings of `residual`, and of `grads`.
      gradients_at: shardings of the sum.
    """
    specs, summed = ({name: s.spec for name, s in at.items()} for at in (residual_at, gradients_at))

    def local(grads: Params, residual: Params) -> tuple[Params, Params]:
        total, lost = {}, {}
        for name, g in grads.items():
            total[name], lost[name] = all_reduce(g + residual[name], replicas.AXIS, cfg.block)
            total[name] = jnp.squeeze(total[name], replicas.dim(axes[name]))
        return total, lost

    return by_device(local, mesh, (specs, specs), (summed, specs))(grads, residual)
