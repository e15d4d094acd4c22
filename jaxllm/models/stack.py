"""What decoders and encoders have in common: a stack of layers, scanned in repeating groups."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.core.errors import ConfigError
from jaxllm.core.shapes import Array, Float, Int, Key
from jaxllm.models.config import Block as BlockConfig
from jaxllm.models.config import Stack as StackConfig
from jaxllm.models.layers import relative
from jaxllm.models.layers.attention import KV, Tokens
from jaxllm.models.layers.block import Block, Earlier, Layer, Memory, Watch, drop
from jaxllm.models.layers.init import Weight, std
from jaxllm.models.layers.linear import lookup
from jaxllm.models.layers.moe import Routing
from jaxllm.models.layers.norm import Norm
from jaxllm.models.layers.param import param
from jaxllm.models.layers.position import Rotation, document_lengths, rotation, rotation_2d, sinusoids, spread
from jaxllm.models.layout import Places
from jaxllm.models.positions import RoPE, RoPE2D
from jaxllm.models.remat import Remat, remat


class Past(NamedTuple):
    """What layers remember of the text before a segment: their inputs, without a gradient.

    One entry a pattern slot [G, B, M, D], one a tail layer [B, M, D], of the M tokens that stand before.
    """

    blocks: tuple[Float[Array, "G B M D"], ...]
    tail: tuple[Float[Array, "B M D"], ...]
    position_BM: Int[Array, "B M"]  # place of each in its document
    document_BM: Int[Array, "B M"]  # 0 where there is no token yet

    def tokens(self) -> Tokens:
        index_1M = jnp.arange(-self.position_BM.shape[1], 0)[None]
        return Tokens(index_1M, self.position_BM, self.document_BM, jnp.zeros((1, 1), bool))


# (place in the group, keys and values of its input) -> all keys and values that a layer attends to, and their tokens
See = Callable[[int, KV], tuple[KV, Tokens]]


class Stack(nnx.Module):
    """See `models.config.Stack`. Weights of pattern slot s are stacked over groups in `blocks[s]`; the rest is in `tail`.

    `scan=False` unrolls the groups, `remat` names what the backward pass computes again: neither changes a weight
    or a result. `places` says which group lies where in the stacks, for runs that spread them over stages; such a model
    computes by `group` alone. `models.module.for_decoding` makes a model of which all layers are in `tail`.
    """

    def __init__(self, cfg: StackConfig, *, scan: bool = True, remat: Remat = "none"):
        if cfg.vocab is None:
            raise ConfigError("model.vocab is not set; give it, or build the model from prepared data")
        self.cfg, self.scan, self.remat = cfg, scan, remat

    def add_layers(self, rngs: nnx.Rngs, places: Places | None) -> None:
        """Makes the weights of the layers, and of what stands after them."""
        cfg = self.cfg
        # A layer's weights depend on the seed and its number only, not on how layers are grouped.
        key = rngs.params()
        P, G = len(cfg.blocks), cfg.num_groups
        groups = jnp.arange(G) if places is None else jnp.array(places)
        self.blocks = nnx.List([stacked(cfg, cfg.blocks[s], key, s + P * groups) for s in range(P)])
        self.tail = nnx.List(
            [make(cfg, cfg.layer(i), jax.random.fold_in(key, i)) for i in range(P * G, cfg.num_layers)]
        )
        attention = cfg.blocks[0].attention
        self.relative = relative.make(cfg, attention.num_heads, cfg.head_dim(attention), rngs=rngs, layered=False)
        if cfg.final_norm:
            self.final_norm = Norm(cfg.blocks[-1].norm, embed=cfg.embed)

    def add_embedding(self, rngs: nnx.Rngs) -> None:
        V, width = self.cfg.vocab, self.cfg.table_width
        self.embedding = param(rngs, std(self.cfg, Weight("embedding", V, width)), vocab=V, embed=width)

    def table(self, given_VD: Float[Array, "V D"] | None) -> Float[Array, "V D"]:
        """The embedding: the one that is given, or else its own."""
        return self.embedding[...] if given_VD is None else given_VD

    def add_positions(self, rngs: nnx.Rngs, width: int) -> None:
        cfg = self.cfg
        if cfg.position.kind == "learned":
            rows = cfg.context + cfg.position.offset
            self.positions = param(rngs, std(cfg, Weight("embedding", rows, width)), position=rows, embed=width)

    def add_place(self, x_BTD: Float[Array, "B T D"], positions_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Embeddings, scaled, with what tells their place added to them."""
        cfg = self.cfg
        if cfg.embed_scale != 1.0:
            x_BTD = x_BTD * jnp.asarray(cfg.embed_scale, x_BTD.dtype)
        if cfg.position.kind == "learned":
            x_BTD = x_BTD + lookup(self.positions[...], positions_BT + cfg.position.offset, "position")
        elif cfg.position.kind == "sinusoidal":
            x_BTD = x_BTD + sinusoids(cfg.position, positions_BT, x_BTD.shape[-1]).astype(x_BTD.dtype)
        return x_BTD

    def settle(self, x_BTD: Float[Array, "B T D"], key: Key[Array, ""] | None) -> Float[Array, "B T D"]:
        """Embeddings that all is added to, normed, with dropout."""
        cfg = self.cfg
        if cfg.embedding_norm:
            x_BTD = self.embedding_norm(x_BTD)
        return drop(x_BTD, cfg.dropout.embedding, None if key is None else jax.random.fold_in(key, cfg.num_layers))

    def check_length(self, length: int) -> None:
        """Raises ConfigError where a row has more tokens than there are learned positions."""
        cfg = self.cfg
        learned = cfg.position.kind == "learned" or getattr(cfg, "query_layer", None) or getattr(cfg, "enhanced", 0)
        if learned and length > self.cfg.context:
            raise ConfigError(
                f"rows of {length} tokens for a model of {self.cfg.context} learned positions (model.context)"
            )

    def padded_tokens(self, index_1S: Int[Array, "1 S"], pad_B: Int[Array, " B"], prefix_B: Int[Array, " B"]) -> Tokens:
        """Where the tokens of left-padded rows stand, one document a row; index < pad (or < 0) is padding."""
        position = index_1S - pad_B[:, None]
        real = position >= 0
        place = self.placed(jnp.maximum(position, 0))
        block = jnp.maximum(position - prefix_B[:, None] + 1, 0)
        return Tokens(
            index_1S, place, real.astype(jnp.int32), real & (position < prefix_B[:, None]),
            (jnp.maximum(position - block, 0), block),
        )  # fmt: skip

    def placed(self, positions_BT: Int[Array, "B T"], key: Key[Array, ""] | None = None) -> Int[Array, "B T"]:
        """Positions as the model is told them: themselves, or among `random_positions`, drawn anew for each row.

        Without a key, and so outside training, they are always the same ones.
        """
        cfg = self.cfg
        if cfg.random_positions is None:
            return positions_BT
        return spread(positions_BT, cfg.context, cfg.random_positions, key)

    def layers(
        self,
        x_BTD: Float[Array, "B T D"],
        tokens: Tokens,
        key: Key[Array, ""] | None = None,
        keep: bool = False,
        memory: Memory | None = None,
        watch: Watch | None = None,
        see: See | None = None,
        past: Past | None = None,
        last: bool = True,
    ):
        """The residual stream after all layers; with `keep` also each layer's keys and values, as `Cache` has them.

        Args:
          see: as `group` takes it.
          past: the text before; then what layers remember of it and of these tokens comes back in place of keys.
          last: also computes the last layer, if that stands in the tail.
          watch: is told once what the routers of all mixtures did, if there are any: `Routing` of arrays, one element
            a mixture.
        """
        cfg, P = self.cfg, len(self.cfg.blocks)
        context = self.context(tokens, memory)
        if past is not None:
            before = past.tokens()
            index, position, document = (jnp.concatenate(pair, 1) for pair in zip(before[:3], tokens[:3], strict=True))
            both = Tokens(index, position, document, before.prefix)
            context = context._replace(earlier=Earlier(self.context(before).rotations, both))

        def group(x_BTD, given):
            (first, blocks, old), seen = given, []
            told = {"keep": keep, "scanned": self.scan and cfg.num_groups > 1, "watch": watch and seen.append}
            x_BTD, kvs = self.group(blocks, x_BTD, context, first, key, see, past=old, **told)
            return x_BTD, (kvs, seen)

        kvs, seen, late, rest = (), [], [], jnp.int32(P * cfg.num_groups if self.blocks else 0)
        if self.blocks:
            firsts, unroll = P * jnp.arange(cfg.num_groups), 1 if self.scan else cfg.num_groups
            given = firsts, tuple(self.blocks), past and past.blocks
            x_BTD, (kvs, seen) = jax.lax.scan(group, x_BTD, given, unroll=unroll)
        told = {"keep": keep, "scanned": False, "watch": watch and late.append, "past": past and past.tail}
        tail = tuple(self.tail) if last else tuple(self.tail)[:-1]
        x_BTD, tail = self.group(tail, x_BTD, context, rest, key, see, **told)
        if seen or late:
            late = [jax.tree.map(lambda x: x[None], routing) for routing in late]
            watch(jax.tree.map(lambda *xs: jnp.concatenate(xs), *seen, *late))
        return x_BTD, (kvs, tail)

    def group(
        self,
        blocks: Sequence[Block],
        x_BTD: Float[Array, "B T D"],
        context: Layer,
        first: Int[Array, ""],
        key: Key[Array, ""] | None = None,
        see: See | None = None,
        *,
        keep: bool = False,
        scanned: bool = True,
        watch: Watch | None = None,
        past: tuple[Float[Array, "B M D"], ...] | None = None,
    ) -> tuple[Float[Array, "B T D"], tuple[KV | Array | None, ...]]:
        """The residual stream after these layers, numbered from `first`; with `keep` their keys and values.

        Args:
          see: what each layer attends to; None: its own keys and values.
          scanned: runs in a loop, which hides from XLA that the backward pass computes something again.
          watch: is told what the router of each mixture did.
          past: inputs of the layers for the tokens before; then they come back with those of these tokens.
        """

        def run(block: Block, x_BTD: Array, s: int) -> tuple[Array, KV | None, list[Routing]]:
            kept, seen = [], []

            def remember(new: KV) -> tuple[KV, Tokens]:
                kept.append(new)
                if past is not None:
                    old = block.keys_values(past[s], context.earlier.rotations)
                    return jax.tree.map(lambda a, b: jnp.concatenate([a, b], 1), old, new), context.earlier.tokens
                return (new, context.tokens) if see is None else see(s, new)

            layer_key = None if key is None else jax.random.fold_in(key, first + s)
            x_BTD = block(x_BTD, context, remember, layer_key, watch=watch and seen.append)
            return x_BTD, kept[0] if keep else None, seen

        kvs = []
        for s, block in enumerate(blocks):
            before_BTD = x_BTD
            x_BTD, kv, seen = remat(functools.partial(run, s=s), self.remat, scanned=scanned)(block, x_BTD)
            kvs.append(kv if past is None else newest(past[s], before_BTD))
            for routing in seen:
                watch(routing)
        return x_BTD, tuple(kvs)

    def final(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The residual stream as the head takes it."""
        return self.final_norm(x_BTD) if self.cfg.final_norm else x_BTD

    def context(self, tokens: Tokens, memory: Memory | None = None) -> Layer:
        """What every layer is told of these tokens."""
        cfg = self.cfg
        lengths = None
        if any(rope.by_length for rope, _ in cfg.ropes):
            lengths = document_lengths(*jnp.broadcast_arrays(tokens.position, tokens.document))

        def turns(rope: RoPE | RoPE2D, size: int) -> Rotation:
            if rope.kind == "rope":
                return rotation(rope, tokens.position, lengths, size)
            return rotation_2d(rope, *(tokens.two or two_places(tokens)), size)

        rotations = tuple(turns(*rope) for rope in cfg.ropes)
        return Layer(tokens, rotations, lengths, self.relative, memory)


def newest(old: Array, new: Array) -> Array:
    """The last M of [B, M, ...] and [B, T, ...], without a gradient."""
    M, T = old.shape[1], new.shape[1]
    both = new[:, T - M :] if T >= M else jnp.concatenate([old[:, T:], new], 1)
    return jax.lax.stop_gradient(both)


def make(cfg: StackConfig, block: BlockConfig, key: Key[Array, ""]) -> Block:
    return Block(cfg, block, rngs=nnx.Rngs(params=key))


def stacked(cfg: StackConfig, block: BlockConfig, key: Key[Array, ""], layers: Int[Array, " G"]) -> Block:
    """One module whose weights have a leading axis over `layers`; zeros for those below 0."""
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: make(cfg, block, jax.random.key(0))))

    def weights(i: Int[Array, ""]):
        state = nnx.state(make(cfg, block, jax.random.fold_in(key, i)), nnx.Param)
        return jax.tree.map(lambda w: jnp.where(i < 0, 0, w), state)

    return nnx.merge(graphdef, jax.vmap(weights)(layers))


def row_tokens(positions_BT, documents_BT, prefix_BT=None, index_BT=None) -> Tokens:
    """Where the tokens of packed rows stand."""
    index = jnp.arange(positions_BT.shape[1])[None] if index_BT is None else index_BT
    prefix = jnp.zeros((1, 1), bool) if prefix_BT is None else prefix_BT
    return Tokens(index, positions_BT, documents_BT, prefix)


def two_places(tokens: Tokens) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """The place in the prompt, and after it, of tokens whose prompt is the prefix of their document."""
    position, document, prefix = jnp.broadcast_arrays(tokens.position, tokens.document, tokens.prefix)
    last = document_lengths(jnp.where(prefix, position, -1), document)  # one more than the place of its last token
    block = jnp.maximum(position - last + 1, 0)
    return jnp.maximum(position - block, 0), block
