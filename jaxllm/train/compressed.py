"""Gradients that cross mesh axis `data` as 8-bit integers, and what that leaves out, added to the next step's.

Each share of `data` is a replica that computes the gradient of its rows alone; the replicas exchange them by
`parallel.compress.all_reduce`. What rounding has taken so far is part of the train state, one residual a replica:
over a run, the sum of all gradients used and of the last residuals is the sum of the exact gradients.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxllm.core.shapes import Array, Bool, Key, PyTree
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


def by_replica(gradients: Callable, where: dict[str, Any], rules: Rules, axes: Axes) -> Callable:
    """Like `gradients`: (weights, batch, key) -> (gradients, weight, sums), but with an axis of replicas in each gradient.

    Args:
      where: shardings of the weights.
      rules: of activations.
    """
    dims = {name: replicas.dim(a) for name, a in axes.items()}
    mesh = next(iter(where.values())).mesh
    count = mesh.shape[replicas.AXIS]

    def run(params: Params, batch: PyTree, key: Key[Array, ""] | None) -> tuple[Params, Array, PyTree]:
        # Each device computes with what it holds. One copy for all replicas would be the same there, but not to XLA,
        # which then gathers embedded tokens over `data`.
        apart = {n: replicas.copies(x, axes[n], count) for n, x in params.items()}
        apart = jax.lax.with_sharding_constraint(apart, {n: replicas.placed(where[n], axes[n]) for n in params})
        keys = None if key is None else jax.random.split(key, count)
        mapped = replicas.over(gradients, in_axes=(dims, 0, 0), out_axes=(dims, 0, 0))
        grads, weight, sums = mapped(apart, replicas.rows(batch, mesh, rules), keys)
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
    wanted: Bool[Array, ""] | bool,
) -> tuple[Params, Params]:
    """The sum over replicas of gradients and residuals, and the residuals that are left: those given, if not `wanted`.

    Args:
      residual_at: shardings of `residual`, and of `grads`.
      gradients_at: shardings of the sum.
    """
    specs, summed = ({name: s.spec for name, s in at.items()} for at in (residual_at, gradients_at))

    def local(grads: Params, residual: Params, wanted: Array) -> tuple[Params, Params]:
        total, left = {}, {}
        for name, g in grads.items():
            total[name], lost = all_reduce(g + residual[name], replicas.AXIS, cfg.block)
            total[name] = jnp.squeeze(total[name], replicas.dim(axes[name]))
            left[name] = jnp.where(wanted, lost, residual[name])
        return total, left

    run = by_device(local, mesh, (specs, specs, PartitionSpec()), (summed, specs))
    return run(grads, residual, jnp.asarray(wanted))
