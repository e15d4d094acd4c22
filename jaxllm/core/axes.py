"""Logical axes of activations: models name them, the run decides what they mean.

`constrain(x, "batch", "seq", "embed")` does nothing until a run has put a placement in force with `placed_by`;
parallel/ supplies that placement from its `Rules`. So models need no mesh, and one definition runs everywhere.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from jaxllm.core.shapes import Array

Place = Callable[[Array, tuple[str | None, ...]], Array]

_PLACE: ContextVar[Place | None] = ContextVar("place", default=None)


def constrain(x: Array, *axes: str | None) -> Array:
    """`x`, laid out as the run in force wants an array with these logical axes; one name a dimension."""
    assert x.ndim == len(axes), f"{axes} for an array of shape {x.shape}"
    place = _PLACE.get()
    return x if place is None else place(x, axes)


@contextmanager
def placed_by(place: Place | None) -> Iterator[None]:
    """Puts `place` in force for what is traced inside."""
    token = _PLACE.set(place)
    try:
        yield
    finally:
        _PLACE.reset(token)
