"""Pipeline schedules as data: who does what at which tick, where values wait, who sends to whom.

A stage is a run of layers; stage s is chunk s // p of device s % p. In a tick each device does one thing for one unit
(a microbatch, or a slice of its tokens): F, its stage forward; B, its stage backward; or, where the backward pass is
cut in two, B for the gradient of the stage's input and W, later, for those of its weights. What F or B of a tick makes
arrives at the neighbour before the next tick.

Within a schedule devices wait for each other only where one needs what the other makes: `Instructions.routes` are
pairs, not rings. In a ring with 1F1B, whose neighbours are always at opposite passes, every tick would last as long as
the longer pass (36 % idle in place of 9 % for 4 devices and 32 microbatches, when B takes three times as long as F).
"""

import itertools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from jaxllm.core.shapes import Float, Int
from jaxllm.parallel.config import GPipe, Interleaved, OneForwardOneBackward, ZeroBubble

IDLE, F, B, W = range(4)  # what a device does in a tick

Schedule = GPipe | OneForwardOneBackward | Interleaved | ZeroBubble


class Table(NamedTuple):
    """A schedule. Unit u is slice u % slices of microbatch u // slices; both are 0 where a device is idle."""

    op: Int[np.ndarray, "ticks devices"]
    unit: Int[np.ndarray, "ticks devices"]
    chunk: Int[np.ndarray, "ticks devices"]
    units: int
    chunks: int
    slices: int = 1

    @property
    def devices(self) -> int:
        return self.op.shape[1]

    @property
    def stages(self) -> int:
        return self.devices * self.chunks

    @property
    def stage(self) -> Int[np.ndarray, "ticks devices"]:
        return self.chunk * self.devices + np.arange(self.devices, dtype=np.int32)

    def at(self) -> dict[tuple[int, int, int], int]:
        """Tick of each (op, unit, stage)."""
        busy = np.nonzero(self.op)
        what = np.stack([self.op[busy], self.unit[busy], self.stage[busy]], -1)
        return dict(zip(map(tuple, what.tolist()), busy[0].tolist(), strict=True))


# --- the schedules ---------------------------------------------------------------------------------------------------


def table(schedule: Schedule, devices: int, microbatches: int) -> Table:
    """The schedule of a training step; at least as many microbatches as devices."""
    assert microbatches >= devices, "a ConfigError says so long before"
    match schedule:
        case GPipe():
            return gpipe(devices, microbatches, schedule.slices)
        case OneForwardOneBackward():
            return one_forward_one_backward(devices, microbatches)
        case Interleaved():
            return interleaved(devices, microbatches, schedule.chunks)
        case ZeroBubble():
            return zero_bubble(devices, microbatches)
    raise AssertionError(schedule)


def gpipe(devices: int, microbatches: int, slices: int = 1) -> Table:
    """All forward passes, then all backward passes in the opposite order (Huang et al. 2018, arXiv:1811.06965).

    With slices of tokens: Li et al. 2021 (TeraPipe), arXiv:2102.07988.
    """
    units = microbatches * slices
    length = units + devices - 1
    forward = {(u + d, d): (F, u, 0) for u in range(units) for d in range(devices)}
    backward = {(2 * length - 1 - t, d): (B, u, 0) for (t, d), (_, u, _) in forward.items()}
    return _table(forward | backward, devices, units, slices=slices)


def forward_only(devices: int, microbatches: int, chunks: int = 1) -> Table:
    """Evaluation: microbatches, of any number, one after another through all stages."""
    around = max(0, devices - microbatches)  # ticks until the first unit is back for its next chunk, if they are few
    ops = {
        (k + c * around + d, d): (F, u, c)
        for k, (u, c) in enumerate(_chunk_order(devices, microbatches, chunks))
        for d in range(devices)
    }
    return _table(ops, devices, microbatches, chunks)


def one_forward_one_backward(devices: int, microbatches: int) -> Table:
    """PipeDream-flush (Narayanan et al. 2020, arXiv:2006.09503): device d has at most p - d units in flight.

    Even and odd devices take turns, so whatever arrives is used in the next tick.
    """
    p = devices
    ops = {(d + 2 * u, d): (F, u, 0) for u in range(microbatches) for d in range(p)}
    ops |= {(2 * p - 1 - d + 2 * u, d): (B, u, 0) for u in range(microbatches) for d in range(p)}
    return _table(ops, p, microbatches)


def interleaved(devices: int, microbatches: int, chunks: int) -> Table:
    """1F1B with several stages a device (Narayanan et al. 2021, arXiv:2104.04473, section 2.2).

    In one tick all devices do the same pass, and as many units are in flight as in Megatron-LM. Any number of
    microbatches from `devices` on: the first group of them takes what does not divide.
    """
    p = devices
    order = _chunk_order(p, microbatches, chunks)
    first = order.index((0, chunks - 1))  # the forward pass, of a device, after which its backward passes may start
    warmup, passes = p + first, len(order) + p - 1  # forward ticks before the first backward tick, and all in all
    ops = {}
    for k, (u, c) in enumerate(order):
        for d in range(p):
            forward, backward = k + d, k + p - 1 - d  # which forward, which backward tick; after `warmup` in turns
            ops[forward + max(0, forward + 1 - warmup), d] = F, u, c
            ops[backward + min(warmup + backward, passes), d] = B, u, chunks - 1 - c
    return _table(ops, p, microbatches, chunks)


def _chunk_order(devices: int, microbatches: int, chunks: int) -> list[tuple[int, int]]:
    """(unit, chunk) in the order of forward passes: groups of microbatches, of `devices` or a little more."""
    first = devices + microbatches % devices if microbatches > devices else microbatches
    starts = [0, *range(first, microbatches, devices)]
    groups = [range(a, b) for a, b in itertools.pairwise([*starts, microbatches])]
    return [(u, c) for group in groups for c in range(chunks) for u in group]


def zero_bubble(devices: int, microbatches: int) -> Table:
    """ZB-H1 (Qi et al. 2023, arXiv:2401.10241, section 2.3): 1F1B in which device d is d weight gradients behind.

    F and B not followed by their W are at most p on every device, as many as 1F1B has in flight on the first.
    """
    p, m = devices, microbatches
    orders = []
    for d in range(p):
        ahead = min(p - 1 - d, m)
        order = [(F, u) for u in range(ahead)]
        for u in range(m):
            order += [(F, u + ahead)] * (u + ahead < m) + [(B, u)] + [(W, u - d)] * (u >= d)
        orders.append(order + [(W, u) for u in range(m - d, m)])
    return _table(_as_early_as_can_be(orders), p, m)


def _as_early_as_can_be(orders: list[list[tuple[int, int]]]) -> dict[tuple[int, int], tuple[int, int, int]]:
    """Ticks for what each device is to do in this order, one stage a device."""
    last, at = len(orders) - 1, {}
    queues = [iter(order) for order in orders]
    heads = [next(q, None) for q in queues]
    for tick in itertools.count():
        if not any(heads):
            return {(t, d): (op, u, 0) for (op, u, d), t in at.items()}
        for d, head in enumerate(heads):
            if head and all(at.get(needed, tick) < tick for needed in _needs(*head, d, last)):
                at[*head, d], heads[d] = tick, next(queues[d], None)
    raise AssertionError


def _needs(op: int, unit: int, stage: int, last: int) -> list[tuple[int, int, int]]:
    """(op, unit, stage) that must be done before."""
    match op:
        case 1:  # F
            return [(F, unit, stage - 1)] if stage else []
        case 2:  # B
            return [(F, unit, stage)] + ([(B, unit, stage + 1)] if stage < last else [])
    return [(B, unit, stage)]


def _table(
    ops: Mapping[tuple[int, int], tuple[int, int, int]], devices: int, units: int, chunks: int = 1, slices: int = 1
) -> Table:
    """From (tick, device) -> (op, unit, chunk)."""
    cells = np.zeros((max(t for t, _ in ops) + 1, devices, 3), np.int32)
    for place, cell in ops.items():
        cells[place] = cell
    return Table(*np.moveaxis(cells, -1, 0), units, chunks, slices)


# --- what is counted -------------------------------------------------------------------------------------------------


def bubble(table: Table, inputs: float = 1.0, weights: float = 1.0, again: float = 0.0) -> float:
    """Share of the devices' time that they idle, from the first start to the last end; messages take no time.

    Args:
      inputs, weights: time of these gradients, of one stage and unit, in forward passes.
      again: what the backward pass computes of the forward pass again, in forward passes.
    """
    return idle(table, np.array([0, 1, again + inputs + (0 if W in table.op else weights), weights])[table.op])


def idle(table: Table, times: Float[np.ndarray, "ticks devices"]) -> float:
    """As `bubble`, given what each device's tick takes."""
    clock = np.zeros(table.devices)
    for spent, pairs in zip(times, _messages(table)):
        done = clock + spent
        clock = done.copy()
        for source, target in itertools.chain(*pairs):
            clock[target] = max(clock[target], done[source])
    return 1 - float(times.sum() / (table.devices * clock.max()))


def in_flight(table: Table, device: int, until: int = B) -> int:
    """The most forward passes that a device has done and not yet seen come back (`until` B, or W)."""
    op = table.op[:, device]
    return int(np.cumsum((op == F).astype(int) - (op == until)).max())


# --- from a schedule to instructions ---------------------------------------------------------------------------------


class Cell(NamedTuple):
    """What one device is told for one tick. Slots are numbers of places in a buffer, -1 for none."""

    op: int
    unit: int
    stage: int
    chunk: int
    arriving: int  # slot for the activation that arrives as the tick begins
    input: int  # slot of the activation that F or B starts from; -1 for the first stage, which embeds
    arriving_gradient: int  # slot for the gradient that arrives as the tick begins
    gradient: int  # slot of the gradient that B starts from; -1 for the last stage, which has the loss
    kept: int  # slot of what the layers keep from forward to backward
    waiting: int  # slot of what B leaves for W


Pairs = tuple[tuple[int, int], ...]  # (from device, to device)


class Instructions(NamedTuple):
    """A table, ready to run: `Cell`s, who sends, and how many slots the buffers of a device have."""

    cells: Int[np.ndarray, "ticks devices fields"]
    route: Int[np.ndarray, " ticks"]  # which of `routes` messages take at the end of each tick
    routes: tuple[tuple[Pairs, Pairs], ...]  # of activations, of gradients
    slots: Cell  # how many each field of slots needs
    recompute: bool


def instructions(table: Table, recompute: bool = True) -> Instructions:
    """Gives each value that waits a slot, from before it is written until after it is last read.

    Args:
      recompute: B starts from the stage's input; else from what F kept of each layer.
    """
    at, last, p = table.at(), table.stages - 1, table.devices
    trains = B in table.op
    lives: dict[str, dict[tuple[int, int], tuple[int, int]]] = {n: {} for n in ("input", "gradient", "kept", "waiting")}
    for (op, u, s), forward in at.items():
        if op != F:
            continue
        back = at.get((B, u, s), forward)
        runs = back if recompute else forward  # when the layers run to be differentiated
        if s > 0:
            lives["input"][u, s] = at[F, u, s - 1] + 1, max(forward, runs)
        if trains:
            lives["kept"][u, s] = runs, back
            if s < last:
                lives["gradient"][u, s] = at[B, u, s + 1] + 1, back
        if (W, u, s) in at:
            lives["waiting"][u, s] = back, at[W, u, s]
    slots = {name: _allot(alive, p) for name, alive in lives.items()}

    cells = np.full((*table.op.shape, len(Cell._fields)), -1, np.int32)
    cells[:, :, :4] = 0
    for (op, u, s), t in at.items():
        read = {"F": ("input", "kept"), "B": ("input", "gradient", "kept", "waiting"), "W": ("waiting",)}["_FBW"[op]]
        cell = Cell(op, u, s, s // p, *cells[t, s % p, 4:])
        if op == F and recompute:
            read = ("input",)
        cells[t, s % p] = cell._replace(**{name: slots[name].get((u, s), -1) for name in read})
    for name, arriving in (("input", "arriving"), ("gradient", "arriving_gradient")):
        for (u, s), slot in slots[name].items():
            cells[lives[name][u, s][0], s % p, Cell._fields.index(arriving)] = slot

    messages = _messages(table)
    routes = tuple(dict.fromkeys(messages))
    sizes = {name: max(slot.values(), default=-1) + 1 for name, slot in slots.items()}
    counts = Cell(
        0, 0, 0, 0, sizes["input"], sizes["input"], sizes["gradient"], sizes["gradient"], sizes["kept"],
        sizes["waiting"],
    )  # fmt: skip
    route = np.array([routes.index(m) for m in messages], np.int32)
    return Instructions(cells, route, routes, counts, recompute)


def _messages(table: Table) -> list[tuple[Pairs, Pairs]]:
    """Who sends an activation, who a gradient, at the end of each tick.

    For fewer kinds of ticks an idle device may send too, whatever it has: it keeps nobody waiting.
    """
    p, stage = table.devices, table.stage

    def senders(op: int, end: int) -> list[frozenset[int]]:
        return [frozenset(np.flatnonzero(row).tolist()) for row in (table.op == op) & (stage != end)]

    wanted = list(zip(senders(F, table.stages - 1), senders(B, 0)))
    largest_first = sorted(dict.fromkeys(wanted), key=lambda pair: -len(pair[0]) - len(pair[1]))

    def chosen(tick: int) -> tuple[Pairs, Pairs]:
        (activations, gradients), idle = wanted[tick], frozenset(np.flatnonzero(table.op[tick] == IDLE).tolist())
        a, g = next(
            (a, g)
            for a, g in largest_first
            if activations <= a <= activations | idle and gradients <= g <= gradients | idle
        )
        return tuple((d, (d + 1) % p) for d in sorted(a)), tuple((d, (d - 1) % p) for d in sorted(g))

    return [chosen(t) for t in range(len(table.op))]


def _allot(alive: Mapping[tuple[int, int], tuple[int, int]], devices: int) -> dict[tuple[int, int], int]:
    """A slot of its stage's device for each (unit, stage), first tick and last; as few as there are alive at once."""
    slots: dict[tuple[int, int], int] = {}
    free_after: dict[int, list[int]] = {d: [] for d in range(devices)}  # by slot: the last tick of who has it
    for (unit, stage), (first, final) in sorted(alive.items(), key=lambda item: item[1]):
        taken = free_after[stage % devices]
        slot = next((i for i, tick in enumerate(taken) if tick < first), len(taken))
        taken[slot : slot + 1] = [final]
        slots[unit, stage] = slot
    return slots


# --- how long a slice of tokens should be ----------------------------------------------------------------------------


def slice_lengths(length: int, stages: int, cost: Callable[[int, int], float], step: int = 1) -> tuple[int, ...]:
    """Lengths of the slices of a row of tokens that pass the stages in the least time, multiples of `step`.

    Dynamic programming over the end of a slice, for each bound on the longest of them (Li et al. 2021,
    arXiv:2102.07988, section 3.3): the time is sum(cost of each) + (stages - 1) max(cost of any). It stands alone:
    nothing but tests calls it, as the slices of a run are equally long.

    Args:
      cost: time of one stage for a slice, of (its length, tokens before it).
    """
    assert length % step == 0
    n = length // step
    times = {(k, c): cost(k * step, c * step) for c in range(n) for k in range(1, n - c + 1)}
    best, chosen = float("inf"), ()
    for bound in sorted(set(times.values())):
        if (stages - 1) * bound >= best:
            break
        least, previous = [0.0] + [float("inf")] * n, [0] * (n + 1)
        for end in range(1, n + 1):
            for start in range(end):
                time = times[end - start, start]
                if time <= bound and least[start] + time < least[end]:
                    least[end], previous[end] = least[start] + time, start
        if least[n] + (stages - 1) * bound < best:
            best, chosen, end = least[n] + (stages - 1) * bound, (), n
            while end:
                chosen, end = ((end - previous[end]) * step, *chosen), previous[end]
    return chosen
