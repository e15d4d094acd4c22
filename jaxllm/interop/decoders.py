"""The families of decoders: a name table and the keys of `config.json` for each."""

import math
from collections.abc import Sequence
from typing import Any

from jaxllm.interop.family import LAYERS, Family, Given, Part, at
from jaxllm.interop.names import (
    QKV,
    Row,
    Table,
    fused,
    heads_fused,
    in_shares,
    layers,
    linear,
    matrix,
    norm,
    table,
    tensor,
)
from jaxllm.models.config import DecoderConfig

# --- parts that families share -------------------------------------------------------------------------------------


def rope(theta: float = 10_000.0, fraction: float = 1.0, *, interleaved: bool = False) -> Part:
    """Rotary positions, as `rope_parameters` says or, before transformers 5, `rope_theta` and `rope_scaling`."""

    def ours(given: Given) -> dict[str, Any]:
        said = given.get("rope_parameters") or given.get("rope_scaling") or {}
        return {"position": _rope(given, said, theta, fraction, interleaved)}

    def theirs(cfg: DecoderConfig) -> dict[str, Any]:
        return _rope_parameters(cfg, cfg.layer(0).attention.position, fraction)

    return Part(ours, theirs)


def _rope(given: Given, said: dict[str, Any], theta: float, fraction: float, interleaved: bool) -> dict[str, Any]:
    """Fields of RoPE for one set of rope parameters."""

    def one(key: str, default: Any, *others: str) -> Any:
        found = (x for x in (said.get(key), *(given.get(k) for k in (key, *others))) if x is not None)
        return next(found, default)

    context = given.get("max_position_embeddings")
    out = {
        "kind": "rope", "theta": float(one("rope_theta", theta, "rotary_emb_base")), "interleaved": interleaved,
        "fraction": float(one("partial_rotary_factor", fraction, "rotary_pct")),
    }  # fmt: skip
    kind, original = (
        said.get("rope_type", said.get("type", "default")),
        one("original_max_position_embeddings", context),
    )
    match kind:
        case "default":
            return out
        case "linear":
            scaling = {"kind": "linear", "factor": said["factor"]}
        case "dynamic":
            scaling = {"kind": "dynamic_ntk", "factor": said["factor"], "original": context}
        case "llama3":
            scaling = {"low": said["low_freq_factor"], "high": said["high_freq_factor"]}
            scaling |= {"kind": "llama3", "factor": said["factor"], "original": original}
        case "yarn":
            factor = said.get("factor") or context / original
            scaling = {"kind": "yarn", "factor": factor, "original": original, "truncate": said.get("truncate", True)}
            scaling |= {"beta_fast": said.get("beta_fast") or 32.0, "beta_slow": said.get("beta_slow") or 1.0}
            temperature = lambda m: 0.1 * m * math.log(factor) + 1 if factor > 1 else 1.0
            m, all_dim = said.get("mscale"), said.get("mscale_all_dim")
            attention = said.get("attention_factor")
            if attention is None and m and all_dim:
                attention = temperature(m) / temperature(all_dim)
            scaling["attention"] = attention
        case "longrope" | "su":
            factor = said.get("factor") or context / original
            attention = said.get("attention_factor")
            if attention is None:
                attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
            scaling = {"kind": "longrope", "short": said["short_factor"], "long": said["long_factor"]}
            scaling |= {"original": original, "attention": attention}
        case _:
            raise given.refuse("rope_parameters", "known: default, linear, dynamic, llama3, yarn, longrope")
    return out | {"scaling": scaling}


def _rope_parameters(cfg: DecoderConfig, rope: Any, default: float = 1.0) -> dict[str, Any]:
    """Their keys for a RoPE of ours, for transformers 5 and for what is older; none for what is no RoPE."""
    if getattr(rope, "kind", None) != "rope":
        return {}
    said: dict[str, Any] = {"rope_type": "default", "rope_theta": rope.theta}
    if (rope.fraction, default) != (1.0, 1.0):
        said["partial_rotary_factor"] = rope.fraction
    old = {"rope_theta": rope.theta}
    s = rope.scaling
    match s and s.kind:
        case None:
            return {"rope_parameters": said, **old}
        case "linear":
            more = {"rope_type": "linear", "factor": s.factor}
        case "dynamic_ntk":
            more = {"rope_type": "dynamic", "factor": s.factor}
        case "llama3":
            more = {"rope_type": "llama3", "factor": s.factor, "low_freq_factor": s.low, "high_freq_factor": s.high}
            more["original_max_position_embeddings"] = s.original
        case "yarn":
            more = {"rope_type": "yarn", "factor": s.factor, "original_max_position_embeddings": s.original}
            more |= {"beta_fast": s.beta_fast, "beta_slow": s.beta_slow}
            more |= {} if s.attention is None else {"attention_factor": s.attention}
            more |= {} if s.truncate else {"truncate": False}
        case "longrope":
            more = {"rope_type": "longrope", "short_factor": list(s.short), "long_factor": list(s.long)}
            more |= {"original_max_position_embeddings": s.original, "attention_factor": s.attention}
            more["factor"] = cfg.context / s.original
        case _:  # no type of theirs: what comes back will differ, which is refused
            more = {}
    return {"rope_parameters": said | more, **old, "rope_scaling": said | more}


def windows(full_every: int) -> Part:
    """Sliding windows as `layer_types` says or, where it is absent, of all layers but every so many."""

    def ours(given: Given) -> dict[str, Any]:
        slides = [t.startswith("sliding") for t in given.get("layer_types") or ()]
        if given.get("layer_types") is None:
            every = given.get("sliding_window_pattern", full_every)
            slides = [bool((i + 1) % every) for i in range(given["num_hidden_layers"])]
        return {LAYERS: [{"attention.window": given.get("sliding_window") if slide else None} for slide in slides]}

    # Their classes want a window where no layer uses one.
    return Part(ours, lambda cfg: {"sliding_window": 4096} | {k: v for k, v in windowed(cfg).items() if v is not None})


def windowed(cfg: DecoderConfig) -> dict[str, Any]:
    """Which layers have a window, and the first one's size."""
    found = [cfg.layer(i).attention.window for i in range(cfg.num_layers)]
    types = ["full_attention" if w is None else "sliding_attention" for w in found]
    return {"layer_types": types, "sliding_window": next((w for w in found if w), None)}


def qwen_windows() -> Part:
    """Windows of the layers from `max_window_layers` on, if `use_sliding_window`; `layer_types` says it newer."""

    def ours(given: Given) -> dict[str, Any]:
        L, window = given["num_hidden_layers"], given.get("sliding_window") if given.get("use_sliding_window") else None
        slides = [t.startswith("sliding") for t in given.get("layer_types") or ()]
        slides = slides or [i >= given["max_window_layers"] for i in range(L)]
        return {LAYERS: [{"attention.window": window if slide else None} for slide in slides]}

    def theirs(cfg: DecoderConfig) -> dict[str, Any]:
        said = windowed(cfg)
        first = next((i for i, t in enumerate(said["layer_types"]) if t.startswith("sliding")), cfg.num_layers)
        return said | {"use_sliding_window": said["sliding_window"] is not None, "max_window_layers": first}

    return Part(ours, theirs)


def width(key: str, factor: int = 4, embed: str = "n_embd") -> Part:
    """A feed-forward width that may be left out."""
    return Part(
        lambda given: {"block.ffn.mlp": given.get(key) or factor * given[embed]},
        lambda cfg: {key: cfg.block.ffn.mlp},
    )


def rotary_dim(default: int = 64) -> Part:
    """The first elements of a head are rotated, in turn (GPT-J)."""

    def ours(given: Given) -> dict[str, Any]:
        dim = given.get("rotary_dim", default) or given["n_embd"] // given["n_head"]
        fraction = dim / (given["n_embd"] // given["n_head"])
        return {"position": {"kind": "rope", "fraction": fraction, "interleaved": True}}

    return Part(
        ours,
        lambda cfg: {
            "rotary_dim": round(cfg.head_dim(cfg.block.attention) * (at(cfg.block.attention, "position.fraction") or 0))
        },
    )


def _scaled_as_usual(cfg: DecoderConfig) -> bool:
    """Whether the logits of the first layer are divided by the root of a head's size."""
    a = cfg.layer(0).attention
    return math.isclose(a.scale, cfg.head_dim(a) ** -0.5)


# --- names and keys that many share --------------------------------------------------------------------------------

SIZES = {
    "vocab_size": "vocab", "hidden_size": "embed", "num_hidden_layers": "num_layers",
    "max_position_embeddings": "context", "num_attention_heads": "block.attention.num_heads",
    "num_key_value_heads": "block.attention.num_kv_heads", "intermediate_size": "block.ffn.mlp",
    "hidden_act": "block.ffn.activation", "rms_norm_eps": "block.norm.epsilon", "tie_word_embeddings": "tie",
}  # fmt: skip
GPT2_SIZES = {
    "vocab_size": "vocab", "n_embd": "embed", "n_layer": "num_layers", "n_positions": "context",
    "n_head": "block.attention.num_heads", "activation_function": "block.ffn.activation",
    "layer_norm_epsilon": "block.norm.epsilon", "tie_word_embeddings": "tie",
}  # fmt: skip
LLAMA_FIXED = {"block.norm.kind": "rmsnorm", "block.placement.kind": "pre", "block.ffn.glu": True}
LAYERNORM = {"block.norm.kind": "layernorm", "block.ffn.glu": False}
BIASES = {"block.ffn.bias": True, "block.attention.bias": True, "block.attention.out_bias": True}


def but(sizes: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: path for key, path in sizes.items() if key not in keys}


def projections(module: str, q: str = "q_proj", k: str = "k_proj", v: str = "v_proj", o: str = "o_proj") -> Table:
    return table(
        *(linear(f"{module}.{name}", ours) for name, ours in zip((q, k, v), QKV, strict=True)),
        linear(f"{module}.{o}", "attention.o", inputs=2),
    )


def gated(module: str = "mlp") -> Table:
    return table(*(linear(f"{module}.{name}_proj", f"ffn.{name}") for name in ("gate", "up", "down")))


def plain(up: str, down: str, *, transposed: bool = True) -> Table:
    return table(linear(up, "ffn.up", transposed=transposed), linear(down, "ffn.down", transposed=transposed))


def norms(attention: str = "input_layernorm", ffn: str = "post_attention_layernorm") -> Table:
    return table(norm(attention, "norm_attention"), norm(ffn, "norm_ffn"))


def outside(embedding: str, last: str | None, head: str = "lm_head") -> Table:
    """Weights outside of layers."""
    return table(
        tensor(f"{embedding}.weight", "embedding"), norm(last, "final_norm") if last else (), linear(head, "head")
    )


LLAMA_NAMES = table(
    outside("model.embed_tokens", "model.norm"),
    layers("model.layers.{}", projections("self_attn"), gated(), norms()),
)
QK_NORMS = layers(
    "model.layers.{}", norm("self_attn.q_norm", "attention.q_norm"), norm("self_attn.k_norm", "attention.k_norm")
)


def llama_like(kind: str, architecture: str, **changes: Any) -> Family:
    """A family with LLaMA's names and keys, but for what is said."""
    standard = {
        "prefix": "model.", "names": LLAMA_NAMES, "sizes": SIZES, "fixed": LLAMA_FIXED, "parts": (rope(),),
        "drop": ("rotary_emb.inv_freq",),
    }  # fmt: skip
    return Family(kind, architecture, **standard | changes)


QK_EPSILON = {"rms_norm_eps": ("block.norm.epsilon", "block.attention.qk_norm.epsilon")}
WINDOW = {"sliding_window": "block.attention.window"}  # of all layers alike
HEAD_DIM = {"head_dim": "block.attention.head_dim"}
ATTENTION_BIAS = {"attention_bias": ("block.attention.bias", "block.attention.out_bias")}
LLAMA_DEFAULTS = {
    "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False, "num_key_value_heads": None,
    "head_dim": None, "max_position_embeddings": 2048, "attention_bias": False, "mlp_bias": False,
}  # fmt: skip

# --- the families --------------------------------------------------------------------------------------------------

LLAMA = llama_like(
    "llama", "LlamaForCausalLM",
    sizes=SIZES | HEAD_DIM | ATTENTION_BIAS | {"mlp_bias": "block.ffn.bias"}, defaults=LLAMA_DEFAULTS,
)  # fmt: skip
MISTRAL = llama_like(
    "mistral", "MistralForCausalLM", sizes=SIZES | HEAD_DIM | WINDOW,
    defaults=LLAMA_DEFAULTS | {"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096},
)  # fmt: skip
QWEN2 = llama_like(
    "qwen2", "Qwen2ForCausalLM", sizes=SIZES, fixed=LLAMA_FIXED | {"block.attention.bias": True},
    defaults=LLAMA_DEFAULTS | {
        "num_key_value_heads": 32, "max_position_embeddings": 32_768, "use_sliding_window": False,
        "sliding_window": 4096, "max_window_layers": 28,
    },
    parts=(rope(), qwen_windows()),
)  # fmt: skip
QWEN3 = llama_like(
    "qwen3", "Qwen3ForCausalLM", names=table(LLAMA_NAMES, QK_NORMS),
    sizes=SIZES | HEAD_DIM | ATTENTION_BIAS | QK_EPSILON,
    fixed=LLAMA_FIXED | {"block.attention.qk_norm.kind": "rmsnorm"},
    defaults=LLAMA_DEFAULTS | {
        "num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32_768, "use_sliding_window": False,
        "sliding_window": 4096, "max_window_layers": 28,
    },
    parts=(rope(), qwen_windows()),
)  # fmt: skip


def gemma(kind: str, architecture: str, **changes: Any) -> Family:
    standard = {
        "fixed": LLAMA_FIXED | {"block.norm.unit_offset": True}, "sizes": SIZES | HEAD_DIM | ATTENTION_BIAS,
        "defaults": LLAMA_DEFAULTS | {
            "tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh", "head_dim": 256,
            "max_position_embeddings": 8192,
        },
        "parts": (rope(), EMBED_SCALE),
    }  # fmt: skip
    return llama_like(kind, architecture, **standard | changes)


EMBED_SCALE = Part(lambda given: {"embed_scale": math.sqrt(given["hidden_size"])}, lambda cfg: {})
QUERY_SCALE = Part(
    lambda given: {"block.attention.scale": given["query_pre_attn_scalar"] ** -0.5},
    lambda cfg: {"query_pre_attn_scalar": _whole(cfg.block.attention.scale**-2)},
)


def _whole(x: float) -> float | int:
    """An integer, if only rounding keeps `x` from being one."""
    return round(x) if abs(x - round(x)) < 1e-9 * abs(x) else x


SANDWICH = layers(
    "model.layers.{}", norm("post_attention_layernorm", "post_attention"), norm("pre_feedforward_layernorm", "norm_ffn"),
    norm("post_feedforward_layernorm", "post_ffn"),
)  # fmt: skip
GEMMA2_NAMES = table(
    outside("model.embed_tokens", "model.norm"),
    layers("model.layers.{}", projections("self_attn"), gated(), norm("input_layernorm", "norm_attention")), SANDWICH,
)  # fmt: skip
GEMMA2_SIZES = but(SIZES, "hidden_act") | HEAD_DIM | ATTENTION_BIAS | {
    "hidden_activation": "block.ffn.activation", "final_logit_softcapping": "logit_softcap",
    "attn_logit_softcapping": "block.attention.softcap",
}  # fmt: skip
GEMMA2_DEFAULTS = {
    "vocab_size": 256_000, "rms_norm_eps": 1e-6, "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True,
    "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 8192, "attention_bias": False,
    "query_pre_attn_scalar": 256, "sliding_window": 4096, "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}  # fmt: skip


def _gemma3_layers() -> Part:
    """Local layers with a window and a shorter wavelength, every sixth global (arXiv:2503.19786, section 2)."""
    pattern = windows(6)

    def ours(given: Given) -> dict[str, Any]:
        said = given.get("rope_parameters") or {}
        if "full_attention" in said:
            of = {"full": said["full_attention"], "sliding": said["sliding_attention"]}
        else:
            of = {
                "full": {"rope_theta": given.get("rope_theta", 1e6), **(given.get("rope_scaling") or {})},
                "sliding": {"rope_theta": given.get("rope_local_base_freq", 10_000.0)},
            }
        full, sliding = (_rope(given, of[k], 10_000.0, 1.0, False) for k in ("full", "sliding"))
        rows = pattern.ours(given)[LAYERS]
        for row in rows:
            row["attention.position"] = full if row["attention.window"] is None else sliding
        return {"position": full, LAYERS: rows}

    def theirs(cfg: DecoderConfig) -> dict[str, Any]:
        said = pattern.theirs(cfg)
        every = [cfg.layer(i).attention for i in range(cfg.num_layers)]
        full = next((a for a in every if a.window is None), every[0])
        sliding = next((a for a in every if a.window is not None), every[0])
        named = {"full_attention": full, "sliding_attention": sliding}
        parameters = {n: _rope_parameters(cfg, a.position).get("rope_parameters") for n, a in named.items()}
        return said | ({"rope_parameters": parameters} if all(parameters.values()) else {})

    return Part(ours, theirs)


GEMMA = gemma("gemma", "GemmaForCausalLM", only={"use_bidirectional_attention": None})
GEMMA2 = gemma(
    "gemma2", "Gemma2ForCausalLM", names=GEMMA2_NAMES, sizes=GEMMA2_SIZES, defaults=GEMMA2_DEFAULTS,
    fixed=LLAMA_FIXED | {"block.norm.unit_offset": True, "block.placement.kind": "sandwich"},
    parts=(rope(), EMBED_SCALE, QUERY_SCALE, windows(2)), only={"use_bidirectional_attention": None},
)  # fmt: skip
GEMMA3 = gemma(
    "gemma3_text", "Gemma3ForCausalLM", names=table(GEMMA2_NAMES, QK_NORMS),
    sizes=but(GEMMA2_SIZES, "attn_logit_softcapping") | QK_EPSILON,
    defaults=GEMMA2_DEFAULTS | {
        "vocab_size": 262_208, "max_position_embeddings": 131_072, "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
    },
    fixed=LLAMA_FIXED | {
        "block.norm.unit_offset": True, "block.placement.kind": "sandwich", "block.attention.qk_norm.kind": "rmsnorm",
        "block.attention.qk_norm.unit_offset": True,
    },
    parts=(EMBED_SCALE, QUERY_SCALE, _gemma3_layers()),
    only={"use_bidirectional_attention": False, "attn_logit_softcapping": None},
)  # fmt: skip
OLMO = llama_like(
    "olmo", "OlmoForCausalLM",
    sizes=but(SIZES, "rms_norm_eps") | ATTENTION_BIAS | {"clip_qkv": "block.attention.clip"},
    fixed=LLAMA_FIXED | {
        "block.norm.kind": "layernorm", "block.norm.bias": False, "block.norm.scale": False, "block.norm.epsilon": 1e-5,
    },
    defaults=LLAMA_DEFAULTS | {"clip_qkv": None},
)  # fmt: skip
OLMO2 = llama_like(
    "olmo2", "Olmo2ForCausalLM", sizes=SIZES | ATTENTION_BIAS | QK_EPSILON,
    names=table(
        outside("model.embed_tokens", "model.norm"), QK_NORMS,
        layers("model.layers.{}", projections("self_attn"), gated(),
               norms("post_attention_layernorm", "post_feedforward_layernorm")),
    ),
    fixed=LLAMA_FIXED | {
        "block.placement.kind": "res_post", "block.attention.qk_norm.kind": "rmsnorm",
        "block.attention.qk_norm_over": "heads",
    },
    defaults=LLAMA_DEFAULTS | {"rms_norm_eps": 1e-5},
)  # fmt: skip
PHI3 = llama_like(
    "phi3", "Phi3ForCausalLM",
    names=table(
        outside("model.embed_tokens", "model.norm"),
        layers("model.layers.{}", fused("self_attn.qkv_proj", QKV), linear("self_attn.o_proj", "attention.o", inputs=2),
               fused("mlp.gate_up_proj", ("ffn.gate", "ffn.up")), linear("mlp.down_proj", "ffn.down"), norms()),
    ),
    defaults=LLAMA_DEFAULTS | {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "sliding_window": None},
    sizes=SIZES | WINDOW,
    parts=(rope(), Part(
        lambda given: {},
        lambda cfg: {"original_max_position_embeddings": at(cfg, "block.attention.position.scaling.original") or cfg.context},
    )),
)  # fmt: skip
PHI = Family(
    "phi", "PhiForCausalLM", prefix="model.",
    names=table(
        outside("model.embed_tokens", "model.final_layernorm"),
        layers("model.layers.{}", projections("self_attn", o="dense"), plain("mlp.fc1", "mlp.fc2"),
               norm("input_layernorm", "norm_attention"), norm("self_attn.q_layernorm", "attention.q_norm"),
               norm("self_attn.k_layernorm", "attention.k_norm")),
    ),
    sizes=but(SIZES, "rms_norm_eps") | {"layer_norm_eps": "block.norm.epsilon"},
    fixed=LAYERNORM | BIASES | {"block.placement.kind": "parallel", "head_bias": True},
    defaults={
        "layer_norm_eps": 1e-5, "hidden_act": "gelu_new", "tie_word_embeddings": False, "num_key_value_heads": None,
        "max_position_embeddings": 2048, "qk_layernorm": False,
    },
    parts=(rope(fraction=0.5), Part(
        lambda given: {"block.attention.qk_norm": {"kind": "layernorm", "epsilon": given["layer_norm_eps"]}
                       if given["qk_layernorm"] else None},
        lambda cfg: {"qk_layernorm": cfg.block.attention.qk_norm is not None},
    )),
    drop=("rotary_emb.inv_freq",),
)  # fmt: skip
STARCODER2 = Family(
    "starcoder2", "Starcoder2ForCausalLM", prefix="model.",
    names=table(
        outside("model.embed_tokens", "model.norm"),
        layers("model.layers.{}", projections("self_attn"), plain("mlp.c_fc", "mlp.c_proj"), norms()),
    ),
    sizes=but(SIZES, "rms_norm_eps") | WINDOW | {
        "norm_epsilon": "block.norm.epsilon",
        "use_bias": ("block.ffn.bias", "block.attention.bias", "block.attention.out_bias"),
    },
    fixed=LAYERNORM,
    defaults={
        "norm_epsilon": 1e-5, "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True, "num_key_value_heads": 2,
        "max_position_embeddings": 4096, "sliding_window": None, "use_bias": True,
    },
    parts=(rope(),),
)  # fmt: skip
GPT2 = Family(
    "gpt2", "GPT2LMHeadModel", prefix="transformer.",
    names=table(
        outside("transformer.wte", "transformer.ln_f"), tensor("transformer.wpe.weight", "positions"),
        layers("transformer.h.{}", fused("attn.c_attn", QKV, transposed=False),
               linear("attn.c_proj", "attention.o", inputs=2, transposed=False),
               plain("mlp.c_fc", "mlp.c_proj", transposed=False), norms("ln_1", "ln_2")),
    ),
    sizes=GPT2_SIZES, fixed=LAYERNORM | BIASES | {"position.kind": "learned"},
    defaults={
        "n_positions": 1024, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
        "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
    },
    only={"add_cross_attention": False},
    parts=(width("n_inner"), Part(
        lambda given: {LAYERS: [{"attention.scale": scale} for scale in _gpt2_scales(given)]},
        lambda cfg: {"scale_attn_weights": _scaled_as_usual(cfg),
                     "scale_attn_by_inverse_layer_idx": cfg.num_layers > 1 and cfg.layer(1).attention.scale < 0.75 * cfg.layer(0).attention.scale},
    )),
    drop=("attn.bias", "attn.masked_bias"),
)  # fmt: skip


def _gpt2_scales(given: Given) -> list[float]:
    """What multiplies the logits of each layer."""
    scale = (given["n_embd"] // given["n_head"]) ** -0.5 if given["scale_attn_weights"] else 1.0
    by_layer = given["scale_attn_by_inverse_layer_idx"]
    return [scale / (i + 1) if by_layer else scale for i in range(given["n_layer"])]


GPT1 = Family(
    "openai-gpt", "OpenAIGPTLMHeadModel", prefix="transformer.",
    names=table(
        outside("transformer.tokens_embed", None), tensor("transformer.positions_embed.weight", "positions"),
        layers("transformer.h.{}", fused("attn.c_attn", QKV, transposed=False),
               linear("attn.c_proj", "attention.o", inputs=2, transposed=False),
               plain("mlp.c_fc", "mlp.c_proj", transposed=False), norms("ln_1", "ln_2")),
    ),
    sizes=but(GPT2_SIZES, "activation_function"),
    fixed=LAYERNORM | BIASES | {"position.kind": "learned", "block.placement.kind": "post", "final_norm": False},
    defaults={"n_positions": 512, "afn": "gelu", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
    parts=(Part(lambda given: {"block.ffn.mlp": 4 * given["n_embd"]}, lambda cfg: {}), Part(
        # its "gelu" is the approximation
        lambda given: {"block.ffn.activation": {"gelu": "gelu_tanh", "relu": "relu", "silu": "silu", "swish": "silu"}[given["afn"]]},
        lambda cfg: {"afn": {"gelu_tanh": "gelu", "relu": "relu", "silu": "silu"}.get(cfg.block.ffn.activation)},
    )),
    drop=("attn.bias",),
)  # fmt: skip
GPT_NEO = Family(
    "gpt_neo", "GPTNeoForCausalLM", prefix="transformer.",
    names=table(
        outside("transformer.wte", "transformer.ln_f"), tensor("transformer.wpe.weight", "positions"),
        layers("transformer.h.{}", projections("attn.attention", o="out_proj"), plain("mlp.c_fc", "mlp.c_proj"),
               norms("ln_1", "ln_2")),
    ),
    sizes={
        "vocab_size": "vocab", "hidden_size": "embed", "num_layers": "num_layers", "max_position_embeddings": "context",
        "num_heads": "block.attention.num_heads", "activation_function": "block.ffn.activation",
        "layer_norm_epsilon": "block.norm.epsilon", "tie_word_embeddings": "tie",
    },
    fixed=LAYERNORM | {
        "block.ffn.bias": True, "block.attention.out_bias": True, "position.kind": "learned", "block.attention.scale": 1.0,
    },
    defaults={
        "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True, "window_size": 256,
        "attention_types": [[["global", "local"], 12]],
    },
    parts=(width("intermediate_size", embed="hidden_size"), Part(
        lambda given: {LAYERS: [
            {"attention.window": given["window_size"] if kind == "local" else None}
            for kinds, times in given["attention_types"] for kind in list(kinds) * times
        ]},
        lambda cfg: _neo_types([cfg.layer(i).attention.window for i in range(cfg.num_layers)]),
    )),
    drop=("attn.attention.bias", "attn.attention.masked_bias"),
)  # fmt: skip


def _neo_types(found: Sequence[int | None]) -> dict[str, Any]:
    kinds = ["global" if window is None else "local" for window in found]
    return {"attention_types": [[kinds, 1]], "window_size": next((w for w in found if w), 256)}


GPTJ = Family(
    "gptj", "GPTJForCausalLM", prefix="transformer.",
    names=table(
        outside("transformer.wte", "transformer.ln_f"),
        layers("transformer.h.{}", projections("attn", o="out_proj"), plain("mlp.fc_in", "mlp.fc_out"),
               norm("ln_1", "norm_attention")),
    ),
    sizes=GPT2_SIZES,
    fixed=LAYERNORM | {"block.ffn.bias": True, "block.placement.kind": "parallel", "head_bias": True},
    defaults={
        "n_positions": 2048, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": False,
    },
    parts=(width("n_inner"), rotary_dim()), drop=("attn.bias", "attn.masked_bias"),
)  # fmt: skip
CODEGEN = Family(
    "codegen", "CodeGenForCausalLM", prefix="transformer.",
    names=table(
        outside("transformer.wte", "transformer.ln_f"),
        layers("transformer.h.{}",
               (Row(("attn.qkv_proj.weight",), ("attention.w_q", "attention.w_k", "attention.w_v"), in_shares((0, 2, 1), 4)),),
               linear("attn.out_proj", "attention.o", inputs=2), plain("mlp.fc_in", "mlp.fc_out"),
               norm("ln_1", "norm_attention")),
    ),
    sizes=GPT2_SIZES, fixed=GPTJ.fixed, defaults=GPTJ.defaults, parts=GPTJ.parts, drop=("attn.causal_mask",),
)  # fmt: skip
GPT_NEOX = Family(
    "gpt_neox", "GPTNeoXForCausalLM", prefix="gpt_neox.",
    names=table(
        outside("gpt_neox.embed_in", "gpt_neox.final_layer_norm", "embed_out"),
        layers("gpt_neox.layers.{}", heads_fused("attention.query_key_value"),
               linear("attention.dense", "attention.o", inputs=2), plain("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"), norms()),
    ),
    sizes=but(SIZES, "rms_norm_eps", "num_key_value_heads") | ATTENTION_BIAS | {"layer_norm_eps": "block.norm.epsilon"},
    fixed=LAYERNORM | {"block.ffn.bias": True},
    defaults={
        "layer_norm_eps": 1e-5, "hidden_act": "gelu", "tie_word_embeddings": False, "max_position_embeddings": 2048,
        "use_parallel_residual": True, "attention_bias": True,
    },
    parts=(rope(fraction=0.25), Part(
        lambda given: {"block.placement": {"kind": "parallel", "norms": 2} if given["use_parallel_residual"] else {"kind": "pre"}},
        lambda cfg: {"use_parallel_residual": cfg.block.placement.kind == "parallel"},
    )),
    drop=("attention.bias", "attention.masked_bias", "rotary_emb.inv_freq"),
)  # fmt: skip
OPT = Family(
    "opt", "OPTForCausalLM", prefix="model.",
    names=table(
        outside("model.decoder.embed_tokens", "model.decoder.final_layer_norm"),
        tensor("model.decoder.embed_positions.weight", "positions"),
        tensor("model.decoder.project_in.weight", "table_in", matrix()),
        tensor("model.decoder.project_out.weight", "table_out", matrix()),
        layers("model.decoder.layers.{}", projections("self_attn", o="out_proj"), plain("fc1", "fc2"),
               norms("self_attn_layer_norm", "final_layer_norm")),
    ),
    sizes={
        "vocab_size": "vocab", "hidden_size": "embed", "num_hidden_layers": "num_layers",
        "max_position_embeddings": "context", "num_attention_heads": "block.attention.num_heads",
        "ffn_dim": "block.ffn.mlp", "activation_function": "block.ffn.activation", "tie_word_embeddings": "tie",
        "enable_bias": ("block.ffn.bias", "block.attention.bias", "block.attention.out_bias"),
        "layer_norm_elementwise_affine": ("block.norm.scale", "block.norm.bias"),
    },
    fixed=LAYERNORM | {"position.kind": "learned", "position.offset": 2, "block.norm.epsilon": 1e-5},
    defaults={
        "max_position_embeddings": 2048, "activation_function": "relu", "tie_word_embeddings": True, "enable_bias": True,
        "layer_norm_elementwise_affine": True, "do_layer_norm_before": True, "_remove_final_layer_norm": False,
    },
    parts=(Part(
        lambda given: {"block.placement.kind": "pre" if given["do_layer_norm_before"] else "post",
                       "final_norm": given["do_layer_norm_before"] and not given["_remove_final_layer_norm"],
                       "table": given.get("word_embed_proj_dim") if given.get("word_embed_proj_dim") != given["hidden_size"] else None},
        lambda cfg: {"do_layer_norm_before": cfg.block.placement.kind == "pre", "word_embed_proj_dim": cfg.table_width,
                     "_remove_final_layer_norm": cfg.block.placement.kind == "pre" and not cfg.final_norm},
    ),),
)  # fmt: skip
BLOOM = Family(
    "bloom", "BloomForCausalLM", prefix="transformer.",
    names=table(
        outside("transformer.word_embeddings", "transformer.ln_f"),
        norm("transformer.word_embeddings_layernorm", "embedding_norm"),
        layers("transformer.h.{}", heads_fused("self_attention.query_key_value"),
               linear("self_attention.dense", "attention.o", inputs=2), plain("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
               norms()),
    ),
    sizes={
        "vocab_size": "vocab", "hidden_size": "embed", "n_layer": "num_layers", "n_head": "block.attention.num_heads",
        "layer_norm_epsilon": ("block.norm.epsilon", "embedding_norm.epsilon"), "tie_word_embeddings": "tie",
    },
    fixed=LAYERNORM | BIASES | {
        "position.kind": "alibi", "block.ffn.activation": "gelu_tanh", "embedding_norm.kind": "layernorm",
    },
    defaults={
        "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True, "apply_residual_connection_post_layernorm": False,
        "seq_length": 2048,
    },
    parts=(Part(lambda given: {"block.ffn.mlp": 4 * given["hidden_size"], "context": given["seq_length"]},
                lambda cfg: {"seq_length": cfg.context}), Part(
        lambda given: {"block.placement.kind": "normed_residual" if given["apply_residual_connection_post_layernorm"] else "pre"},
        lambda cfg: {"apply_residual_connection_post_layernorm": cfg.block.placement.kind == "normed_residual"},
    )),
)  # fmt: skip


def _falcon_ours(given: Given) -> dict[str, Any]:
    new, parallel, heads = given["new_decoder_architecture"], given["parallel_attn"], given["num_attention_heads"]
    kv = given.get("num_kv_heads") or heads if new else 1 if given["multi_query"] else heads
    norms = (given.get("num_ln_in_parallel_attn") or 2) if new else 1
    out: dict[str, Any] = {
        "block.attention.num_kv_heads": kv, "block.ffn.mlp": given.get("ffn_hidden_size") or 4 * given["hidden_size"],
        "block.placement": {"kind": "parallel", "norms": norms} if parallel else {"kind": "pre"},
    }  # fmt: skip
    if new and not parallel:
        raise given.refuse("parallel_attn", "with new_decoder_architecture only true makes sense")
    if given["alibi"]:
        scale = (given["hidden_size"] // heads) ** -0.5
        return out | {"position": {"kind": "alibi", "scale": scale, "rounded": True}}
    return out | rope().ours(given)


def _falcon_theirs(cfg: DecoderConfig) -> dict[str, Any]:
    a, placement = cfg.block.attention, cfg.block.placement
    two = placement.kind == "parallel" and placement.norms == 2
    new = two or 1 < a.num_kv_heads < a.num_heads or placement.kind == "parallel" and a.num_kv_heads == a.num_heads
    said = {
        "new_decoder_architecture": new, "num_kv_heads": a.num_kv_heads, "multi_query": a.num_kv_heads == 1,
        "parallel_attn": placement.kind == "parallel", "num_ln_in_parallel_attn": 2 if two else 1 if new else None,
        "ffn_hidden_size": cfg.block.ffn.mlp, "alibi": at(a, "position.kind") == "alibi",
    }  # fmt: skip
    return said if said["alibi"] else said | _rope_parameters(cfg, a.position)


def _falcon_names(cfg: DecoderConfig) -> Table:
    """Where each branch has a norm of its own, they have other names."""
    own = getattr(cfg.block.placement, "norms", 1) == 2
    return table(
        outside("transformer.word_embeddings", "transformer.ln_f"),
        layers(
            "transformer.h.{}", heads_fused("self_attention.query_key_value"),
            linear("self_attention.dense", "attention.o", inputs=2), plain("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
            norms("ln_attn", "ln_mlp") if own else norms(),
        ),
    )  # fmt: skip


FALCON = Family(
    "falcon", "FalconForCausalLM", prefix="transformer.",
    names=_falcon_names,
    sizes={
        "vocab_size": "vocab", "hidden_size": "embed", "num_hidden_layers": "num_layers",
        "num_attention_heads": "block.attention.num_heads", "max_position_embeddings": "context",
        "activation": "block.ffn.activation", "layer_norm_epsilon": "block.norm.epsilon", "tie_word_embeddings": "tie",
        "bias": ("block.ffn.bias", "block.attention.bias", "block.attention.out_bias"),
    },
    fixed=LAYERNORM,
    defaults={
        "max_position_embeddings": 2048, "activation": "gelu", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
        "bias": False, "alibi": False, "new_decoder_architecture": False, "multi_query": True, "parallel_attn": True,
    },
    parts=(Part(_falcon_ours, _falcon_theirs),), also=("RefinedWeb", "RefinedWebModel"),
)  # fmt: skip
MPT = Family(
    "mpt", "MptForCausalLM", prefix="transformer.",
    names=table(
        outside("transformer.wte", "transformer.norm_f"),
        layers("transformer.blocks.{}", fused("attn.Wqkv", QKV), linear("attn.out_proj", "attention.o", inputs=2),
               plain("ffn.up_proj", "ffn.down_proj"), norms("norm_1", "norm_2")),
    ),
    sizes={
        "vocab_size": "vocab", "d_model": "embed", "n_layers": "num_layers", "n_heads": "block.attention.num_heads",
        "max_seq_len": "context", "layer_norm_epsilon": "block.norm.epsilon", "tie_word_embeddings": "tie",
    },
    fixed=LAYERNORM | {"block.norm.bias": False, "block.ffn.activation": "gelu"},
    defaults={
        "max_seq_len": 2048, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True, "expansion_ratio": 4,
        "attn_config": {}, "no_bias": True, "logit_scale": None,
    },
    only={"no_bias": True, "logit_scale": None, "expansion_ratio": 4},
    parts=(Part(lambda given: _mpt_ours(given), lambda cfg: _mpt_theirs(cfg)),),
)  # fmt: skip


def _mpt_ours(given: Given) -> dict[str, Any]:
    attn = given["attn_config"] or {}
    for key, right in (("qk_ln", False), ("prefix_lm", False), ("alibi", True), ("alibi_bias_max", 8)):
        if attn.get(key, right) != right:
            raise given.refuse("attn_config", f"{key} is read with {right} only")
    return {
        "block.ffn.mlp": 4 * given["d_model"], "block.attention.clip": attn.get("clip_qkv"),
        "block.attention.scale": attn.get("softmax_scale"), "position": {"kind": "alibi", "order": "odd_first"},
    }  # fmt: skip


def _mpt_theirs(cfg: DecoderConfig) -> dict[str, Any]:
    a = cfg.block.attention
    own = None if _scaled_as_usual(cfg) else a.scale
    return {
        "attn_config": {"model_type": "", "alibi": True, "clip_qkv": a.clip, "softmax_scale": own},
    }


def _bigcode_names(cfg: DecoderConfig) -> Table:
    """All query heads, then the one key and value head; head by head where each has its own."""
    shared = cfg.block.attention.kv_heads == 1
    return table(
        outside("transformer.wte", "transformer.ln_f"), tensor("transformer.wpe.weight", "positions"),
        layers(
            "transformer.h.{}", fused("attn.c_attn", QKV) if shared else heads_fused("attn.c_attn"),
            linear("attn.c_proj", "attention.o", inputs=2), plain("mlp.c_fc", "mlp.c_proj"), norms("ln_1", "ln_2"),
        ),
    )  # fmt: skip


GPT_BIGCODE = Family(
    "gpt_bigcode", "GPTBigCodeForCausalLM", prefix="transformer.",
    names=_bigcode_names,
    sizes=GPT2_SIZES, fixed=LAYERNORM | BIASES | {"position.kind": "learned"},
    defaults={
        "n_positions": 1024, "activation_function": "gelu_pytorch_tanh", "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True, "scale_attn_weights": True, "multi_query": True,
    },
    only={"add_cross_attention": False},
    parts=(width("n_inner"), Part(
        lambda given: {"block.attention.num_kv_heads": 1 if given["multi_query"] else None,
                       "block.attention.scale": None if given["scale_attn_weights"] else 1.0},
        lambda cfg: {"multi_query": cfg.block.attention.num_kv_heads == 1,
                     "scale_attn_weights": _scaled_as_usual(cfg)},
    )),
    drop=("attn.bias", "attn.masked_bias"),
)  # fmt: skip
CTRL = Family(
    "ctrl", "CTRLLMHeadModel", prefix="transformer.",
    names=table(
        outside("transformer.w", "transformer.layernorm"), tensor("lm_head.bias", "head_bias"),
        layers("transformer.h.{}", projections("multi_head_attention", "Wq", "Wk", "Wv", "dense"),
               plain("ffn.0", "ffn.2"), norms("layernorm1", "layernorm2")),
    ),
    sizes={
        "vocab_size": "vocab", "n_embd": "embed", "n_layer": "num_layers", "n_positions": "context",
        "n_head": "block.attention.num_heads", "dff": "block.ffn.mlp", "tie_word_embeddings": "tie",
    },
    fixed=LAYERNORM | BIASES | {
        "position": {"kind": "sinusoidal", "halves": True}, "block.norm.epsilon": 1e-6, "block.ffn.activation": "relu",
        "head_bias": True,
    },
    defaults={"n_positions": 256, "tie_word_embeddings": True},
    only={"layer_norm_epsilon": 1e-6},
    parts=(Part(lambda given: {"embed_scale": math.sqrt(given["n_embd"])}, lambda cfg: {}),),
    drop=("pos_encoding",),
)  # fmt: skip
XGLM = Family(
    "xglm", "XGLMForCausalLM", prefix="model.",
    names=table(
        outside("model.embed_tokens", "model.layer_norm"),
        layers("model.layers.{}", projections("self_attn", o="out_proj"), plain("fc1", "fc2"),
               norms("self_attn_layer_norm", "final_layer_norm")),
    ),
    sizes={
        "vocab_size": "vocab", "d_model": "embed", "num_layers": "num_layers", "max_position_embeddings": "context",
        "attention_heads": "block.attention.num_heads", "ffn_dim": "block.ffn.mlp",
        "activation_function": "block.ffn.activation", "tie_word_embeddings": "tie",
    },
    fixed=LAYERNORM | BIASES | {
        "position": {"kind": "sinusoidal", "halves": True, "reaches_base": True, "offset": 2}, "block.norm.epsilon": 1e-5,
    },
    defaults={
        "max_position_embeddings": 2048, "activation_function": "gelu", "tie_word_embeddings": True,
        "scale_embedding": True,
    },
    only={"add_cross_attention": False},
    parts=(Part(
        lambda given: {"embed_scale": math.sqrt(given["d_model"]) if given["scale_embedding"] else 1.0},
        lambda cfg: {"scale_embedding": cfg.embed_scale != 1.0},
    ),),
    drop=("embed_positions.weights",),
)  # fmt: skip
GLM = llama_like(
    "glm", "GlmForCausalLM",
    names=table(
        outside("model.embed_tokens", "model.norm"),
        layers("model.layers.{}", projections("self_attn"), fused("mlp.gate_up_proj", ("ffn.gate", "ffn.up")),
               linear("mlp.down_proj", "ffn.down"), norms()),
    ),
    sizes=SIZES | HEAD_DIM | {"attention_bias": "block.attention.bias"},
    defaults=LLAMA_DEFAULTS | {
        "num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1.5625e-07, "max_position_embeddings": 131_072,
        "attention_bias": True,
    },
    parts=(rope(fraction=0.5, interleaved=True),),
)  # fmt: skip

FAMILIES: tuple[Family, ...] = (
    LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA, GEMMA2, GEMMA3, OLMO, OLMO2, PHI3, PHI, STARCODER2, GPT2, GPT1, GPT_NEO, GPTJ,
    CODEGEN, GPT_NEOX, OPT, BLOOM, FALCON, MPT, GPT_BIGCODE, CTRL, XGLM, GLM,
)  # fmt: skip
