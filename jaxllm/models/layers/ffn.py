"""The position-wise feed-forward, with or without a gate."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxllm.core.axes import constrain
from jaxllm.core.shapes import Array, Float
from jaxllm.models.config import Activation, Block, Stack
from jaxllm.models.layers.init import Weight, gain, std
from jaxllm.models.layers.linear import linear
from jaxllm.models.layers.norm import Norm
from jaxllm.models.layers.param import constant, param
from jaxllm.models.remat import recomputed


def activate(kind: Activation, x: Float[Array, "..."]) -> Float[Array, "..."]:
    match kind:
        case "gelu":
            return jax.nn.gelu(x, approximate=False)
        case "gelu_tanh":
            return jax.nn.gelu(x, approximate=True)
        case "relu2":
            return jnp.square(jax.nn.relu(x))
        case "gelu_sigmoid":
            return x * jax.nn.sigmoid(1.702 * x)
        case "identity":
            return x
    plain = {"relu": jax.nn.relu, "silu": jax.nn.silu, "sigmoid": jax.nn.sigmoid, "tanh": jnp.tanh, "mish": jax.nn.mish}
    return plain[kind](x)


def gated(kind: Activation, gate: Float[Array, "..."], x: Float[Array, "..."]) -> Float[Array, "..."]:
    return activate(kind, gate) * x


class FFN(nnx.Module):
    def __init__(self, cfg: Stack, block: Block, *, rngs: nnx.Rngs):
        self.cfg = block.ffn
        D, F, g = cfg.embed, block.ffn.mlp, gain(cfg, block)
        up = g * std(cfg, Weight("hidden", D, F))
        self.w_up = param(rngs, up, embed=D, mlp=F)
        self.w_down = param(rngs, g * std(cfg, Weight("residual", F, D)), mlp=F, embed=D)
        if block.ffn.glu:
            self.w_gate = param(rngs, up, embed=D, mlp=F)
        if block.ffn.bias:
            self.b_up = constant(0.0, mlp=F)
            self.b_down = constant(0.0, embed=D)
            if block.ffn.glu:
                self.b_gate = constant(0.0, mlp=F)
        if block.placement.kind == "subln":
            self.inner_norm = Norm(block.norm, mlp=F)

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        bias = self.cfg.bias
        wide, narrow = ("batch", "seq", "mlp"), ("batch", "seq", "embed")
        h_BTF = linear("BTD,DF->BTF", x_BTD, self.w_up[...], narrow, ("embed", "mlp"), wide)
        h_BTF = checkpoint_name(h_BTF + self.b_up[...] if bias else h_BTF, "up")
        if self.cfg.glu:
            gate_BTF = linear("BTD,DF->BTF", x_BTD, self.w_gate[...], narrow, ("embed", "mlp"), wide)
            gate_BTF = checkpoint_name(gate_BTF + self.b_gate[...] if bias else gate_BTF, "gate")
            h_BTF = recomputed(functools.partial(gated, self.cfg.activation))(gate_BTF, h_BTF)
        else:
            h_BTF = recomputed(functools.partial(activate, self.cfg.activation))(h_BTF)
        h_BTF = constrain(h_BTF, "batch", "seq", "mlp")
        if hasattr(self, "inner_norm"):
            h_BTF = self.inner_norm(h_BTF)
        y_BTD = linear("BTF,FD->BTD", h_BTF, self.w_down[...], wide, ("mlp", "embed"), narrow)
        return y_BTD + self.b_down[...] if bias else y_BTD
