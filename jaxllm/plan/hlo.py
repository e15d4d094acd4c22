"""A compiled program as text (`compiled.as_text()`), read back: computations, instructions, and what each one means.

Nothing here knows JAX. The texts of libtpu, of XLA for GPUs and of XLA for CPUs are read alike.
"""

import functools
import math
import re
from typing import NamedTuple

import numpy as np

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


class Array(NamedTuple):
    """One array of a type."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0  # memory it lies in: 0 is HBM, 1 the chip's own scratchpad, 5 the host

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        return self.size * bits(self.dtype) / 8


class Instruction(NamedTuple):
    name: str
    op: str
    arrays: tuple[Array, ...]  # of the result; those of a tuple one after another
    inside: str  # between the parentheses: operands, or the value of a constant
    attributes: str  # after them
    root: bool

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.inside)

    @property
    def bytes(self) -> float:
        return sum((a.bytes for a in self.arrays), 0.0)

    def attribute(self, pattern: str) -> str | None:
        """First group of a pattern among the attributes."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else None

    def calls(self) -> list[str]:
        """Computations that the instruction runs as its own, branches in order; not those it maps over elements."""
        found = re.findall(
            r"\b(?:calls|called_computations=\{|true_computation|false_computation)=?%([\w.\-]+)", self.attributes
        )
        if branches := self.attribute(r"branch_computations=\{([^}]*)\}"):
            found += re.findall(r"%([\w.\-]+)", branches)
        if self.op.removesuffix("-start") in ("call", "async"):
            found += re.findall(r"\bto_apply=%([\w.\-]+)", self.attributes)
        return found


class Computation:
    """Instructions in the order of the text: of a scheduled program, that in which they run."""

    def __init__(self, name: str, instructions: list[Instruction], thread: str):
        self.name, self.instructions, self.thread = name, instructions, thread
        self.by_name = {i.name: i for i in instructions}

    @property
    def root(self) -> Instruction:
        return next((i for i in self.instructions if i.root), self.instructions[-1])

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Name -> instructions that take it as an operand."""
        found: dict[str, list[Instruction]] = {}
        for i in self.instructions:
            for name in dict.fromkeys(i.operands):
                found.setdefault(name, []).append(i)
        return found

    def operands(self, i: Instruction) -> list[Instruction]:
        return [self.by_name[name] for name in i.operands if name in self.by_name]


class Program(NamedTuple):
    computations: dict[str, Computation]
    entry: str
    partitions: int  # devices that run the text together: those of one slice


@functools.cache
def bits(dtype: str) -> int:
    """Bits an element takes."""
    if dtype in ("token", "opaque"):
        return 0
    if dtype == "pred":
        return 8
    digits = re.match(r"[a-z]+(\d+)", dtype)
    return int(digits[1]) if digits else 0


# --- reading ---------------------------------------------------------------------------------------------------------

_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](?:\{[^{}]*?(?:S\((\d+)\))?\})?")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*-> .*\{$")


def parse(text: str) -> Program:
    """The program of a text."""
    computations: dict[str, Computation] = {}
    entry = name = ""
    lines: list[str] = []
    for line in text.splitlines():
        if not name:
            if line[:1] not in " }" and (header := _HEADER.match(line)):
                name, lines = header[2], []
                entry = name if header[1] else entry
        elif line == "}" or line.startswith("}, execution_thread"):
            thread = re.search(r'execution_thread="(\w+)"', line)
            computations[name] = Computation(name, [_instruction(x) for x in lines], thread[1] if thread else "main")
            name = ""
        elif _INSTRUCTION.match(line):
            lines.append(line)
        elif lines:  # strings of a kernel go over several lines
            lines[-1] += "\n" + line
    partitions = re.search(r"num_partitions=(\d+)", text[: text.find("\n")])
    return Program(computations, entry, int(partitions[1]) if partitions else 1)


def _instruction(line: str) -> Instruction:
    start = _INSTRUCTION.match(line)
    rest = line[start.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    return Instruction(
        start[2], rest[:opening], arrays(kind), rest[opening + 1 : closing], rest[closing + 1 :], bool(start[1])
    )


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, start):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    raise ValueError(f"parenthesis without an end in {text[start : start + 80]!r}")


def arrays(kind: str) -> tuple[Array, ...]:
    """Arrays of a type as it is written."""
    return tuple(
        Array(dtype, tuple(int(n.removeprefix("<=")) for n in dims.split(",") if n), int(space or 0))
        for dtype, dims, space in _ARRAY.findall(kind)
    )


# --- floating-point operations ---------------------------------------------------------------------------------------

_GEMM = re.compile(r"custom_call_target=\"(__cublas\$|__onednn\$matmul|__cublas\$lt\$matmul)")


def flops(i: Instruction, inputs: list[Instruction]) -> float:
    """Of a matrix product or convolution, two for a multiplication and its addition; 0 for everything else."""
    if i.op == "dot":
        contracted = _numbers(i.attribute(r"lhs_contracting_dims=\{([\d,]*)\}"))
        return 2.0 * i.arrays[0].size * math.prod(inputs[0].arrays[0].dims[d] for d in contracted)
    if i.op == "convolution":
        return _convolution(i, *(x.arrays[0].dims for x in inputs[:2]))
    if i.op == "custom-call" and _GEMM.search(i.attributes):
        return _library(i, inputs)
    return 0.0


def _convolution(i: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> float:
    """libtpu writes products as convolutions: batch dimensions become windows that slide in steps of their size."""
    lhs, rhs, out = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes).groups()
    window = dict(pair.split("=") for pair in (i.attribute(r"window=\{([^}]*)\}") or "").split())
    result = i.arrays[0].dims
    total = 2.0 * result[out.index("b")] * result[out.index("f")] * right[rhs.index("i")]
    for at, d in enumerate(sorted(c for c in rhs if c.isdigit())):
        size, stride, spread, holes, low = (
            int(window[key].split("x")[at].split("_")[0]) if key in window else default
            for key, default in (("size", 1), ("stride", 1), ("rhs_dilate", 1), ("lhs_dilate", 1), ("pad", 0))
        )
        n_in, n_out = left[lhs.index(d)], result[out.index(d)]
        # A place of the window counts where it meets an element, not padding nor the holes of a dilated input.
        place = np.arange(n_out)[:, None] * stride + np.arange(size) * spread - low
        total *= float(((place >= 0) & (place <= (n_in - 1) * holes) & (place % holes == 0)).sum())
    return total


def _library(i: Instruction, inputs: list[Instruction]) -> float:
    left, right = inputs[0].arrays[0], inputs[1].arrays[0]
    out = i.arrays[0].size
    named = i.attribute(r'lhs_contracting_dimensions":\[([^\]]*)\]')
    if named:
        return 2.0 * out * math.prod(left.dims[int(d)] for d in re.findall(r"\d+", named))
    batch = math.prod(left.dims[:-2]) if len(left.dims) > 2 else 1
    return 2.0 * out * math.sqrt(left.size * right.size / (out * batch))


def _numbers(listed: str | None) -> list[int]:
    return [int(n) for n in (listed or "").split(",") if n]


# --- cycles ----------------------------------------------------------------------------------------------------------


def estimated_cycles(i: Instruction) -> tuple[float, str] | None:
    """libtpu's own guess and where it has it from: `bundles`, a simulation of the machine code, or `compiler`.

    libtpu leaves 2^63 - 1 where it has no guess.
    """
    for source, pattern in (
        ("bundles", r'"bundle_analysis_data":\{"estimated_cycles":"(\d+)"'),
        ("compiler", r'"estimated_cycles":"(\d+)"'),
    ):
        found = i.attribute(pattern)
        if found and 0 < int(found) < 2**62:
            return float(found), source
    return None


# --- loops -----------------------------------------------------------------------------------------------------------


class _Linear(NamedTuple):
    """Element `index` of the loop's tuple plus `offset`; of no element: the number `offset`."""

    index: int | None
    offset: int


def trip_count(program: Program, computation: Computation, loop: Instruction) -> int | None:
    """How often the body of a `while` runs; None where it cannot be told.

    XLA writes it down for CPUs and GPUs. libtpu does not: there it follows from where the counter starts, what the
    body adds to it, and what the condition compares it with.
    """
    if known := loop.attribute(r'known_trip_count":\{"n":"(\d+)"'):
        return int(known)
    condition = program.computations.get(loop.attribute(r"condition=%([\w.\-]+)"))
    body = program.computations.get(loop.attribute(r"body=%([\w.\-]+)"))
    start = computation.by_name.get(loop.operands[0])
    if not condition or not body or not start or start.op != "tuple":
        return None
    compared = _compared(program, condition)
    if compared is None:
        return None
    (left, right), direction = compared

    def before(x: _Linear) -> int | None:
        """Its value when the loop starts."""
        if x.index is None:
            return x.offset
        value = _linear(program, computation, start.operands[x.index])
        return None if value is None or value.index is not None else value.offset + x.offset

    def step(x: _Linear) -> int | None:
        """What the body adds to it."""
        if x.index is None:
            return 0
        if body.root.op != "tuple":
            return None
        value = _linear(program, body, body.root.operands[x.index])
        return None if value is None or value.index != x.index else value.offset

    values = [f(x) for f in (before, step) for x in (left, right)]
    if None in values:
        return None
    gap, closes = values[1] - values[0], values[2] - values[3]
    if direction in ("GT", "GE"):
        gap, closes = -gap, -closes
    if closes <= 0:
        return None
    return max(0, (gap + closes if direction in ("LE", "GE") else gap + closes - 1) // closes)


def _compared(program: Program, condition: Computation) -> tuple[list[_Linear], str] | None:
    """Both sides and the direction of the comparison that a condition is."""
    root, inside, args = condition.root, condition, None
    if root.op == "fusion":
        args = [_linear(program, condition, name) for name in root.operands]
        inside = program.computations[root.calls()[0]]
        root = inside.root
    sides = [_linear(program, inside, name, args) for name in root.operands]
    if root.op != "compare" or None in sides:
        return None
    return sides, root.attribute(r"direction=(\w+)")


_PASSED = {"copy", "convert", "bitcast", "reshape", "copy-start", "copy-done"}  # leave a number as it is


def _linear(program: Program, computation: Computation, name: str, args: list | None = None) -> _Linear | None:
    i = computation.by_name.get(name)
    if i is None:
        return None
    if i.op == "constant":
        return _Linear(None, int(i.inside)) if re.fullmatch(r"-?\d+", i.inside) else None
    if i.op == "parameter":
        return args[int(i.inside)] if args is not None else None
    if i.op == "get-tuple-element" and args is None and computation.by_name[i.operands[0]].op == "parameter":
        return _Linear(int(i.attribute(r"index=(\d+)")), 0)
    if i.op not in _PASSED | {"fusion", "add", "subtract"}:
        return None
    below = [_linear(program, computation, x, args) for x in i.operands]
    if None in below or not below:
        return None
    if i.op == "fusion":
        called = program.computations[i.calls()[0]]
        return _linear(program, called, called.root.name, below)
    if i.op in _PASSED:
        return below[0]
    if i.op in ("add", "subtract") and None in (below[0].index, below[1].index):
        sign = 1 if i.op == "add" else -1
        if sign < 0 and below[1].index is not None:
            return None
        index = below[0].index if below[1].index is None else below[1].index
        return _Linear(index, below[0].offset + sign * below[1].offset)
    return None


# --- who takes part in a collective ----------------------------------------------------------------------------------


def replica_groups(i: Instruction, partitions: int) -> list[list[int]]:
    """Devices, by their place in the program, that exchange data with each other.

    Written out `{{0,1},{2,3}}`, as an iota `[2,2]<=[2,2]T(1,0)`, or by the axes of a mesh
    `mesh['a'=2,'b'=2] {'b'}`; nothing or `{}` means all together. A permutation's groups are its cycles and chains.
    """
    if pairs := i.attribute(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}"):
        return _chains([tuple(map(int, p)) for p in re.findall(r"\{(\d+),(\d+)\}", pairs)])
    if listed := i.attribute(r"replica_groups=\{((?:\{[\d,]+\},?)+)\}"):
        return [_numbers(group) for group in re.findall(r"\{([\d,]+)\}", listed)]
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", i.attributes):
        return _iota(_numbers(found[2]), _numbers(found[3])).reshape(_numbers(found[1])).tolist()
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", i.attributes):
        return _on_axes(*found.groups())
    return [list(range(partitions))]


def _iota(dims: list[int], order: list[int]) -> np.ndarray:
    """0, 1, 2, ... in an array of these dimensions, which are then put in this order."""
    ids = np.arange(math.prod(dims)).reshape(dims)
    return ids.transpose(order) if order else ids


def _on_axes(mesh: str, devices: str | None, along: str) -> list[list[int]]:
    sizes = {k.strip("' "): int(n) for k, n in (axis.split("=") for axis in mesh.split(","))}
    if devices is None:
        ids = np.arange(math.prod(sizes.values()))
    elif found := re.match(r"\[([\d,]+)\]T\(([\d,]+)\)", devices):
        ids = _iota(_numbers(found[1]), _numbers(found[2]))
    else:
        ids = np.array([int(n) for n in re.findall(r"\d+", devices)])
    # An axis 'a' of 8 of which the group spans 'a':(2)4 is three axes, 2 x 4 x 1, and the group spans the second.
    shape, spanned = [], []
    wanted = [re.fullmatch(r"'?([^':]+)'?(?::\((\d+)\)(\d+))?", a.strip()).groups() for a in along.split(",") if a]
    for name, size in sizes.items():
        cuts = sorted((int(before or 1), int(part or size)) for axis, before, part in wanted if axis == name)
        done = 1
        for before, part in cuts:
            shape += [before // done, part]
            spanned += [len(shape) - 1]
            done = before * part
        shape.append(size // done)
    kept = [d for d in range(len(shape)) if d not in spanned]
    grid = ids.reshape(shape).transpose(kept + spanned)
    return grid.reshape(-1, math.prod(shape[d] for d in spanned)).tolist()


def _chains(pairs: list[tuple[int, int]]) -> list[list[int]]:
    """Sets of devices that a permutation's pairs link, each in ascending order."""
    group = {d: {d} for pair in pairs for d in pair}
    for a, b in pairs:
        if group[a] is not group[b]:
            group[a] |= group[b]
            for d in group[b]:
                group[d] = group[a]
    return sorted(map(sorted, {id(g): g for g in group.values()}.values()))
