"""One way to declare a weight: the keywords are its logical axes and their sizes, in order."""

import jax
import jax.numpy as jnp
from flax import nnx


def param(rngs: nnx.Rngs, std: float, **axes: int) -> nnx.Param:
    """`param(rngs, 0.02, embed=512, mlp=2048)`: float32, normal of that std cut at two deviations.

    The logical axes travel as metadata of our own, which flax does not interpret: a layer can be built
    without a mesh, and a misspelt axis is refused by `Rules` instead of passing as a mesh axis.
    """
    shape = tuple(axes.values())
    # 0.8796: std of N(0, 1) cut at +-2
    value = std / 0.8796 * jax.random.truncated_normal(rngs.params(), -2, 2, shape)
    return nnx.Param(value, axes=tuple(axes))


def constant(value: float, **axes: int) -> nnx.Param:
    """A weight that starts at one value everywhere: norm scales, biases."""
    return nnx.Param(jnp.full(tuple(axes.values()), value, jnp.float32), axes=tuple(axes))
