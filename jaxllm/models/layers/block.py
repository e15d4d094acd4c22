"""One layer: attention and feed-forward, with norms where the placement puts them."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxllm.core.axes import constrain
from jaxllm.core.shapes import Array, Float, Int, Key
from jaxllm.models.config import Block as BlockConfig
from jaxllm.models.config import Stack
from jaxllm.models.layers.relative import Module as Relative
from jaxllm.models.layers.attention import KV, Attention, Tokens
from jaxllm.models.layers.ffn import FFN
from jaxllm.models.layers.moe import MoE, Routing
from jaxllm.models.layers.norm import Norm
from jaxllm.models.layers.position import Rotation


class Memory(NamedTuple):
    """What an encoder made of its input, for the layers of a decoder."""

    x_BSD: Float[Array, "B S D"] | None  # None: keys and values of each layer are at hand
    tokens: Tokens  # their index is below 0: none is any query's own


class Earlier(NamedTuple):
    """What every layer is told of the tokens before a segment, whose inputs it remembers."""

    rotations: tuple[Rotation, ...]
    tokens: Tokens  # they, and then the segment's


class Layer(NamedTuple):
    """What every layer of a forward pass is told besides its input."""

    tokens: Tokens
    rotations: tuple[Rotation, ...]  # those of `Stack.ropes`: computed once for all layers
    length_BT: Int[Array, "B T"] | None = None  # of the tokens' documents, where a rotation depends on it
    relative: Relative | None = None  # what distance adds to logits, as far as all layers share it
    memory: Memory | None = None  # for layers that attend to an encoder's output, too
    queries_BTD: Float[Array, "B T D"] | None = None  # what queries are projections of; None: of the layer's input
    earlier: Earlier | None = None  # of a segment of a longer text


# What attention reads and writes: (projected keys and values) -> (all keys and values to look at, where they stand).
Remember = Callable[[KV], tuple[KV, Tokens]]
# Is told what a router did.
Watch = Callable[[Routing], None]


class Block(nnx.Module):
    def __init__(self, cfg: Stack, block: BlockConfig, *, rngs: nnx.Rngs):
        self.cfg, self.placement = cfg, block.placement
        self.attention = Attention(cfg, block, rngs=rngs)
        self.ffn = {"dense": FFN, "moe": MoE}[block.ffn.kind](cfg, block, rngs=rngs)
        self.norm_attention = Norm(block.norm, embed=cfg.embed)
        if not (self.placement.kind == "parallel" and self.placement.norms == 1):
            self.norm_ffn = Norm(block.norm, embed=cfg.embed)
        if self.placement.kind == "sandwich":
            self.post_attention = Norm(block.norm, embed=cfg.embed)
            self.post_ffn = Norm(block.norm, embed=cfg.embed)
        if block.cross is not None:
            self.cross = Attention(cfg, block.model_copy(update={"attention": block.cross}), rngs=rngs, cross=True)
            self.norm_cross = Norm(block.norm, embed=cfg.embed)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        layer: Layer,
        remember: Remember,
        key: Key[Array, ""] | None = None,
        memory_kv: KV | None = None,
        watch: Watch | None = None,
    ) -> Float[Array, "B T D"]:
        """The layer's output. `remember` sees each new key and value and says which to attend to.

        Args:
          memory_kv: keys and values of an encoder's output; None: they are computed of `layer.memory`.
          watch: is told what the router did, if there is one.
        """
        keys = jax.random.split(key, 3) if key is not None else (None, None, None)
        x_BTD = checkpoint_name(x_BTD, "input")

        def attention(h_BTD):
            h_BTD = constrain(h_BTD, "batch", "seq", "embed")
            new = self.attention.keys_values(h_BTD, layer.rotations)
            q_BTNH = self.attention.queries(h_BTD if layer.queries_BTD is None else layer.queries_BTD, layer.rotations)
            kv, k_tokens = remember(new)
            if self.attention.turns_late:
                turns = None if k_tokens is layer.tokens else layer.length_BT
                kv = self.attention.turned(kv, k_tokens, layer.rotations, turns)
            y = self.attention.mix(
                q_BTNH, kv, layer.tokens, k_tokens, self.cfg.dropout.attention, keys[0], layer.relative
            )
            return drop(constrain(y, "batch", "norm_seq", "embed"), self.cfg.dropout.residual, keys[1])

        def cross(h_BTD):
            q_BTNH = self.cross.queries(constrain(h_BTD, "batch", "seq", "embed"), ())
            kv = self.cross.keys_values(layer.memory.x_BSD, ()) if memory_kv is None else memory_kv
            at, on = (None, None) if key is None else (jax.random.fold_in(keys[0], 1), jax.random.fold_in(keys[1], 1))
            y = self.cross.mix(q_BTNH, kv, layer.tokens, layer.memory.tokens, self.cfg.dropout.attention, at)
            return drop(constrain(y, "batch", "norm_seq", "embed"), self.cfg.dropout.residual, on)

        def ffn(h_BTD):
            h_BTD = constrain(h_BTD, "batch", "seq", "embed")
            if isinstance(self.ffn, MoE):
                y, routing = self.ffn(
                    h_BTD, layer.tokens.document != 0, None if key is None else jax.random.fold_in(key, 3)
                )
                if watch is not None:
                    watch(routing)
            else:
                y = self.ffn(h_BTD)
            return drop(constrain(y, "batch", "norm_seq", "embed"), self.cfg.dropout.residual, keys[2])

        def between(x_BTD):
            return checkpoint_name(x_BTD, "residual")

        match self.placement.kind:
            case "pre" | "subln":
                x_BTD = between(x_BTD + attention(self.norm_attention(x_BTD)))
                if hasattr(self, "cross"):
                    x_BTD = x_BTD + cross(self.norm_cross(x_BTD))
                x_BTD = x_BTD + ffn(self.norm_ffn(x_BTD))
            case "res_post":
                x_BTD = between(x_BTD + self.norm_attention(attention(x_BTD)))
                x_BTD = x_BTD + self.norm_ffn(ffn(x_BTD))
            case "normed_residual":
                alpha = jnp.asarray(self.placement.alpha, x_BTD.dtype)
                h_BTD = self.norm_attention(x_BTD)
                h_BTD = self.norm_ffn(between(alpha * h_BTD + attention(h_BTD)))
                x_BTD = alpha * h_BTD + ffn(h_BTD)
            case "post":
                x_BTD = between(self.norm_attention(x_BTD + attention(x_BTD)))
                if hasattr(self, "cross"):
                    x_BTD = self.norm_cross(x_BTD + cross(x_BTD))
                x_BTD = self.norm_ffn(x_BTD + ffn(x_BTD))
            case "sandwich":
                x_BTD = between(x_BTD + self.post_attention(attention(self.norm_attention(x_BTD))))
                x_BTD = x_BTD + self.post_ffn(ffn(self.norm_ffn(x_BTD)))
            case "parallel":
                h_BTD = self.norm_attention(x_BTD)
                x_BTD = x_BTD + attention(h_BTD) + ffn(h_BTD if self.placement.norms == 1 else self.norm_ffn(x_BTD))
            case "deepnorm":
                alpha = jnp.asarray(self.cfg.deepnorm_alpha, x_BTD.dtype)
                x_BTD = between(self.norm_attention(alpha * x_BTD + attention(x_BTD)))
                x_BTD = self.norm_ffn(alpha * x_BTD + ffn(x_BTD))
        return constrain(x_BTD, "batch", "norm_seq", "embed")

    def keys_values(self, x_BSD: Float[Array, "B S D"], rotations: tuple[Rotation, ...]) -> KV:
        """Keys and values of inputs of the layer, of other tokens than those it computes."""
        after = self.placement.kind in ("post", "deepnorm", "res_post")
        return self.attention.keys_values(x_BSD if after else self.norm_attention(x_BSD), rotations)


def drop(x: Float[Array, "..."], rate: float, key: Key[Array, ""] | None) -> Float[Array, "..."]:
    """Dropout (Srivastava et al. 2014): `x` itself without a key."""
    if not rate or key is None:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)
