"""XLNet (Yang et al. 2019, arXiv:1906.08237) as transformers has it. See `decoders.py` for how a family is written."""

from typing import Any

from jaxllm.interop.encoders import QA, affine, heads
from jaxllm.interop.family import Family, Given, Part
from jaxllm.interop.names import Form, layers, linear, norm, table, tensor
from jaxllm.models.config import EncoderConfig

LONE = Form(lambda theirs, shapes: [theirs[0].reshape(shapes[0])], lambda ours: [ours[0][None, None]])  # [1, 1, D]
OUTPUT = Form(  # [D, N, H]
    lambda theirs, shapes: [theirs[0].transpose(1, 2, 0).reshape(shapes[0])],
    lambda ours: [ours[0].transpose(2, 0, 1)],
)


def _attention(given: Given) -> dict[str, Any]:
    head_dim = given["d_model"] // given["n_head"]
    if given.get("d_head") not in (None, head_dim):
        raise given.refuse("d_head", f"must be d_model / n_head={head_dim}")
    kinds = {"bi": "full", "uni": "causal"}
    if given["attn_type"] not in kinds:
        raise given.refuse("attn_type", f"known: {', '.join(kinds)}")
    return {"block.attention.mask": {"kind": kinds[given["attn_type"]]}}


ATTENTION = Part(_attention, lambda cfg: {
    "attn_type": "bi" if cfg.block.attention.mask.kind == "full" else "uni", "d_head": cfg.head_dim(cfg.block.attention),
})  # fmt: skip

XLNET = Family(
    "xlnet", "XLNetModel", prefix="transformer.",
    names=table(
        tensor("transformer.word_embedding.weight", "embedding"), tensor("transformer.mask_emb", "query", LONE),
        layers(
            "transformer.layer.{}",
            *(tensor(f"rel_attn.{n}", f"attention.w_{n}") for n in "qkv"), tensor("rel_attn.o", "attention.w_o", OUTPUT),
            tensor("rel_attn.r", "attention.relative.w_r"), tensor("rel_attn.r_w_bias", "attention.relative.u"),
            tensor("rel_attn.r_r_bias", "attention.relative.v"), tensor("rel_attn.r_s_bias", "attention.relative.s"),
            tensor("rel_attn.seg_embed", "attention.relative.of_segments"),
            norm("rel_attn.layer_norm", "norm_attention"), linear("ff.layer_1", "ffn.up"),
            linear("ff.layer_2", "ffn.down"), norm("ff.layer_norm", "norm_ffn"),
        ),
        tensor("lm_loss.bias", "lm.b"), QA, affine("sequence_summary.summary", "pooler"),
        affine("logits_proj", "classification"), affine("classifier", "tokens"),
    ),
    sizes={
        "vocab_size": "vocab", "d_model": "embed", "n_layer": "num_layers", "n_head": "block.attention.num_heads",
        "d_inner": "block.ffn.mlp", "ff_activation": "block.ffn.activation", "layer_norm_eps": "block.norm.epsilon",
        "n_positions": "context",  # a key of ours: its code knows no longest row
    },
    fixed={
        "block.norm.kind": "layernorm", "block.placement": "post", "block.ffn.glu": False, "block.ffn.bias": True,
        "final_norm": False, "position": "none", "relative": {"kind": "xl", "segments": True}, "query_stream": True,
        "pooled": "last",
    },
    defaults={
        "vocab_size": 32000, "d_model": 1024, "n_layer": 24, "n_head": 16, "d_inner": 4096, "ff_activation": "gelu",
        "layer_norm_eps": 1e-12, "attn_type": "bi", "n_positions": 512, "tie_word_embeddings": True,
    },
    only={
        "tie_word_embeddings": True, "clamp_len": -1, "bi_data": False, "same_length": False, "summary_type": "last",
        "summary_use_proj": True, "summary_activation": "tanh",
    },
    parts=(ATTENTION, heads({
        "XLNetModel": {"heads": []}, "XLNetLMHeadModel": {"heads": ["lm"]},
        "XLNetForSequenceClassification": {"pooler": "tanh", "heads": ["classification"]},
        "XLNetForTokenClassification": {"heads": ["tokens"]}, "XLNetForQuestionAnsweringSimple": {"heads": ["qa"]},
    }, "ff_activation")),
    model=EncoderConfig, repeats={"lm_loss.weight": "embedding"},
)  # fmt: skip

FAMILIES = (XLNET,)
