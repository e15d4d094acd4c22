"""Replicas that train alone and meet every `every` steps: local SGD (Stich 2018, arXiv:1805.09767) and DiLoCo
(Douillard et al. 2023, arXiv:2311.08105, algorithm 1).

Each share of mesh axis `data` is a replica with weights, optimizer state and loss scale of its own; between meetings
nothing but the sums of metrics crosses `data`. `TrainState.params` are the weights of the last meeting: what is
evaluated, exported and started from; a run's last step is a meeting too. The number of replicas is part of the
algorithm, so a checkpoint loads on meshes of the same `data`, whatever their other axes.

One replica is allowed to DiLoCo: then this is Lookahead with momentum (Zhang et al. 2019, arXiv:1907.08610).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.core.shapes import Array, PyTree
from jaxllm.models.module import Axes, Params
from jaxllm.parallel.config import DiLoCo, Outer, Rules, Sharding
from jaxllm.parallel.sharding import sharding, shardings
from jaxllm.train import replicas

MEETING = "outer_meeting"  # name, in the compiled program, of the choice whether replicas meet


class Replicas(NamedTuple):
    """`TrainState.opt` of such a run."""

    params: Params  # weights of each replica
    opt: PyTree  # its optimizer state
    velocity: Params  # momentum of the outer update; empty without


def start(cfg: Outer, state: Any, axes: Axes, opt_axes: PyTree, count: int) -> Any:
    """The train state of `count` replicas, all of them where the plain train state `state` is.

    Args:
      axes: logical axes of the weights.
      opt_axes: logical axes of `state.opt`.
    """
    apart = lambda tree, axes: jax.tree.map(lambda x, a: replicas.copies(x, a, count), tree, axes)
    velocity = jax.tree.map(jnp.zeros_like, state.params) if _momentum(cfg) else {}
    scale = jax.tree.map(lambda x: replicas.copies(x, (), count), state.scale)
    return state._replace(opt=Replicas(apart(state.params, axes), apart(state.opt, opt_axes), velocity), scale=scale)


def places(mesh: jax.sharding.Mesh, rules: Sharding, state: Any, axes: Axes, opt_axes: PyTree) -> Any:
    """Where the train state that `start` gives lies; `state` holds its shapes."""
    spread = lambda tree, axes: jax.tree.map(lambda _, a: replicas.spread(a), tree, axes)
    params, opt, velocity = state.opt
    return state._replace(
        step=sharding(mesh, rules.parameters, ()),
        params=shardings(mesh, rules.parameters, axes, state.params),
        opt=Replicas(
            shardings(mesh, rules.parameters, spread(params, axes), params),
            shardings(mesh, rules.optimizer, spread(opt, opt_axes), opt),
            shardings(mesh, rules.optimizer, {name: axes[name] for name in velocity}, velocity),
        ),
        scale=jax.tree.map(lambda _: sharding(mesh, rules.parameters, ("replicas",)), state.scale),
    )


def make_step(
    cfg: Outer, last: int, step: Callable, state: Any, rules: Rules, axes: Axes, opt_axes: PyTree
) -> Callable:
    """(state, batch) -> (state, sums): a step of every replica on its rows, and a meeting if it is due.

    Args:
      last: the step that ends the run.
      step: (state, batch, replica) -> (state, sums) of one replica.
      state: shapes and shardings of the train state.
      rules: of activations.
    """
    where = jax.tree.map(lambda x: x.sharding, state)
    dims = {name: replicas.dim(a) for name, a in axes.items()}
    mesh = where.step.mesh
    count = mesh.shape[replicas.AXIS]
    each = state._replace(
        step=None, params=dims, opt=jax.tree.map(lambda _, a: replicas.dim(a), state.opt.opt, opt_axes), scale=0
    )

    def meet(anchor: Params, apart: Params, velocity: Params) -> tuple[Params, Params, Params]:
        mean = {name: jnp.mean(x, dims[name]) for name, x in apart.items()}
        mean = jax.lax.with_sharding_constraint(mean, where.params)
        anchor, velocity = outer_update(cfg, anchor, mean, velocity)
        return anchor, {name: replicas.copies(x, axes[name], count) for name, x in anchor.items()}, velocity

    def outer_step(state, batch):
        apart = state._replace(params=state.opt.params, opt=state.opt.opt)
        mapped = replicas.over(step, in_axes=(each, 0, 0), out_axes=(each, 0))
        apart, sums = mapped(apart, replicas.rows(batch, mesh, rules), jnp.arange(count))
        due = (apart.step % cfg.every == 0) | (apart.step == last)
        with jax.named_scope(MEETING):
            params, copies, velocity = jax.lax.cond(
                due, meet, lambda *same: same, state.params, apart.params, state.opt.velocity
            )
        return apart._replace(params=params, opt=Replicas(copies, apart.opt, velocity)), summed(sums)

    return outer_step


def summed(sums: dict[str, tuple[Array, Array]]) -> dict[str, tuple[Array, Array]]:
    """Metric sums over the replicas whose step was finite, or over all if none was; `nonfinite` is over all."""
    finite = sums["nonfinite"][0] == 0
    counted = finite | ~jnp.any(finite)
    return {
        name: tuple(jnp.sum(x if name == "nonfinite" else jnp.where(counted, x, 0)) for x in pair)
        for name, pair in sums.items()
    }


def outer_update(cfg: Outer, anchor: Params, mean: Params, velocity: Params) -> tuple[Params, Params]:
    """The weights to go on from, and the momentum, after the replicas have come from `anchor` to `mean`.

    DiLoCo takes anchor - mean for a gradient, with Nesterov momentum as in torch.optim.SGD.
    """
    if not isinstance(cfg, DiLoCo):
        return mean, velocity
    change = jax.tree.map(jnp.subtract, anchor, mean)
    if _momentum(cfg):
        velocity = jax.tree.map(lambda v, d: cfg.momentum * v + d, velocity, change)
        change = jax.tree.map(lambda v, d: cfg.momentum * v + d, velocity, change)
    return jax.tree.map(lambda x, d: x - cfg.learning_rate * d, anchor, change), velocity


def _momentum(cfg: Outer) -> bool:
    return isinstance(cfg, DiLoCo) and cfg.momentum > 0
