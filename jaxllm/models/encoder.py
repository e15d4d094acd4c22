"""The encoder: embeddings of tokens, places and segments, layers that see both ways, heads for tasks."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.core.axes import constrain
from jaxllm.core.errors import ConfigError
from jaxllm.core.shapes import Array, Bool, Float, Int, Key
from jaxllm.models.config import OF_ROWS, EncoderConfig, LayerNorm
from jaxllm.models.layers.attention import KV, Tokens
from jaxllm.models.layers.block import Layer, Watch
from jaxllm.models.layers.ffn import activate
from jaxllm.models.layers.init import Weight, std
from jaxllm.models.layers.linear import lookup, to_vocabulary
from jaxllm.models.layers.norm import Norm
from jaxllm.models.layers.param import constant, param
from jaxllm.models.layout import Places
from jaxllm.models.remat import Remat
from jaxllm.models.stack import Stack, row_tokens

Outputs = dict[str, Array]  # by kind of head


class Encoder(Stack):
    """See `EncoderConfig` and `Stack`. `embedded`: has an embedding of its own, else it is given one."""

    def __init__(
        self,
        cfg: EncoderConfig,
        *,
        rngs: nnx.Rngs,
        scan: bool = True,
        remat: Remat = "none",
        places: Places | None = None,
        embedded: bool = True,
    ):
        super().__init__(cfg, scan=scan, remat=remat)
        width = cfg.table_width
        row = lambda n: std(cfg, Weight("embedding", n, width))
        if embedded:
            self.add_embedding(rngs)
        self.add_positions(rngs, width)
        if cfg.segments:
            self.segments = param(rngs, row(cfg.segments), small=cfg.segments, embed=width)
        if cfg.tasks:
            self.tasks = param(rngs, row(cfg.tasks), small=cfg.tasks, embed=width)
        if cfg.query_stream:
            self.query = param(rngs, row(1), embed=width)
        if cfg.embedding_norm:
            self.embedding_norm = Norm(cfg.embedding_norm, embed=width)
        if cfg.table:
            self.projection = Projection(cfg, width, cfg.embed, rngs=rngs)
        self.add_layers(rngs, places)
        if cfg.convolution:
            self.convolution = Convolution(cfg, rngs=rngs)
        if cfg.pooler:
            self.pooler = Projection(cfg, cfg.embed, cfg.embed, rngs=rngs)
        for head in cfg.heads:
            setattr(self, head.kind, HEADS[head.kind](cfg, head, rngs=rngs))

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"],
        documents_BT: Int[Array, "B T"],
        *,
        segments_BT: Int[Array, "B T"] | None = None,
        tasks_BT: Int[Array, "B T"] | None = None,
        visible_BTT: Bool[Array, "B T T"] | None = None,
        targets_BP: Int[Array, "B P"] | None = None,
        key: Key[Array, ""] | None = None,
        watch: Watch | None = None,
    ) -> Outputs:
        """What each head says, float32, by its kind: `mlm` and `lm` [B, T, V], `rtd` [B, T], `tokens` [B, T, labels],
        `qa` [B, T, 2] (start, end), `classification` [B, labels], `nsp` and `sop` [B, 2].

        Heads of rows judge one token of each row (`pooled`). Arguments as `Decoder` has them; segments and tasks are 0
        where they are not given.

        Args:
          visible_BTT: which keys (last axis) each token may see, of those that the mask lets it see; it sees itself.
          targets_BP: places that the query stream predicts, each from what its token sees but that token itself. Heads
            then look at them alone, P in place of T.

        Raises:
          ConfigError: targets for a model without a query stream; rows longer than its learned positions.
        """
        told = {"segments_BT": segments_BT, "tasks_BT": tasks_BT, "key": key, "watch": watch}
        told |= {"visible_BTT": visible_BTT, "targets_BP": targets_BP}
        return self.judge(*self.states(tokens_BT, positions_BT, documents_BT, **told))

    def hidden(self, tokens_BT: Array, positions_BT: Array, documents_BT: Array, **told: Any) -> Float[Array, "B _ D"]:
        """What the last layer says of each token or target; arguments as `__call__` has them."""
        return self.states(tokens_BT, positions_BT, documents_BT, **told)[0]

    def states(
        self,
        tokens_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"],
        documents_BT: Int[Array, "B T"],
        *,
        segments_BT: Int[Array, "B T"] | None = None,
        tasks_BT: Int[Array, "B T"] | None = None,
        visible_BTT: Bool[Array, "B T T"] | None = None,
        targets_BP: Int[Array, "B P"] | None = None,
        key: Key[Array, ""] | None = None,
        table_VD: Float[Array, "V D"] | None = None,
        watch: Watch | None = None,
    ) -> tuple[Float[Array, "B _ D"], Float[Array, "B T D"] | None]:
        """What the last layer says of each token or target, and what it does when the MLM head asks it by place."""
        T = tokens_BT.shape[1]
        self.check_length(T)
        row = row_tokens(self.placed(positions_BT, key), documents_BT)._replace(segment=segments_BT)
        if visible_BTT is not None:
            row = row._replace(seen=visible_BTT | jnp.eye(T, dtype=bool))
        x_BTE, tokens, see = lookup(self.table(table_VD), tokens_BT), row, None
        if targets_BP is not None:
            x_BTE, tokens, tasks_BT = self.with_targets(x_BTE, row, tasks_BT, targets_BP)
            see = lambda _, kv: (KV(*(x[:, :T] for x in kv)), row)
        x_BTD, asked_BTD = self.enter(x_BTE, tokens, tasks_BT, key), None
        x_BTD, _ = self.layers(x_BTD, tokens, key, watch=watch, see=see, last=not self.cfg.enhanced)
        if self.cfg.enhanced:
            x_BTD, asked_BTD = self.last_again(x_BTD, tokens, key)
            asked_BTD = self.final(asked_BTD)
        return self.final(x_BTD if targets_BP is None else x_BTD[:, T:]), asked_BTD

    def last_again(
        self, x_BTD: Float[Array, "B T D"], tokens: Tokens, key: Key[Array, ""] | None
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
        """The last layer of its input; and computed again and again, asked first by that input and absolute places.

        What asks is a query and goes on in the residual stream; keys and values are those of the input, always (He et
        al. 2020, arXiv:2006.03654, section 3.2; that places are added to the input is of the published code).
        """
        L, context, block = self.cfg.num_layers, self.context(tokens), self.tail[-1]
        kv = block.keys_values(x_BTD, context.rotations)

        def again(i: int, q_BTD: Array) -> Array:
            number = jnp.int32(L - 1 + i)  # draws other numbers for dropout each time
            return self.group((block,), q_BTD, context, number, key, lambda _, own: (kv, tokens), scanned=False)[0]

        asked_BTD = x_BTD + lookup(self.mlm.positions[...], tokens.position, "position")
        for i in range(self.cfg.enhanced):
            asked_BTD = again(1 + i, asked_BTD)
        return again(0, x_BTD), asked_BTD

    def with_targets(
        self,
        x_BTE: Float[Array, "B T E"],
        row: Tokens,
        tasks_BT: Int[Array, "B T"] | None,
        targets_BP: Int[Array, "B P"],
    ) -> tuple[Float[Array, "B _ E"], Tokens, Int[Array, "B _"] | None]:
        """A row with its query stream behind it: rows of the table, where they stand, their tasks.

        Both streams go through the same layers and look at keys and values of the row (Yang et al. 2019,
        arXiv:1906.08237, section 2.3).
        """
        if not self.cfg.query_stream:
            raise ConfigError("targets_BP is for encoders with a query stream; set query_stream=true")
        B, T, E = x_BTE.shape
        also = lambda x_BT: jnp.concatenate([x_BT, jnp.take_along_axis(x_BT, targets_BP, axis=1)], axis=1)
        told = (jnp.broadcast_to(row.index, (B, T)), row.position, row.document, row.segment, tasks_BT)
        index, position, document, segment, tasks = jax.tree.map(also, told)
        seen_BTT = jnp.ones((B, T, T), bool) if row.seen is None else row.seen
        others_BPT = jnp.take_along_axis(seen_BTT & ~jnp.eye(T, dtype=bool), targets_BP[..., None], axis=1)
        tokens = Tokens(
            index, position, document, row.prefix, segment=segment, seen=jnp.concatenate([seen_BTT, others_BPT], axis=1)
        )
        query_BPE = jnp.broadcast_to(self.query[...].astype(x_BTE.dtype), (*targets_BP.shape, E))
        return jnp.concatenate([x_BTE, query_BPE], axis=1), tokens, tasks

    def enter(
        self,
        x_BTE: Float[Array, "B T E"],
        tokens: Tokens,
        tasks_BT: Int[Array, "B T"] | None,
        key: Key[Array, ""] | None,
    ) -> Float[Array, "B T D"]:
        """What the first layer is given, of rows of the table."""
        cfg = self.cfg
        x_BTD = self.add_place(x_BTE, tokens.position)
        for name, ids_BT in (("segments", tokens.segment), ("tasks", tasks_BT)):
            if getattr(cfg, name):
                ids_BT = jnp.zeros_like(tokens.position) if ids_BT is None else ids_BT
                x_BTD = x_BTD + lookup(getattr(self, name)[...], ids_BT, "small")
        x_BTD = self.settle(x_BTD, key)
        if cfg.table:
            x_BTD = self.projection(x_BTD)
        return constrain(x_BTD, "batch", "norm_seq", "embed")

    def group(self, blocks, x_BTD, context, first, key=None, see=None, **told):
        before_BTD, kvs = x_BTD, ()
        for i in range(self.cfg.repeat):
            again = None if key is None else jax.random.fold_in(key, i)
            x_BTD, kvs = super().group(blocks, x_BTD, context, first, again, see, **told)
        if self.cfg.convolution:
            beside = lambda x_BTD: self.convolution(x_BTD, before_BTD, context)
            x_BTD = jax.lax.cond(first == 0, beside, lambda x_BTD: x_BTD, x_BTD)
        return x_BTD, kvs

    def judge(self, x_BTD: Float[Array, "B T D"], asked_BTD: Float[Array, "B T D"] | None = None) -> Outputs:
        """What the heads say of hidden states; the MLM head, of those that `states` has for it."""
        one_BD = x_BTD[:, 0 if self.cfg.pooled == "first" else -1]
        if self.cfg.pooler:
            one_BD = activate(self.cfg.pooler, self.pooler(one_BD))
        if self.cfg.enhanced and asked_BTD is None:
            raise ConfigError("mlm.enhanced: give both results of `states`")
        views = dict.fromkeys(OF_ROWS, one_BD) | ({} if asked_BTD is None else {"mlm": asked_BTD})
        return {head.kind: getattr(self, head.kind)(views.get(head.kind, x_BTD), self) for head in self.cfg.heads}


class Projection(nnx.Module):
    """x W + b."""

    def __init__(self, cfg: EncoderConfig, width: int, out: int, *, rngs: nnx.Rngs):
        self.w = param(rngs, std(cfg, Weight("hidden", width, out)), table=width, embed=out)
        self.b = constant(0.0, embed=out)

    def __call__(self, x: Float[Array, "... E"]) -> Float[Array, "... D"]:
        return jnp.einsum("...E,ED->...D", x, self.w[...]) + self.b[...]


class Scores(nnx.Module):
    """x W + b in float32, `labels` a row or token."""

    def __init__(self, cfg: EncoderConfig, labels: int, *, rngs: nnx.Rngs):
        self.w = param(rngs, std(cfg, Weight("hidden", cfg.embed, labels)), embed=cfg.embed, small=labels)
        self.b = constant(0.0, small=labels)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... N"]:
        return jnp.einsum("...D,DN->...N", x, self.w[...], preferred_element_type=jnp.float32) + self.b[...]


class _Labels(Scores):
    """A head that is scores alone."""

    def __init__(self, cfg: EncoderConfig, head, *, rngs: nnx.Rngs):
        super().__init__(cfg, getattr(head, "labels", 2), rngs=rngs)

    def __call__(self, x: Float[Array, "... D"], encoder: Encoder) -> Float[Array, "... N"]:
        return super().__call__(x)


class Mlm(nnx.Module):
    def __init__(self, cfg: EncoderConfig, head, *, rngs: nnx.Rngs):
        self.cfg = head
        width = cfg.table_width
        self.projection = Projection(cfg, cfg.embed, width, rngs=rngs)
        self.norm = Norm(_layer_norm(cfg), embed=width)
        if not head.tie:
            self.w = param(rngs, std(cfg, Weight("head", width, cfg.vocab)), embed=width, vocab=cfg.vocab)
        self.b = constant(0.0, vocab=cfg.vocab)
        if head.enhanced:
            deviation = std(cfg, Weight("embedding", cfg.context, cfg.embed))
            self.positions = param(rngs, deviation, position=cfg.context, embed=cfg.embed)

    def __call__(self, x_BTD: Float[Array, "B T D"], encoder: Encoder) -> Float[Array, "B T V"]:
        h_BTE = self.norm(activate(self.cfg.activation, self.projection(x_BTD)))
        w = encoder.embedding[...] if self.cfg.tie else self.w[...]
        return to_vocabulary(h_BTE, w, tied=self.cfg.tie) + self.b[...]


class Lm(nnx.Module):
    def __init__(self, cfg: EncoderConfig, head, *, rngs: nnx.Rngs):
        self.b = constant(0.0, vocab=cfg.vocab)

    def __call__(self, x_BTD: Float[Array, "B T D"], encoder: Encoder) -> Float[Array, "B T V"]:
        return to_vocabulary(x_BTD, encoder.embedding[...], tied=True) + self.b[...]


class ReplacedToken(nnx.Module):
    def __init__(self, cfg: EncoderConfig, head, *, rngs: nnx.Rngs):
        self.cfg = head
        self.projection = Projection(cfg, cfg.embed, cfg.embed, rngs=rngs)
        self.scores = Scores(cfg, 1, rngs=rngs)

    def __call__(self, x_BTD: Float[Array, "B T D"], encoder: Encoder) -> Float[Array, "B T"]:
        return self.scores(activate(self.cfg.activation, self.projection(x_BTD)))[..., 0]


class Convolution(nnx.Module):
    """norm(x + act(conv(before))): what stands beside the first layer (DeBERTa v2)."""

    def __init__(self, cfg: EncoderConfig, *, rngs: nnx.Rngs):
        self.cfg, D = cfg.convolution, cfg.embed
        inputs = D // self.cfg.groups
        scale = std(cfg, Weight("hidden", self.cfg.width * inputs, D))
        self.w = param(rngs, scale, small=self.cfg.width, table=inputs, embed=D)
        self.b = constant(0.0, embed=D)
        self.norm = Norm(_layer_norm(cfg), embed=D)

    def __call__(
        self, x_BTD: Float[Array, "B T D"], before_BTD: Float[Array, "B T D"], layer: Layer
    ) -> Float[Array, "B T D"]:
        """Tokens of other documents and padding count as zeros."""
        W = self.cfg.width
        document_BT = jnp.broadcast_to(layer.tokens.document, before_BTD.shape[:2])
        y_BTD = self.b[...]
        for i in range(W):
            ahead = i - W // 2
            near_BTD, near_BT = (jnp.roll(a, -ahead, axis=1) for a in (before_BTD, document_BT))
            place_T = jnp.arange(document_BT.shape[1]) + ahead
            inside_T = (place_T >= 0) & (place_T < document_BT.shape[1])
            seen_BT1 = (inside_T & (near_BT == document_BT))[..., None]
            y_BTD = y_BTD + self._product(jnp.where(seen_BT1, near_BTD, 0), self.w[...][i])
        return self.norm(x_BTD + activate(self.cfg.activation, y_BTD))

    def _product(self, x_BTD: Array, w_ED: Array) -> Array:
        G, (B, T, D) = self.cfg.groups, x_BTD.shape
        w_GED = jnp.moveaxis(w_ED.reshape(D // G, G, D // G), 1, 0)
        return jnp.einsum("BTGE,GED->BTGD", x_BTD.reshape(B, T, G, D // G), w_GED).reshape(B, T, D)


def _layer_norm(cfg: EncoderConfig) -> LayerNorm:
    """The layer norm of heads, with the epsilon of the layers."""
    return LayerNorm(epsilon=cfg.block.norm.epsilon)


HEADS = {
    "mlm": Mlm, "lm": Lm, "classification": _Labels, "nsp": _Labels, "sop": _Labels, "rtd": ReplacedToken,
    "tokens": _Labels, "qa": _Labels,
}  # fmt: skip
