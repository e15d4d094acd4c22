"""Logical axes of activations: models name them, the run decides what they mean.

`constrain(x, "batch", "seq", "embed")` does nothing until a run has put a placement in force with `placed_by`;
parallel/ supplies that placement from its `Rules`. So models need no mesh, and one definition runs everywhere.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, runtime_checkable

from jaxllm.core.shapes import Array

Axes = tuple[str | None, ...]


@runtime_checkable
class Placement(Protocol):
    """What a run does to what its models name."""

    platform: str  # of the devices: cpu, tpu, gpu
    chip: str  # their kind, in the maker's words
    spread: Callable[..., Any] | None  # attention over rows that several devices share; None: no device shares a row

    def constrain(self, x: Array, axes: Axes) -> Array: ...

    def on_shares(self, fn: Callable, in_axes: tuple[Axes, ...], out_axes: Axes) -> Callable: ...

    def reduces(self, x_axes: Axes) -> bool: ...

    def weight_gradient(
        self, equation: str, x: Array, dy: Array, x_axes: Axes, dy_axes: Axes, w_axes: Axes
    ) -> Array: ...

    def lookup(self, table_VD: Array, ids_BT: Array, rows: str) -> Array: ...

    def table_gradient(self, ids_BT: Array, dx_BTD: Array, size: int, rows: str) -> Array: ...


_PLACE: ContextVar[Placement | None] = ContextVar("place", default=None)


def constrain(x: Array, *axes: str | None) -> Array:
    """`x`, laid out as the run in force wants an array with these logical axes; one name a dimension."""
    assert x.ndim == len(axes), f"{axes} for an array of shape {x.shape}"
    place = _PLACE.get()
    return x if place is None else place.constrain(x, axes)


def on_shares(fn: Callable, in_axes: tuple[Axes, ...], out_axes: Axes) -> Callable:
    """`fn` of arrays with these axes, run by every device on its own share: for kernels, which XLA cannot cut."""
    place = _PLACE.get()
    return fn if place is None else place.on_shares(fn, in_axes, out_axes)


def placement() -> Placement | None:
    """The placement in force."""
    return _PLACE.get()


@contextmanager
def placed_by(place: Placement | None) -> Iterator[None]:
    """Puts `place` in force for what is traced inside."""
    token = _PLACE.set(place)
    try:
        yield
    finally:
        _PLACE.reset(token)
