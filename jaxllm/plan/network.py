"""How long collectives take on the torus of a TPU slice, among the GPUs of a host, and between slices or hosts.

A mesh axis becomes up to three levels, from fast to slow: the devices of a chip, the torus (or switch), the network.
Where n devices each take in W bytes/s, gathering V bytes takes V (1 - 1/n) / W, and the next level carries a share of
1/n of them (Austin et al. 2025, "How to Scale Your Model", jax-ml.github.io/scaling-book, chapter 3). No JAX here.
"""

import functools
import itertools
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jaxllm.plan.chips import Torus
from jaxllm.plan.topology import Topology

Numbers = np.ndarray | np.number | float | int  # one number a plan, or one for all
FAST_TO_SLOW = ("tensor", "context", "fsdp", "pipe", "data")  # MESH_AXES from the end, without `expert`
BETWEEN_CORES = 6  # bandwidth between the devices of a TPU7x chip, in torus links (cloud.google.com/tpu/docs/tpu7x)


class Level(NamedTuple):
    """Devices of a group that exchange over one network: numbers, or arrays of one number a plan."""

    n: Numbers  # how many
    bandwidth: Numbers  # bytes/s into a device, all directions together
    way: Numbers  # bytes/s from one neighbour
    hops: Numbers  # between the two that are furthest apart
    hop: Numbers  # seconds
    far: Numbers  # mean distance of an all-to-all relative to a gather's load on the links


class Group(NamedTuple):
    """The devices along one mesh axis or several, level by level from the fastest."""

    levels: tuple[Level, ...]

    def gather(self, size: Numbers, count: Numbers = 1) -> Numbers:
        """Seconds until each device has the `size` bytes of which each had a share; a reduce-scatter takes as long.

        Args:
          count: collectives that it is cut into.
        """
        seconds, part = 0.0, size
        for level in self.levels:
            seconds = seconds + part * (1 - 1 / level.n) / level.bandwidth + count * level.hops * level.hop
            part = part / level.n
        return seconds

    def shift(self, size: Numbers) -> Numbers:
        """Seconds until each device has its neighbour's `size` bytes: the slowest level sets the pace."""
        return np.maximum.reduce([(level.n > 1) * (size / level.way + level.hop) for level in self.levels])

    def swap(self, size: Numbers) -> Numbers:
        """Seconds of an all-to-all of an array of which each device has `size` bytes."""
        return sum(
            size * (1 - 1 / level.n) * level.far / level.bandwidth + level.hops * level.hop for level in self.levels
        )


class Wires(NamedTuple):
    """The groups that a training step communicates in, of one mesh or an array of them."""

    shared: Group  # fsdp and context: what parameters are shared out over
    data: Group
    tensor: Group
    context: Group
    pipe: Group


GROUPS = Wires(("context", "fsdp"), ("data",), ("tensor",), ("context",), ("pipe",))
_ALONE = (1, 1.0, 1.0, 0, 0.0, 1.0)


def wires(on: Topology, mesh: Mapping[str, Numbers], across: str | None = None) -> Wires:
    """The groups of every mesh, given the sizes of its axes as arrays; endless where it does not fit the topology.

    Args:
      across: the axis over slices, as `place` has it.
    """
    sizes = np.stack([np.atleast_1d(mesh[axis]) for axis in FAST_TO_SLOW], 1)
    first, which = runs(sizes)
    table = np.array([_levels(on, tuple(map(int, sizes[i])), across) for i in first])[which]
    return Wires(*(Group(tuple(Level(*table[:, g, k].T) for k in range(table.shape[2]))) for g in range(len(GROUPS))))


def runs(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each run of equal rows starts, and the number of each row's run: plans come mesh by mesh."""
    new = np.ones(len(rows), bool)
    new[1:] = (rows[1:] != rows[:-1]).any(1)
    return np.flatnonzero(new), np.cumsum(new) - 1


def group(
    on: Topology,
    mesh: Mapping[str, int],
    axes: tuple[str, ...],
    *,
    devices: int | None = None,
    slow: bool | None = None,
    across: str | None = None,
) -> Group:
    """The group along some axes of one mesh.

    Args:
      devices: as many of them exchange as this, where it is not all: dimensions of the torus that make so many.
      slow: whether slices exchange with each other, or (False) only devices within one; None: all there are.
      across: the axis over slices, as `place` has it.

    Raises:
      ValueError: the mesh does not fit the topology, or these axes do not span its slices and `slow` says so.
    """
    sizes = tuple(
        int(mesh.get(axis, 1)) * (int(mesh.get("expert", 1)) if axis == "fsdp" else 1) for axis in FAST_TO_SLOW
    )
    placed = place(on, sizes, across)
    if placed is None:
        raise ValueError(f"a mesh of {dict(mesh)} does not fit {on}")
    fast = [a for a in FAST_TO_SLOW if a in axes or a == "fsdp" and "expert" in axes]
    pieces = [(level, piece) for axis in fast for level in range(3) for piece in placed[axis][level]]
    if slow and all(level < 2 for level, _ in pieces):
        raise ValueError(
            f"{' x '.join(axes)} of {dict(mesh)} does not span the slices of {on}: {across or 'no'} axis does"
        )
    if slow is False:
        pieces = [p for p in pieces if p[0] < 2]
    if devices is not None:
        some = (c for k in range(len(pieces) + 1) for c in itertools.combinations(pieces, k))
        fitting = [c for c in some if math.prod(piece[0] for _, piece in c) == devices]
        if slow:
            fitting = [c for c in fitting if any(level == 2 for level, _ in c)]
        pieces = list(fitting[0]) if fitting else pieces  # of a permutation, chains may be of any length
    return Group(tuple(Level(*_level([piece for at, piece in pieces if at == level])) for level in range(3)))


@functools.lru_cache(100_000)
def _levels(on: Topology, sizes: tuple[int, ...], across: str | None) -> np.ndarray:
    """[group, level, field] of one mesh."""
    placed = place(on, sizes, across)
    if placed is None:
        return np.full((len(GROUPS), 3, len(_ALONE)), (2, 1e-9, 1e-9, 0, 0.0, 1.0))
    return np.array([_joined(placed, axes) for axes in GROUPS])


Pieces = dict[str, tuple[list[tuple], list[tuple], list[tuple]]]  # axis -> levels -> pieces of the network


def _joined(placed: Pieces, axes: tuple[str, ...]) -> list[tuple]:
    """Levels of the devices along several axes: on one level their links work side by side."""
    return [_level([piece for some in pieces for piece in some]) for pieces in zip(*(placed[axis] for axis in axes))]


def _level(pieces: list[tuple]) -> tuple:
    n, width, way, hops, hop, far = zip(*pieces) if pieces else zip(_ALONE)
    return math.prod(n), sum(width), min(way), sum(hops), max(hop), max(far)


def place(on: Topology, sizes: tuple[int, ...], across: str | None = None) -> Pieces | None:
    """Which links each mesh axis gets; None where the mesh does not fit.

    As `parallel.sharding.make_mesh` lays it out: one axis spans the slices; inside, from the fastest axis on, an axis
    takes whole dimensions of the torus, as many as it can, else parts of some.

    Args:
      sizes: of the axes of FAST_TO_SLOW.
      across: the axis that spans slices; None: data, pipe or fsdp, the first that can.
    """
    axes = dict(zip(FAST_TO_SLOW, sizes))
    if math.prod(sizes) != on.devices:
        return None
    if not isinstance(on.chip.links, Torus):
        return _on_hosts(on, axes)
    across = across or next((a for a in ("data", "pipe", "fsdp") if axes[a] % on.slices == 0), None)
    if on.slices > 1 and (across is None or axes[across] % on.slices):
        return None
    link, hop, net = on.chip.links.link / on.chip.devices, on.chip.links.hop, on.chip.network
    cores, free = on.chip.devices, [[n, ring] for n, ring in zip(on.shape, on.chip.links.rings(on.shape))]
    out: Pieces = {}
    for axis, size in axes.items():
        outer = on.slices if axis == across and on.slices > 1 else 1
        left = size // outer
        inner = math.gcd(left, cores)
        left, cores = left // inner, cores // inner
        torus = []
        for n, ring in _take(free, left):
            links = 2 if ring else 1
            torus.append((n, links * link, link, n // links, hop, max(1, n / 4) if ring else max(1, n / 2)))
        if math.prod(piece[0] for piece in torus) != left:
            return None
        width = BETWEEN_CORES * on.chip.links.link
        slow = net.bandwidth / on.chip.devices
        out[axis] = (
            [(inner, width, width, 1, hop, 1.0)] if inner > 1 else [], torus,
            [(outer, slow, slow, 1, net.hop, 1.0)] if outer > 1 else [],
        )  # fmt: skip
    return out


def _take(free: list[list], size: int) -> list[tuple[int, bool]]:
    """Takes dimensions (length, whether they close to a ring) out of `free` for an axis of this size."""
    if size == 1:
        return []
    for k in range(len(free), 0, -1):
        for some in itertools.combinations(range(len(free)), k):
            if math.prod(free[i][0] for i in some) == size and all(free[i][0] > 1 for i in some):
                taken = [tuple(free[i]) for i in some]
                for i in some:
                    free[i] = [1, False]
                return taken
    taken = []
    for i in sorted(range(len(free)), key=lambda i: -free[i][0]):
        part = math.gcd(size, free[i][0])
        if part > 1:
            taken.append((part, free[i][1] and part == free[i][0]))
            free[i], size = [free[i][0] // part, False], size // part
    return taken


def _on_hosts(on: Topology, axes: Mapping[str, int]) -> Pieces:
    """Devices are numbered host by host: the fastest axes stay inside one, where a switch joins all at full speed."""
    fast, net, left = on.chip.links, on.chip.network, on.chips // on.slices
    out: Pieces = {}
    for axis, size in axes.items():
        inner = math.gcd(size, left)
        left //= inner
        outer = size // inner
        out[axis] = (
            [(inner, fast.bandwidth, fast.bandwidth, 1, fast.hop, 1.0)] if inner > 1 else [], [],
            [(outer, net.bandwidth, net.bandwidth, 1, net.hop, 1.0)] if outer > 1 else [],
        )  # fmt: skip
    return out
