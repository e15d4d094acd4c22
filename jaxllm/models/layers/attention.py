"""Attention: projections, rotation, masks, and the softmax of whatever no kernel takes."""

import dataclasses
import functools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxllm.core.axes import Placement, constrain, on_shares, placement
from jaxllm.core.shapes import Array, Bool, Float, Int, Key
from jaxllm.models import config
from jaxllm.models.config import Block, Stack
from jaxllm.models.layers import relative
from jaxllm.models.layers.init import Weight, gain, std
from jaxllm.models.layers.linear import linear
from jaxllm.models.layers.norm import Norm
from jaxllm.models.layers.param import constant, param
from jaxllm.models.layers.position import Rotation, alibi_slopes, rotate, rotation
from jaxllm.models.masks import Coords
from jaxllm.models.positions import ALiBi, NoPosition
from jaxllm.models.remat import recomputed
from pallas_kernels.attention import api, masks, splash

ROWS = ("batch", "seq")  # logical axes of the tokens of a batch


class Tokens(NamedTuple):
    """Where the tokens of one side stand; arrays [B, T] (or broadcastable to it)."""

    index: Int[Array, "#B T"]  # place in the row
    position: Int[Array, "#B T"]  # place in its document
    document: Int[Array, "#B T"]  # 0 is padding
    prefix: Bool[Array, "#B T"]  # belongs to a bidirectional prefix
    two: tuple[Int[Array, "#B T"], Int[Array, "#B T"]] | None = None  # places in the prompt and after it (`rope_2d`)
    segment: Int[Array, "#B T"] | None = None  # part of the text, where distance is told of parts, too
    seen: Bool[Array, "B T S"] | None = None  # of queries: the keys that each may see, itself or not; None: all

    def queries(self) -> Coords:
        return Coords(self.index[:, :, None], self.document[:, :, None], self.prefix[:, :, None])

    def keys(self) -> Coords:
        return Coords(self.index[:, None, :], self.document[:, None, :], self.prefix[:, None, :])


class KV(NamedTuple):
    """Keys and values of one layer, keys already rotated, unless by angles that the length of a document changes."""

    k_BSKH: Float[Array, "B S K H"]
    v_BSKH: Float[Array, "B S K H"]


class Cached(NamedTuple):
    """Keys and values of one layer as a cache holds them: heads before tokens, the order in which products read them."""

    k_BKSH: Float[Array, "*G B K S H"]
    v_BKSH: Float[Array, "*G B K S H"]

    def seen(self) -> KV:
        """What attention is given."""
        return KV(*(x.swapaxes(-3, -2) for x in self))


class Attention(nnx.Module):
    """Multi-head, grouped-query or multi-query attention (sources stand with its config)."""

    def __init__(self, cfg: Stack, block: Block, *, rngs: nnx.Rngs, cross: bool = False):
        a = block.attention
        D, N, K, H = cfg.embed, a.num_heads, a.kv_heads, cfg.head_dim(a)
        g = gain(cfg, block)
        self.cfg, self.position = a, NoPosition() if cross else cfg.position_of(a)
        self.scale = a.scale or H**-0.5
        self.mixing = Mixing(a, self.scale, self.position if self.position.kind == "alibi" else None, cross)
        rope = self.position, cfg.rotary_dim(a)
        self.rope = None if cross or rope not in cfg.ropes else cfg.ropes.index(rope)
        self.turns_late = self.rope is not None and self.position.by_length  # of keys
        self.w_q = param(rngs, std(cfg, Weight("hidden", D, N * H)), embed=D, heads=N, head_dim=H)
        self.w_k = param(rngs, std(cfg, Weight("hidden", D, K * H)), embed=D, kv_heads=K, head_dim=H)
        self.w_v = param(rngs, g * std(cfg, Weight("hidden", D, K * H)), embed=D, kv_heads=K, head_dim=H)
        self.w_o = param(rngs, g * std(cfg, Weight("residual", N * H, D)), heads=N, head_dim=H, embed=D)
        if a.bias:
            self.b_q = constant(0.0, heads=N, head_dim=H)
            self.b_v = constant(0.0, kv_heads=K, head_dim=H)
            if a.key_bias:
                self.b_k = constant(0.0, kv_heads=K, head_dim=H)
        if a.out_bias:
            self.b_o = constant(0.0, embed=D)
        if a.qk_norm and a.qk_norm_over == "heads":
            self.q_norm = Norm(a.qk_norm, heads=N, head_dim=H)
            self.k_norm = Norm(a.qk_norm, kv_heads=K, head_dim=H)
        elif a.qk_norm:
            self.q_norm = Norm(a.qk_norm, head_dim=H)
            self.k_norm = Norm(a.qk_norm, head_dim=H)
        if block.placement.kind == "subln":
            self.inner_norm = Norm(block.norm, heads=N, head_dim=H)
        self.relative = None if cross else relative.make(cfg, N, H, rngs=rngs, layered=True)

    def fuse(self) -> None:
        """Makes one weight of those of queries, keys and values: to compute one token, three small products are slow."""
        apart = self.w_q, self.w_k, self.w_v
        self.w_qkv = nnx.Param(jnp.concatenate([w[...].reshape(w.shape[0], -1) for w in apart], axis=1))
        del self.w_q, self.w_k, self.w_v

    def projected(self, x_BTD: Float[Array, "B T D"], name: Literal["q", "k", "v"]) -> Float[Array, "B T N H"]:
        """What the weight of that name makes of `x_BTD`."""
        heads, K, (N, H) = "heads" if name == "q" else "kv_heads", self.cfg.kv_heads, self.w_o.shape[:2]
        x_axes, w_axes = (*ROWS, "embed"), ("embed", heads, "head_dim")
        if not hasattr(self, "w_qkv"):
            w = getattr(self, f"w_{name}")[...]
            return linear("BTD,DNH->BTNH", x_BTD, w, x_axes, w_axes, (*ROWS, *w_axes[1:]))
        # Of three that are the same XLA computes one.
        y_BTF = linear("BTD,DF->BTF", x_BTD, self.w_qkv[...], x_axes, w_axes[:2], (*ROWS, heads))
        first, count = {"q": (0, N), "k": (N, K), "v": (N + K, K)}[name]
        return y_BTF.reshape(*y_BTF.shape[:2], N + 2 * K, H)[:, :, first : first + count]

    def queries(self, x_BTD: Float[Array, "B T D"], rotations: tuple[Rotation, ...]) -> Float[Array, "B T N H"]:
        """Queries of `x_BTD`, normed and rotated; `rotations` are those of `Stack.ropes`."""
        q_BTNH = self.projected(x_BTD, "q")
        q_BTNH = self._cut(q_BTNH + self.b_q[...] if self.cfg.bias else q_BTNH)
        if self.cfg.qk_norm:
            q_BTNH = self.q_norm(q_BTNH)
        if self.rope is not None:
            q_BTNH = rotate(self.position, q_BTNH, rotations[self.rope])
        return checkpoint_name(constrain(q_BTNH, *ROWS, "heads", "head_dim"), "q")

    def keys_values(self, x_BTD: Float[Array, "B T D"], rotations: tuple[Rotation, ...]) -> KV:
        """Keys, normed and rotated, and values of `x_BTD`."""
        k_BTKH, v_BTKH = self.projected(x_BTD, "k"), self.projected(x_BTD, "v")
        if self.cfg.bias:
            k_BTKH = k_BTKH + self.b_k[...] if self.cfg.key_bias else k_BTKH
            v_BTKH = v_BTKH + self.b_v[...]
        k_BTKH, v_BTKH = self._cut(k_BTKH), self._cut(v_BTKH)
        if self.cfg.qk_norm:
            k_BTKH = self.k_norm(k_BTKH)
        if self.rope is not None and not self.turns_late:
            k_BTKH = rotate(self.position, k_BTKH, rotations[self.rope], keys=True)
        k_BTKH = checkpoint_name(constrain(k_BTKH, *ROWS, "kv_heads", "head_dim"), "k")
        v_BTKH = checkpoint_name(constrain(v_BTKH, *ROWS, "kv_heads", "head_dim"), "v")
        return KV(k_BTKH, v_BTKH)

    def _cut(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        return jnp.clip(x, -self.cfg.clip, self.cfg.clip) if self.cfg.clip else x

    def turned(self, kv: KV, k: Tokens, rotations: tuple[Rotation, ...], length_BT: Int[Array, "B 1"] | None) -> KV:
        """The keys rotated by the angles of a document as long as it is now.

        Args:
          rotations: of the queries, whose tokens the keys are of, too, unless `length_BT` says how long documents are.
        """
        rotation_ = rotations[self.rope]
        if length_BT is not None:
            size = 2 * rotation_.sin_BTR.shape[-1]
            position_BS = jnp.broadcast_to(k.position, kv.k_BSKH.shape[:2])
            rotation_ = rotation(self.position, position_BS, jnp.broadcast_to(length_BT, position_BS.shape), size)
        return kv._replace(k_BSKH=rotate(self.position, kv.k_BSKH, rotation_, keys=True))

    def mix(
        self,
        q_BTNH: Float[Array, "B T N H"],
        kv: KV,
        q: Tokens,
        k: Tokens,
        dropout: float = 0.0,
        key: Key[Array, ""] | None = None,
        whole: relative.Module | None = None,
    ) -> Float[Array, "B T D"]:
        """What the queries gather from the keys' values, projected back to the residual stream.

        Args:
          whole: what distance adds to logits, as far as all layers share it.
        """
        if self.cfg.log_scale:
            nth_BT = jnp.maximum(q.position + 1, self.cfg.log_scale).astype(jnp.float32)
            grown_BT11 = (jnp.log(nth_BT) / math.log(self.cfg.log_scale))[..., None, None]
            q_BTNH = (q_BTNH * grown_BT11).astype(q_BTNH.dtype)
        by_distance = self.relative or whole
        if by_distance is not None:
            bias_BNTS = by_distance(self, q_BTNH, kv.k_BSKH, q, k, whole)
            values_BTSH = by_distance.values(q, k)
            o_BTNH = self.mixing.biased(q_BTNH, kv, q, k, bias_BNTS, values_BTSH, dropout, key)
        elif q.seen is not None:
            o_BTNH = self.mixing.biased(q_BTNH, kv, q, k, None, None, dropout, key)
        else:
            o_BTNH = self.mixing.over_mesh(q_BTNH, kv, q, k, dropout, key)
        o_BTNH = constrain(o_BTNH, *ROWS, "heads", "head_dim")
        if hasattr(self, "inner_norm"):
            o_BTNH = self.inner_norm(o_BTNH)
        o_axes = ("heads", "head_dim", "embed")
        y_BTD = linear("BTNH,NHD->BTD", o_BTNH, self.w_o[...], (*ROWS, "heads", "head_dim"), o_axes, (*ROWS, "embed"))
        return y_BTD + self.b_o[...] if self.cfg.out_bias else y_BTD


@dataclasses.dataclass(frozen=True)
class Mixing:
    """Attention without weights: what the queries of one layer gather from keys and values.

    Its functions know nothing of a mesh, so that every device can run them on its own share of rows, heads and,
    block by block, of a row. `slopes_N` are ALiBi's, of the heads at hand; without ALiBi they are not looked at.
    """

    cfg: config.Attention
    scale: float
    alibi: ALiBi | None
    cross: bool = False  # the keys are of other tokens than the queries

    @property
    def causal(self) -> bool:
        """Whether no token sees one that stands after it in the row."""
        return self.cfg.mask.causal

    def slopes(self) -> Float[Array, " N"]:
        N = self.cfg.num_heads
        return alibi_slopes(self.alibi, N) if self.alibi else jnp.zeros(N, jnp.float32)

    def over_mesh(
        self, q_BTNH: Array, kv: KV, q: Tokens, k: Tokens, dropout: float = 0.0, key: Key[Array, ""] | None = None
    ) -> Float[Array, "B T N H"]:
        """`whole` as the run in force lays it out, with what the backward pass needs of it named for `remat`."""
        place = placement()
        if place is not None and place.spread is not None:
            return place.spread(self, q_BTNH, kv.k_BSKH, kv.v_BSKH, q, k)
        return self.over_rows(q_BTNH, kv.k_BSKH, kv.v_BSKH, q, k, dropout, key)

    def over_rows(
        self, q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, q: Tokens, k: Tokens, dropout: float = 0.0,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "B T N H"]:  # fmt: skip
        """`whole` of rows that no two devices share: by a kernel, or left to XLA."""
        place = placement()
        if not (dropout and key is not None) and self.kernel_applies(place, q_BTNH, k_BSKH):
            heads, kv_heads = (*ROWS, "heads", "head_dim"), (*ROWS, "kv_heads", "head_dim")
            run = on_shares(functools.partial(self.kernel, place.chip), (heads, kv_heads, kv_heads, ROWS), heads)
            return run(q_BTNH, k_BSKH, v_BSKH, jnp.broadcast_to(q.document, q_BTNH.shape[:2]))
        return checkpoint_name(self.whole(q_BTNH, k_BSKH, v_BSKH, q, k, self.slopes(), dropout, key), "attention")

    def whole(
        self,
        q_BTNH: Float[Array, "B T N H"],
        k_BSKH: Float[Array, "B S K H"],
        v_BSKH: Float[Array, "B S K H"],
        q: Tokens,
        k: Tokens,
        slopes_N: Float[Array, " N"],
        dropout: float = 0.0,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "B T N H"]:
        """softmax over all keys that there are."""
        return attend(
            q_BTNH, k_BSKH, v_BSKH, self.visible(q, k), scale=self.scale, bias=self.bias(q, k, slopes_N),
            softcap=self.cfg.softcap, dropout=dropout, key=key,
        )  # fmt: skip

    def biased(
        self, q_BTNH: Array, kv: KV, q: Tokens, k: Tokens, bias_BNTS: Float[Array, "#B N T S"] | None,
        values_BTSH: Float[Array, "#B T S H"] | None, dropout: float = 0.0, key: Key[Array, ""] | None = None,
    ) -> Float[Array, "B T N H"]:  # fmt: skip
        """`whole` with what distance adds to the logits and, for each pair, to the value."""
        if self.alibi:
            bias_BNTS = self.bias(q, k, self.slopes()) + (0 if bias_BNTS is None else bias_BNTS)
        visible_BTS = self.visible(q, k)
        o_BTNH = attend(
            q_BTNH, kv.k_BSKH, kv.v_BSKH, visible_BTS, scale=self.scale, bias=bias_BNTS, softcap=self.cfg.softcap,
            dropout=dropout, key=key, values_BTSH=values_BTSH,
        )  # fmt: skip
        if q.seen is not None:  # what sees nothing gathers nothing, where its softmax is the mean of all
            o_BTNH = jnp.where(visible_BTS.any(-1)[..., None, None], o_BTNH, 0)
        return checkpoint_name(o_BTNH, "attention")

    def partial(
        self,
        q_BTNH: Float[Array, "B T N H"],
        k_BSKH: Float[Array, "B S K H"],
        v_BSKH: Float[Array, "B S K H"],
        q: Tokens,
        k: Tokens,
        slopes_N: Float[Array, " N"],
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
        """softmax over these keys alone, and the log of its denominator, in float32: 0 and -inf where none is seen.

        With both the softmax over more keys can be put together (Milakov & Gimelshein 2018, arXiv:1805.02867).
        """
        logits_BKGTS = self.logits(q_BTNH, k_BSKH, q, k, slopes_N)
        top_BKGT1 = logits_BKGTS.max(-1, keepdims=True)
        weights_BKGTS = jnp.where(logits_BKGTS > HIDDEN, jnp.exp(logits_BKGTS - top_BKGT1), 0)
        total_BKGT1 = weights_BKGTS.sum(-1, keepdims=True)
        o_BKGTH = gathered(weights_BKGTS, v_BSKH) / jnp.maximum(total_BKGT1, jnp.finfo(jnp.float32).tiny)
        return by_token(o_BKGTH), by_token(top_BKGT1 + jnp.log(total_BKGT1))[..., 0]

    def weighted(
        self,
        q_BTNH: Float[Array, "B T N H"],
        k_BSKH: Float[Array, "B S K H"],
        v_BSKH: Float[Array, "B S K H"],
        q: Tokens,
        k: Tokens,
        slopes_N: Float[Array, " N"],
        log_z_BTN: Float[Array, "B T N"],
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
        """These keys' part of a softmax over more of them, whose denominators are known: p v and the sum of p."""
        logits_BKGTS = self.logits(q_BTNH, k_BSKH, q, k, slopes_N)
        log_z_BKGT = log_z_BTN.swapaxes(1, 2).reshape(logits_BKGTS.shape[:-1])
        weights_BKGTS = jnp.exp(logits_BKGTS - log_z_BKGT[..., None])
        total_BKGT1 = weights_BKGTS.sum(-1, keepdims=True)
        return by_token(gathered(weights_BKGTS, v_BSKH)), by_token(total_BKGT1)[..., 0]

    def logits(
        self, q_BTNH: Array, k_BSKH: Array, q: Tokens, k: Tokens, slopes_N: Float[Array, " N"]
    ) -> Float[Array, "B K G T S"]:
        return masked(
            products(q_BTNH, k_BSKH, self.scale), self.visible(q, k), self.bias(q, k, slopes_N), self.cfg.softcap
        )

    def visible(self, q: Tokens, k: Tokens) -> Bool[Array, "B T S"]:
        """Who sees whom: the mask, within the window, within the document; and every token sees itself.

        Where queries say which keys they may see, a token sees itself only if it is one of those.
        """
        queries, keys = q.queries(), k.keys()
        seen = self.cfg.mask.visible(queries, keys) & (queries.document == keys.document)
        if self.cfg.window:
            seen = seen & (queries.index - keys.index < self.cfg.window)
        if q.seen is not None:
            return seen & q.seen
        # A softmax over nothing would be an average over everything, other documents included.
        return seen | (queries.index == keys.index)

    def bias(self, q: Tokens, k: Tokens, slopes_N: Float[Array, " N"]) -> Float[Array, "#B N #T S"] | None:
        """ALiBi: -slope * distance; rounded, slope * place of the key, which is the same but for the rounding."""
        if not self.alibi:
            return None
        if self.alibi.rounded:
            low = jnp.bfloat16
            bias_BNS = slopes_N.astype(low)[None, :, None] * k.position.astype(low)[:, None]
            return self.alibi.scale * bias_BNS.astype(jnp.float32)[:, :, None]
        distance_BTS = jnp.abs(q.position[:, :, None] - k.position[:, None, :]).astype(jnp.float32)
        return -self.alibi.scale * slopes_N[None, :, None, None] * distance_BTS[:, None]

    def kernel_applies(self, place: Placement | None, q_BTNH: Array, k_BSKH: Array) -> bool:
        """Whether a flash kernel takes this layer, here: a TPU's or Hopper's, in training (as many queries as keys)."""
        return (
            place is not None and self.alibi is None and not self.cross and q_BTNH.shape[1] == k_BSKH.shape[1]
            and self.cfg.mask.kind in ("causal", "full")
            and (splash.applies(q_BTNH, k_BSKH) if place.platform == "tpu" else api.applies(place.chip, q_BTNH, k_BSKH))
        )  # fmt: skip

    def kernel(
        self, chip: str, q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, document_BT: Int[Array, "B T"]
    ) -> Float[Array, "B T N H"]:
        """`whole` of one row of documents with itself, without a [T, S] array, on a chip of this kind."""
        how = dict(scale=self.scale, softcap=self.cfg.softcap, name="attention")
        if api.CHIPS["gpu"].has(chip):
            mask = self.algebra(document_BT)
            return api.attention(q_BTNH, k_BSKH, v_BSKH, mask=mask, implementation="gpu", chip=chip, **how)
        return splash.attention(
            q_BTNH, k_BSKH, v_BSKH, document_BT, causal=self.causal, window=self.cfg.window, **how
        )  # fmt: skip

    def algebra(self, document_BT: Int[Array, "B T"]) -> masks.Mask:
        """`visible` of a row with itself, causal or full, in the terms of kernels."""
        near = masks.Window(self.cfg.window and self.cfg.window - 1, 0 if self.causal else None)
        return near & masks.Documents(document_BT, document_BT)


def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    visible_BTS: Bool[Array, "#B T S"],
    *,
    scale: float,
    bias: Float[Array, "#B N #T S"] | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    key: Key[Array, ""] | None = None,
    values_BTSH: Float[Array, "#B T S H"] | None = None,
) -> Float[Array, "B T N H"]:
    """softmax(q k^T * scale + bias) (v + values) over the visible keys, logits and softmax in float32.

    Vaswani et al. 2017, arXiv:1706.03762, equation 1; grouped heads: Ainslie et al. 2023, arXiv:2305.13245.
    """
    logits_BKGTS = products(q_BTNH, k_BSKH, scale)

    def mix(logits_BKGTS: Array, v_BSKH: Array) -> Array:
        logits_BKGTS = masked(logits_BKGTS, visible_BTS, bias, softcap)
        # softmax(x) v = (exp(x - max) v) / sum(exp(x - max))
        weights_BKGTS = jnp.exp(logits_BKGTS - jax.lax.stop_gradient(logits_BKGTS.max(-1, keepdims=True)))
        total_BKGT1 = weights_BKGTS.sum(-1, keepdims=True)
        if dropout and key is not None:
            keep = jax.random.bernoulli(key, 1 - dropout, weights_BKGTS.shape)
            weights_BKGTS = jnp.where(keep, weights_BKGTS / (1 - dropout), 0)
        o_BKGTH = gathered(weights_BKGTS, v_BSKH)
        if values_BTSH is not None:
            o_BKGTH += jnp.einsum("BKGTS,BTSH->BKGTH", weights_BKGTS, jnp.broadcast_to(
                values_BTSH.astype(jnp.float32), (weights_BKGTS.shape[0], *values_BTSH.shape[1:])
            ))  # fmt: skip
        return (o_BKGTH / total_BKGT1).astype(v_BSKH.dtype)

    # Of the [T, S] arrays only the logits are kept for the backward pass.
    return by_token(recomputed(mix)(logits_BKGTS, v_BSKH))


HIDDEN = float(jnp.finfo(jnp.float32).min)  # logit of what is not visible


def products(
    q_BTNH: Float[Array, "B T N H"], k_BSKH: Float[Array, "B S K H"], scale: float
) -> Float[Array, "B K G T S"]:
    """q k^T * scale in float32, query heads in the groups that share a key head."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    # Heads before tokens, where the CPU's matrix products are twice as fast; TPU and GPU lay it out as they like.
    q_BKGTH = (q_BTNH * jnp.asarray(scale, q_BTNH.dtype)).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    return jnp.einsum("BKGTH,BKSH->BKGTS", q_BKGTH, k_BSKH.swapaxes(1, 2), preferred_element_type=jnp.float32)


def masked(
    logits_BKGTS: Float[Array, "B K G T S"],
    visible_BTS: Bool[Array, "#B T S"],
    bias_BNTS: Float[Array, "#B N #T S"] | None,
    softcap: float | None,
) -> Float[Array, "B K G T S"]:
    if softcap is not None:
        logits_BKGTS = softcap * jnp.tanh(logits_BKGTS / softcap)
    if bias_BNTS is not None:
        B, _, T, S = bias_BNTS.shape
        logits_BKGTS += bias_BNTS.reshape(B, *logits_BKGTS.shape[1:3], T, S)
    return jnp.where(visible_BTS[:, None, None], logits_BKGTS, HIDDEN)


def gathered(weights_BKGTS: Float[Array, "B K G T S"], v_BSKH: Float[Array, "B S K H"]) -> Float[Array, "B K G T H"]:
    """Weighted sums of values, in float32."""
    return jnp.einsum(
        "BKGTS,BKSH->BKGTH", weights_BKGTS.astype(v_BSKH.dtype), v_BSKH.swapaxes(1, 2),
        preferred_element_type=jnp.float32,
    )  # fmt: skip


def by_token(x_BKGTH: Float[Array, "B K G T H"]) -> Float[Array, "B T N H"]:
    """Tokens before heads, the groups of heads flat."""
    B, K, G, T, H = x_BKGTH.shape
    return x_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, H)
