from typing import NamedTuple

import jax


class Terms(NamedTuple):
    """Of each row, in nats and float32: what is minimised, and what it is made of, without gradients."""

    loss: jax.Array
    xent: jax.Array  # cross-entropy alone
    log_z: jax.Array
    hit: jax.Array  # no logit is larger than the target's
