"""What one run of a compiled program does, its loops counted: products, cycles, kernels, and who talks to whom."""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

import numpy as np

from jaxllm.plan.chips import Chip
from jaxllm.plan.hlo import (
    COLLECTIVES,
    Array,
    Computation,
    Instruction,
    Program,
    estimated_cycles,
    flops,
    replica_groups,
    trip_count,
)

HBM, HOST = 0, 5  # memory spaces of libtpu and XLA


class Layout:
    """Which mesh axes and which slices the devices of a program lie on, by their place in the program."""

    def __init__(self, axes: tuple[str, ...], coordinates: np.ndarray, slices: np.ndarray, across: str = "data"):
        """
        Args:
          coordinates: [device, axis].
          slices: [device], the group with a fast network of its own.
          across: the axis that spans slices where each of them runs a text of its own.
        """
        self.axes, self.coordinates, self.slices, self.across = axes, coordinates, slices, across

    @classmethod
    def of(cls, mesh, partitions: int, across: str = "data") -> "Layout":
        """Of a `jax.sharding.Mesh` and a text for that many devices: all of the mesh, or those of one slice."""
        flat = list(mesh.devices.flat)
        slices = np.array([_group(d) for d in flat])
        coordinates = np.stack(np.unravel_index(np.arange(len(flat)), mesh.devices.shape), axis=1)
        if partitions < len(flat):
            here = slices == slices[0]
            coordinates, slices = coordinates[here], slices[here]
        return cls(tuple(mesh.axis_names), coordinates, slices, across)

    def spans(self, group: list[int]) -> tuple[tuple[str, ...], int]:
        """Axes that a group of devices goes along, and how many slices it is in."""
        at = self.coordinates[group]
        varies = (at != at[0]).any(axis=0)
        return tuple(a for a, v in zip(self.axes, varies) if v), len(set(self.slices[group].tolist()))


def _group(device) -> int:
    if device.platform == "gpu":
        return device.process_index  # deviceless hosts of GPUs are one slice each
    return getattr(device, "slice_index", 0) if device.platform == "tpu" else 0


class Collective(NamedTuple):
    """Exchanges of one kind and size."""

    kind: str  # all-gather, all-reduce, reduce-scatter, all-to-all, collective-permute, ...
    bytes: float  # of one, on the side where arrays are whole: gathered, not yet scattered
    group: int  # devices that exchange with each other; of a permutation: of the ring or chain
    axes: tuple[str, ...]  # of the mesh that they lie along
    slices: int  # with networks of their own that they are in; above 1: over the slow network
    overlapped: bool  # whether the chip computes between its start and its end
    between: float  # cycles of that computation
    count: float = 1.0  # a step


class Kernel(NamedTuple):
    """Calls of one hand-written kernel, which XLA cannot look into."""

    name: str
    operands: tuple[Array, ...]
    results: tuple[Array, ...]
    cycles: float | None  # of one call, simulated by libtpu where it was asked to
    metadata: str  # what the kernel says of itself: block sizes
    count: float = 1.0  # a step

    @property
    def bytes(self) -> float:
        """Of HBM that one call reads and writes at least."""
        return _bytes((*self.operands, *self.results), HBM)


class Cost(NamedTuple):
    """Of a call of a kernel."""

    flops: float
    cycles: float
    asked: float = 0.0  # FLOPs that attention asks for, by whatever kernels


class Account(NamedTuple):
    """A device's share of one run of a program."""

    flops: float  # of matrix products and convolutions, kernels left out
    kernel_flops: float
    kernel_asked: float  # of them, those that attention asks for: the pace of a chip is of these
    cycles: dict[str, float]  # by where they are known from, see `account`
    traffic: float  # bytes of HBM that instructions read and write, kernels included
    host_traffic: float  # bytes that go to and from pinned memory of the host
    collectives: tuple[Collective, ...]
    kernels: tuple[Kernel, ...]
    loops: dict[str, int]  # trip counts by name
    scopes: dict[str, float]  # cycles of one run of each loop that `runs` tells of, without those within it
    notes: dict[str, int]  # what could not be told, and how often

    @property
    def collective_bytes(self) -> dict[str, float]:
        """By kind."""
        return _sums((c.kind, c.bytes * c.count) for c in self.collectives)

    @property
    def collective_bytes_by_axes(self) -> dict[tuple[str, tuple[str, ...]], float]:
        """By kind and mesh axes."""
        return _sums(((c.kind, c.axes), c.bytes * c.count) for c in self.collectives)

    @property
    def overlapped(self) -> float:
        """Share of the collectives' bytes that move while the chip computes; 1 where nothing moves."""
        total = sum(c.bytes * c.count for c in self.collectives)
        return sum(c.bytes * c.count for c in self.collectives if c.overlapped) / total if total else 1.0


def _sums(pairs) -> dict:
    totals = Counter()
    for key, value in pairs:
        totals[key] += value
    return dict(totals)


class _Tally:
    def __init__(self):
        self.numbers: Counter = Counter()  # flops, kernel_flops, kernel_asked, traffic, ...; ("cycles", source);
        # told: cycles of what `runs` tells of
        self.collectives: Counter = Counter()  # Collective of count 1 -> count
        self.kernels: Counter = Counter()  # Kernel of count 1 -> count
        self.loops: dict[str, int] = {}
        self.notes: Counter = Counter()

    @property
    def cycles(self) -> float:
        return sum((n for key, n in self.numbers.items() if isinstance(key, tuple)), 0.0)

    def add(self, other: "_Tally", times: float = 1.0, *, computes: bool = True) -> None:
        """
        Args:
          computes: false for what another unit of the chip does meanwhile: its cycles are nobody's wait.
        """
        for key, n in other.numbers.items():
            if computes or not isinstance(key, tuple):
                self.numbers[key] += n * times
        for mine, theirs in ((self.collectives, other.collectives), (self.kernels, other.kernels)):
            for key, n in theirs.items():
                mine[key] += n * times
        self.loops |= other.loops
        self.notes.update(other.notes)


def account(
    program: Program,
    layout: Layout,
    chip: Chip,
    *,
    kernel_cost: Callable[[Kernel], Cost] | None = None,
    runs: Mapping[str, float | tuple[float, ...]] = MappingProxyType({}),
) -> Account:
    """Counts a program from its entry, the bodies of loops as often as they run.

    Cycles come from `bundles` or `compiler` (libtpu's estimates), from `kernels` (`kernel_cost`), or, for an
    instruction that none of these knows, from a `roofline`: its products at the peak, or its bytes of HBM, whichever
    takes longer.

    Args:
      kernel_cost: of one call of a kernel; default: no products, and the cycles libtpu simulated or, without them,
        those of reading and writing its arrays once.
      runs: by the `jax.named_scope` around it, how often a loop runs whose trips no text tells, or the share of its
        runs in which a conditional takes each of its branches; of conditionals that are not named, each as often.
    """
    walker = _Walker(program, layout, chip, kernel_cost or (lambda k: Cost(0.0, k.cycles or 0.0)), runs)
    tally = walker.run(program.entry)
    return Account(
        float(tally.numbers["flops"]), float(tally.numbers["kernel_flops"]), float(tally.numbers["kernel_asked"]),
        {key[1]: float(n) for key, n in tally.numbers.items() if isinstance(key, tuple)},
        float(tally.numbers["traffic"]), float(tally.numbers["host_traffic"]),
        tuple(c._replace(count=float(n)) for c, n in tally.collectives.items()),
        tuple(k._replace(count=float(n)) for k, n in tally.kernels.items()), tally.loops,
        walker.scopes, dict(tally.notes),
    )  # fmt: skip


# A kernel written by hand, on TPU (Mosaic) or GPU (Triton, Mosaic GPU, cuDNN's attention).
_KERNEL = re.compile(r'custom_call_target="[^"]*(?:tpu_custom_call|triton|mosaic|fmha)[^"]*"')
# Take no time: names for what is there already.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "add-dependency", "opt-barrier", "domain", "rng-get-and-update-state",
}  # fmt: skip


class _Async(NamedTuple):
    """A collective that has been started and not yet ended, and when: instructions before it."""

    collective: Collective
    started: int
    ended: int | None  # None: in the next run of the loop's body


class _Walker:
    def __init__(self, program: Program, layout: Layout, chip: Chip, kernel_cost: Callable, runs: Mapping):
        self.program, self.layout, self.chip, self.kernel_cost, self.runs = program, layout, chip, kernel_cost, runs
        self.done: dict[str, _Tally] = {}
        self.scopes: dict[str, float] = {}

    def run(self, name: str) -> _Tally:
        """One run of a computation."""
        if name not in self.done:
            self.done[name] = self._run(self.program.computations[name])
        return self.done[name]

    def _run(self, computation: Computation) -> _Tally:
        total, spent, flying = _Tally(), [0.0], []
        ends = _Ends(self.program, computation)
        for at, i in enumerate(computation.instructions):
            tally = self._instruction(computation, i, at, ends, flying)
            total.add(tally)
            spent.append(spent[-1] + tally.cycles)
        for one in flying:
            last = len(computation.instructions) if one.ended is None else one.ended
            between = round(spent[last] - spent[one.started + 1]) if last > one.started else 0
            total.collectives[one.collective._replace(overlapped=between > 0, between=float(between))] += 1
        return total

    def _instruction(self, computation: Computation, i: Instruction, at: int, ends: "_Ends", flying: list) -> _Tally:
        tally = _Tally()
        base = i.op.removesuffix("-start")
        if i.op == "while":
            self._loop(tally, computation, i)
        elif i.op == "conditional":
            self._conditional(tally, i)
        elif base in COLLECTIVES:
            one = self._collective(base, computation, i)
            if i.op == base or '"is_sync":true' in i.attributes:
                tally.collectives[one] += 1
            else:
                flying.append(_Async(one, at, ends.of(i)))
        elif i.op == "send" and "_xla_megascale_transfer_type" in i.attributes:
            flying.append(_Async(self._between_slices(computation, i), at, ends.of(i)))
        elif base in ("call", "async"):
            self._call(tally, i, at, ends, flying)
        elif i.op == "fusion":
            self._fusion(tally, computation, i, at, ends, flying)
        elif i.op == "custom-call" and _KERNEL.search(i.attributes):
            self._kernel(tally, computation, i)
        elif i.op not in _FREE:
            self._spend(tally, computation, i, flops(i, computation.operands(i)))
        return tally

    # --- control flow ---

    def _loop(self, tally: _Tally, computation: Computation, i: Instruction) -> None:
        body = self.run(i.attribute(r"body=%([\w.\-]+)"))
        trips, scopes = trip_count(self.program, computation, i), self._scopes(i)
        if trips is not None:
            tally.loops[i.name] = trips
            tally.add(body, float(trips))
        elif scopes:
            often, path = self.runs[scopes[-1]], ".".join(scopes)
            self.scopes[path] = self.scopes.get(path, 0.0) + body.cycles - body.numbers["told"]
            tally.add(body, often)
            tally.numbers["told"] = body.cycles * often
        else:
            tally.notes[f"trip count of {i.name} is not known, counted once"] += 1
            tally.add(body)

    def _conditional(self, tally: _Tally, i: Instruction) -> None:
        ways, scopes = [self.run(name) for name in i.calls()], self._scopes(i)
        shares = self.runs[scopes[-1]] if scopes else ()
        if "true_computation" in i.attributes:
            shares = shares[::-1]  # of branches by number, false is the first
        if len(shares) != len(ways):
            shares = [1 / len(ways)] * len(ways)
            if len({(way.cycles, way.numbers["flops"]) for way in ways}) > 1:
                tally.notes[f"which branch of {i.name} is taken is not known, each counted as often"] += 1
        for way, share in zip(ways, shares):
            tally.add(way, share)

    def _scopes(self, i: Instruction) -> list[str]:
        """Names of `runs` around an instruction, the outermost first; none if it is not the very one they are about."""
        path = (i.attribute(r'op_name="([^"]*)"') or "").split("/")
        return [name for name in path if name in self.runs] if path[-2:-1] and path[-2] in self.runs else []

    def _call(self, tally: _Tally, i: Instruction, at: int, ends: "_Ends", flying: list) -> None:
        for name in i.calls():
            inner = self.run(name)
            if i.op in ("call", "async"):
                tally.add(inner)
                continue
            # Started here, ended elsewhere: its collectives run beside what comes between.
            rest = _Tally()
            rest.add(inner)
            rest.collectives = Counter()
            tally.add(rest, computes="async_execution_thread" not in i.attributes)
            for one, n in inner.collectives.items():
                flying += [_Async(one, at, ends.of(i))] * round(n)

    # --- work ---

    def _spend(self, tally: _Tally, computation: Computation, i: Instruction, products: float) -> None:
        traffic = self._traffic(computation, i, HBM)
        tally.numbers["flops"] += products
        tally.numbers["traffic"] += traffic
        tally.numbers["host_traffic"] += self._traffic(computation, i, HOST)
        known = estimated_cycles(i)
        if known is not None:
            tally.numbers["cycles", known[1]] += known[0]
        elif not i.op.endswith("-done"):  # a copy that was started earlier keeps nobody busy
            seconds = max(products / self.chip.device_flops, traffic / self.chip.device_bandwidth)
            if seconds:
                tally.numbers["cycles", "roofline"] += seconds * self.chip.clock

    def _kernel(self, tally: _Tally, computation: Computation, i: Instruction) -> None:
        known = estimated_cycles(i)
        said = i.attribute(r"kernel_metadata=\{\s*([^\0]*?)\}\}, metadata") or ""
        operands = tuple(a for x in computation.operands(i) for a in x.arrays)
        # Ours by the scope that they stand in: Mosaic GPU's kernels have no names, Mosaic's lose their punctuation.
        scope = i.attribute(r'op_name="[^"]*?\b((?:hopper|tpu|triton)_[\w:=]+)')
        name = scope or re.sub(r"(\.clone|\.\d+)+$", "", i.name)
        kernel = Kernel(name, operands, i.arrays, known[0] if known else None, said)
        cost = self.kernel_cost(kernel)
        # A simulated kernel has all of HBM's bandwidth to itself in each of its copies: hold it to what there is.
        floor = kernel.bytes / self.chip.device_bandwidth * self.chip.clock
        tally.kernels[kernel] += 1
        tally.numbers["kernel_flops"] += cost.flops
        tally.numbers["kernel_asked"] += cost.asked
        tally.numbers["traffic"] += kernel.bytes
        tally.numbers["cycles", "kernels"] += max(cost.cycles, floor)

    def _fusion(
        self, tally: _Tally, computation: Computation, i: Instruction, at: int, ends: "_Ends", flying: list
    ) -> None:
        name = i.calls()[0]
        inside = self.program.computations[name]
        for x in inside.instructions:
            if x.op == "custom-call" and _KERNEL.search(x.attributes):
                self._kernel(tally, inside, x)  # a kernel beside which a collective runs
            if x.op not in COLLECTIVES:
                continue
            one = self._collective(x.op, inside, x)
            role = _role(inside, x)
            if role == "start":
                flying.append(_Async(one, at, ends.of_piece(x)))
            elif role == "whole":
                tally.collectives[one] += 1
        self._spend(tally, computation, i, self._products(name))

    def _products(self, name: str) -> float:
        inside = self.program.computations[name]
        return sum(
            (flops(x, inside.operands(x)) + sum(map(self._products, x.calls())) for x in inside.instructions), 0.0
        )

    # --- collectives ---

    def _collective(self, kind: str, computation: Computation, i: Instruction) -> Collective:
        groups = replica_groups(i, self.program.partitions)
        members = max(groups, key=len)  # of a permutation, some may keep what they have
        axes, slices = self.layout.spans(members)
        group = len(members)
        if i.op == kind:  # of a sum in bfloat16 of float32 operands, the result is what travels
            size = i.bytes * (group if kind == "reduce-scatter" else 1)
        else:  # the result of a start holds operands and flags too
            size = sum(a.bytes for x in computation.operands(i) for a in x.arrays if a.dtype != "token")
            size *= group if kind == "all-gather" else 1
        if kind == "all-reduce" and _scattered(computation, i):
            kind = "reduce-scatter"
        return Collective(kind, size, group, axes, slices, overlapped=False, between=0.0)

    def _between_slices(self, computation: Computation, i: Instruction) -> Collective:
        """What libtpu hands to the host to exchange with other slices."""
        kind = i.attribute(r'_xla_megascale_transfer_type="(\w+)"').lower().replace("_", "-")
        slices = len((i.attribute(r'_xla_megascale_target="\{([\d,]+)\}') or "").split(","))
        size = computation.operands(i)[0].bytes * (slices if kind == "all-gather" else 1)
        return Collective(kind, size, slices, (self.layout.across,), slices, overlapped=False, between=0.0)

    # --- memory ---

    def _traffic(self, computation: Computation, i: Instruction, space: int) -> float:
        """Bytes of a memory that an instruction reads and writes: of a slice or an update in place, only that part."""
        if i.op.endswith("-start") or i.op in ("send", "recv"):
            return 0.0  # counted where it ends
        inputs = computation.operands(i)
        if i.op == "fusion-done":  # XLA for GPUs copies slices, in place too, beside other work
            start = inputs[0]
            return self._fused_traffic(start._replace(arrays=i.arrays), computation.operands(start), space)
        if i.op.endswith("-done"):
            sources = computation.operands(inputs[0])[:1] if inputs else []
            sides = (*i.arrays[:1], *(a for x in sources for a in x.arrays[:1]))
            return sum(a.space == space for a in sides) * i.arrays[0].bytes if i.arrays else 0.0
        if i.op == "fusion":
            return self._fused_traffic(i, inputs, space)
        if i.op in ("dynamic-slice", "slice", "gather"):
            return sum(((a.space == space) * i.bytes for x in (i, *inputs[:1]) for a in x.arrays[:1]), 0.0)
        if i.op in ("dynamic-update-slice", "scatter"):
            update = inputs[1 if i.op == "dynamic-update-slice" else -1]
            return sum(((a.space == space) * update.bytes for x in (i, update) for a in x.arrays[:1]), 0.0)
        if i.op == "custom-call":
            return 0.0  # buffers, names and other things of no weight: kernels and products are counted apart
        return sum((_bytes(x.arrays, space) for x in (i, *inputs)), 0.0)

    def _fused_traffic(self, i: Instruction, inputs: list[Instruction], space: int) -> float:
        inside = self.program.computations[i.calls()[0]]
        total = 0.0
        for x in inside.instructions:
            if x.op == "parameter" and (number := int(x.inside)) < len(inputs):
                total += _read(inside, x, _bytes(inputs[number].arrays, space))
        outputs = inside.operands(inside.root) if inside.root.op == "tuple" else [inside.root]
        sizes = i.arrays if len(i.arrays) == len(outputs) else ()
        for output, array in zip(outputs, sizes):
            written = _source(inside, output)
            if written.op == "parameter" or array.space != space:
                continue
            if written.op == "dynamic-update-slice":
                total += inside.operands(written)[1].bytes
            elif written.op not in COLLECTIVES and written.op != "custom-call":
                total += array.bytes
        return total


def _bytes(arrays: tuple[Array, ...], space: int) -> float:
    return sum((a.bytes for a in arrays if a.space == space), 0.0)


def _source(inside: Computation, i: Instruction) -> Instruction:
    """What an instruction is another name for."""
    while i.op in ("bitcast", "reshape", "get-tuple-element") and inside.operands(i):
        i = inside.operands(i)[0]
    return i


def _read(inside: Computation, parameter: Instruction, whole: float) -> float:
    """Bytes read of a fusion's operand, `whole` in that memory."""
    total, names = 0.0, [parameter.name]
    while names:
        name = names.pop()
        for user in inside.users.get(name, []):
            if user.op == "bitcast":
                names.append(user.name)
            elif user.op in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
                total += user.bytes
            elif user.op == "dynamic-update-slice" and user.operands[0] == name:
                pass  # written in place
            elif user.op != "tuple" and user.op not in COLLECTIVES and user.op != "custom-call":
                return whole
    return min(total, whole)


# --- how libtpu spells collectives -----------------------------------------------------------------------------------


def _role(inside: Computation, i: Instruction) -> Literal["start", "whole", "piece"]:
    """What a collective inside a fusion is.

    libtpu cuts a collective that it overlaps into a fusion that starts it, pieces that stand in the fusions that
    compute meanwhile, and a fusion that ends it; each shows the whole collective.
    """
    ends = {m for user in inside.users.get(i.name, []) for m in re.findall(r"AsyncCollective(\w+)", user.attributes)}
    if "Start" in ends:
        return "start"
    return "piece" if "Done" in ends or "async_collective_fusion_config" in i.attributes else "whole"


def _scattered(computation: Computation, i: Instruction) -> bool:
    """Whether each device keeps only its share of a sum: libtpu's reduce-scatter is a fusion of an all-reduce and a
    slice of it, named all-reduce-scatter."""
    users = computation.users.get(i.name, [])
    return computation.name.startswith("all-reduce-scatter") or (
        not computation.name.startswith("async_collective") and bool(users) and users == [computation.root]
        and users[0].op == "dynamic-slice" and "partition-id" in {x.op for x in computation.instructions}
    )  # fmt: skip


class _Ends:
    """Where in a computation that which was started ends."""

    def __init__(self, program: Program, computation: Computation):
        self.computation = computation
        self.place = {i.name: at for at, i in enumerate(computation.instructions)}
        self.pieces: dict[str, int] = {}  # chain -> place of the fusion that ends it
        for at, i in enumerate(computation.instructions):
            if i.op != "fusion":
                continue
            inside = program.computations[i.calls()[0]]
            for x in inside.instructions:
                if x.op in COLLECTIVES and any(
                    "AsyncCollectiveDone" in u.attributes for u in inside.users.get(x.name, [])
                ):
                    self.pieces[_chain(x)] = at

    def of(self, start: Instruction) -> int | None:
        """Place of the `-done` of a start; of a send to other slices, of the arrival of its answer."""
        if meeting := start.attribute(r'_xla_host_transfer_rendezvous="([^"]*)"'):
            arrives = (
                i for i in self.computation.instructions if i.op == "recv" and f'rendezvous="{meeting}"' in i.attributes
            )
            start = next(arrives, start)
        while start.op.endswith(("-start", "-update")) or start.op in ("send", "recv"):
            users = self.computation.users.get(start.name, [])
            ended = next((u for u in users if u.op.endswith("-done")), None)
            if ended is not None:
                return self.place[ended.name]
            start = next((u for u in users if u.op.endswith("-update")), None)
            if start is None:
                return None
        return None

    def of_piece(self, piece: Instruction) -> int | None:
        return self.pieces.get(_chain(piece))


def _chain(i: Instruction) -> str:
    """What the pieces of one collective have in common."""
    return i.attribute(r'chain_id="(\d+)"') or i.attribute(r"channel_id=(\d+)") or i.name


def ring_bytes(c: Collective) -> float:
    """Bytes that each device sends in all `count` exchanges, around a ring (Patarasu & Yuan 2009)."""
    share = (c.group - 1) / c.group
    sent = {"all-reduce": 2 * share, "all-to-all": share, "ragged-all-to-all": share, "collective-permute": 1.0}
    return c.bytes * c.count * sent.get(c.kind, share)
