"""LayerNorm and RMSNorm over the last dimension, computed in float32."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.core.shapes import Array, Float
from jaxllm.models import config
from jaxllm.models.layers.param import constant
from jaxllm.models.remat import recomputed


class Norm(nnx.Module):
    """`Norm(cfg, embed=512)`: the keywords are the normalised dimensions, which stand last."""

    def __init__(self, cfg: config.RMSNorm | config.LayerNorm, **axes: int):
        self.cfg = cfg
        self.dims = len(axes)
        offset = cfg.kind == "rmsnorm" and cfg.unit_offset
        if cfg.kind == "rmsnorm" or cfg.scale:
            self.scale = constant(0.0 if offset else 1.0, **axes)
        if cfg.kind == "layernorm" and cfg.bias:
            self.bias = constant(0.0, **axes)

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        bias = self.bias[...] if self.cfg.kind == "layernorm" and self.cfg.bias else None
        scale = self.scale[...] if hasattr(self, "scale") else None
        return recomputed(functools.partial(normalise, self.cfg, self.dims))(x, scale, bias)


def normalise(
    cfg: config.RMSNorm | config.LayerNorm,
    dims: int,
    x: Float[Array, "..."],
    scale: Float[Array, "..."] | None,
    bias: Float[Array, "..."] | None,
) -> Float[Array, "..."]:
    """`x` normalised over its last `dims` dimensions."""
    over = tuple(range(-dims, 0))
    y = x.astype(jnp.float32)
    if cfg.kind == "layernorm":
        y = y - jnp.mean(y, over, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), over, keepdims=True) + cfg.epsilon)
    if scale is not None:
        scale = scale.astype(jnp.float32)
        y = y * (1 + scale if cfg.kind == "rmsnorm" and cfg.unit_offset else scale)
    return (y if bias is None else y + bias).astype(x.dtype)
