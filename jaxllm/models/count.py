"""Parameters and floating-point operations of a decoder, as closed formulas of its config; needs no JAX.

A token passes through a part of a mixture only: `active` counts that part, and a model's FLOPs are those of the experts
that a token chooses. Dense dispatch computes all of them (`chosen=False`).
"""

from typing import NamedTuple

from jaxllm.core.errors import ConfigError
from jaxllm.models.config import FFN, Attention, Block, DecoderConfig, MoE, Norm
from jaxllm.models.masks import Coords


class Flops(NamedTuple):
    """Floating-point operations per token; a multiplication and an addition are two."""

    forward: float
    backward: float  # two products for each of the forward pass: gradients of both its sides

    @property
    def train(self) -> float:
        return self.forward + self.backward


def parameters(cfg: DecoderConfig) -> int:
    """Elements of all weights; a tied head counts once."""
    return sum(parts(cfg).values())


def non_embedding(cfg: DecoderConfig) -> int:
    """Parameters without token and position tables and without the head (Kaplan et al. 2020, arXiv:2001.08361)."""
    tables = ("embedding", "positions", "query_positions", "head", "head_bias")
    return sum(n for name, n in parts(cfg).items() if name not in tables)


def active(cfg: DecoderConfig) -> int:
    """Parameters that a token passes through: all but those of experts it does not choose; tables count whole."""
    idle = 0
    for i in range(cfg.num_layers):
        if (f := cfg.layer(i).ffn).kind == "moe":
            idle += (f.experts - f.top_k) * _feed_forward(cfg, f.mlp, f)
    return parameters(cfg) - idle


def parts(cfg: DecoderConfig) -> dict[str, int]:
    """Parameters by part: `embedding`, `positions`, `layers.0`, ..., `final_norm`, `head`, ... in the order of use."""
    D, V = cfg.embed, vocabulary(cfg)
    count = {"embedding": V * cfg.table_width}
    if cfg.table:
        count["table"] = 2 * cfg.table * D
    if cfg.position.kind == "learned":
        count["positions"] = (cfg.context + cfg.position.offset) * D
    if cfg.embedding_norm:
        count["embedding_norm"] = _norm(cfg.embedding_norm, D)
    count |= {f"layers.{i}": sum(block_parts(cfg, cfg.layer(i)).values()) for i in range(cfg.num_layers)}
    if cfg.final_norm:
        count["final_norm"] = _norm(cfg.blocks[-1].norm, D)
    if not cfg.tie:
        count["head"] = cfg.table_width * V
    if cfg.head_bias:
        count["head_bias"] = V
    if cfg.query_layer:
        count["query_positions"] = cfg.context * D
        count["query_layer"] = sum(block_parts(cfg, cfg.query_layer).values())
    return count


def block_parts(cfg: DecoderConfig, block: Block) -> dict[str, int]:
    """Parameters of one layer: `attention`, `ffn` (each without its norms) and `norms`."""
    a, f, D = block.attention, block.ffn, cfg.embed
    H, placement = cfg.head_dim(a), block.placement
    N, K = a.num_heads * H, a.kv_heads * H
    attention = attention_weights(cfg, a) + a.bias * (N + 2 * K) + a.out_bias * D
    ffn = (f.experts if f.kind == "moe" else 1) * _feed_forward(cfg, f.mlp, f)
    if f.kind == "moe":
        ffn += (D + f.router.bias) * f.experts
        ffn += _feed_forward(cfg, f.shared.mlp, f) + f.shared.gate * D if f.shared else 0
    outer = {"parallel": getattr(placement, "norms", 2), "sandwich": 4}.get(placement.kind, 2)
    norms = outer * _norm(block.norm, D)
    if placement.kind == "subln":
        norms += _norm(block.norm, N) + _norm(block.norm, f.mlp)
    if a.qk_norm:
        norms += sum(_norm(a.qk_norm, n if a.qk_norm_over == "heads" else H) for n in (N, K))
    return {"attention": attention, "ffn": ffn, "norms": norms}


def attention_weights(cfg: DecoderConfig, a: Attention) -> int:
    """Elements of the four projection matrices."""
    return 2 * cfg.embed * cfg.head_dim(a) * (a.num_heads + a.kv_heads)


def ffn_weights(cfg: DecoderConfig, block: Block, *, chosen: bool = True) -> int:
    """Elements of the matrices that a token is multiplied by: two or, with a gate, three.

    Args:
      chosen: of a mixture, counts the experts that a token chooses; else all of them. Router and shared experts count.
    """
    f, D = block.ffn, cfg.embed
    if f.kind == "dense":
        return (2 + f.glu) * D * f.mlp
    routing = D * f.experts + (f.shared.gate * D if f.shared else 0)
    return routing + (2 + f.glu) * D * ffn_width(f, chosen=chosen)


def ffn_width(f: FFN | MoE, *, chosen: bool = True) -> int:
    """Elements of the hidden layers that are computed for a token; `chosen` as above."""
    if f.kind == "dense":
        return f.mlp
    return (f.top_k if chosen else f.experts) * f.mlp + (f.shared.mlp if f.shared else 0)


def flops_per_token(cfg: DecoderConfig, length: int, *, causal: bool = True, chosen: bool = True) -> Flops:
    """FLOPs of matrix products per token of sequences of `length` tokens, each one document.

    Each weight of a product costs 2 in the forward pass (looking up an embedding costs nothing, the head counts
    even when tied); scores and weighted values cost 4 x heads x head_dim for every pair of query and key. Training
    costs three times that, so with all pairs this is PaLM's 6 N + 12 L H Q T (Chowdhery et al. 2022,
    arXiv:2204.02311, appendix B). Norms, activations and softmax are not counted, nor is recomputation: what
    divides a measured speed is the work that the model asks for.

    Args:
      causal: counts the pairs that mask and window let see, about half of PaLM's; else the whole square, as PaLM
        does and as attention without a kernel computes it. The first gives the lower utilisation.
      chosen: counts the experts that a token chooses; else all, as dense dispatch computes them.
    """
    forward = 2.0 * cfg.table_width * vocabulary(cfg) + (4.0 * cfg.table * cfg.embed if cfg.table else 0)
    for block in (*map(cfg.layer, range(cfg.num_layers)), *filter(None, [cfg.query_layer])):
        a = block.attention
        keys = visible_pairs(a, length) / length if causal else length
        forward += 2 * (attention_weights(cfg, a) + ffn_weights(cfg, block, chosen=chosen))
        forward += 4 * a.num_heads * cfg.head_dim(a) * keys
    return Flops(forward, 2 * forward)


def visible_pairs(a: Attention, length: int) -> int:
    """Pairs of query and key that mask and window let see in one document of `length` tokens without a prefix."""
    import numpy as np

    # Masks look at differences of places only: asking once for each difference is enough.
    ahead = np.arange(1 - length, length)
    seen = a.mask.visible(Coords(np.zeros_like(ahead), 1, False), Coords(ahead, 1, False))
    if a.window:
        seen = seen & (-ahead < a.window)
    return int(((seen | (ahead == 0)) * (length - abs(ahead))).sum())


def vocabulary(cfg: DecoderConfig) -> int:
    if cfg.vocab is None:
        raise ConfigError("model.vocab is not set, so its parameters cannot be counted; give the number of tokens")
    return cfg.vocab


def _feed_forward(cfg: DecoderConfig, width: int, f: FFN | MoE) -> int:
    """Parameters of one feed-forward of this width, made as `f` says."""
    return (2 + f.glu) * cfg.embed * width + f.bias * ((1 + f.glu) * width + cfg.embed)


def _norm(norm: Norm, size: int) -> int:
    return size * (norm.scale + norm.bias if norm.kind == "layernorm" else 1)
