"""Attention over rows that several devices share."""

from collections.abc import Callable

import jax

from jaxllm.parallel.config import Context, Rules


def spread(mesh: jax.sharding.Mesh, rules: Rules, cfg: Context) -> Callable:
    raise NotImplementedError
