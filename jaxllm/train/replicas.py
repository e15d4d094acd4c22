"""Copies of the weights (or of their gradients) that differ: each array has an axis more, shared out over mesh axis data.

The axis `replicas` stands after `layers`, else first, so that checkpoints find the layers where they look for them. A
step of one replica, mapped over that axis, is the step of all of them, with no word between them.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.core.shapes import Array, PyTree
from jaxllm.parallel.config import Rules, Sharding

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


def over(fn: Callable, in_axes: Any, out_axes: Any) -> Callable:
    """`fn` of one replica, for all of them; in it, no mesh axis is named `data`."""
    return jax.vmap(fn, in_axes=in_axes, out_axes=out_axes, spmd_axis_name=AXIS)


def rows(batch: PyTree, count: int) -> PyTree:
    """The rows of each replica, by replica."""
    return jax.tree.map(lambda x: x.reshape(count, x.shape[0] // count, *x.shape[1:]), batch)


def within(sharding: Sharding) -> Sharding:
    """The rules inside a replica: its rows are not shared out over `data`."""
    without = {name: _without(getattr(sharding.activations, name)) for name in Rules.model_fields if name != "replicas"}
    return sharding.model_copy(update={"activations": sharding.activations.model_copy(update=without)})


def _without(axes: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
    names = (axes,) if isinstance(axes, str) else axes or ()
    return tuple(n for n in names if n != AXIS) or None
