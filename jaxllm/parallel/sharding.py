"""From rules to devices: the mesh, shardings of named arrays, and the placement of activations."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxllm.core.errors import ConfigError
from jaxllm.core.shapes import Array, PyTree
from jaxllm.parallel.collectives import axis_names, by_device, share_count, taken_axes
from jaxllm.parallel.config import MESH_AXES, Context, Mesh, Ring, Rules

BATCH = ("batch", "seq")  # logical axes of a batch array; arrays of one value a row have the first


def make_mesh(cfg: Mesh, devices: list[jax.Device] | None = None) -> jax.sharding.Mesh:
    """The mesh over `devices` (default: all), neighbours in the fastest network next to each other.

    The axis `across` goes over the slices, the others stay within one: only its collectives use the slow network.

    Raises:
      ConfigError: the sizes do not fit the number of devices, or `across` not the number of slices.
    """
    devices = jax.devices() if devices is None else devices
    resolved = cfg.resolve(len(devices))
    slices, over = len({_slice(d) for d in devices}), getattr(resolved, cfg.across)
    if slices == 1 or (over % slices and devices[0].platform == "gpu"):
        # Hosts of GPUs are numbered one after another: the leading mesh axes span them, whichever those are.
        grid = mesh_utils.create_device_mesh(resolved.sizes, devices, allow_split_physical_axes=True)
    elif over % slices:
        raise ConfigError(
            f"mesh.{cfg.across}={over} does not divide over the {slices} slices that mesh.across={cfg.across} spans; "
            f"make mesh.{cfg.across} a multiple of {slices}, or let mesh.across name an axis that is one"
        )
    else:
        within = resolved.model_copy(update={cfg.across: over // slices}).sizes
        outside = tuple(slices if axis == cfg.across else 1 for axis in MESH_AXES)
        grid = mesh_utils.create_hybrid_device_mesh(within, outside, devices, allow_split_physical_axes=True)
    return jax.sharding.Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _slice(device: jax.Device) -> int:
    """Which of the groups of devices with a fast network of their own this one is in: TPU slice, GPU host or rack."""
    return 0 if device.platform == "cpu" else getattr(device, "slice_index", 0)


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
        over, shares = axis_names(mesh_axes), share_count(mesh, mesh_axes)
        if size % shares:
            raise ConfigError(
                f"{name}: {axis}={size} does not divide over mesh axis "
                f"{' x '.join(n for n in over if mesh.shape[n] > 1)} of {shares} devices; change "
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
    rules: Rules  # of activations
    gradients: Rules  # of the gradients of weights
    spread: Callable[..., Any] | None = None

    @property
    def platform(self) -> str:
        return self.mesh.devices.flat[0].platform

    def constrain(self, x: Array, axes: tuple[str | None, ...]) -> Array:
        where = fitting(self.mesh, self.rules, axes, x.shape, f"activation {axes}")
        if taken_axes():
            where = NamedSharding(jax.sharding.get_abstract_mesh(), where.spec)
        return jax.lax.with_sharding_constraint(x, where)

    def on_shares(self, fn: Callable, in_axes: tuple[tuple[str | None, ...], ...], out_axes: tuple) -> Callable:
        """`fn` under shard_map over the whole mesh; dimensions of one element are on every device."""

        def run(*args: Array) -> Array:
            for x, axes in zip(args, in_axes, strict=True):
                fitting(self.mesh, self.rules, axes, x.shape, f"argument {axes}")
            return self._by_device(fn, [self.rules.mesh_axes(a) for a in in_axes], self.rules.mesh_axes(out_axes))(*args)

        return run

    def reduces(self, x_axes: tuple[str | None, ...]) -> bool:
        """Whether several devices share the rows of activations with these axes, so that gradients must be summed."""
        rows = [n for a, m in zip(x_axes, self.rules.mesh_axes(x_axes)) if a in BATCH for n in axis_names(m)]
        return any(self.mesh.shape[n] > 1 for n in rows)

    def weight_gradient(self, equation: str, x: Array, dy: Array, x_axes: tuple, dy_axes: tuple, w_axes: tuple) -> Array:
        """einsum of activations and a gradient, summed over the devices that share rows, as `gradients` lays it out.

        Mesh axes that share the gradient out scatter what they sum; the others all-reduce what is left.
        """
        xs, dys, ws = self.rules.mesh_axes(x_axes), self.rules.mesh_axes(dy_axes), self.gradients.mesh_axes(w_axes)
        summed = {n for a, m in zip(x_axes, xs) if a in BATCH for n in axis_names(m) if self.mesh.shape[n] > 1}

        def local(x: Array, dy: Array) -> Array:
            g = jax.numpy.einsum(equation, x, dy)
            scattered = set()
            for dim, names in enumerate(map(axis_names, ws)):
                for n in names:
                    if n in summed:
                        for groups in stages(self.mesh, n):
                            g = jax.lax.psum_scatter(g, n, scatter_dimension=dim, axis_index_groups=groups, tiled=True)
                        scattered.add(n)
            rest = tuple(n for n in self.mesh.axis_names if n in summed - scattered)
            return jax.lax.psum(g, rest) if rest else g

        return self._by_device(local, [xs, dys], ws)(x, dy)

    def table_gradient(self, ids_BT: Array, dx_BTD: Array, size: int, rows: str) -> Array:
        """float32 sums of the gradients of each of `size` rows of a table, as `gradients` lays (rows, embed) out.

        Mesh axes that share `embed` out exchange their tokens for their part of the width (all-to-all): the whole
        table's gradient never stands on a device.
        """
        xs, ws = self.rules.mesh_axes((*BATCH, "embed")), self.gradients.mesh_axes((rows, "embed"))
        summed = {n for m in xs[:2] for n in axis_names(m) if self.mesh.shape[n] > 1}
        last = size - 1
        size //= share_count(self.mesh, ws[0])

        def local(ids: Array, dx: Array) -> Array:
            ids, first = jax.numpy.minimum(ids, last), 0
            for n in axis_names(ws[0]):
                first = first * self.mesh.shape[n] + jax.lax.axis_index(n)
            for n in (exchanged := [n for n in axis_names(ws[1]) if n in summed]):
                dx = jax.lax.all_to_all(dx, n, split_axis=2, concat_axis=0, tiled=True)
                ids = jax.lax.all_gather(ids, n, axis=0, tiled=True)
            ids = ids - first * size
            ids = jax.numpy.where(ids < 0, size, ids)  # rows of other devices are dropped
            sums = jax.numpy.zeros((size, dx.shape[-1]), "float32").at[ids].add(dx.astype("float32"), mode="drop")
            rest = tuple(n for n in self.mesh.axis_names if n in summed - set(exchanged))
            return jax.lax.psum(sums, rest) if rest else sums

        return self._by_device(local, [xs[:2], xs], ws)(ids_BT, dx_BTD)

    def _by_device(self, fn: Callable, in_specs: list[tuple], out_spec: tuple) -> Callable:
        return by_device(fn, self.mesh, tuple(PartitionSpec(*spec) for spec in in_specs), PartitionSpec(*out_spec))


def stages(mesh: jax.sharding.Mesh, axis: str) -> list[list[list[int]] | None]:
    """Groups along a mesh axis, stage after stage, in which to reduce-scatter over it; [None] is all at once.

    libtpu turns a reduce-scatter over a torus of two or three dimensions into an all-reduce when more than 16 chips
    take part (seen with 0.0.42); one ring dimension after the other it does as asked.
    """
    n = mesh.shape[axis]
    if n <= RING:
        return [None]
    line = np.moveaxis(mesh.devices, mesh.axis_names.index(axis), -1).reshape(-1, n)[0]
    sizes = rings([tuple(getattr(d, "coords", (i,))) for i, d in enumerate(line)])
    if len(sizes) == 1:
        return [None]
    ids = np.arange(n).reshape(sizes)
    return [np.moveaxis(ids, k, -1).reshape(-1, size).tolist() for k, size in enumerate(sizes)]


RING = 16  # chips that libtpu reduce-scatters over at once


def rings(coords: list[tuple[int, ...]]) -> tuple[int, ...]:
    """Sizes of the torus dimensions that a row-major walk of chips goes along, slow ones merged up to RING chips."""
    sizes = [len(set(c)) for c in zip(*coords)]
    order = sorted(range(len(sizes)), key=lambda d: next((i for i, c in enumerate(coords) if c[d] != coords[0][d]), 0))
    found: list[int] = []
    for size in (sizes[d] for d in reversed(order) if sizes[d] > 1):
        if found and found[-1] * size <= RING:
            found[-1] *= size
        else:
            found.append(size)
    return tuple(found) if math.prod(found) == len(coords) else (len(coords),)


def placement(
    mesh: jax.sharding.Mesh, rules: Rules, gradients: Rules = Rules(), context: Context = Ring()
) -> Placed:
    """What `core.axes` does inside a step on this mesh.

    Args:
      rules: of activations.
      gradients: of the gradients of weights.
      context: how attention crosses the shares of a row.
    """
    from jaxllm.parallel.context import spread  # brings the collectives along: only where a row is shared out

    return Placed(mesh, rules, gradients, spread(mesh, rules, context) if share_count(mesh, rules.seq) > 1 else None)


def batch_shardings(
    mesh: jax.sharding.Mesh, rules: Rules, batch: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, NamedSharding]:
    """Where the arrays of a batch of these shapes lie; rows must divide over the mesh axes of `batch`."""
    return {
        name: fitting(mesh, rules, BATCH[: len(x.shape)], x.shape, f"batch array {name}") for name, x in batch.items()
    }
