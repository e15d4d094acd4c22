"""What distance adds to the logits of attention, one module a kind of `Relative` (sources stand with its config).

Each answers, for queries and keys of one layer, an array that is added to the logits of all heads. A module belongs to
one layer, or to the whole stack where its config says `shared`.
"""

import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.core.shapes import Array, Float, Int
from jaxllm.models import positions as config
from jaxllm.models.config import LayerNorm, Stack
from jaxllm.models.layers.init import Weight, std
from jaxllm.models.layers.norm import Norm
from jaxllm.models.layers.param import constant, param
from jaxllm.models.layers.position import sinusoids

if TYPE_CHECKING:
    from jaxllm.models.layers.attention import Attention, Tokens

Bias = Float[Array, "#B N T S"]


def make(cfg: Stack, num_heads: int, head_dim: int, *, rngs: nnx.Rngs, layered: bool) -> "Module | None":
    """The module of a stack or, with `layered`, of one of its layers; None: there is none there."""
    relative = cfg.relative
    if relative is None:
        return None
    if relative.kind in ("xl", "disentangled"):  # of both, a part is shared and a part is not
        return (_LAYERED if layered else _SHARED)[relative.kind](cfg, num_heads, head_dim, rngs=rngs)
    return KINDS[relative.kind](cfg, num_heads, head_dim, rngs=rngs) if relative.shared != layered else None


class Module(nnx.Module):
    """Base of all; `values` is what else distance gives, to the values: [T, S, H] or None."""

    def __init__(self, cfg: Stack, num_heads: int, head_dim: int, *, rngs: nnx.Rngs):
        self.cfg, self.by_position = cfg.relative, cfg.random_positions is not None

    def distance(self, q: "Tokens", k: "Tokens") -> Int[Array, "#B T S"]:
        """Places from key to query: above 0, the key stands before it.

        Within a document, places in the row differ as those in the document do; the first are the same for all rows.
        """
        if self.by_position:
            return q.position[:, :, None] - k.position[:, None, :]
        return q.index[:, :, None] - k.index[:, None, :]

    def __call__(self, attention: "Attention", q_BTNH: Array, k_BSKH: Array, q: "Tokens", k: "Tokens", whole) -> Bias:
        """Args: `attention`, the layer's; `whole`, the module of the whole stack, where a part is shared."""
        raise NotImplementedError

    def values(self, q: "Tokens", k: "Tokens") -> Float[Array, "T S H"] | None:
        return None


class T5Buckets(Module):
    def __init__(self, cfg: Stack, num_heads: int, head_dim: int, *, rngs: nnx.Rngs):
        super().__init__(cfg, num_heads, head_dim, rngs=rngs)
        self.table = param(rngs, cfg.embed**-0.5, small=self.cfg.buckets, heads=num_heads)

    def __call__(self, attention, q_BTNH, k_BSKH, q, k, whole) -> Bias:
        bucket_BTS = t5_bucket(self.cfg, self.distance(q, k))
        return jnp.moveaxis(self.table[...].astype(jnp.float32)[bucket_BTS], -1, 1)


def t5_bucket(cfg: config.T5Buckets, distance: Int[Array, "..."]) -> Int[Array, "..."]:
    """The bucket of each distance."""
    buckets, first = cfg.buckets, 0
    if cfg.bidirectional:
        buckets //= 2
        first = jnp.where(distance < 0, buckets, 0)
        distance = jnp.abs(distance)
    distance = jnp.maximum(distance, 0)
    exact = buckets // 2
    far = jnp.log(jnp.maximum(distance, 1) / exact) / math.log(cfg.max_distance / exact) * (buckets - exact)
    far = jnp.minimum(exact + far.astype(jnp.int32), buckets - 1)
    return first + jnp.where(distance < exact, distance, far)


class Kerple(Module):
    def __init__(self, cfg: Stack, num_heads: int, head_dim: int, *, rngs: nnx.Rngs):
        super().__init__(cfg, num_heads, head_dim, rngs=rngs)
        self.a = constant(1.0, heads=num_heads)
        self.b = constant(1.0, heads=num_heads)

    def __call__(self, attention, q_BTNH, k_BSKH, q, k, whole) -> Bias:
        far_BNTS = jnp.abs(self.distance(q, k)).astype(jnp.float32)[:, None]
        a, b = (jnp.maximum(x[...], LEAST)[:, None, None] for x in (self.a, self.b))
        if self.cfg.form == "log":
            return -a * jnp.log1p(b * far_BNTS)
        # 0^b has no derivative in b that a float could hold
        return -a * jnp.where(far_BNTS > 0, jnp.maximum(far_BNTS, 1) ** jnp.minimum(b, 2), 0)


LEAST = 1e-2  # of what must stay above 0 (the published code of KERPLE)


class SandwichBias(Module):
    def __init__(self, cfg: Stack, num_heads: int, head_dim: int, *, rngs: nnx.Rngs):
        super().__init__(cfg, num_heads, head_dim, rngs=rngs)
        self.heads = num_heads

    def __call__(self, attention, q_BTNH, k_BSKH, q, k, whole) -> Bias:
        size = self.cfg.size
        freq_R = 10_000.0 ** (-2 * jnp.arange(1, size // 2 + 1) / size)
        near_BTS = jnp.cos(self.distance(q, k)[..., None] * freq_R).sum(-1) - size // 2
        scale_N = self.cfg.steepest * jnp.arange(1, self.heads + 1) / self.heads
        return scale_N[:, None, None] * near_BTS[:, None]


class Fire(Module):
    def __init__(self, cfg: Stack, num_heads: int, head_dim: int, *, rngs: nnx.Rngs):
        super().__init__(cfg, num_heads, head_dim, rngs=rngs)
        F = self.cfg.hidden
        self.c = constant(0.1, small=1)
        self.threshold = constant(self.cfg.threshold, small=1)
        self.w_in = param(rngs, 1.0, small=F)
        self.b_in = constant(0.0, small=F)
        self.w_out = param(rngs, F**-0.5, small=F, heads=num_heads)
        self.b_out = constant(0.0, heads=num_heads)

    def __call__(self, attention, q_BTNH, k_BSKH, q, k, whole) -> Bias:
        psi = lambda x: jnp.log1p(jnp.abs(self.c[...]) * x)
        far_BTS = jnp.abs(self.distance(q, k)).astype(jnp.float32)
        seen_BT1 = jnp.maximum(q.position.astype(jnp.float32), jnp.abs(self.threshold[...]))[..., None]
        x_BTS = psi(far_BTS) / psi(seen_BT1)
        h_BTSF = jax.nn.relu(x_BTS[..., None] * self.w_in[...] + self.b_in[...])
        return jnp.moveaxis(h_BTSF @ self.w_out[...] + self.b_out[...], -1, 1)


class Tisa(Module):
    def __init__(self, cfg: Stack, num_heads: int, head_dim: int, *, rngs: nnx.Rngs):
        super().__init__(cfg, num_heads, head_dim, rngs=rngs)
        sizes = {"small": self.cfg.kernels, "heads": num_heads}
        self.height, self.width, self.centre = (param(rngs, s, **sizes) for s in (1.0, 0.1, 3.0))

    def __call__(self, attention, q_BTNH, k_BSKH, q, k, whole) -> Bias:
        ahead_BTS1 = -self.distance(q, k).astype(jnp.float32)[..., None]
        add = lambda s: (
            self.height[...][s] * jnp.exp(-jnp.abs(self.width[...][s]) * jnp.square(ahead_BTS1 - self.centre[...][s]))
        )
        return jnp.moveaxis(sum(add(s) for s in range(self.cfg.kernels)), -1, 1)


class Shaw(Module):
    def __init__(self, cfg: Stack, num_heads: int, head_dim: int, *, rngs: nnx.Rngs):
        super().__init__(cfg, num_heads, head_dim, rngs=rngs)
        sizes = {"small": 2 * self.cfg.clip + 1, "head_dim": head_dim}
        self.keys = param(rngs, head_dim**-0.5, **sizes)
        if self.cfg.values:
            self.of_values = param(rngs, head_dim**-0.5, **sizes)

    def rows(self, q: "Tokens", k: "Tokens") -> Int[Array, "#B T S"]:
        """Rows of the tables: that of the key `clip` or more places before the query is the first."""
        return jnp.clip(-self.distance(q, k), -self.cfg.clip, self.cfg.clip) + self.cfg.clip

    def __call__(self, attention, q_BTNH, k_BSKH, q, k, whole) -> Bias:
        by_row_BNTR = jnp.einsum("BTNH,RH->BNTR", q_BTNH, self.keys[...], preferred_element_type=jnp.float32)
        return attention.scale * picked(by_row_BNTR, self.rows(q, k))

    def values(self, q: "Tokens", k: "Tokens") -> Float[Array, "#B T S H"] | None:
        return self.of_values[...][self.rows(q, k)] if self.cfg.values else None


class XLShared(Module):
    """The biases u and v, where all layers share them."""

    def __init__(self, cfg: Stack, num_heads: int, head_dim: int, *, rngs: nnx.Rngs):
        super().__init__(cfg, num_heads, head_dim, rngs=rngs)
        if self.cfg.shared_biases:
            self.u = constant(0.0, heads=num_heads, head_dim=head_dim)
            self.v = constant(0.0, heads=num_heads, head_dim=head_dim)


class XL(Module):
    def __init__(self, cfg: Stack, num_heads: int, head_dim: int, *, rngs: nnx.Rngs):
        super().__init__(cfg, num_heads, head_dim, rngs=rngs)
        D, self.embed = cfg.embed, cfg.embed
        scale = std(cfg, Weight("hidden", D, num_heads * head_dim))
        self.w_r = param(rngs, scale, embed=D, heads=num_heads, head_dim=head_dim)
        if not self.cfg.shared_biases:
            self.u = constant(0.0, heads=num_heads, head_dim=head_dim)
            self.v = constant(0.0, heads=num_heads, head_dim=head_dim)
        if self.cfg.segments:
            self.s = constant(0.0, heads=num_heads, head_dim=head_dim)
            self.of_segments = param(rngs, scale, small=2, heads=num_heads, head_dim=head_dim)

    def __call__(self, attention, q_BTNH, k_BSKH, q, k, whole) -> Bias:
        biases = whole if self.cfg.shared_biases else self
        most = max(q_BTNH.shape[1], k_BSKH.shape[1])
        far_R = jnp.arange(1 - most, most)
        r_RD = sinusoids(config.Sinusoidal(halves=True), far_R[None], self.embed)[0].astype(q_BTNH.dtype)
        r_RNH = jnp.einsum("RD,DNH->RNH", r_RD, self.w_r[...])
        placed_BNTR = jnp.einsum("BTNH,RNH->BNTR", q_BTNH + biases.v[...], r_RNH, preferred_element_type=jnp.float32)
        repeats = q_BTNH.shape[2] // k_BSKH.shape[2]
        u_KGH = biases.u[...].reshape(k_BSKH.shape[2], repeats, -1)
        told_BKGS = jnp.einsum("KGH,BSKH->BKGS", u_KGH, k_BSKH, preferred_element_type=jnp.float32)
        told_BN1S = told_BKGS.reshape(told_BKGS.shape[0], -1, 1, told_BKGS.shape[-1])
        bias_BNTS = picked(placed_BNTR, self.distance(q, k) + most - 1) + told_BN1S
        if self.cfg.segments and q.segment is not None:
            apart_BTS = (q.segment[:, :, None] != k.segment[:, None, :]).astype(jnp.int32)
            bias_BNTS += picked(jnp.einsum("BTNH,RNH->BNTR", q_BTNH + self.s[...], self.of_segments[...],
                                           preferred_element_type=jnp.float32), apart_BTS)  # fmt: skip
        return attention.scale * bias_BNTS


class DisentangledShared(Module):
    """The table of distances."""

    def __init__(self, cfg: Stack, num_heads: int, head_dim: int, *, rngs: nnx.Rngs):
        super().__init__(cfg, num_heads, head_dim, rngs=rngs)
        rows = 2 * (self.cfg.buckets or self.cfg.span)
        self.table = param(rngs, std(cfg, Weight("embedding", rows, cfg.embed)), small=rows, embed=cfg.embed)
        if self.cfg.norm:
            self.norm = Norm(LayerNorm(epsilon=cfg.block.norm.epsilon), embed=cfg.embed)

    def rows(self) -> Float[Array, "R D"]:
        return self.norm(self.table[...]) if self.cfg.norm else self.table[...]


class Disentangled(Module):
    def __init__(self, cfg: Stack, num_heads: int, head_dim: int, *, rngs: nnx.Rngs):
        super().__init__(cfg, num_heads, head_dim, rngs=rngs)
        attention, sizes = cfg.block.attention, {"heads": num_heads, "head_dim": head_dim}
        scale = std(cfg, Weight("hidden", cfg.embed, num_heads * head_dim))
        if self.cfg.own_projections and self.cfg.content_to_position:
            self.w_k = param(rngs, scale, embed=cfg.embed, **sizes)
            if attention.key_bias:
                self.b_k = constant(0.0, **sizes)
        if self.cfg.own_projections and self.cfg.position_to_content:
            self.w_q = param(rngs, scale, embed=cfg.embed, **sizes)
            self.b_q = constant(0.0, **sizes)

    def __call__(self, attention, q_BTNH, k_BSKH, q, k, whole) -> Bias:
        by = self if self.cfg.own_projections else attention
        r_RD, size = whole.rows().astype(q_BTNH.dtype), self.cfg.buckets or self.cfg.span
        far_BTS = log_distance(self.cfg, self.distance(q, k))
        bias_BNTS = 0.0
        if self.cfg.content_to_position:
            keys_RNH = jnp.einsum("RD,DNH->RNH", r_RD, by.w_k[...]) + (by.b_k[...] if hasattr(by, "b_k") else 0)
            by_row_BNTR = jnp.einsum("BTNH,RNH->BNTR", q_BTNH, keys_RNH, preferred_element_type=jnp.float32)
            bias_BNTS += picked(by_row_BNTR, jnp.clip(far_BTS + size, 0, 2 * size - 1))
        if self.cfg.position_to_content:
            queries_RNH = jnp.einsum("RD,DNH->RNH", r_RD, by.w_q[...]) + by.b_q[...]
            by_row_BNSR = jnp.einsum("BSNH,RNH->BNSR", k_BSKH, queries_RNH, preferred_element_type=jnp.float32)
            rows_BST = jnp.clip(far_BTS + size, 0, 2 * size - 1).swapaxes(1, 2)
            bias_BNTS += picked(by_row_BNSR, rows_BST).swapaxes(2, 3)
        return attention.scale * bias_BNTS


def log_distance(cfg: config.Disentangled, distance: Int[Array, "..."]) -> Int[Array, "..."]:
    """Distances as they are up to half of the buckets, logarithmic beyond."""
    if cfg.buckets is None:
        return distance
    half = cfg.buckets // 2
    far = jnp.maximum(jnp.abs(distance), half).astype(jnp.float32)
    log = jnp.ceil(jnp.log(far / half) / math.log((cfg.span - 1) / half) * (half - 1)) + half
    return jnp.where(jnp.abs(distance) <= half, distance, jnp.sign(distance) * log.astype(jnp.int32))


def picked(by_row_BNTR: Float[Array, "B N T R"], rows_BTS: Int[Array, "#B T S"]) -> Float[Array, "B N T S"]:
    """For each query and key, the row that their distance asks for."""
    rows_BNTS = jnp.broadcast_to(rows_BTS[:, None], (by_row_BNTR.shape[0], 1, *rows_BTS.shape[1:]))
    return jnp.take_along_axis(by_row_BNTR, jnp.clip(rows_BNTS, 0, by_row_BNTR.shape[-1] - 1), axis=-1)


KINDS = {
    "t5": T5Buckets, "kerple": Kerple, "sandwich": SandwichBias, "fire": Fire, "tisa": Tisa, "shaw": Shaw,
}  # fmt: skip
_SHARED = {"xl": XLShared, "disentangled": DisentangledShared}
_LAYERED = {"xl": XL, "disentangled": Disentangled}
