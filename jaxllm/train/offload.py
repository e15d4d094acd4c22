"""Optimizer state and master weights that wait in pinned host memory and come to the device a layer group at a time.

The memory of ZeRO-Offload (Ren et al. 2021, arXiv:2101.06840), with the update computed on the device: it costs one
trip over the host's bus there and back a step, whatever the batch. Between steps the device holds nothing of what
waits; in the update it holds one group's share. Every optimizer here updates a layer as if it stood alone
(`optimizers`), so the numbers are those of an update of everything at once.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxllm.core.shapes import Array, Bool, Float, Int, PyTree
from jaxllm.models.layout import is_stacked, layer_sharding
from jaxllm.models.module import Axes, Params
from jaxllm.parallel.config import Offload

HOST, DEVICE = "pinned_host", "device"
VISIT = "offload_visit"  # name, in the compiled program, of the loops that fetch and put back


def places(cfg: Offload, params: dict[str, Any], opt: PyTree, opt_axes: PyTree) -> tuple[dict[str, Any], PyTree]:
    """Shardings of weights and optimizer state, with what waits on the host put there.

    Counters and constants of the optimizer stay on the device.
    """
    wait = lambda s: s.with_memory_kind(HOST)
    if cfg.parameters:
        params = jax.tree.map(wait, params)
    if cfg.optimizer:
        opt = jax.tree.map(lambda s, axes: wait(s) if any(axes) else s, opt, opt_axes)
    return params, opt


def copies(params: Params, cast: Callable[[Params], Params], where: dict[str, Any]) -> Params:
    """`cast` of weights that wait on the host, on the device, made group by group; `where` has their shardings."""
    one_by_one = {n: cast(jax.device_put(x, _here(where[n]))) for n, x in params.items() if not is_stacked(n)}
    stacked = {n: x for n, x in params.items() if is_stacked(n)}
    here = {n: layer_sharding(_here(where[n])) for n in stacked}
    _, made = jax.lax.scan(lambda _, group: (None, cast(jax.device_put(group, here))), None, stacked)
    made = jax.lax.with_sharding_constraint(made, {n: _here(where[n]) for n in stacked})
    return {n: (made if is_stacked(n) else one_by_one)[n] for n in params}


def update(
    build: Callable[[Axes], optax.GradientTransformation],
    axes: Axes,
    where: tuple[dict[str, Any], PyTree],
    grads: Params,
    per: Float[Array, ""],
    params: Params,
    opt: PyTree,
    wanted: Bool[Array, ""] | bool,
) -> tuple[Params, PyTree]:
    """Weights and optimizer state after an update by `per` times the gradients, or as they were if it is not `wanted`.

    Args:
      build: the optimizer of some of the weights, given their axes.
      where: shardings of `params` and `opt`.
    """
    paths, leaves, structure = _flat(opt)
    state = params | dict(zip(paths, leaves, strict=True))  # weights by name, the rest by path
    at = where[0] | dict(zip(paths, jax.tree.leaves(where[1]), strict=True))

    def visits(names: list[str], count: Int[Array, ""] | int) -> dict[str, Array]:
        """Weights that lie alone, or are stacked alike, and their state, after one visit of each group."""
        alone = not is_stacked(names[0])
        tx = build({n: axes[n] for n in names})
        mine, _, form = _flat(jax.eval_shape(tx.init, {n: params[n] for n in names}))
        moves = [*names, *(p for p in mine if any(f"['{n}']" in p for n in names))]
        stays = {p: state[p] for p in mine if p not in moves}  # counters and constants

        def group(x: Array, i: Array) -> Array:
            part = jax.lax.dynamic_slice_in_dim(x, i, 1)
            return part[0] if alone else part

        def visit(i: Array, carry: tuple[dict[str, Array], dict[str, Array]]) -> tuple:
            held, _ = carry
            now = {p: jax.device_put(group(held[p], i), _here(at[p])) for p in moves} | stays
            mean = {n: group(lifted[n], i).astype(jnp.float32) * per for n in names}
            weights = {n: now[n] for n in names}
            updates, then = tx.update(mean, jax.tree.unflatten(form, [now[p] for p in mine]), weights)
            then = optax.apply_updates(weights, updates) | dict(zip(mine, jax.tree.leaves(then), strict=True))
            then = {p: jnp.where(wanted, then[p], x) for p, x in now.items()}
            for p in moves:
                back = jax.device_put(then[p], at[p])
                held = held | {p: jax.lax.dynamic_update_slice_in_dim(held[p], back[None] if alone else back, i, 0)}
            return held, {p: then[p] for p in stays}

        lift = lambda x: x[None] if alone else x
        lifted = {n: lift(grads[n]) for n in names}
        with jax.named_scope(VISIT):
            held, stays = jax.lax.fori_loop(0, count, visit, ({p: lift(state[p]) for p in moves}, stays))
        return {p: x[0] if alone else x for p, x in held.items()} | stays

    # What lies alone makes one visit. A loop that XLA thinks may make none keeps it from coming before its time: it
    # would wait on the device for the whole of the backward pass.
    once = jnp.int32(1) if wanted is True else jnp.where(wanted, 1, 0)
    done = dict(state)
    for name in params:
        if not is_stacked(name):
            done |= visits([name], once)
    if stacked := [n for n in params if is_stacked(n)]:
        done |= visits(stacked, params[stacked[0]].shape[0])
    return {n: done[n] for n in params}, jax.tree.unflatten(structure, [done[p] for p in paths])


def _here(where: Any) -> Any:
    """The same place in the device's memory."""
    return where.with_memory_kind(DEVICE)


def _flat(tree: PyTree) -> tuple[list[str], list[Any], Any]:
    """Paths, leaves and structure."""
    pairs, structure = jax.tree_util.tree_flatten_with_path(tree)
    return [jax.tree_util.keystr(path) for path, _ in pairs], [leaf for _, leaf in pairs], structure
