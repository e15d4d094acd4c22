"""What is added to logits, of the distance of query and key alone: no array of [T, S]."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slopes:
    """ALiBi's: slope * distance is taken off (Press et al. 2021, arXiv:2108.12409); not differentiated."""

    slopes_N: Any  # of each query head


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Distances:
    """Any function of the distance: `values_NX[n, k - q + T - 1]` of query q and key k, X = T + S - 1. Differentiated."""

    values_NX: Any


Bias = Slopes | Distances


def bucketed(
    table_MN: jax.Array, T: int, S: int, bucket: Callable[[jax.Array], jax.Array], *, shift: int = 0
) -> Distances:
    """A value of each head and bucket of distances (Raffel et al. 2019, arXiv:1910.10683, section 2.1).

    Args:
      bucket: of integers, place of the query less place of the key: rows of the table.
      shift: query i stands at place i + shift of the keys.
    """
    return Distances(table_MN[bucket(shift + T - 1 - jnp.arange(T + S - 1))].T)
