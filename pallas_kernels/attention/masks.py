"""Masks as values: who sees whom, token by token and, for kernels that skip and hurry, block by block.

A mask is a tree of small parts joined by `&` and `|`. Its shape is static, the arrays in it (documents, lengths of
prefixes) are data: a mask is a pytree and passes through `jax.jit`. Query i stands at place i + `shift` of the keys.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray
Role = Literal["queries", "keys", "row"]  # what an array of a mask is of: [B, T], [B, S] or [B]


class Range(NamedTuple):
    """The smallest and the largest of some integers: those of a block, or of many blocks in arrays."""

    low: Array
    high: Array


class Seen(NamedTuple):
    """What a mask knows of blocks: whether `some` pair may be visible, and whether `every` one surely is."""

    some: Array
    every: Array


class Mask:
    """What all masks can do."""

    def visible(self, q: Array, k: Array) -> Array:
        """Whether queries see keys, by their indices, which broadcast against each other and the mask's arrays."""
        raise NotImplementedError

    def block(self, q: Range, k: Range) -> Seen:
        """`visible` of whole blocks; arrays of the mask are ranges here. Never wrong, but not always the sharpest."""
        raise NotImplementedError

    def mapped(self, f: Callable[[Array, Role], object]) -> "Mask":
        """The same mask with `f(array, role)` in place of its arrays."""
        return self

    def __and__(self, other: "Mask") -> "Mask":
        return And(self, other)

    def __or__(self, other: "Mask") -> "Mask":
        return Or(self, other)


def _mask(*masks: str, **roles: Role):
    """A class of masks: fields are static, but for `masks` that it is made of and arrays, which `roles` names."""

    def decorate(cls):
        cls = dataclasses.dataclass(frozen=True)(cls)
        names = [f.name for f in dataclasses.fields(cls)]
        data = (*masks, *roles)

        def mapped(self, f):
            inner = {n: getattr(self, n).mapped(f) for n in masks}
            return dataclasses.replace(self, **inner, **{n: f(getattr(self, n), role) for n, role in roles.items()})

        cls.mapped = mapped
        return jax.tree_util.register_dataclass(cls, data, [n for n in names if n not in data])

    return decorate


@_mask()
class Full(Mask):
    """Every query sees every key."""

    def visible(self, q: Array, k: Array) -> Array:
        return (q >= 0) & (k >= 0)

    def block(self, q: Range, k: Range) -> Seen:
        every = self.visible(q.low, k.low)
        return Seen(every, every)


@_mask()
class Window(Mask):
    """Keys at most `left` places before a query and `right` after it; None is no limit."""

    left: int | None = None
    right: int | None = None
    shift: int = 0

    def visible(self, q: Array, k: Array) -> Array:
        near = [] if self.left is None else [k >= q + (self.shift - self.left)]
        near += [] if self.right is None else [k <= q + (self.shift + self.right)]
        return functools.reduce(operator.and_, near) if near else Full().visible(q, k)

    def block(self, q: Range, k: Range) -> Seen:
        nearest = Window(self.left, None, self.shift).visible(q.low, k.high)
        furthest = Window(self.left, None, self.shift).visible(q.high, k.low)
        first = Window(None, self.right, self.shift).visible(q.high, k.low)
        last = Window(None, self.right, self.shift).visible(q.low, k.high)
        return Seen(nearest & first, furthest & last)


def Causal(shift: int = 0) -> Window:  # noqa: N802
    """Keys up to the query's own place."""
    return Window(None, 0, shift)


@_mask()
class Sinks(Mask):
    """The first `count` keys, by everyone (Xiao et al. 2023, arXiv:2309.17453); joined to a window by `|`."""

    count: int

    def visible(self, q: Array, k: Array) -> Array:
        return (q >= 0) & (k < self.count)

    def block(self, q: Range, k: Range) -> Seen:
        return Seen(self.visible(q.low, k.low), self.visible(q.low, k.high))


@_mask()
class Global(Mask):
    """The first `count` tokens see all and are seen by all (Beltagy et al. 2020, arXiv:2004.05150)."""

    count: int
    shift: int = 0

    def visible(self, q: Array, k: Array) -> Array:
        return (q + self.shift < self.count) | (k < self.count)

    def block(self, q: Range, k: Range) -> Seen:
        return Seen(self.visible(q.low, k.low), self.visible(q.high, k.high))


@_mask()
class Dilated(Mask):
    """Every `step`th key, counted from the query (Child et al. 2019, arXiv:1904.10509)."""

    step: int
    shift: int = 0

    def visible(self, q: Array, k: Array) -> Array:
        return (q + self.shift - k) % self.step == 0

    def block(self, q: Range, k: Range) -> Seen:
        # Differences run from least to most; some multiple of `step` is among them or not.
        least, most = q.low + self.shift - k.high, q.high + self.shift - k.low
        some = (most // self.step) * self.step >= least
        return Seen(some, some & (self.step == 1))


@_mask(q="queries", k="keys")
class Documents(Mask):
    """Tokens see those of their own document: integers [B, T] of queries and [B, S] of keys."""

    q: Any
    k: Any

    def visible(self, q: Array, k: Array) -> Array:
        return self.q == self.k

    def block(self, q: Range, k: Range) -> Seen:
        some = (self.q.low <= self.k.high) & (self.k.low <= self.q.high)
        one = (self.q.low == self.q.high) & (self.k.low == self.k.high)
        return Seen(some, some & one)


@_mask(length="row")
class Prefix(Mask):
    """The first `length` [B] keys of a row, by everyone; `Causal() | Prefix(length)` is a prefix LM's mask."""

    length: Any

    def visible(self, q: Array, k: Array) -> Array:
        return (q >= 0) & (k < self.length)

    def block(self, q: Range, k: Range) -> Seen:
        return Seen((q.low >= 0) & (k.low < self.length.low), (q.low >= 0) & (k.high < self.length.low))


@_mask("a", "b")
class And(Mask):
    """What both show."""

    a: Mask
    b: Mask

    def visible(self, q: Array, k: Array) -> Array:
        return self.a.visible(q, k) & self.b.visible(q, k)

    def block(self, q: Range, k: Range) -> Seen:
        a, b = self.a.block(q, k), self.b.block(q, k)
        return Seen(a.some & b.some, a.every & b.every)


@_mask("a", "b")
class Or(Mask):
    """What either shows."""

    a: Mask
    b: Mask

    def visible(self, q: Array, k: Array) -> Array:
        return self.a.visible(q, k) | self.b.visible(q, k)

    def block(self, q: Range, k: Range) -> Seen:
        a, b = self.a.block(q, k), self.b.block(q, k)
        return Seen(a.some | b.some, a.every | b.every)


def dense(mask: Mask, T: int, S: int) -> Array:
    """Who sees whom, [B, T, S], or [1, T, S] of a mask without arrays."""

    def spread(x: Array, role: Role) -> Array:
        return jnp.expand_dims(x, {"queries": 2, "keys": 1, "row": (1, 2)}[role])

    seen = mask.mapped(spread).visible(np.arange(T)[None, :, None], np.arange(S)[None, None, :])
    return seen if seen.shape[1:] == (T, S) else jnp.broadcast_to(seen, (seen.shape[0], T, S))


class Work(NamedTuple):
    """Which blocks of keys each block of queries has work with (or the other way round), [B or 1, I, J] and [.., I].

    `order` has first the `partial` blocks, whose pairs have to be asked for one by one, then the `full` ones.
    """

    order: Array
    partial: Array
    full: Array


def work(
    mask: Mask, q: int, k: int, T: int, S: int, *, by: Literal["queries", "keys"] = "queries",
    q_begin: int = 0, k_begin: int = 0,
) -> Work:  # fmt: skip
    """The work of blocks of `q` queries with blocks of `k` keys; numpy arrays if those of the mask are, or it has none.

    Args:
      T: queries; the last block of them may be filled up with others, whose work does not matter.
      S: keys; later ones, in the last block of keys, nobody sees.
      by: what the rows of the answer are blocks of.
      q_begin: index of the first query, and k_begin of the first key; arrays of the mask begin there too.
    """
    np_or_jnp = np if all(isinstance(x, np.ndarray) for x in jax.tree.leaves(mask)) else jnp
    q_low = q_begin + np.arange(0, T, q)[None, :, None]
    k_low = k_begin + np.arange(0, S, k)[None, None, :]

    def ranges(x: Array, role: Role) -> Range:
        if role == "row":
            return Range(x[:, None, None], x[:, None, None])
        size, axis = (q, 2) if role == "queries" else (k, 1)
        blocks = np_or_jnp.pad(x, ((0, 0), (0, -x.shape[1] % size)), mode="edge").reshape(x.shape[0], -1, size)
        return Range(np_or_jnp.expand_dims(blocks.min(2), axis), np_or_jnp.expand_dims(blocks.max(2), axis))

    seen = mask.mapped(ranges).block(Range(q_low, q_low + q - 1), Range(k_low, np.minimum(k_low + k, k_begin + S) - 1))
    some = np_or_jnp.broadcast_to(seen.some, (seen.some.shape[0], q_low.size, k_low.size))
    every = np_or_jnp.broadcast_to(seen.every, some.shape) & (k_low + k <= k_begin + S)
    if by == "keys":
        some, every = some.swapaxes(1, 2), every.swapaxes(1, 2)
    kinds = some & ~every, some & every, ~some
    count = functools.partial(np_or_jnp.sum, axis=-1, dtype=np.int32)
    partial, full, _ = map(count, kinds)
    # No sort: TPUs sort slowly, and their compiler is slower still.
    before = [np_or_jnp.cumsum(kind, axis=-1, dtype=np.int32) - 1 for kind in kinds]
    begins = 0, partial[..., None], (partial + full)[..., None]
    place = sum(np_or_jnp.where(kind, begin + n, 0) for kind, begin, n in zip(kinds, begins, before, strict=True))
    block = np.arange(place.shape[-1], dtype=np.int32)
    order = np_or_jnp.sum((place[..., None] == block) * block[:, None], axis=-2, dtype=np.int32)
    return Work(order, partial, full)
