"""Name tables: which tensors of another format are which of our weights, and in what form; read both ways.

A table is a list of rows. A row names tensors of theirs and logical weights of ours, `{}` standing for a layer's
number, and a form that turns the arrays of one side into those of the other without rounding. `Linear` and the other
makers below write the usual rows down: a module of theirs, and of ours what follows `w_` and `b_`.
"""

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Shape = tuple[int, ...]
Tensor = Any  # a numpy array, or one of JAX's where only its shape is asked for


class Form(NamedTuple):
    """How arrays of theirs are arrays of ours."""

    ours: Callable[[Sequence[Tensor], Sequence[Shape]], list[Tensor]]  # given theirs and the shapes of ours
    theirs: Callable[[Sequence[Tensor]], list[Tensor]]  # given ours


class Row(NamedTuple):
    """Tensors of theirs that hold weights of ours."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    form: Form

    def at(self, layer: int) -> "Row":
        """The row of one layer."""
        return self._replace(
            theirs=tuple(n.replace("{}", str(layer)) for n in self.theirs),
            ours=tuple(n.replace("{}", str(layer)) for n in self.ours),
        )


Table = tuple[Row, ...]


# --- forms ---------------------------------------------------------------------------------------------------------


def _reshaped(theirs: Sequence[Tensor], shapes: Sequence[Shape]) -> list[Tensor]:
    return [x.reshape(shape) for x, shape in zip(theirs, shapes, strict=True)]


def _flat(x: Tensor, inputs: int) -> Tensor:
    """A weight as a matrix [in, out]; its first `inputs` dimensions are contracted."""
    return x.reshape(int(np.prod(x.shape[:inputs])), -1)


def _numpy(x: Tensor) -> Any:
    """The module that has the functions for `x`: shapes of theirs are found by tracing."""
    return np if isinstance(x, np.ndarray) else jnp


SAME = Form(_reshaped, lambda ours: list(ours))
FLAT = Form(_reshaped, lambda ours: [x.reshape(-1) for x in ours])  # heads and head_dim as one


def matrix(inputs: int = 1, *, transposed: bool = True) -> Form:
    """[out, in] of theirs (torch's Linear), or [in, out] (its Conv1D)."""

    def ours(theirs, shapes):
        return [(x.T if transposed else x).reshape(shape) for x, shape in zip(theirs, shapes, strict=True)]

    def back(ours):
        flat = [_flat(x, inputs) for x in ours]
        return [x.T if transposed else x for x in flat]

    return Form(ours, back)


def side_by_side(*, bias: bool = False, transposed: bool = True) -> Form:
    """Matrices or biases whose outputs follow one another in one tensor: all of q, all of k, all of v."""
    turn = (lambda x: x) if bias or not transposed else (lambda x: x.T)

    def ours(theirs, shapes):
        (x,) = theirs
        sizes = [int(np.prod(s if bias else s[1:])) for s in shapes]
        parts = np.split(turn(x), np.cumsum(sizes)[:-1], axis=-1)
        return [p.reshape(s) for p, s in zip(parts, shapes, strict=True)]

    def back(ours):
        flat = [x.reshape(-1) if bias else _flat(x, 1) for x in ours]
        return [turn(_numpy(flat[0]).concatenate(flat, -1))]

    return Form(ours, back)


def by_head(*, bias: bool = False, transposed: bool = True) -> Form:
    """q, k and v of each key head together: [K, G queries, key, value, H] (GPT-NeoX, BLOOM with G = 1; Falcon)."""

    def ours(theirs, shapes):
        (x,) = theirs
        x = x if bias else (x.T if transposed else x)
        (*D, N, H), K = shapes[0], shapes[1][-2]
        x = x.reshape(*D, K, N // K + 2, H)
        q, k, v = x[..., : N // K, :], x[..., N // K, :], x[..., N // K + 1, :]
        return [p.reshape(s) for p, s in zip((q, k, v), shapes, strict=True)]

    def back(ours):
        q, k, v = ours
        *D, N, H = q.shape
        K = k.shape[-2]
        x = _numpy(q).concatenate([q.reshape(*D, K, N // K, H), k[..., None, :], v[..., None, :]], -2)
        x = x.reshape(*D, K * (N // K + 2) * H)
        return [x if bias else (x.T if transposed else x)]

    return Form(ours, back)


def by_element(*, bias: bool = False) -> Form:
    """q, k and v of each element of each head together: [N, H, 3] (Megatron-LM's checkpoints of version 1)."""

    def ours(theirs, shapes):
        x = theirs[0] if bias else theirs[0].T
        return [x[..., i :: len(shapes)].reshape(s) for i, s in enumerate(shapes)]

    def back(ours):
        x = _numpy(ours[0]).stack([x.reshape(-1) if bias else _flat(x, 1) for x in ours], -1)
        return [x.reshape(-1) if bias else x.reshape(x.shape[0], -1).T]

    return Form(ours, back)


def in_shares(order: Sequence[int], shares: int) -> Form:
    """Matrices cut into shares, the same share of each side by side (CodeGen: 4 shares of q, v, k).

    Args:
      order: which of ours stands first, second, ... within a share.
    """

    def ours(theirs, shapes):
        (x,) = theirs
        D = shapes[0][0]
        x = x.T.reshape(D, shares, len(shapes), -1)
        return [x[:, :, order.index(i)].reshape(s) for i, s in enumerate(shapes)]

    def back(ours):
        D = ours[0].shape[0]
        x = _numpy(ours[0]).stack([ours[i].reshape(D, shares, -1) for i in order], 2)
        return [x.reshape(D, -1).T]

    return Form(ours, back)


def _stacked(theirs: Sequence[Tensor], shapes: Sequence[Shape]) -> list[Tensor]:
    return [np.stack([x.T for x in theirs]).reshape(shapes[0])]


STACKED = Form(_stacked, lambda ours: [x.T for x in ours[0]])  # experts: matrices [out, in], ours [expert, in, out]
ROW = Form(_reshaped, lambda ours: [x[None] for x in ours])  # [1, in], ours [in]


# --- rows ----------------------------------------------------------------------------------------------------------


def tensor(theirs: str, ours: str, form: Form = SAME) -> Table:
    return (Row((theirs,), (ours,), form),)


def linear(theirs: str, ours: str, *, inputs: int = 1, transposed: bool = True) -> Table:
    """A module with `weight` and perhaps `bias`; `attention.q` stands for `attention.w_q` and `attention.b_q`."""
    return (
        Row((f"{theirs}.weight",), (_weight(ours),), matrix(inputs, transposed=transposed)),
        Row((f"{theirs}.bias",), (_bias(ours),), FLAT),
    )


def fused(theirs: str, ours: Sequence[str], *, transposed: bool = True) -> Table:
    """A module that holds several of ours, one after the other."""
    return (
        Row((f"{theirs}.weight",), tuple(map(_weight, ours)), side_by_side(transposed=transposed)),
        Row((f"{theirs}.bias",), tuple(map(_bias, ours)), side_by_side(bias=True)),
    )


def heads_fused(theirs: str, *, transposed: bool = True) -> Table:
    """A module that holds q, k and v head by head."""
    return (
        Row((f"{theirs}.weight",), tuple(map(_weight, QKV)), by_head(transposed=transposed)),
        Row((f"{theirs}.bias",), tuple(map(_bias, QKV)), by_head(bias=True)),
    )


def elements_fused(theirs: str) -> Table:
    """A module that holds q, k and v element by element."""
    return (
        Row((f"{theirs}.weight",), tuple(map(_weight, QKV)), by_element()),
        Row((f"{theirs}.bias",), tuple(map(_bias, QKV)), by_element(bias=True)),
    )


def experts(theirs: str, ours: str, count: int) -> Table:
    """Weights of `count` modules, `{e}` standing for the number of each."""
    return (Row(tuple(f"{theirs}.weight".replace("{e}", str(e)) for e in range(count)), (_weight(ours),), STACKED),)


def norm(theirs: str, ours: str) -> Table:
    return (
        Row((f"{theirs}.weight",), (f"{ours}.scale",), FLAT),
        Row((f"{theirs}.bias",), (f"{ours}.bias",), FLAT),
    )


QKV = ("attention.q", "attention.k", "attention.v")


def layers(theirs: str, *rows: Table, ours: str = "layers") -> Table:
    """Rows of a layer, whose names of theirs follow `theirs` and of ours `layers.{}`, after the side it is of."""
    return tuple(
        Row(tuple(f"{theirs}.{n}" for n in row.theirs), tuple(f"{ours}.{{}}.{n}" for n in row.ours), row.form)
        for table in rows
        for row in table
    )


def table(*rows: Table) -> Table:
    return tuple(row for part in rows for row in part)


def _weight(ours: str) -> str:
    if ours == "head":
        return "head"
    part, _, name = ours.rpartition(".")
    return f"{part}.w_{name}"


def _bias(ours: str) -> str:
    if ours == "head":
        return "head_bias"
    part, _, name = ours.rpartition(".")
    return f"{part}.b_{name}"


# --- a table and a model -------------------------------------------------------------------------------------------


def rows_of(table: Table, logical: Iterable[str]) -> tuple[Row, ...]:
    """The rows of the weights that a model has, in the order of the model; each weight is in one of them.

    A family's table has rows for what some of its models lack (biases, an output head): those are left out.
    """
    logical = list(logical)
    by_name = {name: row for row in table for name in row.ours}
    known, found = set(logical), {}
    for name in logical:
        match = re.match(r"(?:encoder\.|decoder\.|)layers\.(\d+)\.", name)
        general = name if match is None else f"{name[: match.start(1)]}{{}}.{name[match.end() :]}"
        assert general in by_name, f"the table has no row for {name}"
        row = by_name[general] if match is None else by_name[general].at(int(match[1]))
        assert known.issuperset(row.ours), f"the model has {name} but not all of {row.ours}"
        found[row] = None
    return tuple(found)


@functools.cache
def shapes_of_theirs(form: Form, shapes: tuple[Shape, ...]) -> tuple[Shape, ...]:
    """Shapes of the tensors that hold weights of ours of these shapes."""
    made = jax.eval_shape(form.theirs, [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes])
    return tuple(x.shape for x in made)
