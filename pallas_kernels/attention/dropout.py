"""Which weights of attention are dropped: a hash of head, query and key, the same in every implementation."""

import jax.numpy as jnp
import numpy as np
from jax import lax


def mixed(x):
    """A permutation of the integers of 32 bits that leaves no pattern (Wellons 2018, "Prospecting for hash functions")."""
    right = lax.shift_right_logical
    x = (x ^ right(x, jnp.full_like(x, 16))) * np.int32(0x7FEB352D)
    x = (x ^ right(x, jnp.full_like(x, 15))) * np.uint32(0x846CA68B).astype(np.int32)
    return x ^ right(x, jnp.full_like(x, 16))


def grown(rate: float, seed, head, q, k):
    """What weights are multiplied with, 0 or 1 / (1 - rate); integers of 32 bits that broadcast.

    Args:
      head: counted over the whole batch.
    """
    row = mixed(mixed(seed ^ head) ^ q)
    kept = lax.shift_right_logical(mixed(row ^ k), jnp.full_like(row ^ k, 1)) >= np.int32(rate * 2**31)
    return jnp.where(kept, 1 / (1 - rate), 0.0)
