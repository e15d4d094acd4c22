"""From rules to devices: the mesh, shardings of named arrays, and the placement of activations."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxllm.core.errors import ConfigError
from jaxllm.core.shapes import Array, PyTree
from jaxllm.parallel.config import MESH_AXES, Context, Mesh, Ring, Rules

BATCH = ("batch", "seq")  # logical axes of a batch array; arrays of one value a row have the first


def make_mesh(cfg: Mesh, devices: list[jax.Device] | None = None) -> jax.sharding.Mesh:
    """The mesh over `devices` (default: all), neighbours in the fastest network next to each other.

    Raises:
      ConfigError: the sizes do not fit the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = cfg.resolve(len(devices)).sizes
    return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(sizes), devices=devices)


def sharding(mesh: jax.sharding.Mesh, rules: Rules, axes: tuple[str | None, ...]) -> NamedSharding:
    """Where an array with these logical axes lies."""
    return NamedSharding(mesh, PartitionSpec(*rules.mesh_axes(axes)))


def fitting(mesh: jax.sharding.Mesh, rules: Rules, axes: tuple, shape: tuple[int, ...], name: str) -> NamedSharding:
    """Like `sharding`, for an array of this shape.

    Raises:
      ConfigError: a dimension does not divide over its mesh axes; names the array, the dimension and the sizes.
    """
    placed = sharding(mesh, rules, axes)
    for size, axis, mesh_axes in zip(shape, axes, placed.spec):
        names = (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes or ()
        shares = math.prod(mesh.shape[n] for n in names)
        if size % shares:
            raise ConfigError(
                f"{name}: {axis}={size} does not divide over mesh axis "
                f"{' x '.join(n for n in names if mesh.shape[n] > 1)} of {shares} devices; change "
                f"the mesh or the model, or replicate it: set {axis} to null in sharding.parameters, .gradients, "
                ".optimizer and .activations"
            )
    return placed


def shardings(mesh: jax.sharding.Mesh, rules: Rules, axes: PyTree, shapes: PyTree) -> PyTree:
    """A NamedSharding for every array of a tree of shapes; `axes` is the same tree with logical axes at its leaves."""
    names = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(shapes)
    ]
    leaves, structure = jax.tree.flatten(shapes)
    placed = [
        fitting(mesh, rules, tuple(a), leaf.shape, name)
        for name, leaf, a in zip(names, leaves, structure.flatten_up_to(axes), strict=True)
    ]
    return jax.tree.unflatten(structure, placed)


def placed(shapes: PyTree, where: PyTree) -> PyTree:
    """ShapeDtypeStructs of the same shapes, which say where their arrays lie; `where` is the same tree of shardings."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where)


@dataclasses.dataclass(frozen=True)
class Placed:
    """`core.axes.Placement` of a run: what its rules make of logical axes on its mesh."""

    mesh: jax.sharding.Mesh
    rules: Rules
    spread: Callable[..., Any] | None = None

    @property
    def platform(self) -> str:
        return self.mesh.devices.flat[0].platform

    def constrain(self, x: Array, axes: tuple[str | None, ...]) -> Array:
        return jax.lax.with_sharding_constraint(x, fitting(self.mesh, self.rules, axes, x.shape, f"activation {axes}"))

    def on_shares(self, fn: Callable, in_axes: tuple[tuple[str | None, ...], ...], out_axes: tuple) -> Callable:
        """`fn` under shard_map over the whole mesh; dimensions of one element are on every device."""

        def run(*args: Array) -> Array:
            for x, axes in zip(args, in_axes, strict=True):
                fitting(self.mesh, self.rules, axes, x.shape, f"argument {axes}")
            specs = tuple(PartitionSpec(*self.rules.mesh_axes(axes)) for axes in in_axes)
            out = PartitionSpec(*self.rules.mesh_axes(out_axes))
            return jax.shard_map(fn, mesh=self.mesh, in_specs=specs, out_specs=out, check_vma=False)(*args)

        return run


def placement(mesh: jax.sharding.Mesh, rules: Rules, context: Context = Ring()) -> Placed:
    """What `core.axes` does inside a step on this mesh; `context` says how attention crosses the shares of a row."""
    from jaxllm.parallel.context import spread  # brings the collectives along: only where a row is shared out

    shared = rules.seq is not None and mesh.shape["context"] > 1
    return Placed(mesh, rules, spread(mesh, rules, context) if shared else None)


def batch_shardings(
    mesh: jax.sharding.Mesh, rules: Rules, batch: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, NamedSharding]:
    """Where the arrays of a batch of these shapes lie; rows must divide over the mesh axes of `batch`."""
    return {
        name: fitting(mesh, rules, BATCH[: len(x.shape)], x.shape, f"batch array {name}") for name, x in batch.items()
    }
