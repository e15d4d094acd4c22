"""The decoder: embedding, layers, head; with a cache for generation."""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.core.axes import constrain
from jaxllm.core.errors import ConfigError
from jaxllm.core.shapes import Array, Bool, Float, Int, Key
from jaxllm.models.config import Block as BlockConfig
from jaxllm.models.config import DecoderConfig
from jaxllm.models.layers.attention import KV, Cached, Tokens
from jaxllm.models.layers.block import Block, Layer, Memory, Watch
from jaxllm.models.layers.init import Weight, std
from jaxllm.models.layers.linear import linear, lookup, to_vocabulary
from jaxllm.models.layers.norm import Norm
from jaxllm.models.layers.param import constant, param
from jaxllm.models.layout import Places
from jaxllm.models.remat import Remat
from jaxllm.models.stack import Past, Stack, make, newest, row_tokens


class Cache(NamedTuple):
    """Keys and values of a left-padded batch: one entry a pattern slot [G, B, K, S, H], one a tail layer [B, K, S, H].

    S is the capacity, or the window of a sliding-window layer if that is less: such a layer is a ring buffer in
    which token i stands at slot i mod S.
    """

    blocks: tuple[Cached, ...]
    tail: tuple[Cached, ...]
    length: Int[Array, ""]  # tokens so far, padding included; alike for all rows
    pad_B: Int[Array, " B"]  # padding tokens at the left of each row
    prefix_B: Int[Array, " B"]  # tokens of the bidirectional prefix
    query: Cached | None = None  # of the query layer
    cross: tuple[tuple[KV, ...], tuple[KV, ...]] | None = None  # of an encoder's output, for `blocks` and `tail`
    memory: Memory | None = None  # where that output's tokens stand

    def reorder(self, rows_B: Int[Array, " R"]) -> "Cache":
        """The cache of rows `rows_B`, in that order; rows may repeat (beam search)."""
        take = lambda tree, axis=0: jax.tree.map(functools.partial(jnp.take, indices=rows_B, axis=axis), tree)
        cross, memory = self.cross, self.memory
        if memory is not None:
            read = memory.tokens
            read = read._replace(position=take(read.position), document=take(read.document))
            cross, memory = (take(cross[0], axis=1), take(cross[1])), memory._replace(tokens=read)
        return self._replace(
            blocks=take(self.blocks, axis=1), tail=take(self.tail), pad_B=take(self.pad_B),
            prefix_B=take(self.prefix_B), query=take(self.query), cross=cross, memory=memory,
        )  # fmt: skip


class Decoder(Stack):
    """See `DecoderConfig` and `Stack`.

    Args:
      embedded: has an embedding of its own; else `embed` and `logits` are given that of another (encoder-decoders).
    """

    def __init__(
        self,
        cfg: DecoderConfig,
        *,
        rngs: nnx.Rngs,
        scan: bool = True,
        remat: Remat = "none",
        places: Places | None = None,
        embedded: bool = True,
    ):
        super().__init__(cfg, scan=scan, remat=remat)
        width = cfg.table_width
        if embedded:
            self.add_embedding(rngs)
        if cfg.table:
            hidden = std(cfg, Weight("hidden", width, cfg.embed))
            self.table_in = param(rngs, hidden, table=width, embed=cfg.embed)
            self.table_out = param(rngs, std(cfg, Weight("hidden", cfg.embed, width)), embed=cfg.embed, table=width)
        self.add_positions(rngs, cfg.embed)
        if cfg.embedding_norm:
            self.embedding_norm = Norm(cfg.embedding_norm, embed=cfg.embed)
        self.add_layers(rngs, places)
        if not cfg.tie:
            self.head = param(rngs, std(cfg, Weight("head", width, cfg.vocab)), embed=width, vocab=cfg.vocab)
        if cfg.head_bias:
            self.head_bias = constant(0.0, vocab=cfg.vocab)
        if cfg.query_layer:
            deviation = std(cfg, Weight("embedding", cfg.context, cfg.embed))
            self.query_positions = param(rngs, deviation, position=cfg.context, embed=cfg.embed)
            self.query_layer = make(cfg, cfg.query_layer, rngs.params())

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"],
        documents_BT: Int[Array, "B T"],
        *,
        prefix_BT: Bool[Array, "B T"] | None = None,
        index_BT: Int[Array, "#B T"] | None = None,
        block_BT: Int[Array, "B T"] | None = None,
        key: Key[Array, ""] | None = None,
        watch: Watch | None = None,
    ) -> Float[Array, "B T V"]:
        """float32 logits of the token after each token.

        Args:
          positions_BT: position in the document, from 0; padding may hold anything.
          documents_BT: document id in a packed row; 0 is padding and is seen by padding only.
          prefix_BT: marks tokens of a bidirectional prefix, for masks with `prefix`.
          index_BT: place of each token in its row, where the tokens of a row stand in another order.
          block_BT: for `rope_2d`, place in the span that a token is of, from 1; 0 in the prompt. Positions are then
            places in the prompt, of a token of a span that of its mask. None: what follows the prefix is one span, and
            the prefix ends in its mask.
          key: turns dropout on, and the jitter of routers.
          watch: is told once what the routers of all mixtures did, if there are any: `Routing` of arrays, one element
            a mixture.
        """
        told = {"prefix_BT": prefix_BT, "index_BT": index_BT, "block_BT": block_BT, "key": key, "watch": watch}
        return self.logits(self.hidden(tokens_BT, positions_BT, documents_BT, **told))

    def hidden(
        self,
        tokens_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"],
        documents_BT: Int[Array, "B T"],
        *,
        prefix_BT: Bool[Array, "B T"] | None = None,
        index_BT: Int[Array, "#B T"] | None = None,
        block_BT: Int[Array, "B T"] | None = None,
        key: Key[Array, ""] | None = None,
        table_VD: Float[Array, "V D"] | None = None,
        memory: Memory | None = None,
        watch: Watch | None = None,
    ) -> Float[Array, "B T D"]:
        """What the head turns into logits: the residual stream after the last norm."""
        self.check_length(tokens_BT.shape[1])
        positions_BT = self.placed(positions_BT, key)
        tokens = row_tokens(positions_BT, documents_BT, prefix_BT, index_BT)
        if block_BT is not None:
            tokens = tokens._replace(two=(positions_BT, block_BT))
        x_BTD = self.embed(tokens_BT, positions_BT, key, table_VD)
        x_BTD, _ = self.layers(x_BTD, tokens, key, memory=memory, watch=watch)
        return self.top(self.final(x_BTD), tokens, key)[0]

    def begin(self, batch: int, memory: int | None = None) -> Past:
        """What is remembered of `batch` rows before their first segments: nothing.

        Args:
          memory: tokens that will be remembered; None: as many as the config says (evaluation may take more).

        Raises:
          ConfigError: none, or the model has a part that cannot see earlier segments.
        """
        cfg, M = self.cfg, self.cfg.memory if memory is None else memory
        if why := cfg.forgets or (M < 1 and "there is nothing to remember; take 1 or more"):
            raise ConfigError(f"memory={M}: {why}")
        none_BMD = jnp.zeros((batch, M, cfg.embed), self.embedding[...].dtype)
        stacked = jnp.broadcast_to(none_BMD, (cfg.num_groups, *none_BMD.shape))
        none_BM = jnp.zeros((batch, M), jnp.int32)
        return Past((stacked,) * len(self.blocks), (none_BMD,) * len(self.tail), none_BM, none_BM)

    def segment(
        self,
        tokens_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"],
        documents_BT: Int[Array, "B T"],
        past: Past,
        *,
        key: Key[Array, ""] | None = None,
        watch: Watch | None = None,
    ) -> tuple[Float[Array, "B T V"], Past]:
        """Logits of a segment of text whose earlier tokens are remembered, and what is remembered with it.

        Layer n attends to [stop_gradient(m), h], m its inputs for the M tokens before: gradients reach the projections
        of what is remembered, not what it was computed of (Dai et al. 2019, arXiv:1901.02860, section 3.2).

        Args:
          positions_BT, documents_BT: as `__call__` has them. A document that goes on from the segment before has the
            same id and counts on, and no padding lies between.
          past: from `begin`, or from the segment before.
        """
        x_BTD = self.embed(tokens_BT, positions_BT, key)
        tokens = row_tokens(positions_BT, documents_BT)
        x_BTD, (blocks, tail) = self.layers(x_BTD, tokens, key, watch=watch, past=past)
        told = newest(past.position_BM, positions_BT), newest(past.document_BM, documents_BT)
        return self.logits(self.final(x_BTD)), Past(blocks, tail, *told)

    def top(
        self, x_BTD: Float[Array, "B T D"], tokens: Tokens, key: Key[Array, ""] | None = None
    ) -> tuple[Float[Array, "B T D"], KV | None]:
        """What the query layer makes of the layers' output, and its keys and values; without one, the output itself."""
        if not self.cfg.query_layer:
            return x_BTD, None
        asked = self.asking(self.context(tokens))
        last = jnp.int32(self.cfg.num_layers)
        x_BTD, (kv,) = self.group((self.query_layer,), x_BTD, asked, last, key, keep=True, scanned=False)
        return x_BTD, kv

    def asking(self, layer: Layer) -> Layer:
        """What the query layer is told: that its queries are embeddings of places."""
        return layer._replace(queries_BTD=lookup(self.query_positions[...], layer.tokens.position, "position"))

    def logits(
        self, x_BTD: Float[Array, "B T D"], table_VD: Float[Array, "V D"] | None = None
    ) -> Float[Array, "B T V"]:
        """float32 logits of hidden states."""
        x_BTD = constrain(x_BTD, "batch", "seq", "embed")
        if self.cfg.table:
            wide, narrow = ("batch", "seq", "embed"), ("batch", "seq", "table")
            x_BTD = linear("BTD,DE->BTE", x_BTD, self.table_out[...], wide, ("embed", "table"), narrow)
        w = self.table(table_VD) if self.cfg.tie else self.head[...]
        if self.cfg.head_norm:
            w = unit_rows(w, -1 if self.cfg.tie else 0)
        y_BTV = to_vocabulary(x_BTD, w, tied=self.cfg.tie)
        if self.cfg.logit_scale != 1.0:
            y_BTV = self.cfg.logit_scale * y_BTV
        if self.cfg.head_bias:
            y_BTV = y_BTV + self.head_bias[...]
        if self.cfg.logit_softcap:
            y_BTV = self.cfg.logit_softcap * jnp.tanh(y_BTV / self.cfg.logit_softcap)
        return constrain(y_BTV, "batch", "seq", "vocab")

    def prefill(
        self,
        tokens_BT: Int[Array, "B T"],
        pad_B: Int[Array, " B"],
        *,
        capacity: int,
        prefix_len_B: Int[Array, " B"] | None = None,
        table_VD: Float[Array, "V D"] | None = None,
        memory: Memory | None = None,
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Logits after the last token of each row of a left-padded batch, and the cache of all of them.

        Args:
          pad_B: padding tokens at the left of each row.
          capacity: tokens the cache must be able to hold, prompt included.
          prefix_len_B: length of the bidirectional prefix of each row, for masks with `prefix`.
        """
        self.check_decodable()
        B, T = tokens_BT.shape
        prefix_B = jnp.zeros(B, jnp.int32) if prefix_len_B is None else prefix_len_B
        tokens = self.padded_tokens(jnp.arange(T)[None], pad_B, prefix_B)
        x_BTD = self.embed(tokens_BT, tokens.position, table_VD=table_VD)
        x_BTD, (blocks, tail) = self.layers(x_BTD, tokens, keep=True, memory=memory)
        query = None
        if self.cfg.query_layer:
            x_BTD, kv = self.top(self.final(x_BTD), tokens)
            query = cached(kv, cache_size(self.cfg.query_layer, capacity))
        else:
            x_BTD = self.final(x_BTD[:, -1:])
        logits_BV = self.logits(x_BTD[:, -1:], table_VD)[:, 0]
        sizes = [cache_size(b, capacity) for b in self.cfg.blocks]
        cache = Cache(
            blocks=tuple(map(cached, blocks, sizes)), tail=tuple(map(cached, tail, itertools.cycle(sizes))),
            length=jnp.int32(T), pad_B=pad_B, prefix_B=prefix_B, query=query,
        )  # fmt: skip
        return logits_BV, cache

    def decode(
        self, tokens_B: Int[Array, " B"], cache: Cache, table_VD: Float[Array, "V D"] | None = None
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Logits after one more token in each row, and the cache that holds it."""
        now = cache.length
        tokens = self.padded_tokens(now[None, None], cache.pad_B, cache.prefix_B)
        x_BTD = self.embed(tokens_B[:, None], tokens.position, table_VD=table_VD)
        layer = self.context(tokens, cache.memory)
        cross_blocks, cross_tail = cache.cross or ((None,) * len(self.blocks), (None,) * len(self.tail))

        def write(all_kv: Cached, new: KV, group: Int[Array, ""] | None) -> tuple[Cached, KV, Tokens]:
            """The stacked cache with `new` in it, this layer's part of it, and where its tokens stand."""
            size, one = all_kv.k_BKSH.shape[-2], cached(new, 1)
            slot = now % size
            if group is None:
                out = jax.tree.map(lambda a, n: jax.lax.dynamic_update_slice_in_dim(a, n, slot, 2), all_kv, one)
                here = out
            else:
                out = jax.tree.map(
                    lambda a, n: jax.lax.dynamic_update_slice(a, n[None], (group, 0, 0, slot, 0)), all_kv, one
                )
                here = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, group, 0, keepdims=False), out)
            index = now - (now - jnp.arange(size)) % size  # slot j holds the newest token i <= now with i = j mod size
            return out, here.seen(), self.padded_tokens(index[None], cache.pad_B, cache.prefix_B)

        def group_step(carry, group_blocks):
            x_BTD, kvs = carry
            group, blocks, cross = group_blocks
            out = []
            for block, kv, other in zip(blocks, kvs, cross, strict=True):
                x_BTD, kv = self._decode_layer(block, x_BTD, layer, lambda new, kv=kv: write(kv, new, group), other)
                out.append(kv)
            return (x_BTD, tuple(out)), None

        blocks = cache.blocks
        if self.blocks:
            groups = jnp.arange(self.cfg.num_groups), tuple(self.blocks), cross_blocks
            (x_BTD, blocks), _ = jax.lax.scan(group_step, (x_BTD, blocks), groups)
        tail = []
        for block, kv, other in zip(self.tail, cache.tail, cross_tail, strict=True):
            x_BTD, kv = self._decode_layer(block, x_BTD, layer, lambda new, kv=kv: write(kv, new, None), other)
            tail.append(kv)
        x_BTD, query = self.final(x_BTD), cache.query
        if self.cfg.query_layer:
            x_BTD, query = self._decode_layer(
                self.query_layer, x_BTD, self.asking(layer), lambda new: write(cache.query, new, None), None
            )
        logits_BV = self.logits(x_BTD, table_VD)[:, 0]
        return logits_BV, cache._replace(blocks=blocks, tail=tuple(tail), query=query, length=now + 1)

    def embed(
        self,
        tokens_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"],
        key: Key[Array, ""] | None = None,
        table_VD: Float[Array, "V D"] | None = None,
    ) -> Float[Array, "B T D"]:
        cfg = self.cfg
        x_BTD = lookup(self.table(table_VD), tokens_BT)
        if cfg.table:
            narrow, wide = ("batch", "seq", "table"), ("batch", "seq", "embed")
            x_BTD = linear("BTE,ED->BTD", x_BTD, self.table_in[...], narrow, ("table", "embed"), wide)
        x_BTD = self.settle(self.add_place(x_BTD, positions_BT), key)
        return constrain(x_BTD, "batch", "norm_seq", "embed")

    def check_decodable(self) -> None:
        """Raises ConfigError where a token's representation depends on tokens that are not there yet."""
        for block in (*self.cfg.blocks, *filter(None, [self.cfg.query_layer])):
            if not block.attention.mask.decodable:
                raise ConfigError(
                    f"attention.mask={block.attention.mask.kind} lets tokens see what follows them: such a model has "
                    "no next-token generation; use causal, or `some` of causal and prefix"
                )

    def _decode_layer(self, block: Block, x_BTD: Array, layer: Layer, write, cross: KV | None) -> tuple[Array, Cached]:
        written = []

        def remember(new: KV) -> tuple[KV, Tokens]:
            all_kv, here, tokens = write(new)
            written.append(all_kv)
            return here, tokens

        return block(x_BTD, layer, remember, memory_kv=cross), written[0]


def unit_rows(w: Float[Array, "A B"], dim: int) -> Float[Array, "A B"]:
    """`w` with vectors of length 1 along `dim`."""
    length = jnp.sqrt(jnp.sum(jnp.square(w.astype(jnp.float32)), dim, keepdims=True))
    return (w / jnp.maximum(length, 1e-12)).astype(w.dtype)


def cache_size(block: BlockConfig, capacity: int) -> int:
    return min(block.attention.window or capacity, capacity)


def cached(kv: KV, size: int) -> Cached:
    """The last `size` of all tokens, token i at slot i mod size; zeros where there are fewer."""

    def ring(x_BSKH: Float[Array, "*G B S K H"]) -> Float[Array, "*G B K _ H"]:
        x_BKSH = x_BSKH.swapaxes(-3, -2)
        S = x_BKSH.shape[-2]
        if S <= size:
            return jnp.pad(x_BKSH, [(0, 0)] * (x_BKSH.ndim - 2) + [(0, size - S), (0, 0)])
        return jnp.roll(x_BKSH[..., S - size :, :], S % size, axis=-2)

    return Cached(*map(ring, kv))
