"""The families of encoder-decoders: T5 and BART and what came of them. See `decoders.py` for how a family is written."""

import dataclasses
import functools
import math
from typing import Any

from jaxllm.core.errors import ConfigError
from jaxllm.interop.family import (
    ACTIVATIONS,
    ACTIVATIONS_OF_OURS,
    LAYERS,
    MOST_LAYERS,
    Family,
    Given,
    Part,
    activation,
)
from jaxllm.interop.names import FLAT, Form, Row, Table, experts, layers, linear, matrix, norm, table, tensor
from jaxllm.models.config import EncoderDecoderConfig

SIDES = ("encoder", "decoder")


def both(path: str) -> tuple[str, str]:
    """The same field of both sides."""
    return (f"decoder.{path}", f"encoder.{path}")


def fixed(fields: dict[str, Any]) -> dict[str, Any]:
    """The same values on both sides; what is said of `block.attention` holds of `block.cross` too."""
    out = {f"{side}.{path}": value for side in SIDES for path, value in fields.items()}
    cross = {p: v for p, v in fields.items() if p.startswith("block.attention.")}
    return out | {f"decoder.{p.replace('attention', 'cross', 1)}": v for p, v in cross.items()}


def attention(theirs: str, ours: str, o: str) -> Table:
    q, k, v = (f"{theirs}.{n}" for n in o.split()[:3])
    return table(
        linear(q, f"{ours}.q"), linear(k, f"{ours}.k"), linear(v, f"{ours}.v"),
        linear(f"{theirs}.{o.split()[3]}", f"{ours}.o", inputs=2),
    )  # fmt: skip


START = Part(
    lambda given: {"start": given.get("decoder_start_token_id")}, lambda cfg: {"decoder_start_token_id": cfg.start}
)

# --- T5 ------------------------------------------------------------------------------------------------------------

T5_MATRICES = {"wi": "up", "wo": "down"}


def _t5_table(cfg: EncoderDecoderConfig, ffn_module: str = "DenseReluDense") -> Table:
    shared = cfg.encoder.relative.shared
    self_attention = attention("layer.0.SelfAttention", "attention", "q k v o")
    rows = []
    for side in SIDES:
        last = 1 if side == "encoder" else 2
        dense = f"layer.{last}.{ffn_module}"
        cross = (
            (attention("layer.1.EncDecAttention", "cross", "q k v o"), norm("layer.1.layer_norm", "norm_cross"))
            if side == "decoder" else ()
        )  # fmt: skip
        gated = cfg.encoder.blocks[0].ffn.glu
        ffn = (
            (linear(f"{dense}.wi_0", "ffn.gate"), linear(f"{dense}.wi_1", "ffn.up"))
            if gated
            else (linear(f"{dense}.wi", "ffn.up"),)
        )
        count = max((moe.experts for moe in cfg.mixtures), default=0)
        sparse = (
            linear(f"{dense}.router.classifier", "ffn.router"),
            *(
                experts(f"{dense}.experts.expert_{{e}}.{wi}", f"ffn.experts.{x}", count)
                for wi, x in T5_MATRICES.items()
            ),
        )
        bias = "layer.0.SelfAttention.relative_attention_bias.weight"
        rows += [
            *layers(
                f"{side}.block.{{}}", self_attention, norm("layer.0.layer_norm", "norm_attention"), *cross, *ffn,
                linear(f"{dense}.wo", "ffn.down"), *sparse, norm(f"layer.{last}.layer_norm", "norm_ffn"),
                *(() if shared else (tensor(bias, "attention.relative.table"),)), ours=f"{side}.layers",
            ),
            *(tensor(f"{side}.block.0.{bias}", f"{side}.relative.table") if shared else ()),
            *norm(f"{side}.final_layer_norm", f"{side}.final_norm"),
        ]  # fmt: skip
    return table(
        tensor("shared.weight", "embedding"), tuple(rows), (Row(("lm_head.weight",), ("decoder.head",), matrix()),)
    )  # fmt: skip


def _t5_ffn(given: Given) -> dict[str, Any]:
    *gated, name = given["feed_forward_proj"].split("-")
    if gated not in ([], ["gated"]) or name not in ACTIVATIONS:
        raise given.refuse("feed_forward_proj", f"known: ACT or gated-ACT, ACT of {', '.join(ACTIVATIONS)}")
    # Released as gated-gelu, trained with the approximation.
    kind = "gelu_tanh" if gated and name == "gelu" else ACTIVATIONS[name]
    return {f"{side}.block.ffn.{k}": v for side in SIDES for k, v in (("glu", bool(gated)), ("activation", kind))}


def _t5_ffn_theirs(cfg: EncoderDecoderConfig) -> dict[str, Any]:
    ffn = cfg.encoder.block.ffn
    name = {"gelu_tanh": "gelu" if ffn.glu else "gelu_new"}.get(ffn.activation, ffn.activation)
    return {"feed_forward_proj": f"gated-{name}" if ffn.glu else name}


def _t5_head(given: Given, scales: bool) -> dict[str, Any]:
    """T5 1.0 divides by the root of the width and ties; 1.1 does neither, and newer files may say so apart."""
    tie = given.get("tie_word_embeddings", True)
    scaled = given.get("scale_decoder_outputs", tie and scales)
    return {"decoder.tie": tie, "decoder.logit_scale": given["d_model"] ** -0.5 if scaled else 1.0}


def _t5_head_theirs(cfg: EncoderDecoderConfig) -> dict[str, Any]:
    return {"tie_word_embeddings": cfg.decoder.tie, "scale_decoder_outputs": cfg.decoder.logit_scale != 1.0}


def _t5_depth(given: Given) -> int:
    """Layers of the decoder."""
    count = given.get("num_decoder_layers") or given["num_layers"]
    if type(count) is not int or not 0 < count <= MOST_LAYERS:
        raise given.refuse("num_decoder_layers", f"a decoder has 1 to {MOST_LAYERS} layers")
    return count


T5_DEPTHS = Part(
    lambda given: {"decoder.num_layers": _t5_depth(given)},
    lambda cfg: {"num_decoder_layers": cfg.decoder.num_layers, "is_encoder_decoder": True},
)
T5_SIZES = {
    "vocab_size": both("vocab"), "d_model": both("embed"), "num_layers": "encoder.num_layers",
    "n_positions": both("context"),
    "d_kv": (*both("block.attention.head_dim"), "decoder.block.cross.head_dim"), "d_ff": both("block.ffn.mlp"),
    "num_heads": (*both("block.attention.num_heads"), "decoder.block.cross.num_heads"),
    "relative_attention_num_buckets": both("relative.buckets"),
    "relative_attention_max_distance": both("relative.max_distance"), "layer_norm_epsilon": both("block.norm.epsilon"),
}  # fmt: skip


def t5(kind: str, architecture: str, *, shared: bool = True, ffn: str = "relu", scales: bool = True) -> Family:
    """T5 and the models built as it is.

    Args:
      shared: all layers share the table of distances.
      scales: what goes to a tied head is divided by the root of the width.
    """
    return Family(
        kind, architecture, prefix="\0", names=_t5_table, sizes=T5_SIZES,
        fixed=fixed({
            "block.norm.kind": "rmsnorm", "block.placement": "pre", "block.attention.scale": 1.0, "position": "none",
            "relative.kind": "t5", "relative.shared": shared,
        }) | {"encoder.relative.bidirectional": True, "encoder.block.attention.mask": "full"},
        defaults={
            "vocab_size": 32128, "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8,
            "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128, "layer_norm_epsilon": 1e-6,
            "feed_forward_proj": ffn, "decoder_start_token_id": 0, "n_positions": 512,
        },
        parts=(
            T5_DEPTHS, Part(_t5_ffn, _t5_ffn_theirs), Part(lambda given: _t5_head(given, scales), _t5_head_theirs), START,
        ),
        model=EncoderDecoderConfig,
        repeats=dict.fromkeys(("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"), "embedding"),
    )  # fmt: skip


T5 = t5("t5", "T5ForConditionalGeneration")
MT5 = t5("mt5", "MT5ForConditionalGeneration", ffn="gated-gelu", scales=False)
UMT5 = t5("umt5", "UMT5ForConditionalGeneration", shared=False, ffn="gated-gelu")

# --- Switch --------------------------------------------------------------------------------------------------------


def _sparse(count: int, step: int) -> list[bool]:
    """Which of `count` layers have experts: every `step`-th, beginning with the second; all for 1, none for 0."""
    return [step == 1 or step > 1 and i % step == 1 for i in range(count)]


def _switch_ffn(given: Given) -> dict[str, Any]:
    """Experts where the files say; a step that they leave out follows from how many layers they call sparse."""
    same = {"ffn.mlp": given["d_ff"], "ffn.activation": activation(given, "dense_act_fn"), "ffn.glu": False}
    dense = same | {"ffn.kind": "dense"}
    moe = same | {
        "ffn.kind": "moe", "ffn.experts": given["num_experts"], "ffn.top_k": 1,
        "ffn.router": {"kind": "softmax", "renormalise": False, "bias": given["router_bias"]},
        "ffn.capacity": {"kind": "slots", "slots": given["expert_capacity"]},
    }  # fmt: skip
    paths = {}
    for side, count in (("encoder", given["num_layers"]), ("decoder", _t5_depth(given))):
        step = given.get(f"{side}_sparse_step")
        if step is None:
            step = count // (given[f"num_sparse_{side}_layers"] or 1)
        if type(step) is not int or step < 0:
            raise given.refuse(f"{side}_sparse_step", "must be 0 or more")
        paths[f"{side}.{LAYERS}"] = [moe if is_sparse else dense for is_sparse in _sparse(count, step)]
    return paths


def _switch_ffn_theirs(cfg: EncoderDecoderConfig) -> dict[str, Any]:
    moe = next(iter(cfg.mixtures), None)
    if moe is None:
        raise ConfigError("a Switch Transformer has experts: block.ffn.kind is 'dense' in all layers of both sides")
    said = {
        "d_ff": moe.mlp, "num_experts": moe.experts, "dense_act_fn": ACTIVATIONS_OF_OURS[moe.activation],
        "router_bias": moe.router.bias, "expert_capacity": getattr(moe.capacity, "slots", None),
    }  # fmt: skip
    for side in SIDES:
        stack = getattr(cfg, side)
        found = [stack.layer(i).ffn.kind == "moe" for i in range(stack.num_layers)]
        steps = [step for step in range(len(found) + 1) if _sparse(len(found), step) == found]
        said |= {f"{side}_sparse_step": steps[0] if steps else 0, f"num_sparse_{side}_layers": sum(found)}
    return said


# T5 with experts in some layers, whose embeddings are always shared.
SWITCH = dataclasses.replace(
    T5, kind="switch_transformers", architecture="SwitchTransformersForConditionalGeneration",
    names=functools.partial(_t5_table, ffn_module="mlp"), sizes={k: x for k, x in T5_SIZES.items() if k != "d_ff"},
    defaults=T5.defaults | {
        "d_model": 768, "num_layers": 12, "num_heads": 12, "num_decoder_layers": 12, "num_sparse_encoder_layers": 3,
        "num_sparse_decoder_layers": 3, "num_experts": 8, "expert_capacity": 64, "router_bias": False,
        "dense_act_fn": "relu",
    },
    only={"tie_word_embeddings": True, "router_dtype": "float32"},
    parts=(
        T5_DEPTHS, Part(_switch_ffn, _switch_ffn_theirs),
        Part(
            lambda given: {"decoder.tie": True, "decoder.logit_scale": given["d_model"] ** -0.5}, lambda cfg: {}
        ),
        START,
    ),
)  # fmt: skip

# --- BART ----------------------------------------------------------------------------------------------------------


def _bart_side(side: str) -> Table:
    own = attention("self_attn", "attention", "q_proj k_proj v_proj out_proj")
    cross = (
        (attention("encoder_attn", "cross", "q_proj k_proj v_proj out_proj"), norm("encoder_attn_layer_norm", "norm_cross"))
        if side == "decoder" else ()
    )  # fmt: skip
    return table(
        tensor(f"model.{side}.embed_positions.weight", f"{side}.positions"),
        norm(f"model.{side}.layernorm_embedding", f"{side}.embedding_norm"),
        norm(f"model.{side}.layer_norm", f"{side}.final_norm"),
        layers(
            f"model.{side}.layers.{{}}", own, norm("self_attn_layer_norm", "norm_attention"), *cross,
            linear("fc1", "ffn.up"), linear("fc2", "ffn.down"), norm("final_layer_norm", "norm_ffn"), ours=f"{side}.layers",
        ),
    )  # fmt: skip


BART_TABLE = table(
    tensor("model.shared.weight", "embedding"), _bart_side("encoder"), _bart_side("decoder"),
    tensor("final_logits_bias", "decoder.head_bias", Form(FLAT.ours, lambda ours: [x.reshape(1, -1) for x in ours])),
)  # fmt: skip
BART_SIZES = {
    "vocab_size": both("vocab"), "d_model": both("embed"), "max_position_embeddings": both("context"),
    "activation_function": both("block.ffn.activation"), "encoder_layers": "encoder.num_layers",
    "decoder_layers": "decoder.num_layers", "encoder_ffn_dim": "encoder.block.ffn.mlp",
    "decoder_ffn_dim": "decoder.block.ffn.mlp", "encoder_attention_heads": "encoder.block.attention.num_heads",
    "decoder_attention_heads": ("decoder.block.attention.num_heads", "decoder.block.cross.num_heads"),
}  # fmt: skip
SCALED = Part(
    lambda given: dict.fromkeys(both("embed_scale"), math.sqrt(given["d_model"]) if given["scale_embedding"] else 1.0),
    lambda cfg: {"scale_embedding": cfg.encoder.embed_scale != 1.0, "is_encoder_decoder": True},
)


def bart(kind: str, architecture: str, start: int | None, *, placement: str, offset: int, normed: bool) -> Family:
    """BART and the models built as it is.

    Args:
      start: the token that outputs begin with, where a config leaves it out.
      normed: there is a norm of the embeddings.
    """
    return Family(
        kind, architecture, prefix="\0", names=BART_TABLE, sizes=BART_SIZES,
        fixed=fixed({
            "block.norm.kind": "layernorm", "block.placement": placement, "block.attention.bias": True,
            "block.attention.out_bias": True, "block.ffn.glu": False, "block.ffn.bias": True,
            "position": {"kind": "learned", "offset": offset}, "final_norm": placement == "pre",
            "embedding_norm": {"kind": "layernorm"} if normed else None,
        }) | {"decoder.tie": True, "decoder.head_bias": True, "encoder.block.attention.mask": "full"},
        defaults={
            "vocab_size": 50265, "d_model": 1024, "max_position_embeddings": 1024, "activation_function": "gelu",
            "encoder_layers": 12, "decoder_layers": 12, "encoder_ffn_dim": 4096, "decoder_ffn_dim": 4096,
            "encoder_attention_heads": 16, "decoder_attention_heads": 16, "scale_embedding": False,
            "decoder_start_token_id": start,
        },
        only={"tie_word_embeddings": True}, parts=(SCALED, START), model=EncoderDecoderConfig,
        repeats=dict.fromkeys(
            ("lm_head.weight", "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"), "embedding"
        ),
    )  # fmt: skip


def _marian_vocabulary(given: Given) -> dict[str, Any]:
    if (given.get("decoder_vocab_size") or given["vocab_size"]) != given["vocab_size"]:
        raise given.refuse("decoder_vocab_size", f"must be vocab_size={given['vocab_size']}: both share one embedding")
    return {}


# The Transformer of Vaswani et al. 2017 (arXiv:1706.03762) as Marian has it, with biases in attention.
_POST = bart("marian", "MarianMTModel", 58_100, placement="post", offset=0, normed=False)
MARIAN = dataclasses.replace(
    _POST, fixed=_POST.fixed | {path: {"kind": "sinusoidal", "halves": True} for path in both("position")},
    defaults=_POST.defaults | {"vocab_size": 58_101},
    only=_POST.only | {"share_encoder_decoder_embeddings": True},
    parts=(*_POST.parts, Part(_marian_vocabulary, lambda cfg: {"decoder_vocab_size": cfg.decoder.vocab})),
    drop=("embed_positions.weight",),  # sinusoids
)  # fmt: skip

FAMILIES = (
    T5, MT5, UMT5, SWITCH,
    bart("bart", "BartForConditionalGeneration", 2, placement="post", offset=2, normed=True),
    bart("mbart", "MBartForConditionalGeneration", None, placement="pre", offset=2, normed=True),
    bart("pegasus", "PegasusForConditionalGeneration", 0, placement="pre", offset=0, normed=False),
    MARIAN,
)  # fmt: skip
