"""Families of decoders without a class in transformers: their code came with their weights, or in a repository.

What a comment says of a family is read from that code (`modeling_*.py` beside the weights, unless another place is
named), whose tensors and keys have these names; papers say what the code is for.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxllm.interop.decoders import (
    BIASES,
    CODEGEN,
    LAYERNORM,
    LLAMA_DEFAULTS,
    LLAMA_FIXED,
    SIZES,
    but,
    gated,
    llama_like,
    norms,
    outside,
    plain,
    projections,
    rope,
)
from jaxllm.interop.family import Family, Given, Part, at
from jaxllm.interop.names import QKV, Row, Table, elements_fused, fused, heads_fused, layers, linear, table, tensor
from jaxllm.models.config import DecoderConfig

# --- LLaMA with small changes --------------------------------------------------------------------------------------

# Yi (Young et al. 2024, arXiv:2403.04652): LLaMA with names of its own for norms; newer folders say `llama`.
YI = llama_like(
    "Yi", "YiForCausalLM",
    names=table(
        outside("model.embed_tokens", "model.norm"),
        layers("model.layers.{}", projections("self_attn"), gated(), norms("ln1", "ln2")),
    ),
    defaults=LLAMA_DEFAULTS | {"num_key_value_heads": 8, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    parts=(rope(theta=5e6),),
)  # fmt: skip
# Aquila and Aquila2 (BAAI, FlagAI): LLaMA.
AQUILA = llama_like("aquila", "AquilaForCausalLM", defaults=LLAMA_DEFAULTS)


def _internlm_ours(given: Given) -> dict[str, Any]:
    rotary = given.get("rotary")
    if rotary is None:
        return rope().ours(given)
    out: dict[str, Any] = {"position": {"kind": "rope", "theta": float(rotary["base"])}}
    if rotary["type"] == "dynamic":
        original = given["max_position_embeddings"]
        out["position"]["scaling"] = {
            "kind": "dynamic_ntk", "factor": rotary.get("scaling_factor", 1.0), "original": original,
        }  # fmt: skip
    elif rotary["type"] != "origin":
        raise given.refuse("rotary", "known: origin, dynamic")
    return out


def _internlm_theirs(cfg: DecoderConfig) -> dict[str, Any]:
    a = cfg.layer(0).attention
    rotary = {"base": at(a, "position.theta"), "type": "origin"}
    if at(a, "position.scaling"):
        rotary |= {"type": "dynamic", "scaling_factor": at(a, "position.scaling.factor")}
    return {"rotary": rotary}


# InternLM (2023): LLaMA with biases in attention.
INTERNLM = llama_like(
    "internlm", "InternLMForCausalLM",
    sizes=but(SIZES, "num_key_value_heads") | {"bias": ("block.attention.bias", "block.attention.out_bias")},
    defaults=LLAMA_DEFAULTS | {"bias": True}, parts=(Part(_internlm_ours, _internlm_theirs),),
)  # fmt: skip


def _baichuan_ours(given: Given) -> dict[str, Any]:
    """7B rotates and says `max_position_embeddings`; 13B has ALiBi and only `model_max_length`."""
    rotates = "max_position_embeddings" in given
    return {
        "context": given["max_position_embeddings" if rotates else "model_max_length"],
        "position": {"kind": "rope" if rotates else "alibi"},
        # The second generation's code knows z_loss_weight; its vocabulary tells where a config leaves that out.
        "head_norm": "z_loss_weight" in given or given["vocab_size"] == 125_696,
    }


def _baichuan_theirs(cfg: DecoderConfig) -> dict[str, Any]:
    rotates = at(cfg.layer(0).attention, "position.kind") == "rope"
    return (
        {"model_max_length": cfg.context}
        | ({"max_position_embeddings": cfg.context} if rotates else {})
        | ({"z_loss_weight": 0.0} if cfg.head_norm else {})
        | ({"architectures": ["BaiChuanForCausalLM"]} if rotates and not cfg.head_norm else {})
    )


# Baichuan 1 and 2 (Yang et al. 2023, arXiv:2309.10305): LLaMA with q, k and v in one matrix; 2 scales rows of the head.
BAICHUAN = llama_like(
    "baichuan", "BaichuanForCausalLM",
    names=table(
        outside("model.embed_tokens", "model.norm"),
        layers("model.layers.{}", fused("self_attn.W_pack", QKV), linear("self_attn.o_proj", "attention.o", inputs=2),
               gated(), norms()),
    ),
    sizes=but(SIZES, "num_key_value_heads", "max_position_embeddings"),
    defaults={"rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False},
    parts=(Part(_baichuan_ours, _baichuan_theirs),),
)  # fmt: skip

# --- Qwen, MOSS ----------------------------------------------------------------------------------------------------


def _qwen_ours(given: Given) -> dict[str, Any]:
    """Beyond `seq_length` tokens queries grow with the logarithm of their place, and rotations slow down by steps."""
    scaling = {"kind": "dynamic_ntk", "factor": 2.0, "original": given["seq_length"], "doubling": True}
    return {
        "block.ffn.mlp": given["intermediate_size"] // 2, "block.ffn.bias": not given["no_bias"],
        "block.attention.out_bias": not given["no_bias"],
        "block.attention.log_scale": given["seq_length"] if given["use_logn_attn"] else None,
        "position": {
            "kind": "rope", "theta": given["rotary_emb_base"], "fraction": given["rotary_pct"],
            "scaling": scaling if given["use_dynamic_ntk"] else None,
        },
    }  # fmt: skip


def _qwen_theirs(cfg: DecoderConfig) -> dict[str, Any]:
    a = cfg.layer(0).attention
    original = at(a, "position.scaling.original")
    return {
        "intermediate_size": 2 * cfg.block.ffn.mlp, "no_bias": not cfg.block.ffn.bias,
        "rotary_emb_base": at(a, "position.theta"), "rotary_pct": at(a, "position.fraction"),
        "use_dynamic_ntk": original is not None, "use_logn_attn": a.log_scale is not None,
        "seq_length": original or a.log_scale or cfg.context,
    }  # fmt: skip


# Qwen 1 (Bai et al. 2023, arXiv:2309.16609). w2 goes through the activation, w1 does not; `intermediate_size` is both.
# In generation its code keeps the rotations that the prompt's length asks for; here a longer text turns all keys anew,
# and is computed as if it were read at once.
QWEN = Family(
    "qwen", "QWenLMHeadModel", prefix="transformer.",
    names=table(
        outside("transformer.wte", "transformer.ln_f"),
        layers("transformer.h.{}", fused("attn.c_attn", QKV), linear("attn.c_proj", "attention.o", inputs=2),
               linear("mlp.w1", "ffn.up"), linear("mlp.w2", "ffn.gate"), linear("mlp.c_proj", "ffn.down"),
               norms("ln_1", "ln_2")),
    ),
    sizes={
        "vocab_size": "vocab", "hidden_size": "embed", "num_hidden_layers": "num_layers",
        "max_position_embeddings": "context", "num_attention_heads": "block.attention.num_heads",
        "kv_channels": "block.attention.head_dim", "layer_norm_epsilon": "block.norm.epsilon",
        "tie_word_embeddings": "tie",
    },
    fixed=LLAMA_FIXED | {"block.ffn.activation": "silu", "block.attention.bias": True},
    defaults={
        "kv_channels": 128, "layer_norm_epsilon": 1e-6, "max_position_embeddings": 8192, "no_bias": True,
        "rotary_pct": 1.0, "rotary_emb_base": 10_000, "tie_word_embeddings": False, "seq_length": 8192,
        "use_dynamic_ntk": True, "use_logn_attn": True,
    },
    parts=(Part(_qwen_ours, _qwen_theirs),), drop=("attn.masked_bias", "rotary_emb.inv_freq"),
)  # fmt: skip
# MOSS (Sun et al. 2023): CodeGen 16B trained on.
MOSS = dataclasses.replace(
    CODEGEN, kind="moss", architecture="MossForCausalLM", only={"wbits": 32},
    defaults=CODEGEN.defaults | {"wbits": 32},
)  # fmt: skip

# --- GLM -----------------------------------------------------------------------------------------------------------


def _chatglm_names(cfg: DecoderConfig) -> Table:
    """All query heads, then keys, then values; head by head where there are as many of each."""
    shared = cfg.block.attention.kv_heads < cfg.block.attention.num_heads
    return table(
        outside(
            "transformer.embedding.word_embeddings", "transformer.encoder.final_layernorm", "transformer.output_layer"
        ),
        layers(
            "transformer.encoder.layers.{}",
            fused("self_attention.query_key_value", QKV) if shared else heads_fused("self_attention.query_key_value"),
            linear("self_attention.dense", "attention.o", inputs=2),
            fused("mlp.dense_h_to_4h", ("ffn.gate", "ffn.up")), linear("mlp.dense_4h_to_h", "ffn.down"), norms(),
        ),
    )  # fmt: skip


def _chatglm_ours(given: Given) -> dict[str, Any]:
    heads, bias, ratio = given["num_attention_heads"], given["add_bias_linear"], given["rope_ratio"]
    kv = given["multi_query_group_num"] if given["multi_query_attention"] else heads
    if given["multi_query_attention"] and kv == heads:
        raise given.refuse("multi_query_group_num", f"must be fewer than num_attention_heads={heads}")
    position: dict[str, Any] = {"kind": "rope", "fraction": 0.5, "interleaved": True}
    if ratio != 1 and "chatglm2" in str(given.get("_name_or_path")).lower():
        # ChatGLM2-32k divides positions by it; in the code of what came later it multiplies the base. Nothing but the
        # name tells the two apart.
        position["scaling"] = {"kind": "linear", "factor": ratio}
    else:
        position["theta"] = 10_000.0 * ratio
    after = given["apply_residual_connection_post_layernorm"]
    return {
        "position": position, "block.attention.num_kv_heads": kv,
        "block.attention.bias": bias or given["add_qkv_bias"], "block.attention.out_bias": bias, "block.ffn.bias": bias,
        "block.norm.kind": "rmsnorm" if given["rmsnorm"] else "layernorm",
        "block.placement.kind": "normed_residual" if after else "pre",
    }  # fmt: skip


def _chatglm_theirs(cfg: DecoderConfig) -> dict[str, Any]:
    a = cfg.layer(0).attention
    theta, scaling = at(a, "position.theta") or 10_000.0, at(a, "position.scaling")
    divided = scaling is not None and scaling.kind == "linear"
    shared = a.kv_heads < a.num_heads
    return {
        "add_bias_linear": cfg.block.ffn.bias, "add_qkv_bias": a.bias, "multi_query_attention": shared,
        "multi_query_group_num": a.kv_heads if shared else 1, "rmsnorm": cfg.block.norm.kind == "rmsnorm",
        "rope_ratio": scaling.factor if divided else theta / 10_000.0, "original_rope": True,
        "apply_residual_connection_post_layernorm": cfg.block.placement.kind == "normed_residual",
    } | ({"_name_or_path": "THUDM/chatglm2-6b-32k"} if divided else {})  # fmt: skip


# ChatGLM2 and 3, CodeGeeX2, GLM-4 (GLM team 2024, arXiv:2406.12793): LLaMA with half of each head rotated by pairs.
CHATGLM2 = Family(
    "chatglm2", "ChatGLMModel", prefix="transformer.", model_type="chatglm",
    when=lambda config: "ffn_hidden_size" in config,
    names=_chatglm_names,
    sizes={
        "padded_vocab_size": "vocab", "hidden_size": "embed", "num_layers": "num_layers", "seq_length": "context",
        "num_attention_heads": "block.attention.num_heads", "ffn_hidden_size": "block.ffn.mlp",
        "layernorm_epsilon": "block.norm.epsilon", "kv_channels": "block.attention.head_dim",
        "post_layer_norm": "final_norm",
    },
    fixed={"block.ffn.glu": True, "block.ffn.activation": "silu", "tie": False},
    defaults={
        "kv_channels": 128, "layernorm_epsilon": 1e-5, "rmsnorm": True, "add_bias_linear": False, "add_qkv_bias": False,
        "multi_query_attention": False, "multi_query_group_num": 1, "rope_ratio": 1, "post_layer_norm": True,
        "apply_residual_connection_post_layernorm": False, "seq_length": 2048, "quantization_bit": 0,
    },
    only={"tie_word_embeddings": False, "quantization_bit": 0, "pre_seq_len": None, "vision_config": None},
    parts=(Part(_chatglm_ours, _chatglm_theirs),), drop=("rotary_pos_emb.inv_freq",),
)  # fmt: skip


def _sat_names(*ffn: Table) -> Table:
    """Names of SwissArmyTransformer."""
    return table(
        outside("transformer.word_embeddings", "transformer.final_layernorm"),
        layers("transformer.layers.{}", heads_fused("attention.query_key_value"),
               linear("attention.dense", "attention.o", inputs=2), *ffn, norms()),
    )  # fmt: skip


SAT_SIZES = {
    "vocab_size": "vocab", "hidden_size": "embed", "num_layers": "num_layers", "max_sequence_length": "context",
    "num_attention_heads": "block.attention.num_heads", "inner_hidden_size": "block.ffn.mlp",
    "layernorm_epsilon": "block.norm.epsilon", "tie_word_embeddings": "tie",
}  # fmt: skip
# Norms before each branch, whose normed input is what the branch's output is added to; alpha as the papers have it.
SAT_FIXED = LAYERNORM | BIASES | {
    "block.placement.kind": "normed_residual",
    "block.attention.mask": {"kind": "some", "of": [{"kind": "causal"}, {"kind": "prefix"}]},
}  # fmt: skip
ALPHA = Part(lambda given: {"block.placement.alpha": (2 * given["num_layers"]) ** 0.5}, lambda cfg: {})
# GLM-130B (Zeng et al. 2022, arXiv:2210.02414, section 2.2): DeepNorm, written with its norms before the branches and
# one at the end; GeGLU, whose second half goes through the activation; prompts up to [gMASK] are a prefix. Its weights
# are no folder of transformers: config.json has the options of its `configs/model_glm_130b.sh`.
GLM130B = Family(
    "glm-130b", "GLM130B", prefix="transformer.",
    names=_sat_names(fused("mlp.dense_h_to_4h", ("ffn.up", "ffn.gate")), linear("mlp.dense_4h_to_h", "ffn.down")),
    sizes=SAT_SIZES,
    fixed=SAT_FIXED | {"block.ffn.glu": True, "block.ffn.activation": "gelu", "position.kind": "rope"},
    defaults={"layernorm_epsilon": 1e-5, "max_sequence_length": 2048, "tie_word_embeddings": True},
    only={"layernorm_order": "post", "position_encoding_2d": False, "no_glu": False},
    parts=(ALPHA,), drop=("attention.rotary_emb.inv_freq",),
)  # fmt: skip

# ChatGLM-6B (the same team, 2023): the same without a gate, each head half by one place and half by another. Its code
# takes alpha for 28 layers, which it has.
CHATGLM = Family(
    "chatglm", "ChatGLMModel", prefix="transformer.", when=lambda config: "inner_hidden_size" in config,
    names=_sat_names(plain("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")), sizes=SAT_SIZES,
    fixed=SAT_FIXED | {"block.ffn.activation": "gelu_tanh"},
    defaults={
        "layernorm_epsilon": 1e-5, "max_sequence_length": 2048, "tie_word_embeddings": True, "quantization_bit": 0,
        "position_encoding_2d": True,
    },
    only={"quantization_bit": 0, "pre_seq_len": None, "eva_config": None},
    parts=(ALPHA, Part(
        lambda given: {"position.kind": "rope_2d" if given["position_encoding_2d"] else "rope"},
        lambda cfg: {"position_encoding_2d": at(cfg.layer(0).attention, "position.kind") == "rope_2d"},
    )),
    drop=("attention.rotary_emb.inv_freq",),
)  # fmt: skip

# --- a query layer on top ------------------------------------------------------------------------------------------


def on_top(theirs: str, *rows: Table) -> Table:
    """Rows of the query layer."""
    return tuple(
        Row(tuple(f"{theirs}.{n}" for n in row.theirs), tuple(f"query_layer.{n}" for n in row.ours), row.form)
        for part in rows for row in part
    )  # fmt: skip


def twice(path: str) -> tuple[str, str]:
    """A path in all layers, and in the query layer."""
    return f"block.{path}", f"query_layer.{path}"


QUERY_FIXED = {"position.kind": "learned"} | {
    path: value for block, value in (LAYERNORM | BIASES).items() for path in twice(block.removeprefix("block."))
}  # fmt: skip


def _pangu_names(cfg: DecoderConfig) -> Table:
    layer = table(projections("attn", o="c_proj"), plain("mlp.c_fc", "mlp.c_proj"), norms("ln_1", "ln_2"))
    return table(
        outside("transformer.wte", "transformer.ln_f"), tensor("transformer.wpe.weight", "positions"),
        tensor("transformer.wqe.weight", "query_positions"), layers("transformer.h.{}", layer),
        on_top(f"transformer.h.{cfg.num_layers}", layer),
    )  # fmt: skip


# PanGu-alpha (Zeng et al. 2021, arXiv:2104.12369, section 3.2), as rewritten for transformers (`gpt_pangu`): the query
# layer is the last of `num_layers`, after `ln_f`.
PANGU = Family(
    "gpt_pangu", "GPTPanguForCausalLM", prefix="transformer.", names=_pangu_names,
    sizes={
        "vocab_size": "vocab", "hidden_size": "embed", "max_position_embeddings": "context",
        "num_heads": twice("attention.num_heads"), "activation_function": twice("ffn.activation"),
        "layer_norm_epsilon": twice("norm.epsilon"), "tie_word_embeddings": "tie",
    },
    fixed=QUERY_FIXED,
    defaults={
        "max_position_embeddings": 1024, "activation_function": "gelu", "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True, "scale_attn_weights": True,
    },
    only={"scale_attn_weights": True},
    parts=(Part(
        lambda given: {"num_layers": given["num_layers"] - 1} | dict.fromkeys(
            twice("ffn.mlp"), given.get("intermediate_size") or 4 * given["hidden_size"]
        ),
        lambda cfg: {"num_layers": cfg.num_layers + 1, "intermediate_size": cfg.block.ffn.mlp},
    ),),
    drop=("attn.bias", "attn.masked_bias"),
)  # fmt: skip
_CODEGEEX_LAYER = table(
    projections("attention", "query", "key", "value", "dense"), plain("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"), norms()
)
# CodeGeeX 13B (Zheng et al. 2023, arXiv:2303.17568): PanGu-alpha's layers in Megatron-LM's names. Its weights are no
# folder of transformers: config.json has the options of `configs/codegeex_13b.sh`. MindSpore's FastGELU, which it
# computes without overflow, is x sigmoid(1.702 x).
CODEGEEX = Family(
    "codegeex", "CodeGeeXModel", prefix="language_model.",
    names=table(
        outside("language_model.embedding.word_embeddings", "language_model.transformer.final_layernorm"),
        tensor("language_model.embedding.position_embeddings.weight", "positions"),
        tensor("language_model.topQueryEmbedding.top_query_embeddings.weight", "query_positions"),
        layers("language_model.transformer.layers.{}", _CODEGEEX_LAYER),
        on_top("language_model.transformer.topQueryLayer", _CODEGEEX_LAYER),
    ),
    sizes={
        "padded_vocab_size": "vocab", "hidden_size": "embed", "num_layers": "num_layers",
        "max_position_embeddings": "context", "num_attention_heads": twice("attention.num_heads"),
    },
    fixed=QUERY_FIXED | {"tie": True} | dict.fromkeys(twice("norm.epsilon"), 1e-5)
    | dict.fromkeys(twice("ffn.activation"), "gelu_sigmoid"),
    defaults={"max_position_embeddings": 2048, "padded_vocab_size": 52_224},
    parts=(Part(lambda given: dict.fromkeys(twice("ffn.mlp"), 4 * given["hidden_size"]), lambda cfg: {}),),
)  # fmt: skip

# --- Megatron-LM ---------------------------------------------------------------------------------------------------


def megatron(kind: str, version: float, stack: str, attention: str, qkv: Callable[[str], Table]) -> Family:
    """GPT-2 as Megatron-LM saves it (Shoeybi et al. 2019, arXiv:1909.08053), the parts of its names joined by dots.

    config.json has the arguments of the training run, and `checkpoint_version`, which says in what order q, k and v
    stand (`megatron/checkpointing.py` of v2.4; none: 0).
    """

    def activation(given: Given) -> dict[str, Any]:
        approximate = given["openai_gelu"] or given["bias_gelu_fusion"]
        return {"block.ffn.activation": "gelu_tanh" if approximate else "gelu"}

    return Family(
        kind, "GPTModel", prefix="language_model.", model_type="megatron-gpt2",
        when=lambda config: config.get("checkpoint_version", 0) == version,
        names=table(
            outside("language_model.embedding.word_embeddings", f"{stack}.final_layernorm"),
            tensor("language_model.embedding.position_embeddings.weight", "positions"),
            layers(f"{stack}.layers.{{}}", qkv(f"{attention}.query_key_value"),
                   linear(f"{attention}.dense", "attention.o", inputs=2),
                   plain("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"), norms()),
        ),
        sizes={
            "padded_vocab_size": "vocab", "hidden_size": "embed", "num_layers": "num_layers",
            "max_position_embeddings": "context", "num_attention_heads": "block.attention.num_heads",
            "ffn_hidden_size": "block.ffn.mlp", "layernorm_epsilon": "block.norm.epsilon",
        },
        fixed=LAYERNORM | BIASES | {"position.kind": "learned", "tie": True},
        defaults={"layernorm_epsilon": 1e-5, "openai_gelu": False, "bias_gelu_fusion": True},
        parts=(Part(activation, lambda cfg: {
            "openai_gelu": cfg.block.ffn.activation == "gelu_tanh", "bias_gelu_fusion": False,
            "checkpoint_version": version,
        }),),
    )  # fmt: skip


ENCODER, TRANSFORMER = "language_model.encoder", "language_model.transformer"
MEGATRON = (
    megatron("megatron-gpt2", 3.0, ENCODER, "self_attention", heads_fused),
    megatron("megatron-gpt2-v2", 2.0, TRANSFORMER, "attention", heads_fused),
    megatron("megatron-gpt2-v1", 1.0, TRANSFORMER, "attention", elements_fused),
    megatron("megatron-gpt2-v0", 0.0, TRANSFORMER, "attention", lambda name: fused(name, QKV)),
)

FAMILIES: tuple[Family, ...] = (
    YI, AQUILA, INTERNLM, BAICHUAN, QWEN, MOSS, CHATGLM, CHATGLM2, GLM130B, PANGU, CODEGEEX, *MEGATRON,
)  # fmt: skip
