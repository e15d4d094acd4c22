"""Collectives written down: where the partitioner's choice would be a hope, or its choice is wrong."""

import math
from collections.abc import Callable

import jax
from jax.sharding import AxisType, PartitionSpec

from jaxllm.core.shapes import Array
from jaxllm.parallel.config import MeshAxes, axis_names


def share_count(mesh: jax.sharding.Mesh, axes: MeshAxes) -> int:
    """Shares that a dimension of these mesh axes is cut into."""
    return math.prod(mesh.shape[n] for n in axis_names(axes))


def by_device(fn: Callable, mesh: jax.sharding.Mesh, in_specs, out_specs, *, differentiable: bool = False) -> Callable:
    """`fn` of each device's shares of global arrays: shard_map over all mesh axes that the caller has not taken yet.

    Args:
      differentiable: gradients may flow through `fn`. Else, for whoever writes its gradient down, nothing checks which
        mesh axes a result is the same on.
    """
    taken = taken_axes()
    return jax.shard_map(
        fn, mesh=jax.sharding.get_abstract_mesh() if taken else mesh, in_specs=in_specs, out_specs=out_specs,
        axis_names=frozenset(mesh.axis_names) - taken, check_vma=differentiable,
    )  # fmt: skip


def taken_axes() -> frozenset[str]:
    """Mesh axes over which whoever calls has already spread out what is traced."""
    mesh = jax.sharding.get_abstract_mesh()
    return frozenset(a for a, kind in zip(mesh.axis_names, mesh.axis_types) if kind == AxisType.Manual)


def exchange(
    x: Array, mesh: jax.sharding.Mesh, spec: PartitionSpec, axis: str, source: int, target: int
) -> tuple[Array, PartitionSpec]:
    """`x`, laid out as `spec` but with mesh axis `axis` on dimension `target` in place of `source`; and that layout.

    One all-to-all: every device keeps 1/n of what it has and gets as much of every other. Ulysses takes whole rows of
    some heads for some tokens of all heads with it; a mixture takes tokens [group, expert, slot, embed], whose groups
    lie on the devices that have the tokens, to the devices that have the experts, and back.

    Args:
      axis: the last mesh axis of dimension `source`; becomes the last of `target`, which must divide over it.
    """
    layout = [axis_names(s) for s in (*spec, *(None,) * (x.ndim - len(spec)))]
    assert layout[source][-1:] == (axis,), f"{axis} is not the last mesh axis of dimension {source} of {spec}"
    before = PartitionSpec(*(s or None for s in layout))
    layout[source], layout[target] = layout[source][:-1], (*layout[target], axis)
    after = PartitionSpec(*(s or None for s in layout))

    def swap(x: Array) -> Array:
        return jax.lax.all_to_all(x, axis, split_axis=target, concat_axis=source, tiled=True)

    return by_device(swap, mesh, (before,), after, differentiable=True)(x), after
