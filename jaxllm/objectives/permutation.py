"""Orders of factorisation for permutation language models (Yang et al. 2019, arXiv:1906.08237)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.core.shapes import Array, Bool, Float, Int, Key


class Permutation(NamedTuple):
    """What an encoder with a query stream is told of an order in which the tokens of a row are predicted."""

    visible_BTT: Bool[Array, "B T T"]  # of each token (first), those that come before it in the order
    targets_BP: Int[Array, "B P"]  # places that are predicted, the last ones of the order
    weights_BP: Float[Array, "B P"]  # 1, or 0 where a row has fewer


def factorised(order_BT: Int[Array, "B T"], targets_B: Int[Array, " B"], most: int) -> Permutation:
    """The prediction of the last `targets_B` tokens of each row in this order (equations 3 and 5).

    Args:
      order_BT: when each token comes, from 0.
      most: the largest of `targets_B`, P of the result.
    """
    last_BP = jnp.argsort(-order_BT, axis=1)[:, :most]
    weights_BP = (jnp.arange(most) < targets_B[:, None]).astype(jnp.float32)
    return Permutation(order_BT[:, None, :] < order_BT[:, :, None], last_BP, weights_BP)


def sample_permutation(key: Key[Array, ""], documents_BT: Int[Array, "B T"], *, one_in: int = 6) -> Permutation:
    """An order of each row, all as likely, in which its last tokens, one in `one_in` (the paper's K), are predicted.

    Every document of a packed row has an order of its own; padding (document 0) comes first and is never predicted.

    Raises:
      ValueError: one_in is below 1.
    """
    if one_in < 1:
        raise ValueError(f"one_in={one_in} must be at least 1")
    real_BT = documents_BT > 0
    drawn_BT = jnp.where(real_BT, jax.random.uniform(key, documents_BT.shape), -1.0)
    order_BT = jnp.argsort(jnp.argsort(drawn_BT, axis=1), axis=1)
    return factorised(order_BT, real_BT.sum(1) // one_in, documents_BT.shape[1] // one_in)
