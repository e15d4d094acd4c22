"""Parameters of models and floating-point operations of decoders, as closed formulas of a config; needs no JAX.

A token passes through a part of a mixture only: `active` counts that part, and a model's FLOPs are those of the experts
that a token chooses. Dense dispatch computes all of them (`chosen=False`).
"""

from typing import NamedTuple

from jaxllm.core.errors import ConfigError
from jaxllm.models.config import FFN, AnyModel, Attention, Block, DecoderConfig, EncoderConfig, Head, MoE, Norm, Stack
from jaxllm.models.masks import Coords


class Flops(NamedTuple):
    """Floating-point operations per token; a multiplication and an addition are two."""

    forward: float
    backward: float  # two products for each of the forward pass: gradients of both its sides

    @property
    def train(self) -> float:
        return self.forward + self.backward


def parameters(cfg: AnyModel) -> int:
    """Elements of all weights; a tied head counts once."""
    return sum(parts(cfg).values())


def non_embedding(cfg: AnyModel) -> int:
    """Parameters without token and position tables and without the head (Kaplan et al. 2020, arXiv:2001.08361)."""
    tables = ("embedding", "positions", "query_positions", "head", "head_bias", "segments", "tasks", "mlm", "lm")
    return sum(n for name, n in parts(cfg).items() if name.rpartition(".")[2] not in tables)


def active(cfg: DecoderConfig) -> int:
    """Parameters that a token passes through: all but those of experts it does not choose; tables count whole."""
    idle = 0
    for i in range(cfg.num_layers):
        if (f := cfg.layer(i).ffn).kind == "moe":
            idle += (f.experts - f.top_k) * _feed_forward(cfg, f.mlp, f)
    return parameters(cfg) - idle


def parts(cfg: AnyModel) -> dict[str, int]:
    """Parameters by part: `embedding`, `positions`, `layers.0`, ..., `final_norm`, `head`, ... in the order of use.

    Those of an encoder-decoder are of `encoder.` or of `decoder.`, but for the embedding that both share.
    """
    if cfg.kind == "encoder":
        return _encoder(cfg)
    if cfg.kind == "encoder_decoder":
        sides = {"encoder": parts(cfg.encoder), "decoder": parts(cfg.decoder)}
        own = {f"{side}.{name}": n for side, count in sides.items() for name, n in count.items()}
        if not cfg.share:
            return own
        shared = {"embedding": sides["decoder"]["embedding"]}
        return shared | {name: n for name, n in own.items() if not name.endswith(".embedding")}
    D, V = cfg.embed, vocabulary(cfg)
    count = {"embedding": V * cfg.table_width}
    if cfg.table:
        count["table"] = 2 * cfg.table * D
    count |= _positions(cfg, D)
    if cfg.embedding_norm:
        count["embedding_norm"] = _norm(cfg.embedding_norm, D)
    count |= _layers(cfg)
    if not cfg.tie:
        count["head"] = cfg.table_width * V
    if cfg.head_bias:
        count["head_bias"] = V
    if cfg.query_layer:
        count["query_positions"] = cfg.context * D
        count["query_layer"] = sum(block_parts(cfg, cfg.query_layer).values())
    return count


def _encoder(cfg: EncoderConfig) -> dict[str, int]:
    D, E = cfg.embed, cfg.table_width
    count = {"embedding": vocabulary(cfg) * E} | _positions(cfg, E)
    count |= {name: n * E for name, n in (("segments", cfg.segments), ("tasks", cfg.tasks)) if n}
    if cfg.query_stream:
        count["query"] = E
    if cfg.embedding_norm:
        count["embedding_norm"] = _norm(cfg.embedding_norm, E)
    if cfg.table:
        count["projection"] = (E + 1) * D
    count |= _layers(cfg)
    if cfg.convolution:
        count["convolution"] = cfg.convolution.width * D // cfg.convolution.groups * D + 3 * D
    if cfg.pooler:
        count["pooler"] = (D + 1) * D
    return count | {head.kind: _head(cfg, head) for head in cfg.heads}


def _head(cfg: EncoderConfig, head: Head) -> int:
    D, E, V = cfg.embed, cfg.table_width, vocabulary(cfg)
    match head.kind:
        case "mlm":
            return (D + 3) * E + V + (0 if head.tie else E * V) + bool(head.enhanced) * cfg.context * D
        case "lm":
            return V
        case "rtd":
            return (D + 1) * D + D + 1
    return (D + 1) * getattr(head, "labels", 2)


def _positions(cfg: Stack, width: int) -> dict[str, int]:
    return {"positions": (cfg.context + cfg.position.offset) * width} if cfg.position.kind == "learned" else {}


def _layers(cfg: Stack) -> dict[str, int]:
    """Layers and what stands after them; and what all layers share of distances."""
    shared, own = _relative(cfg)
    count = {"relative": shared} if shared else {}
    count |= {f"layers.{i}": sum(block_parts(cfg, cfg.layer(i)).values()) + own for i in range(cfg.num_layers)}
    if cfg.final_norm:
        count["final_norm"] = _norm(cfg.blocks[-1].norm, cfg.embed)
    return count


def _relative(cfg: Stack) -> tuple[int, int]:
    """What is learned of distances: shared by all layers, and in each."""
    r, D, a = cfg.relative, cfg.embed, cfg.blocks[0].attention
    H, N = cfg.head_dim(a), a.num_heads
    if r is None:
        return 0, 0
    match r.kind:
        case "t5":
            whole = r.buckets * N
        case "kerple":
            whole = 2 * N
        case "sandwich":
            whole = 0
        case "fire":
            whole = 2 + 2 * r.hidden + (r.hidden + 1) * N
        case "tisa":
            whole = 3 * r.kernels * N
        case "shaw":
            whole = (1 + r.values) * (2 * r.clip + 1) * H
        case "xl":
            biases, own = 2 * N * H, (D + 3 * r.segments) * N * H
            return (biases, own) if r.shared_biases else (0, own + biases)
        case "disentangled":
            keys, queries = ((D + b) * N * H for b in (a.key_bias, True))
            own = r.content_to_position * keys + r.position_to_content * queries if r.own_projections else 0
            return 2 * (r.buckets or r.span) * D + r.norm * 2 * D, own
    return (whole, 0) if r.shared else (0, whole)


def block_parts(cfg: Stack, block: Block) -> dict[str, int]:
    """Parameters of one layer: `attention`, `ffn` (each without its norms) and `norms`; with `cross` in `attention`."""
    a, f, D = block.attention, block.ffn, cfg.embed
    H, placement = cfg.head_dim(a), block.placement
    N, K = a.num_heads * H, a.kv_heads * H
    attention = sum(_attention(cfg, x) for x in (a, block.cross) if x is not None)
    ffn = (f.experts if f.kind == "moe" else 1) * _feed_forward(cfg, f.mlp, f)
    if f.kind == "moe":
        ffn += (D + f.router.bias) * f.experts
        ffn += _feed_forward(cfg, f.shared.mlp, f) + f.shared.gate * D if f.shared else 0
    outer = {"parallel": getattr(placement, "norms", 2), "sandwich": 4}.get(placement.kind, 2)
    norms = (outer + (block.cross is not None)) * _norm(block.norm, D)
    if placement.kind == "subln":
        norms += _norm(block.norm, N) + _norm(block.norm, f.mlp)
    if a.qk_norm:
        norms += sum(_norm(a.qk_norm, n if a.qk_norm_over == "heads" else H) for n in (N, K))
    return {"attention": attention, "ffn": ffn, "norms": norms}


def _attention(cfg: Stack, a: Attention) -> int:
    N, K = (n * cfg.head_dim(a) for n in (a.num_heads, a.kv_heads))
    return attention_weights(cfg, a) + a.bias * (N + (1 + a.key_bias) * K) + a.out_bias * cfg.embed


def attention_weights(cfg: Stack, a: Attention) -> int:
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


def vocabulary(cfg: AnyModel) -> int:
    if cfg.vocab is None:
        raise ConfigError("model.vocab is not set, so its parameters cannot be counted; give the number of tokens")
    return cfg.vocab


def _feed_forward(cfg: Stack, width: int, f: FFN | MoE) -> int:
    """Parameters of one feed-forward of this width, made as `f` says."""
    return (2 + f.glu) * cfg.embed * width + f.bias * ((1 + f.glu) * width + cfg.embed)


def _norm(norm: Norm, size: int) -> int:
    return size * (norm.scale + norm.bias if norm.kind == "layernorm" else 1)
