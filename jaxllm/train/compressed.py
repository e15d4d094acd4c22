"""Gradients that cross mesh axis `data` as 8-bit integers, and what that leaves out, added to the next step's.

Each share of `data` is a replica that computes the gradient of its rows alone; the replicas exchange them by
`parallel.compress.all_reduce`. What rounding has taken so far is part of the train state, one residual a replica:
over a run, the sum of all gradients used and of the last residuals is the sum of the exact gradients.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.sharding import PartitionSpec

from jaxllm.core.shapes import Array, Bool, Float, Key, PyTree
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


def places(mesh: jax.sharding.Mesh, gradients: Rules, residual: PyTree, axes: Axes) -> dict[str, Any]:
    """Where residuals of these shapes lie."""
    return shardings(mesh, gradients, {name: replicas.spread(axes[name]) for name in residual}, residual)


def by_replica(gradients: Callable, where: dict[str, Any], rules: Rules, axes: Axes) -> Callable:
    """Like `gradients`: (weights, batch, key) -> (gradients, weight, sums), each gradient with an axis of replicas.

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
    where: tuple[dict[str, Any], dict[str, Any]],
    axes: Axes,
    grads: Params,
    per: Float[Array, ""],
    residual: Params,
    wanted: Bool[Array, ""] | bool,
) -> tuple[Params, Params]:
    """The sum over replicas of `per` times gradients and residuals, and the residuals that are left.

    Args:
      where: shardings of the residuals, and of the sum.
      wanted: else the residuals are left as they were.
    """
    specs, summed = ({name: at[name].spec for name in grads} for at in where)
    stacked = [n for n in grads if replicas.dim(axes[n])]

    def together(grads: Params, residual: Params, per: Array, wanted: Array) -> tuple[Params, Params]:
        """What one device has of some weights, as one message. The axis of replicas, of one, is the first."""
        given = {n: (g.astype(jnp.float32) * per + residual[n]) for n, g in grads.items()}
        message, apart = ravel_pytree(given)
        total, lost = map(apart, all_reduce(message, replicas.AXIS, cfg.block))
        return {n: x[0] for n, x in total.items()}, {n: jnp.where(wanted, lost[n], x) for n, x in residual.items()}

    def local(grads: Params, residual: Params, per: Array, wanted: Array) -> tuple[Params, Params]:
        total, left = {}, {}
        for name in (n for n in grads if n not in stacked):
            one = together({name: grads[name]}, {name: residual[name]}, per, wanted)
            total, left = total | one[0], left | one[1]

        def layer(i: Array, carry: tuple[Params, Params]) -> tuple[Params, Params]:
            pick = lambda tree: {n: jax.lax.dynamic_index_in_dim(tree[n], i, keepdims=False) for n in stacked}
            new = together(pick(grads), pick(carry[1]), per, wanted)
            return jax.tree.map(lambda x, part: jax.lax.dynamic_update_index_in_dim(x, part, i, 0), carry, new)

        if stacked:  # layer by layer, in place: all at once would be several copies of the gradients
            empty = {n: jnp.zeros(grads[n].shape[:1] + grads[n].shape[2:], jnp.float32) for n in stacked}
            carry = (empty, {n: residual[n] for n in stacked})
            one = jax.lax.fori_loop(0, grads[stacked[0]].shape[0], layer, carry)
            total, left = total | one[0], left | one[1]
        return total, left

    mesh = where[0][next(iter(grads))].mesh
    run = by_device(local, mesh, (specs, specs, PartitionSpec(), PartitionSpec()), (summed, specs))
    return run(grads, residual, per, jnp.asarray(wanted))
