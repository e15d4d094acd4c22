"""A mixture of feed-forwards: router, experts, capacity, and what a run watches of them."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxllm.core.axes import constrain
from jaxllm.core.shapes import Array, Bool, Float, Key
from jaxllm.models import config
from jaxllm.models.config import Block, Stack
from jaxllm.models.layers.ffn import FFN, activate, gated
from jaxllm.models.layers.init import Weight, gain, std
from jaxllm.models.layers.linear import linear
from jaxllm.models.layers.param import constant, param
from jaxllm.models.remat import recomputed

ROWS = ("batch", "seq")


class Routing(NamedTuple):
    """What a router did, as means over the tokens of a batch without padding; float32.

    E experts, k of them a token; f_e is the share of all choices that fell on expert e, P_e its mean probability.
    """

    balance: Float[Array, "..."]  # E sum_e f_e P_e (Fedus et al. 2021, arXiv:2101.03961, eq. 4-6, for k = 1); 1 if even
    z: Float[Array, "..."]  # (log sum_e exp logit_e)^2 (Zoph et al. 2022, arXiv:2202.08906, eq. 5)
    dropped: Float[Array, "..."]  # choices that were over capacity, as a share
    busiest: Float[Array, "..."]  # E max_e f_e: 1 if even, E / k if all tokens choose alike


class MoE(nnx.Module):
    def __init__(self, cfg: Stack, block: Block, *, rngs: nnx.Rngs):
        self.cfg = moe = block.ffn
        D, E = cfg.embed, moe.experts
        self.w_router = param(rngs, std(cfg, Weight("hidden", D, E)), embed=D, experts=E)
        if moe.router.bias:
            self.b_router = constant(0.0, experts=E)
        self.experts = Experts(cfg, block, rngs=rngs)
        if moe.shared:
            alone = config.FFN(mlp=moe.shared.mlp, activation=moe.activation, glu=moe.glu, bias=moe.bias)
            self.shared = FFN(cfg, block.model_copy(update={"ffn": alone}), rngs=rngs)
            if moe.shared.gate:
                self.w_shared = param(rngs, std(cfg, Weight("hidden", D, 1)), embed=D)

    def __call__(
        self, x_BTD: Float[Array, "B T D"], real_BT: Bool[Array, "#B #T"], key: Key[Array, ""] | None = None
    ) -> tuple[Float[Array, "B T D"], Routing]:
        """The weighted sum of the chosen experts, and what the router did.

        Args:
          real_BT: false for padding, which no expert makes room for.
          key: turns the router's jitter on.
        """
        logits_BTE = self.logits(x_BTD, key)
        scores_BTE, chosen_BTE = choose(self.cfg, logits_BTE)
        weights_BTE = scores_BTE * chosen_BTE
        if self.cfg.router.renormalise:
            weights_BTE = weights_BTE / jnp.maximum(jnp.sum(weights_BTE, -1, keepdims=True), 1e-20)
        kept_BTE = chosen_BTE & fits(self.cfg, chosen_BTE & real_BT[..., None])
        weights_BTE = jnp.where(kept_BTE, self.cfg.router.scale * weights_BTE, 0)
        y_BTD = self.experts(x_BTD, weights_BTE.astype(x_BTD.dtype))
        if self.cfg.shared:
            z_BTD = self.shared(x_BTD)
            if self.cfg.shared.gate:
                gate_BT = linear("BTD,D->BT", x_BTD, self.w_shared[...], (*ROWS, "embed"), ("embed",), ROWS)
                z_BTD = jax.nn.sigmoid(gate_BT)[..., None] * z_BTD
            y_BTD = y_BTD + z_BTD
        return y_BTD, watched(logits_BTE, scores_BTE, chosen_BTE, kept_BTE, real_BT)

    def logits(self, x_BTD: Float[Array, "B T D"], key: Key[Array, ""] | None) -> Float[Array, "B T E"]:
        x_BTD = x_BTD.astype(jnp.float32)
        if self.cfg.jitter and key is not None:
            low, high = 1 - self.cfg.jitter, 1 + self.cfg.jitter
            x_BTD = x_BTD * jax.random.uniform(key, x_BTD.shape, jnp.float32, low, high)
        w_DE, axes = self.w_router[...].astype(jnp.float32), ("embed", "experts")
        logits_BTE = linear("BTD,DE->BTE", x_BTD, w_DE, (*ROWS, "embed"), axes, (*ROWS, "experts"))
        return logits_BTE + self.b_router[...].astype(jnp.float32) if self.cfg.router.bias else logits_BTE


class Experts(nnx.Module):
    """Feed-forwards side by side, each of every token."""

    def __init__(self, cfg: Stack, block: Block, *, rngs: nnx.Rngs):
        self.cfg = moe = block.ffn
        D, E, F, g = cfg.embed, moe.experts, moe.mlp, gain(cfg, block)
        up = g * std(cfg, Weight("hidden", D, F))
        self.w_up = param(rngs, up, experts=E, embed=D, mlp=F)
        self.w_down = param(rngs, g * std(cfg, Weight("residual", F, D)), experts=E, mlp=F, embed=D)
        if moe.glu:
            self.w_gate = param(rngs, up, experts=E, embed=D, mlp=F)
        if moe.bias:
            self.b_up = constant(0.0, experts=E, mlp=F)
            self.b_down = constant(0.0, experts=E, embed=D)
            if moe.glu:
                self.b_gate = constant(0.0, experts=E, mlp=F)

    def __call__(self, x_BTD: Float[Array, "B T D"], weights_BTE: Float[Array, "B T E"]) -> Float[Array, "B T D"]:
        """The sum of the experts' outputs, each times its weight.

        The weights multiply hidden layers, before the last product, which then sums over experts too: no output of a
        single expert stands in memory.
        """
        bias = self.cfg.bias
        narrow, wide = (*ROWS, "embed"), (*ROWS, "experts", "mlp")
        ups, downs = ("experts", "embed", "mlp"), ("experts", "mlp", "embed")
        h_BTEF = linear("BTD,EDF->BTEF", x_BTD, self.w_up[...], narrow, ups, wide)
        h_BTEF = checkpoint_name(h_BTEF + self.b_up[...] if bias else h_BTEF, "up")
        if self.cfg.glu:
            gate_BTEF = linear("BTD,EDF->BTEF", x_BTD, self.w_gate[...], narrow, ups, wide)
            gate_BTEF = checkpoint_name(gate_BTEF + self.b_gate[...] if bias else gate_BTEF, "gate")
            h_BTEF = recomputed(functools.partial(gated, self.cfg.activation))(gate_BTEF, h_BTEF)
        else:
            h_BTEF = recomputed(functools.partial(activate, self.cfg.activation))(h_BTEF)
        h_BTEF = constrain(h_BTEF * weights_BTE[..., None], *wide)
        y_BTD = linear("BTEF,EFD->BTD", h_BTEF, self.w_down[...], wide, downs, narrow)
        return y_BTD + jnp.sum(weights_BTE[..., None] * self.b_down[...], -2) if bias else y_BTD


def choose(cfg: config.MoE, logits_BTE: Float[Array, "B T E"]) -> tuple[Float[Array, "B T E"], Bool[Array, "B T E"]]:
    """Scores of all experts, and which are the k best; of equal ones the first."""
    of = {"softmax": jax.nn.softmax, "sigmoid": jax.nn.sigmoid}[cfg.router.kind]
    scores_BTE = of(logits_BTE)
    _, best_BTK = jax.lax.top_k(scores_BTE, cfg.top_k)
    return scores_BTE, jnp.any(best_BTK[..., None] == jnp.arange(cfg.experts), -2)


def fits(cfg: config.MoE, chosen_BTE: Bool[Array, "B T E"]) -> Bool[Array, "B T E"]:
    """Whether an expert has room for a token that chose it: earlier tokens of the row come first.

    So no token's fate hangs on later ones, as it does where all first choices go before all second (GShard).
    """
    if cfg.capacity is None:
        return jnp.ones_like(chosen_BTE)
    return jnp.cumsum(chosen_BTE, 1, dtype=jnp.int32) <= room(cfg, chosen_BTE.shape[1])


def room(cfg: config.MoE, length: int) -> int:
    """Tokens of a row of `length` that an expert takes."""
    match cfg.capacity:
        case None:
            return length
        case config.Slots(slots=slots):
            return slots
    return math.ceil(cfg.capacity.factor * cfg.top_k * length / cfg.experts)


def watched(
    logits_BTE: Float[Array, "B T E"],
    scores_BTE: Float[Array, "B T E"],
    chosen_BTE: Bool[Array, "B T E"],
    kept_BTE: Bool[Array, "B T E"],
    real_BT: Bool[Array, "#B #T"],
) -> Routing:
    E = scores_BTE.shape[-1]
    real_BT1 = jnp.broadcast_to(real_BT, scores_BTE.shape[:2])[..., None]
    count = jnp.maximum(jnp.sum(real_BT1), 1)

    def mean(x_BTN: Array) -> Array:
        return jnp.sum(jnp.where(real_BT1, x_BTN, 0), (0, 1), jnp.float32) / count

    chosen_E = mean(chosen_BTE)
    share_E = chosen_E / jnp.maximum(jnp.sum(chosen_E), 1)  # k, or 0 of a batch of padding
    probability_E = mean(scores_BTE / jnp.sum(scores_BTE, -1, keepdims=True))  # of sigmoids: 2412.19437, eq. 19
    z_1 = mean(jnp.square(jax.nn.logsumexp(logits_BTE, -1, keepdims=True)))
    dropped = jnp.sum(mean(chosen_BTE & ~kept_BTE)) / jnp.maximum(jnp.sum(chosen_E), 1)
    return Routing(E * jnp.sum(share_E * probability_E), z_1[0], dropped, E * jnp.max(share_E))
