"""Attention masks as values: small frozen configs that combine with `&` and `|`.

A mask answers for a query and a key, given as coordinates, whether the query sees the key. It uses operators
only, so the same value works on numpy arrays, traced JAX arrays and plain integers, and needs no JAX to load.
"""

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field

from jaxllm.core.config import Config, kind_alone


class Coords(NamedTuple):
    """Where tokens stand. Fields broadcast against each other and against the other side's."""

    index: Any  # place in the row, from 0 (int)
    document: Any  # document id within the row, 0 is padding (int)
    prefix: Any  # whether the token belongs to a bidirectional prefix (bool)


class _Combines(Config):
    @property
    def decodable(self) -> bool:
        """Whether tokens never see what is generated after them (a prefix is there before generation starts)."""
        return True

    @property
    def causal(self) -> bool:
        """Whether no token sees one that stands after it in the row."""
        return False

    def __and__(self, other: "_Combines") -> "All":
        return All(of=(self, other))

    def __or__(self, other: "_Combines") -> "Some":
        return Some(of=(self, other))


class Causal(_Combines):
    """A token sees itself and everything before it."""

    kind: Literal["causal"] = "causal"

    @property
    def causal(self) -> bool:
        return True

    def visible(self, q: Coords, k: Coords) -> Any:
        return k.index <= q.index


class Full(_Combines):
    """Every token sees every token."""

    kind: Literal["full"] = "full"

    @property
    def decodable(self) -> bool:
        return False

    def visible(self, q: Coords, k: Coords) -> Any:
        return k.index == k.index  # true, in the shape of the coordinates


class Prefix(_Combines):
    """Every token sees the whole prefix of its document (Raffel et al. 2019, arXiv:1910.10683, figure 4).

    The prefix is marked by the batch (`prefix`); combine with causal: `{kind: some, of: [causal, prefix]}`.
    """

    kind: Literal["prefix"] = "prefix"

    def visible(self, q: Coords, k: Coords) -> Any:
        return k.prefix


class Window(_Combines):
    """A token sees `left` - 1 tokens before it, itself, `right` after it (Beltagy et al. 2020, arXiv:2004.05150)."""

    kind: Literal["window"] = "window"
    left: int = Field(gt=0)  # tokens seen up to and including the token itself
    right: int = Field(0, ge=0)  # tokens seen after it

    @property
    def decodable(self) -> bool:
        return self.right == 0

    @property
    def causal(self) -> bool:
        return self.right == 0

    def visible(self, q: Coords, k: Coords) -> Any:
        return (q.index - k.index < self.left) & (k.index - q.index <= self.right)


class Document(_Combines):
    """A token sees its own document only; padding (document 0) is seen by padding only."""

    kind: Literal["document"] = "document"

    @property
    def decodable(self) -> bool:
        return False

    def visible(self, q: Coords, k: Coords) -> Any:
        return q.document == k.document


class All(_Combines):
    """Seen if every part sees it."""

    kind: Literal["all"] = "all"
    of: tuple["Mask", ...] = Field(min_length=1)  # the parts

    @property
    def decodable(self) -> bool:
        return any(mask.decodable for mask in self.of)

    @property
    def causal(self) -> bool:
        return any(mask.causal for mask in self.of)

    def visible(self, q: Coords, k: Coords) -> Any:
        seen = self.of[0].visible(q, k)
        for mask in self.of[1:]:
            seen = seen & mask.visible(q, k)
        return seen


class Some(_Combines):
    """Seen if at least one part sees it."""

    kind: Literal["some"] = "some"
    of: tuple["Mask", ...] = Field(min_length=1)  # the parts

    @property
    def decodable(self) -> bool:
        return all(mask.decodable for mask in self.of)

    @property
    def causal(self) -> bool:
        return all(mask.causal for mask in self.of)

    def visible(self, q: Coords, k: Coords) -> Any:
        seen = self.of[0].visible(q, k)
        for mask in self.of[1:]:
            seen = seen | mask.visible(q, k)
        return seen


Mask = Annotated[
    Annotated[Causal | Full | Prefix | Window | Document | All | Some, Field(discriminator="kind")],
    BeforeValidator(kind_alone),
]
All.model_rebuild()
Some.model_rebuild()
