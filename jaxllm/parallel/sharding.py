"""From rules to devices: the mesh, shardings of named arrays, and the placement of activations."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxllm.core.errors import ConfigError
from jaxllm.core.shapes import Array, PyTree
from jaxllm.parallel.collectives import by_device, share_count, taken_axes
from jaxllm.parallel.config import MESH_AXES, Context, Mesh, MeshAxes, Ring, Rules, axis_names

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

    @property
    def chip(self) -> str:
        return self.mesh.devices.flat[0].device_kind

    def constrain(self, x: Array, axes: tuple[str | None, ...]) -> Array:
        return self._laid_out(x, fitting(self.mesh, self.rules, axes, x.shape, f"activation {axes}").spec)

    def on_shares(self, fn: Callable, in_axes: tuple[tuple[str | None, ...], ...], out_axes: tuple) -> Callable:
        """`fn` under shard_map over the whole mesh; dimensions of one element are on every device."""

        def run(*args: Array) -> Array:
            for x, axes in zip(args, in_axes, strict=True):
                fitting(self.mesh, self.rules, axes, x.shape, f"argument {axes}")
            specs = [self.rules.mesh_axes(axes) for axes in in_axes]
            return self._by_device(fn, specs, self.rules.mesh_axes(out_axes))(*args)

        return run

    def reduces(self, x_axes: tuple[str | None, ...]) -> bool:
        """Whether several devices share the rows of activations with these axes, so that gradients must be summed."""
        return bool(self._sharing_rows(x_axes))

    def weight_gradient(
        self, equation: str, x: Array, dy: Array, x_axes: tuple, dy_axes: tuple, w_axes: tuple
    ) -> Array:
        """einsum of activations and a gradient, summed over the devices that share rows, as `gradients` lays it out.

        It is computed for the shares that activations have. Mesh axes that are summed over scatter the sum where
        `gradients` has them next; the others all-reduce what is left. XLA lays out anew what then lies otherwise.
        """
        letters, of_w = equation.split("->")
        of_x, of_dy = letters.split(",")
        xs, dys = self._shares(self.rules, x_axes), self._shares(self.rules, dy_axes)
        wide = {n for axis, names in zip(x_axes, xs) if axis not in BATCH for n in names}
        dys = [tuple(n for n in names if n not in wide) for names in dys]  # no mesh axis shares out two dimensions
        held, summed = dict(zip(of_x, xs)) | dict(zip(of_dy, dys)), self._sharing_rows(x_axes)
        ws = self._shares(self.gradients, w_axes)
        scattered = [next_axes(held[c], names, summed) for c, names in zip(of_w, ws, strict=True)]

        def local(x: Array, dy: Array) -> Array:
            g = jax.numpy.einsum(equation, x, dy)
            for dim, names in enumerate(scattered):
                g = self._scattered(g, dim, names) if names else g
            return self._summed(g, summed.difference(*scattered))

        out = [(*held[c], *names) for c, names in zip(of_w, scattered)]
        return self._laid_out(self._by_device(local, [xs, dys], out)(x, dy), ws)

    def lookup(self, table_VD: Array, ids_BT: Array, rows: str) -> Array:
        """Rows of a table; ids beyond it get the last.

        Within the stages of a pipeline it is written down, as the opposite of `table_gradient`: XLA's partitioner ends
        the process (jax 0.10) over a table whose width is shared out there, if the mesh has a third axis.
        """
        if not taken_axes():
            return jax.numpy.take(table_VD, ids_BT, axis=0, mode="clip")
        (*tokens, width), own, exchanged = self._table(rows)
        last = table_VD.shape[0] - 1

        def local(table: Array, ids: Array) -> Array:
            for n in exchanged:
                ids = jax.lax.all_gather(ids, n, axis=0, tiled=True)
            ids = self._own_rows(jax.numpy.clip(ids, 0, last), own, table.shape[0])
            x = self._summed(jax.numpy.take(table, ids, axis=0, mode="fill", fill_value=0), {*own})
            for n in reversed(exchanged):
                x = jax.lax.all_to_all(x, n, split_axis=0, concat_axis=2, tiled=True)
            return x

        lies = [[own, (*width, *exchanged)], tokens]
        return self._by_device(local, lies, [*tokens, width])(table_VD, ids_BT)

    def table_gradient(self, ids_BT: Array, dx_BTD: Array, size: int, rows: str) -> Array:
        """float32 sums of the gradients of each of `size` rows of a table, as `gradients` lays (rows, embed) out.

        Mesh axes that share `embed` out exchange their tokens for their part of the width (all-to-all): the whole
        table's gradient never stands on a device.
        """
        (*tokens, width), own, exchanged = self._table(rows)
        last, size = size - 1, size // share_count(self.mesh, own)

        def local(ids: Array, dx: Array) -> Array:
            ids = jax.numpy.minimum(ids, last)
            for n in exchanged:
                dx = jax.lax.all_to_all(dx, n, split_axis=2, concat_axis=0, tiled=True)
                ids = jax.lax.all_gather(ids, n, axis=0, tiled=True)
            sums = jax.numpy.zeros((size, dx.shape[-1]), "float32")
            sums = sums.at[self._own_rows(ids, own, size)].add(dx.astype("float32"), mode="drop")
            return self._summed(sums, self._sharing_rows(BATCH).difference(exchanged))

        g = self._by_device(local, [tokens, [*tokens, width]], [own, (*width, *exchanged)])(ids_BT, dx_BTD)
        return self._laid_out(g, self._shares(self.gradients, (rows, "embed")))

    def _table(self, rows: str) -> tuple[list[tuple[str, ...]], tuple[str, ...], tuple[str, ...]]:
        """Mesh axes that share out tokens [B, T, D]; rows of a table; and its width, in exchange for tokens."""
        xs, ws = self._shares(self.rules, (*BATCH, "embed")), self._shares(self.gradients, (rows, "embed"))
        summed = self._sharing_rows(BATCH)
        return xs, tuple(n for n in ws[0] if n not in (*summed, *xs[2])), next_axes(xs[2], ws[1], summed)

    def _own_rows(self, ids: Array, own: tuple[str, ...], size: int) -> Array:
        """Where rows of a table are in a device's own `size` of them; `size` or more for those of others."""
        first = 0
        for n in own:
            first = first * self.mesh.shape[n] + jax.lax.axis_index(n)
        ids = ids - first * size
        return jax.numpy.where(ids < 0, size, ids)

    def _shares(self, rules: Rules, axes: tuple[str | None, ...]) -> list[tuple[str, ...]]:
        """By dimension, the mesh axes of several devices that share it out."""
        return [tuple(n for n in axis_names(m) if self.mesh.shape[n] > 1) for m in rules.mesh_axes(axes)]

    def _sharing_rows(self, axes: tuple[str | None, ...]) -> set[str]:
        """Mesh axes of several devices that share out the rows of activations with these axes."""
        return {n for axis, names in zip(axes, self._shares(self.rules, axes)) if axis in BATCH for n in names}

    def _scattered(self, x: Array, dim: int, names: tuple[str, ...]) -> Array:
        """Summed over mesh axes, each device keeping its share of one dimension.

        Ring after ring, libtpu (0.0.42) all-reduces where shares lie along the lanes and are no whole tiles. A matrix
        cut along its rows, its columns in lots of 128, it reduce-scatters as asked; on v6e shares of no multiple of
        256 must be laid out so instead (which costs 2 to 4 % of the cycles on v5e).
        """
        x = jax.numpy.moveaxis(x, dim, 0)
        rows, *rest = x.shape
        ring = ring_groups(self.mesh, names[0])[0]
        if dim and self.platform == "tpu" and ring is not None:
            if self.mesh.devices.flat[0].device_kind == "TPU v6 lite" and rows // len(ring[0]) % (2 * LANES):
                x = with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))
            elif len(rest) == 1 and rest[0] % LANES == 0:
                x = x.reshape(rows, -1, LANES)
        for n in names:
            for groups in ring_groups(self.mesh, n):
                x = jax.lax.psum_scatter(x, n, axis_index_groups=groups, tiled=True)
        return jax.numpy.moveaxis(x.reshape(x.shape[0], *rest), 0, dim)

    def _summed(self, x: Array, axes: set[str]) -> Array:
        names = tuple(n for n in self.mesh.axis_names if n in axes)
        return jax.lax.psum(x, names) if names else x

    def _laid_out(self, x: Array, spec: Iterable[MeshAxes]) -> Array:
        mesh = jax.sharding.get_abstract_mesh() if taken_axes() else self.mesh
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*(s or None for s in spec))))

    def _by_device(self, fn: Callable, in_specs: Sequence[Iterable], out_spec: Iterable) -> Callable:
        specs = [PartitionSpec(*(s or None for s in spec)) for spec in (*in_specs, out_spec)]
        return by_device(fn, self.mesh, tuple(specs[:-1]), specs[-1])


def next_axes(held: tuple[str, ...], wanted: tuple[str, ...], among: set[str]) -> tuple[str, ...]:
    """The mesh axes by which a dimension that `held` share out is to be cut on, from `among`, to be as `wanted`."""
    rest = wanted[len(held) :] if wanted[: len(held)] == held else ()
    return tuple(itertools.takewhile(among.__contains__, rest))


def ring_groups(mesh: jax.sharding.Mesh, axis: str) -> list[list[list[int]] | None]:
    """Groups along a mesh axis, ring after ring, in which to reduce-scatter over it; [None] is all at once.

    libtpu (0.0.42) turns a reduce-scatter over a torus of two or three dimensions into an all-reduce when more than 16
    chips take part, and over some of fewer (4x4, 2x2x2); one ring dimension after the other it does as asked.
    """
    n = mesh.shape[axis]
    if n <= min(RING, FEW):
        return [None]
    line = np.moveaxis(mesh.devices, mesh.axis_names.index(axis), -1).reshape(-1, n)[0]
    sizes = rings([tuple(getattr(d, "coords", (i,))) for i, d in enumerate(line)], RING if n > RING else FEW)
    if len(sizes) == 1:
        return [None]
    ids = np.arange(n).reshape(sizes)
    return [np.moveaxis(ids, k, -1).reshape(-1, size).tolist() for k, size in enumerate(sizes)]


LANES = 128  # of a TPU's vector register
RING, FEW = 16, 4  # chips that libtpu reduce-scatters over at once: of more, and if that is all


def rings(coords: list[tuple[int, ...]], most: int = RING) -> tuple[int, ...]:
    """Sizes of the torus dimensions that a row-major walk of chips goes along, slow ones merged up to `most` chips."""
    sizes = [len(set(c)) for c in zip(*coords)]
    order = sorted(range(len(sizes)), key=lambda d: next((i for i, c in enumerate(coords) if c[d] != coords[0][d]), 0))
    found: list[int] = []
    for size in (sizes[d] for d in reversed(order) if sizes[d] > 1):
        if found and found[-1] * size <= most:
            found[-1] *= size
        else:
            found.append(size)
    return tuple(found) if math.prod(found) == len(coords) else (len(coords),)


def placement(mesh: jax.sharding.Mesh, rules: Rules, gradients: Rules = Rules(), context: Context = Ring()) -> Placed:
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
