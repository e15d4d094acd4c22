"""The gradient of a function in pieces that run at different times, in different loops of one program.

`jax.vjp` gives a gradient back inside the trace that asked for it. A pipeline stage runs its layers forward in one
loop and backward in another, maybe ticks later, and a zero-bubble schedule cuts the second in two: gradients of inputs,
for which another device waits, and gradients of weights, for which nobody does (Qi et al. 2023, arXiv:2401.10241,
section 2). A `Pullback` is a function traced once for all of that. What one piece keeps for the next are plain lists
of arrays, for the caller to put where it likes.
"""

from collections.abc import Callable, Iterable, KeysView, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, Var, gensym, jaxprs_in_params

from jaxllm.core.shapes import Array, PyTree

CALLS = (
    "jit",
    "pjit",
    "closed_call",
    "core_call",
    "eval_jaxpr",
    "checkpoint",
    "remat",
    "remat2",
)  # programs within one
PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot_general", "pallas_call")  # what is worth putting off

Leaves = list[Array | None]  # one a leaf of `w`; None: the other piece gives it


class Pullback:
    """`fn(w, x, context, number) -> y`, forward and backward; all are trees of arrays, gradients are by w and x.

    `context` is alike for all calls of a loop, `number` tells them apart. They and the weights are at hand in every
    piece: what follows from weights and context alone (a mask, the angles of a rotation) is computed again, not kept.

    Attributes:
      kept: shapes of what `forward` gives to `backward` or to `early`.
      waiting: shapes of what `early` gives to `late`.

    Args:
      w, x, context, number: examples.
    """

    def __init__(self, fn: Callable, w: PyTree, x: PyTree, context: PyTree, number: PyTree):
        def forward(w, x, context, number):
            y, pull = jax.vjp(lambda w, x: fn(w, x, context, number), w, x)
            leaves, self._y_tree = jax.tree.flatten(y)
            needed, self._pull_tree = jax.tree.flatten(pull)
            return leaves, needed

        def backward(needed, dy):
            dw, dx = jax.tree.unflatten(self._pull_tree, needed)(jax.tree.unflatten(self._y_tree, dy))
            return jax.tree.leaves(dw), jax.tree.leaves(dx)

        self._x_tree = jax.tree.structure(x)
        program = Program()
        ins, outs = program.add(jax.make_jaxpr(forward)(w, x, context, number))
        ws, xs, cs, ns = cut(ins, [len(jax.tree.leaves(tree)) for tree in (w, x, context, number)])
        ys, needed = cut(outs, [self._y_tree.num_leaves, self._pull_tree.num_leaves])
        first = list(program.equations)
        ins, outs = program.add(jax.make_jaxpr(backward)(shapes(needed), shapes(ys)), known=needed)
        dys, (dws, dxs) = ins, cut(outs, [len(ws), len(xs)])
        second = program.equations[len(first) :]

        at_hand, steady = {*ws, *cs, *ns}, {*ws, *cs}
        again = []
        for e in first:
            takes = variables(e.invars)
            if takes <= steady and not is_product(e):
                steady |= set(e.outvars)
                again.append(e)
            elif takes <= at_hand and all(map(is_key, e.outvars)):  # what is drawn with a key is kept, the key is not
                again.append(e)
            else:
                continue
            at_hand |= set(e.outvars)
        kept = [v for v in variables(needed) if v not in at_hand]

        wanted = {id(e) for e in leading_to(second, dxs)}
        put_off: list[JaxprEqn] = []
        later: set[Var] = set()
        for e in leading_to(second, dws):
            if id(e) not in wanted and (is_product(e) or variables(e.invars) & later):
                put_off.append(e)
                later |= set(e.outvars)
        now = [e for e in second if id(e) not in {id(p) for p in put_off}]
        waiting = [v for v in inputs_of(put_off) if v not in at_hand | set(program.constants)]

        self.kept, self.waiting = shapes(kept), shapes(waiting)
        self._late = [isinstance(v, Var) and v in later for v in dws]
        soon, late = ([v for v, is_late in zip(dws, self._late) if is_late == which] for which in (False, True))
        self._forward = program.part([*ws, *xs, *cs, *ns], [*ys, *kept], first)
        self._backward = program.part([*ws, *cs, *ns, *kept, *dys], [*dxs, *dws], [*again, *second])
        self._early = program.part([*ws, *cs, *ns, *kept, *dys], [*dxs, *soon, *waiting], [*again, *now])
        self._put_off = program.part([*ws, *cs, *ns, *waiting], late, [*again, *put_off])

    def forward(self, w: PyTree, x: PyTree, context: PyTree, number: PyTree) -> tuple[PyTree, list[Array]]:
        """y, and what is to be kept."""
        out = self._forward(*jax.tree.leaves((w, x, context, number)))
        n = self._y_tree.num_leaves
        return jax.tree.unflatten(self._y_tree, out[:n]), out[n:]

    def backward(
        self, w: PyTree, context: PyTree, number: PyTree, kept: list[Array], dy: PyTree
    ) -> tuple[list[Array], PyTree]:
        """Gradients by the leaves of w, and by x."""
        out = self._backward(*jax.tree.leaves((w, context, number)), *kept, *jax.tree.leaves(dy))
        n = self._x_tree.num_leaves
        return out[n:], jax.tree.unflatten(self._x_tree, out[:n])

    def early(
        self, w: PyTree, context: PyTree, number: PyTree, kept: list[Array], dy: PyTree
    ) -> tuple[Leaves, PyTree, list[Array]]:
        """The gradient by x, those by w that take no product of matrices, and what the others are waiting with."""
        out = self._early(*jax.tree.leaves((w, context, number)), *kept, *jax.tree.leaves(dy))
        n = self._x_tree.num_leaves
        ready = iter(out[n:])
        soon = [None if late else next(ready) for late in self._late]
        return soon, jax.tree.unflatten(self._x_tree, out[:n]), list(ready)

    def late(self, w: PyTree, context: PyTree, number: PyTree, waiting: list[Array]) -> Leaves:
        """The gradients by w that `early` put off."""
        out = iter(self._put_off(*jax.tree.leaves((w, context, number)), *waiting))
        return [next(out) if late else None for late in self._late]


class Program:
    """Equations of several traces in one list, with the programs within them written out."""

    def __init__(self):
        self.equations: list[JaxprEqn] = []
        self.constants: dict[Var, Any] = {}
        self._fresh, self._any = gensym(), None

    def add(self, traced: ClosedJaxpr, known: Sequence[Var | Literal] = ()) -> tuple[list[Var], list[Var | Literal]]:
        """Inputs and outputs of a trace that is added; its first inputs are `known`, outputs of one added before."""
        self._any, names = traced.jaxpr, dict(zip(traced.jaxpr.invars, known))
        self._write(traced, names)
        return traced.jaxpr.invars[len(known) :], [_named(v, names) for v in traced.jaxpr.outvars]

    def part(self, ins: Sequence[Var], outs: Sequence[Var | Literal], equations: Sequence[JaxprEqn]) -> Callable:
        """A function of values of `ins` that gives those of `outs`, by those of the equations that it takes."""
        takes, values = [*self.constants, *ins], list(self.constants.values())
        jaxpr = self._any.replace(constvars=[], invars=takes, outvars=list(outs), eqns=leading_to(equations, outs))
        return lambda *arguments: list(jax.core.eval_jaxpr(jaxpr, (), *values, *arguments))

    def _write(self, traced: ClosedJaxpr, names: dict[Var, Var | Literal]) -> None:
        self.constants |= dict(zip(traced.jaxpr.constvars, traced.consts))
        for e in traced.jaxpr.eqns:
            e = e.replace(invars=[_named(v, names) for v in e.invars])
            if e.primitive.name in CALLS:
                inner = e.params["jaxpr"] if "jaxpr" in e.params else e.params["call_jaxpr"]
                inner = inner if isinstance(inner, ClosedJaxpr) else ClosedJaxpr(inner, ())
                within = dict(zip(inner.jaxpr.invars, e.invars))
                self._write(inner, within)
                names |= {v: _named(result, within) for v, result in zip(e.outvars, inner.jaxpr.outvars)}
            else:
                fresh = {v: self._fresh(v.aval) for v in e.outvars}  # the same program may be called twice
                names |= fresh
                self.equations.append(e.replace(outvars=list(fresh.values())))


def _named(v: Var | Literal, names: dict[Var, Var | Literal]) -> Var | Literal:
    return v if isinstance(v, Literal) else names.get(v, v)


def leading_to(equations: Sequence[JaxprEqn], outs: Iterable[Var | Literal]) -> list[JaxprEqn]:
    """The equations, in order, that `outs` are made by."""
    needed, found = set(variables(outs)), []
    for e in reversed(equations):
        if not needed.isdisjoint(e.outvars):
            needed |= variables(e.invars)
            found.append(e)
    return found[::-1]


def inputs_of(equations: Sequence[JaxprEqn]) -> list[Var]:
    """What the equations take and do not make themselves."""
    made = {v for e in equations for v in e.outvars}
    return [v for v in variables(v for e in equations for v in e.invars) if v not in made]


def variables(atoms: Iterable[Var | Literal]) -> KeysView[Var]:
    """Those that are no literals, each once, in order."""
    return dict.fromkeys(v for v in atoms if isinstance(v, Var)).keys()


def is_product(equation: JaxprEqn) -> bool:
    """Whether an equation multiplies matrices, it or a program within it."""
    return equation.primitive.name in PRODUCTS or any(
        is_product(e) for jaxpr in jaxprs_in_params(equation.params) for e in jaxpr.eqns
    )


def is_key(v: Var) -> bool:
    return jax.dtypes.issubdtype(v.aval.dtype, jax.dtypes.prng_key)


def shapes(atoms: Iterable[Var | Literal]) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in atoms]


def cut(items: Sequence, sizes: Sequence[int]) -> list[list]:
    """Consecutive runs of these sizes."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [list(items[end - size : end]) for end, size in zip(ends, sizes)]
