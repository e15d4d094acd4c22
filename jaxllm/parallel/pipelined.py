"""A pipeline schedule as one program that all devices run: a scan over ticks, in which each does as it is told.

`shard_map` over mesh axis `pipe` alone: within it every device has the layers of its own stages and nothing of the
others', while data, fsdp, tensor, ... go on as everywhere else, by the constraints that the model states. What a
device is told are its `Cell`s of `jaxllm.parallel.pipeline`, integers it reads tick by tick.

What a tick may not do is skipped by a loop of no iterations rather than by a conditional: XLA hands the buffers of a
loop through in place, those of a conditional it copies, and here they are gradients and activations. How often such a
loop runs no text of a program tells; `runs` does.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm.core.shapes import Array, Bool, Float, Int, PyTree
from jaxllm.parallel.backward import Leaves, Pullback
from jaxllm.parallel.pipeline import B, Cell, F, Instructions, W

AXIS = "pipe"

# Names, in the compiled program, of the loops that run by what a device is told, and of the choice of a route.
TICKS = {F: "pipe_forward", B: "pipe_backward", W: "pipe_weights"}
FIRST, LAST, NOT_LAST, GROUPS, ROUTE = "pipe_first", "pipe_last", "pipe_not_last", "pipe_groups", "pipe_route"


class Model(NamedTuple):
    """A model cut for stages. `shared` are weights of the first or the last stage, which all devices have.

    A unit is what `unit(batch, i)` gives: a microbatch, or a slice of its tokens, which is told what the slices before
    it left in `past`: a tree of arrays for each group, () for nothing.
    """

    unit: Callable[[PyTree, Array], PyTree]  # (batch, i) -> unit
    first: Callable[[PyTree, PyTree], Array]  # (shared, unit) -> x
    context: Callable[[PyTree], PyTree]  # unit -> what all groups are told; no gradient flows through it
    group: Callable[..., tuple[Array, PyTree]]  # (weights of a group, (x, past), context, its number) -> (y, new)
    last: Callable[[PyTree, Array, PyTree], tuple[Array, PyTree]]  # (shared, y, unit) -> (loss, sums)
    settle: Callable[[Array], Array]  # x, laid out as it is between groups
    past: PyTree = ()  # shapes of what a group has of one microbatch
    slices: int = 1  # units of a microbatch
    put: Callable[[PyTree, PyTree, Array], PyTree] = lambda past, new, i: past  # past with what slice i is leaving
    take: Callable[[PyTree, Array], PyTree] = lambda past, i: ()  # what slice i has left


class Stages(NamedTuple):
    """Which groups of layers a stage has: `counts[s]` from number `starts[s]` on, in `places` places of the stacks."""

    starts: tuple[int, ...]
    counts: tuple[int, ...]
    places: int

    @classmethod
    def of(cls, counts: tuple[int, ...]) -> "Stages":
        return cls(tuple(np.cumsum([0, *counts[:-1]]).tolist()), counts, max(counts))

    def order(self, devices: int) -> tuple[int, ...]:
        """The group at each place of a stack, device after device, chunk after chunk; -1 for none."""
        stages = [c * devices + d for d in range(devices) for c in range(len(self.counts) // devices)]
        return tuple(self.starts[s] + i if i < self.counts[s] else -1 for s in stages for i in range(self.places))


class Gradients(NamedTuple):
    """float32 sums over all units: by the stacked weights, by the shared ones, and what `Model.last` counted."""

    layers: PyTree
    shared: PyTree
    sums: PyTree


def backpropagate(
    model: Model, stages: Stages, program: Instructions, mesh: jax.sharding.Mesh, layers: PyTree, shared: PyTree,
    batch: PyTree, specs: tuple[PyTree, PyTree], unroll: bool = False,
) -> Gradients:  # fmt: skip
    """Gradients of the summed loss of a batch.

    Args:
      layers: weights with all groups of all stages stacked, in `stages.order`.
      specs: PartitionSpecs of the gradients by the weights of one group, by the shared weights.
      unroll: writes the groups of a stage out one by one; of stages of one length only.
    """

    def on_device(cells, layers, shared, batch):
        device = Device(model, stages, program, layers, shared, batch, specs, unroll)
        done = device.run(cells[0])
        return Gradients(done.d_layers, *jax.lax.psum((done.d_shared, done.sums), AXIS))

    out_specs = Gradients(PartitionSpec(AXIS), PartitionSpec(), PartitionSpec())
    return _over_stages(on_device, mesh, out_specs)(program.cells.swapaxes(0, 1), layers, shared, batch)


def evaluate(
    model: Model, stages: Stages, program: Instructions, mesh: jax.sharding.Mesh, layers: PyTree, shared: PyTree,
    batch: PyTree, unroll: bool = False,
) -> PyTree:  # fmt: skip
    """What `Model.last` counts, summed over all units."""

    def on_device(cells, layers, shared, batch):
        device = Device(model, stages, program, layers, shared, batch, None, unroll)
        return jax.lax.psum(device.run(cells[0]).sums, AXIS)

    return _over_stages(on_device, mesh, PartitionSpec())(program.cells.swapaxes(0, 1), layers, shared, batch)


def _over_stages(fn: Callable, mesh: jax.sharding.Mesh, out_specs: PyTree) -> Callable:
    stage, everywhere = PartitionSpec(AXIS), PartitionSpec()
    return jax.shard_map(
        fn, mesh=mesh, in_specs=(stage, stage, everywhere, everywhere), out_specs=out_specs,
        axis_names={AXIS}, check_vma=False,
    )  # fmt: skip


def runs(program: Instructions, stages: Stages) -> dict[str, float | tuple[float, ...]]:
    """How often, in the mean over devices, what is skipped or chosen is run, by its scope: of ticks, or within one.

    Of `ROUTE`: the share of ticks for each of the routes.
    """
    op, S = program.cells[:, :, Cell._fields.index("op")], len(stages.counts)
    routes = np.bincount(program.route, minlength=len(program.routes)) / len(program.route)
    return {
        **{TICKS[kind]: float((op == kind).mean()) for kind in TICKS},
        FIRST: 1 / S, LAST: 1 / S, NOT_LAST: 1 - 1 / S, GROUPS: sum(stages.counts) / S, ROUTE: tuple(routes.tolist()),
    }  # fmt: skip


class Carry(NamedTuple):
    """All that a device has from tick to tick besides weights."""

    x: Array  # what its last F or B made: for its neighbour
    arrived: Array  # activation sent to it
    arrived_gradient: Array
    inputs: Array  # by slot: activations that wait
    gradients: Array  # by slot: gradients that wait
    kept: list[Array]  # by slot and group
    ends: Array  # by slot: what the last stage's layers made, where B does not make it again
    waiting: list[Array]  # by slot and group
    past: PyTree  # by microbatch and group
    d_past: PyTree  # by group, of the microbatch on its way back
    d_layers: PyTree
    d_shared: PyTree
    sums: PyTree


class Device:
    """What one device does; methods map Carry to Carry."""

    def __init__(self, model: Model, stages: Stages, program: Instructions, layers, shared, batch, specs, unroll: bool):
        self.model, self.stages, self.program, self.specs = model, stages, program, specs
        self.layers, self.shared, self.batch = layers, shared, batch
        self.last = len(stages.counts) - 1
        self.even = len(set(stages.counts)) == 1
        self.unroll = unroll and self.even
        self.kinds = [op for op in (F, B, W) if op in program.cells[:, :, 0]]
        self.trains = B in self.kinds
        unit = model.unit(batch, jnp.int32(0))
        self.x = jax.eval_shape(model.first, shared, unit)
        self.sums = jax.eval_shape(lambda y: model.last(shared, y, unit)[1], self.x)
        if self.trains:
            group = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape[1:], w.dtype), layers)
            context = jax.eval_shape(model.context, unit)
            self.pull = Pullback(model.group, group, (self.x, model.past), context, jnp.int32(0))

    def start(self) -> Carry:
        model, x, slots, here = self.model, self.x, self.program.slots, self.stages.places
        kept, waiting, d_layers, d_shared, d_past = [], [], (), (), ()
        places = jax.tree.leaves(self.layers)[0].shape[0]  # of all chunks
        if self.trains:
            kept = [zeros(s, slots.kept, here) for s in self.pull.kept]
            waiting = [zeros(s, slots.waiting, here) for s in self.pull.waiting] if W in self.kinds else []
            d_layers, d_shared = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), (self.layers, self.shared))
            d_past = jax.tree.map(lambda p: zeros(p, places), model.past)
        microbatches = 1 + int(self.program.cells[:, :, Cell._fields.index("unit")].max()) // model.slices
        ends = zeros(x, slots.kept if self.trains and not self.program.recompute else 0)
        return Carry(
            zeros(x), zeros(x), zeros(x), zeros(x, slots.input), zeros(x, slots.gradient), kept, ends, waiting,
            jax.tree.map(lambda p: zeros(p, microbatches, places), model.past), d_past, d_layers, d_shared,
            jax.tree.map(zeros, self.sums),
        )  # fmt: skip

    def run(self, cells: Int[Array, "ticks fields"]) -> Carry:
        ops = {F: self.forward, B: self.backward, W: self.weights}

        def tick(carry: Carry, told: tuple[Array, Array]) -> tuple[Carry, None]:
            cell, route = Cell(*told[0]), told[1]
            carry = carry._replace(
                inputs=received(carry.inputs, carry.arrived, cell.arriving),
                gradients=received(carry.gradients, carry.arrived_gradient, cell.arriving_gradient),
            )
            for kind in self.kinds:
                carry = when(TICKS[kind], cell.op == kind, ops[kind], cell, carry)
            with jax.named_scope(ROUTE):
                routes = [functools.partial(self.send, *pairs) for pairs in self.program.routes]
                arrived = jax.lax.switch(route, routes, carry.x)
            return carry._replace(arrived=arrived[0], arrived_gradient=arrived[1]), None

        return jax.lax.scan(tick, self.start(), (cells, jnp.asarray(self.program.route)))[0]

    def send(self, activations, gradients, x: Array) -> tuple[Array, Array]:
        """What arrives here of what all devices send; of no meaning where nobody sends anything."""
        moved = [jax.lax.ppermute(x, AXIS, pairs) if pairs else x for pairs in (activations, gradients)]
        return tuple(map(self.model.settle, moved))

    # --- what a tick may hold ----------------------------------------------------------------------------------------

    def forward(self, cell: Cell, carry: Carry) -> Carry:
        run, at_end = self.run_layers, cell.stage == self.last

        def measured(cell: Cell, sums: PyTree) -> PyTree:
            return jax.tree.map(jnp.add, sums, self.model.last(self.shared, carry.x, self.unit(cell))[1])

        if not self.trains:
            carry = run(cell, carry)
            return carry._replace(sums=when(LAST, at_end, measured, cell, carry.sums))
        if self.program.recompute:
            # The last stage goes forward as it goes backward; but for slices of tokens, which look at those before.
            return run(cell, carry) if self.model.slices > 1 else when(NOT_LAST, ~at_end, run, cell, carry)
        carry = run(cell, carry, keep=True)
        keep_end = lambda cell, ends: written(ends, carry.x, cell.kept)
        return carry._replace(ends=when(LAST, at_end, keep_end, cell, carry.ends))

    def backward(self, cell: Cell, carry: Carry) -> Carry:
        model, at_end = self.model, cell.stage == self.last
        if self.program.recompute:
            carry = self.run_layers(cell, carry, keep=True)
        end = carry.x if self.program.recompute else read(carry.ends, cell.kept)

        def loss(cell: Cell, c: PyTree) -> PyTree:
            x, d_shared, sums = c
            unit = self.unit(cell)
            _, pull, new = jax.vjp(lambda shared, y: model.last(shared, y, unit), self.shared, x, has_aux=True)
            more, dy = pull(jnp.float32(1))
            return model.settle(dy), self.add_shared(d_shared, more), jax.tree.map(jnp.add, sums, new)

        y = jnp.where(at_end, end, read(carry.gradients, cell.gradient))
        dy, d_shared, sums = when(LAST, at_end, loss, cell, (y, carry.d_shared, carry.sums))
        carry = self.run_layers_back(cell, carry._replace(x=dy, d_shared=d_shared, sums=sums))

        def embedding(cell: Cell, d_shared: PyTree) -> PyTree:
            unit = self.unit(cell)
            _, pull = jax.vjp(lambda shared: model.first(shared, unit), self.shared)
            return self.add_shared(d_shared, *pull(carry.x))

        return carry._replace(d_shared=when(FIRST, cell.stage == 0, embedding, cell, carry.d_shared))

    def weights(self, cell: Cell, carry: Carry) -> Carry:
        context = self.model.context(self.unit(cell))
        base = cell.chunk * self.stages.places

        def group(g, d_layers):
            kept = [read(b, cell.waiting, g) for b in carry.waiting]
            more = self.pull.late(self.group_weights(base + g), context, self.number(cell, g), kept)
            return self.add_layers(d_layers, more, base + g)

        return carry._replace(d_layers=self.each_group(cell, group, carry.d_layers))

    def unit(self, cell: Cell) -> PyTree:
        return self.model.unit(self.batch, cell.unit)

    # --- the layers of a stage ---------------------------------------------------------------------------------------

    def run_layers(self, cell: Cell, carry: Carry, *, keep: bool = False) -> Carry:
        """The stage forward; `keep` what its gradient needs."""
        model, unit = self.model, self.unit(cell)
        context, base = model.context(unit), cell.chunk * self.stages.places
        microbatch, slice_ = cell.unit // model.slices, cell.unit % model.slices
        x = read(carry.inputs, cell.input)
        x = when(
            FIRST, cell.stage == 0, lambda cell, _: model.settle(model.first(self.shared, self.unit(cell))), cell, x
        )

        def group(g, c):
            x, kept, past = c
            w, number = self.group_weights(base + g), self.number(cell, g)
            before = jax.tree.map(lambda p: read(p, microbatch, base + g), past)
            if keep:
                (x, new), values = self.pull.forward(w, (x, before), context, number)
                kept = [written(b, v, cell.kept, g) for b, v in zip(kept, values, strict=True)]
            else:
                x, new = model.group(w, (x, before), context, number)
                after = model.put(before, new, slice_)
                past = jax.tree.map(lambda p, a: written(p, a, microbatch, base + g), past, after)
            return model.settle(x), kept, past

        x, kept, past = self.each_group(cell, group, (x, carry.kept, carry.past))
        return carry._replace(x=x, kept=kept, past=past)

    def run_layers_back(self, cell: Cell, carry: Carry) -> Carry:
        """The stage backward, from the gradient of its output in `x` to that of its input."""
        model = self.model
        context, base = model.context(self.unit(cell)), cell.chunk * self.stages.places
        slice_ = cell.unit % model.slices

        def group(i, c):
            dx, d_layers, waiting, d_past = c
            g = self.count(cell) - 1 - i
            w, number = self.group_weights(base + g), self.number(cell, g)
            kept = [read(b, cell.kept, g) for b in carry.kept]
            # Later slices have left here what they want of this one's `new`; the last one finds another microbatch's.
            wanted = jax.tree.map(lambda p: jnp.where(slice_ == model.slices - 1, 0, read(p, base + g)), d_past)
            dy = (dx, model.take(wanted, slice_))
            if W in self.kinds:
                dw, (dx, more), left = self.pull.early(w, context, number, kept, dy)
                waiting = [written(b, v, cell.waiting, g) for b, v in zip(waiting, left, strict=True)]
            else:
                dw, (dx, more) = self.pull.backward(w, context, number, kept, dy)
            d_past = jax.tree.map(lambda p, a, b: written(p, a + b, base + g), d_past, wanted, more)
            return model.settle(dx), self.add_layers(d_layers, dw, base + g), waiting, d_past

        dx, d_layers, waiting, d_past = self.each_group(
            cell, group, (carry.x, carry.d_layers, carry.waiting, carry.d_past)
        )
        return carry._replace(x=dx, d_layers=d_layers, waiting=waiting, d_past=d_past)

    def each_group(self, cell: Cell, fn: Callable, carry: PyTree) -> PyTree:
        if self.even:
            return jax.lax.fori_loop(0, self.stages.places, fn, carry, unroll=self.unroll)
        with jax.named_scope(GROUPS):
            return jax.lax.fori_loop(0, self.count(cell), fn, carry)

    def count(self, cell: Cell) -> Int[Array, ""] | int:
        """Groups of the stage."""
        return self.stages.places if self.even else jnp.array(self.stages.counts)[cell.stage]

    def number(self, cell: Cell, g: Int[Array, ""]) -> Int[Array, ""]:
        """Of a group, in the whole model."""
        return jnp.array(self.stages.starts)[cell.stage] + g

    def group_weights(self, place: Int[Array, ""]) -> PyTree:
        return jax.tree.map(lambda w: read(w, place), self.layers)

    def add_layers(self, d_layers: PyTree, more: Leaves, place: Int[Array, ""]) -> PyTree:
        leaves, tree = jax.tree.flatten(d_layers)
        specs = jax.tree.leaves(self.specs[0])
        for i, m in enumerate(more):
            if m is not None:
                leaves[i] = written(leaves[i], read(leaves[i], place) + settled(m, specs[i]), place)
        return jax.tree.unflatten(tree, leaves)

    def add_shared(self, d_shared: PyTree, more: PyTree) -> PyTree:
        return jax.tree.map(lambda d, m, spec: d + settled(m, spec), d_shared, more, self.specs[1])


def settled(gradient: Array, spec: PartitionSpec) -> Float[Array, "..."]:
    """In float32, laid out over the mesh axes that are not taken."""
    where = NamedSharding(jax.sharding.get_abstract_mesh(), spec)
    return jax.lax.with_sharding_constraint(gradient.astype(jnp.float32), where)


def when(scope: str, fact: Bool[Array, ""], fn: Callable[[Cell, PyTree], PyTree], cell: Cell, carry: PyTree) -> PyTree:
    """fn(cell, carry) or carry: a loop of one iteration or none, by whose scope it is known in the compiled program."""

    def once(i: Array, carry: PyTree) -> PyTree:
        # Of what a device is told alone XLA would compute all that follows before the loop, whether it runs or not.
        told, _ = jax.lax.optimization_barrier((cell, i))
        return fn(told, carry)

    with jax.named_scope(scope):
        return jax.lax.fori_loop(0, fact.astype(jnp.int32), once, carry)


def zeros(like: jax.ShapeDtypeStruct, *leading: int) -> Array:
    return jnp.zeros((*leading, *like.shape), like.dtype)


def read(buffer: Array, *place: Int[Array, ""]) -> Array:
    """What lies at a place of the leading dimensions."""
    rest = buffer.shape[len(place) :]
    found = jax.lax.dynamic_slice(buffer, (*place, *(0,) * len(rest)), (*(1,) * len(place), *rest))
    return found.reshape(rest)


def written(buffer: Array, value: Array, *place: Int[Array, ""]) -> Array:
    """The buffer with `value` at a place of the leading dimensions."""
    value = value.reshape((*(1,) * len(place), *value.shape))
    return jax.lax.dynamic_update_slice(buffer, value, (*place, *(0,) * (buffer.ndim - len(place))))


def received(buffer: Array, value: Array, slot: Int[Array, ""]) -> Array:
    """The buffer with `value` in a slot; unchanged if that is -1."""
    return written(buffer, jnp.where(slot < 0, read(buffer, slot), value), slot) if buffer.shape[0] else buffer
