"""The families of decoders with mixtures of experts: a name table and the keys of `config.json` for each.

Files hold the matrices of each expert apart, as models on the hub do and transformers 5 writes them, though it computes
with stacked ones.
"""

from collections.abc import Callable
from typing import Any

from jaxllm.core.errors import ConfigError
from jaxllm.interop.decoders import (
    ATTENTION_BIAS,
    HEAD_DIM,
    LLAMA_DEFAULTS,
    LLAMA_FIXED,
    QK_EPSILON,
    QK_NORMS,
    SIZES,
    WINDOW,
    but,
    gated,
    llama_like,
    norms,
    outside,
    projections,
    qwen_windows,
    rope,
)
from jaxllm.interop.family import ACTIVATIONS_OF_OURS, LAYERS, Given, Part, activation
from jaxllm.interop.names import ROW, Table, experts, layers, linear, table, tensor
from jaxllm.models.config import DecoderConfig

# --- names ---------------------------------------------------------------------------------------------------------


def names(module: str = "mlp", gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> Callable:
    """The table of LLaMA with mixtures, by config; layers may have LLaMA's feed-forward instead.

    Args:
      module: of the mixture.
      gate, up, down: matrices of an expert.
    """

    def of(cfg: DecoderConfig) -> Table:
        count = max((moe.experts for moe in cfg.mixtures), default=0)
        matrices = (("gate", gate), ("up", up), ("down", down))
        return table(
            outside("model.embed_tokens", "model.norm"), QK_NORMS,
            layers(
                "model.layers.{}", projections("self_attn"), norms(), gated(), linear(f"{module}.gate", "ffn.router"),
                *(experts(f"{module}.experts.{{e}}.{theirs}", f"ffn.experts.{x}", count) for x, theirs in matrices),
                *(linear(f"{module}.shared_expert.{theirs}", f"ffn.shared.{x}") for x, theirs in matrices),
                tensor(f"{module}.shared_expert_gate.weight", "ffn.w_shared", ROW),
            ),
        )  # fmt: skip

    return of


# --- keys ----------------------------------------------------------------------------------------------------------


def layered(*parts: Part) -> Part:
    """Parts that each say something of every layer, as one."""

    def ours(given: Given) -> dict[str, Any]:
        found = [part.ours(given)[LAYERS] for part in parts]
        return {LAYERS: [{k: x for row in layer for k, x in row.items()} for layer in zip(*found, strict=True)]}

    return Part(ours, lambda cfg: {k: x for part in parts for k, x in part.theirs(cfg).items()})


def feed_forwards(*keys: str, shared: bool = False) -> Part:
    """Mixtures in every `decoder_sparse_step`-th layer that is not among `mlp_only_layers`, elsewhere one feed-forward.

    Args:
      keys: of the number of experts; the first one found is read, all are written.
      shared: whether each mixture has a shared expert with a gate.
    """

    def ours(given: Given) -> dict[str, Any]:
        count = next((n for key in keys if (n := given.get(key)) is not None), None)
        if count is None:
            raise given.refuse(keys[0], "must be the number of experts")
        same = {"ffn.glu": True, "ffn.activation": activation(given, "hidden_act")}
        dense = same | {"ffn.kind": "dense", "ffn.mlp": given["intermediate_size"]}
        moe = same | {
            "ffn.kind": "moe", "ffn.experts": count, "ffn.top_k": given["num_experts_per_tok"],
            "ffn.mlp": given["moe_intermediate_size"],
            "ffn.router": {"kind": "softmax", "renormalise": given["norm_topk_prob"]},
        }  # fmt: skip
        if shared:
            moe["ffn.shared"] = {"mlp": given["shared_expert_intermediate_size"], "gate": True}
        alone, every = given["mlp_only_layers"] or (), given["decoder_sparse_step"]
        if not isinstance(every, int) or every < 1:
            raise given.refuse("decoder_sparse_step", "must be 1 or more")
        sparse = [count > 0 and i not in alone and (i + 1) % every == 0 for i in range(given["num_hidden_layers"])]
        return {LAYERS: [moe if is_moe else dense for is_moe in sparse]}

    def theirs(cfg: DecoderConfig) -> dict[str, Any]:
        every = [cfg.layer(i).ffn for i in range(cfg.num_layers)]
        moe = next((ffn for ffn in every if ffn.kind == "moe"), None)
        if moe is None:
            raise ConfigError("a family of mixtures has no model without any: block.ffn.kind is 'dense' in all layers")
        dense = next((ffn for ffn in every if ffn.kind == "dense"), moe)
        said = dict.fromkeys(keys, moe.experts) | {
            "num_experts_per_tok": moe.top_k, "moe_intermediate_size": moe.mlp, "intermediate_size": dense.mlp,
            "hidden_act": ACTIVATIONS_OF_OURS[moe.activation], "norm_topk_prob": moe.router.renormalise,
            "decoder_sparse_step": 1, "mlp_only_layers": [i for i, ffn in enumerate(every) if ffn.kind == "dense"],
        }  # fmt: skip
        return said | ({"shared_expert_intermediate_size": moe.shared.mlp if moe.shared else 0} if shared else {})

    return Part(ours, theirs)


def _said_windows() -> Part:
    """As `qwen_windows`, but which layers slide must be said: versions of transformers differ in what they assume."""
    known = qwen_windows()

    def ours(given: Given) -> dict[str, Any]:
        if given.get("use_sliding_window") and not given.get("layer_types"):
            raise given.refuse("layer_types", "must say which layers have a window, with use_sliding_window")
        return known.ours(given)

    return Part(ours, known.theirs)


def _window() -> Part:
    """One window of all layers, if `use_sliding_window`."""
    return Part(
        lambda given: {
            "block.attention.window": given.get("sliding_window") if given.get("use_sliding_window") else None
        },
        lambda cfg: {
            "sliding_window": cfg.block.attention.window,
            "use_sliding_window": cfg.block.attention.window is not None,
        },
    )


QWEN_SIZES = but(SIZES, "intermediate_size", "hidden_act")
QWEN_DEFAULTS = but(LLAMA_DEFAULTS, "mlp_bias") | {
    "max_position_embeddings": 32_768, "use_sliding_window": False, "sliding_window": 4096, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "norm_topk_prob": False,
}  # fmt: skip
QWEN_FIXED = but(LLAMA_FIXED, "block.ffn.glu")

# --- the families --------------------------------------------------------------------------------------------------

MIXTRAL = llama_like(
    "mixtral", "MixtralForCausalLM", names=names("block_sparse_moe", "w1", "w3", "w2"),
    sizes=SIZES | HEAD_DIM | WINDOW | {
        "num_local_experts": "block.ffn.experts", "num_experts_per_tok": "block.ffn.top_k",
    },
    fixed=LLAMA_FIXED | {"block.ffn.kind": "moe", "block.ffn.router": {"kind": "softmax", "renormalise": True}},
    defaults=but(LLAMA_DEFAULTS, "attention_bias", "mlp_bias") | {
        "rms_norm_eps": 1e-5, "num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": None,
        "num_local_experts": 8, "num_experts_per_tok": 2,
    },
    parts=(rope(1e6),),
)  # fmt: skip
QWEN2_MOE = llama_like(
    "qwen2_moe", "Qwen2MoeForCausalLM", names=names(), sizes=QWEN_SIZES | {"qkv_bias": "block.attention.bias"},
    fixed=QWEN_FIXED,
    defaults=but(QWEN_DEFAULTS, "attention_bias", "head_dim") | {
        "num_key_value_heads": 16, "max_window_layers": 28, "qkv_bias": True, "intermediate_size": 5632,
        "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "num_experts_per_tok": 4,
    },
    parts=(rope(), layered(_said_windows(), feed_forwards("num_experts", shared=True))),
)  # fmt: skip
QWEN3_MOE = llama_like(
    "qwen3_moe", "Qwen3MoeForCausalLM", names=names(), sizes=QWEN_SIZES | HEAD_DIM | ATTENTION_BIAS | QK_EPSILON,
    fixed=QWEN_FIXED | {"block.attention.qk_norm.kind": "rmsnorm"},
    defaults=QWEN_DEFAULTS | {
        "num_key_value_heads": 4, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts_per_tok": 8,
    },
    parts=(rope(), _window(), feed_forwards("num_experts", "num_local_experts")),
)  # fmt: skip
OLMOE = llama_like(
    "olmoe", "OlmoeForCausalLM", names=names(),
    sizes=SIZES | ATTENTION_BIAS | QK_EPSILON | {
        "num_experts": "block.ffn.experts", "num_experts_per_tok": "block.ffn.top_k",
        "norm_topk_prob": "block.ffn.router.renormalise",
    },
    fixed=LLAMA_FIXED | {
        "block.ffn.kind": "moe", "block.ffn.router.kind": "softmax", "block.attention.qk_norm.kind": "rmsnorm",
        "block.attention.qk_norm_over": "heads",
    },
    defaults=but(LLAMA_DEFAULTS, "mlp_bias", "head_dim") | {
        "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "num_experts": 64, "num_experts_per_tok": 8,
        "norm_topk_prob": False,
    },
    only={"clip_qkv": None},  # it would cut after the norms of queries and keys, here it cuts before
)  # fmt: skip

FAMILIES = (MIXTRAL, QWEN2_MOE, QWEN3_MOE, OLMOE)
