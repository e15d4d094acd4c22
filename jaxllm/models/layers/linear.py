"""Products with weights and rows of tables, whose gradients leave a device already summed and cut into its share."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.core.axes import Axes, Placement, placement
from jaxllm.core.shapes import Array, Float, Int


def linear(
    equation: str,
    x: Float[Array, "..."],
    w: Float[Array, "..."],
    x_axes: Axes,
    w_axes: Axes,
    y_axes: Axes,
    dtype: jnp.dtype | None = None,
) -> Float[Array, "..."]:
    """einsum of activations and a weight, with their logical axes; the result has `dtype`, or that of `x`.

    XLA's partitioner sums the gradient of a weight over all devices and lets each keep its share. Where a run's mesh
    shares rows out, the gradient is written down as a reduce-scatter instead: half the bytes on the wire.
    """
    place = placement()
    if place is None or not place.reduces(x_axes):
        return jnp.einsum(_in_order(equation), x, w, preferred_element_type=dtype)
    return _linear(_Product(equation, x_axes, w_axes, y_axes, dtype, place), x, w)


def _in_order(equation: str) -> str:
    """The same with letters that begin the alphabet, in the order in which they occur.

    einsum contracts in the order of the alphabet; with that of the dimensions, XLA's CPU backend need not transpose w.
    """
    letters = dict.fromkeys(c for c in equation if c.isalpha())
    return equation.translate({ord(c): chr(ord("a") + i) for i, c in enumerate(letters)})


class _Product(NamedTuple):
    """The static part of a product."""

    equation: str
    x_axes: Axes
    w_axes: Axes
    y_axes: Axes
    dtype: Any
    place: Placement

    def letters(self) -> tuple[str, str, str]:
        (x, w), y = self.equation.split("->")[0].split(","), self.equation.split("->")[1]
        return x, w, y

    def forward(self, x: Array, w: Array) -> Array:
        return jnp.einsum(self.equation, x, w, preferred_element_type=self.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(product: _Product, x: Array, w: Array) -> Array:
    return product.forward(x, w)


def _backward(product: _Product, kept: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    (x, w), (of_x, of_w, of_y) = kept, product.letters()
    dy = dy.astype(x.dtype)
    if product.place.platform == "tpu" and product.dtype is None:
        # XLA would compute what gives dy again in both products, for every tile of the other side (7B on v5e: -6 %
        # cycles), and so the activation from its two inputs (-1 %). Not so for logits: there the second array costs
        # more memory than its computation.
        dy = jax.lax.optimization_barrier(dy)
        if "mlp" in product.x_axes:
            x = jax.lax.optimization_barrier(x)
    dw = product.place.weight_gradient(f"{of_x},{of_y}->{of_w}", x, dy, product.x_axes, product.y_axes, product.w_axes)
    return jnp.einsum(f"{of_y},{of_w}->{of_x}", dy, w), dw.astype(w.dtype)


_linear.defvjp(lambda product, x, w: (product.forward(x, w), (x, w)), _backward)


def to_vocabulary(x_BTD: Float[Array, "B T D"], w: Float[Array, "_ _"], *, tied: bool) -> Float[Array, "B T V"]:
    """float32 logits; `w` is a head [D, V] or, `tied`, an embedding [V, D]."""
    equation, axes = ("BTD,VD->BTV", ("vocab", "embed")) if tied else ("BTD,DV->BTV", ("embed", "vocab"))
    rows, out = ("batch", "seq", "embed"), ("batch", "seq", "vocab")
    return linear(equation, x_BTD, w, rows, axes, out, jnp.dtype(jnp.float32))


def lookup(table_VD: Float[Array, "V D"], ids_BT: Int[Array, "B T"], rows: str = "vocab") -> Float[Array, "B T D"]:
    """Rows of a table, `rows` being their logical axis; ids beyond it get the last (padding may hold any position).

    The gradient is summed in float32: in bfloat16 a frequent token's would stop growing after 256 occurrences.
    """
    return _lookup(placement(), rows, table_VD, ids_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _lookup(place: Placement | None, rows: str, table_VD: Array, ids_BT: Array) -> Array:
    if place is not None:
        return place.lookup(table_VD, ids_BT, rows)
    return jnp.take(table_VD, ids_BT, axis=0, mode="clip")


def _lookup_backward(place: Placement | None, rows: str, kept: tuple[Array, Array], dx_BTD: Array) -> tuple:
    table_VD, ids_BT = kept
    if place is not None and place.reduces(("batch", "seq")):
        sums_VD = place.table_gradient(ids_BT, dx_BTD, table_VD.shape[0], rows)
    else:
        sums_VD = jnp.zeros(table_VD.shape, jnp.float32).at[ids_BT].add(dx_BTD.astype(jnp.float32), mode="clip")
    return sums_VD.astype(table_VD.dtype), None


_lookup.defvjp(lambda place, rows, table, ids: (_lookup(place, rows, table, ids), (table, ids)), _lookup_backward)
