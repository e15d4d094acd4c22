"""Copies of the weights (or of their gradients) that differ: each array has an axis more, over mesh axis data.

The axis `replicas` stands after `layers`, else first, so that checkpoints find the layers where they look for them. A
step of one replica, mapped over that axis, is the step of all of them, with no word between them.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm.core.shapes import Array
from jaxllm.parallel.config import Rules, axis_names
from jaxllm.parallel.sharding import batch_shardings

AXIS = "data"  # mesh axis that counts replicas

Axes = tuple[str | None, ...]


def dim(axes: Axes) -> int:
    """Where the axis of replicas stands in an array that has these axes without it."""
    return int(axes[:1] == ("layers",))


def spread(axes: Axes) -> Axes:
    """Logical axes with that of replicas."""
    return (*axes[: dim(axes)], "replicas", *axes[dim(axes) :])


def copies(x: Array, axes: Axes, count: int) -> Array:
    """`count` of `x` along a new axis of replicas."""
    at = dim(axes)
    return jnp.broadcast_to(jnp.expand_dims(x, at), (*x.shape[:at], count, *x.shape[at:]))


def placed(where: NamedSharding, axes: Axes) -> NamedSharding:
    """Where copies lie, each on its share of `data`, of an array that lies as `where` says."""
    at = dim(axes)
    spec = (*where.spec, *(None,) * (at - len(where.spec)))
    return NamedSharding(where.mesh, PartitionSpec(*spec[:at], AXIS, *spec[at:]))


def over(fn: Callable, in_axes: Any, out_axes: Any) -> Callable:
    """`fn` of one replica, which must not name mesh axis data, for all of them."""
    return jax.vmap(fn, in_axes=in_axes, out_axes=out_axes, spmd_axis_name=AXIS)


def rows(batch: dict[str, Array], mesh: jax.sharding.Mesh, rules: Rules) -> dict[str, Array]:
    """The rows of each replica, by replica; `rules` are those of activations."""
    count = mesh.shape[AXIS]
    parts = {k: jax.ShapeDtypeStruct((x.shape[0] // count, *x.shape[1:]), x.dtype) for k, x in batch.items()}
    inside = batch_shardings(mesh, within(rules), parts)
    where = {k: NamedSharding(mesh, PartitionSpec(AXIS, *s.spec)) for k, s in inside.items()}
    # Said outright: XLA would take rows of a replica to be what `data` shares out.
    return jax.lax.with_sharding_constraint({k: x.reshape(count, *parts[k].shape) for k, x in batch.items()}, where)


def within(rules: Rules) -> Rules:
    """The rules of activations inside a replica: its rows are not shared out over `data`."""
    return rules.model_copy(update={"batch": tuple(n for n in axis_names(rules.batch) if n != AXIS) or None})
