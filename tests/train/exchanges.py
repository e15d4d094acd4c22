"""What the devices of a compiled program send each other, and along which axes of the mesh."""

import re
from typing import NamedTuple

import jax
import numpy as np

from jaxllm.plan.hlo import COLLECTIVES, Program, parse, replica_groups


class Exchange(NamedTuple):
    kind: str  # all-gather, all-reduce, ...
    dtype: str
    bytes: float  # of the result; of a reduce-scatter, of what goes in
    axes: tuple[str, ...]  # of the mesh, that a group of devices goes along
    sometimes: bool  # in a branch of a conditional


def exchanges(text: str, mesh: jax.sharding.Mesh) -> list[Exchange]:
    """Every collective of the text, once, those in loops too."""
    program, found = parse(text), []
    branches = conditional(program)
    for computation in program.computations.values():
        for i in computation.instructions:
            kind = i.op.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            group = np.array(replica_groups(i, program.partitions)[0])
            at = np.stack(np.unravel_index(group, mesh.devices.shape), 1)
            axes = tuple(np.array(mesh.axis_names)[(at != at[0]).any(0)].tolist())
            size = i.bytes * (len(group) if kind == "reduce-scatter" else 1)
            found.append(Exchange(kind, i.arrays[0].dtype, size, axes, computation.name in branches))
    return found


def conditional(program: Program) -> set[str]:
    """Computations that a branch of a conditional runs."""
    found: set[str] = set()

    def walk(name: str) -> None:
        if name in found:
            return
        found.add(name)
        for i in program.computations[name].instructions:
            for called in [*i.calls(), *re.findall(r"\b(?:body|condition|to_apply)=%([\w.\-]+)", i.attributes)]:
                walk(called)

    for computation in program.computations.values():
        for i in computation.instructions:
            if i.op == "conditional":
                for name in i.calls():
                    walk(name)
    return found
