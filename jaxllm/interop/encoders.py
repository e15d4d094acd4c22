"""The families of encoders: BERT and what came of it. See `decoders.py` for how a family is written down."""

from typing import Any

from jaxllm.interop.family import ACTIVATIONS, ACTIVATIONS_OF_OURS, Family, Given, Part, activation, at
from jaxllm.interop.names import FLAT, Form, Row, Table, by_head, layers, linear, matrix, norm, table, tensor
from jaxllm.models.config import EncoderConfig

# --- what is predicted ---------------------------------------------------------------------------------------------


def heads(architectures: dict[str, dict[str, Any]], act: str = "hidden_act", mlm: str | None = None) -> Part:
    """Heads and pooler, as the first of `architectures` asks for them; the first named here is the one by default.

    Args:
      act: key of the activation in heads that have one.
      mlm: the activation of the MLM head, whatever the key says.
    """
    default = next(iter(architectures))

    def ours(given: Given) -> dict[str, Any]:
        asked = (given.get("architectures") or [default])[0]
        if asked not in architectures:
            raise given.refuse("architectures", f"known: {', '.join(architectures)}")
        said, labels = architectures[asked], len(given.get("id2label") or ()) or given.get("num_labels", 2)
        more = {
            "classification": {"labels": labels}, "tokens": {"labels": labels},
            "mlm": {"activation": mlm or activation(given, act)}, "rtd": {"activation": activation(given, act)},
        }  # fmt: skip
        return {
            "pooler": said.get("pooler"), "heads": [{"kind": k} | more.get(k, {}) for k in said.get("heads", ())],
        }  # fmt: skip

    def theirs(cfg: EncoderConfig) -> dict[str, Any]:
        kinds = [head.kind for head in cfg.heads]
        fits = lambda said: said.get("heads", []) == kinds and said.get("pooler") == cfg.pooler
        out = {"architectures": [next((n for n, said in architectures.items() if fits(said)), default)]}
        for head in cfg.heads:
            if hasattr(head, "labels"):
                names = [f"LABEL_{i}" for i in range(head.labels)]
                out |= {"id2label": {str(i): n for i, n in enumerate(names)}}
                out |= {"label2id": {n: i for i, n in enumerate(names)}}
        return out

    return Part(ours, theirs)


def of_bert(prefix: str, *, pooler: str | None = "tanh", classifier: str | None = None) -> dict[str, dict[str, Any]]:
    """The classes that most families have.

    Args:
      pooler: the activation of the pooler that the model without a head has; None: it has none.
      classifier: that of the pooler under the classifier of rows; None: the same.
    """
    return {
        f"{prefix}Model": {"pooler": pooler, "heads": []},
        f"{prefix}ForMaskedLM": {"heads": ["mlm"]},
        f"{prefix}ForSequenceClassification": {"pooler": classifier or pooler, "heads": ["classification"]},
        f"{prefix}ForTokenClassification": {"heads": ["tokens"]},
        f"{prefix}ForQuestionAnswering": {"heads": ["qa"]},
    }


# --- names ---------------------------------------------------------------------------------------------------------


def affine(theirs: str, ours: str) -> Table:
    """A module with `weight` and `bias`; of ours, `w` and `b`."""
    return (Row((f"{theirs}.weight",), (f"{ours}.w",), matrix()), Row((f"{theirs}.bias",), (f"{ours}.b",), FLAT))


def embeddings(prefix: str) -> Table:
    return table(
        tensor(f"{prefix}embeddings.word_embeddings.weight", "embedding"),
        tensor(f"{prefix}embeddings.position_embeddings.weight", "positions"),
        tensor(f"{prefix}embeddings.token_type_embeddings.weight", "segments"),
        tensor(f"{prefix}embeddings.task_type_embeddings.weight", "tasks"),
        norm(f"{prefix}embeddings.LayerNorm", "embedding_norm"),
    )


def layer(attention: Table) -> tuple[Table, ...]:
    """The rows of a layer of BERT, whose attention is given without what follows it."""
    return (
        attention,
        linear("attention.output.dense", "attention.o", inputs=2),
        norm("attention.output.LayerNorm", "norm_attention"),
        linear("intermediate.dense", "ffn.up"),
        linear("output.dense", "ffn.down"),
        norm("output.LayerNorm", "norm_ffn"),
    )


def qkv(*names: str) -> Table:
    return table(*(linear(theirs, f"attention.{ours}") for theirs, ours in zip(names, "qkv", strict=True)))


def mlm(projection: str, layer_norm: str, bias: str) -> Table:
    return table(affine(projection, "mlm.projection"), norm(layer_norm, "mlm.norm"), tensor(bias, "mlm.b"))


CLS = table(
    mlm("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.bias"),
    affine("cls.seq_relationship", "nsp"),
)
QA = affine("qa_outputs", "qa")
TWICE = {"cls.predictions.decoder.weight": "embedding", "cls.predictions.decoder.bias": "mlm.b"}
LM_HEAD = mlm("lm_head.dense", "lm_head.layer_norm", "lm_head.bias")
LM_TWICE = {"lm_head.decoder.weight": "embedding", "lm_head.decoder.bias": "mlm.b"}
BERT_QKV = qkv("attention.self.query", "attention.self.key", "attention.self.value")


def scored(cfg: EncoderConfig, pooler: str, own: str | None = None) -> Table:
    """Classifiers; those of rows have a projection of their own named `own`, or take the pooler's."""
    if own is not None and cfg.head("classification"):
        return table(affine(own, "pooler"), affine("classifier.out_proj", "classification"))
    return table(affine(pooler, "pooler"), affine("classifier", "classification"), affine("classifier", "tokens"))


# --- families ------------------------------------------------------------------------------------------------------

SIZES = {
    "vocab_size": "vocab", "hidden_size": "embed", "num_hidden_layers": "num_layers",
    "num_attention_heads": "block.attention.num_heads", "intermediate_size": "block.ffn.mlp",
    "hidden_act": "block.ffn.activation", "layer_norm_eps": ("block.norm.epsilon", "embedding_norm.epsilon"),
}  # fmt: skip
DEFAULTS = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
    "hidden_act": "gelu", "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "type_vocab_size": 2,
    "tie_word_embeddings": True,
}  # fmt: skip
FIXED = {
    "block.norm.kind": "layernorm", "block.placement": "post", "block.attention.bias": True,
    "block.attention.out_bias": True, "block.ffn.glu": False, "block.ffn.bias": True, "embedding_norm.kind": "layernorm",
    "final_norm": False,
}  # fmt: skip
ONLY = {"is_decoder": False, "add_cross_attention": False, "tie_word_embeddings": True}


def _positions(offset: int) -> dict[str, Any]:
    return {"position": {"kind": "learned", "offset": offset}}


POSITIONS = Part(
    lambda given: _positions(0) | {"context": given["max_position_embeddings"]},
    lambda cfg: {"max_position_embeddings": cfg.context},
)


def _after_padding(context: int, offset: int) -> dict[str, Any]:
    return {"max_position_embeddings": context + offset, "pad_token_id": offset - 1}


# Positions count from the id of padding: that row of the table is padding's own.
AFTER_PADDING = Part(
    lambda given: (
        _positions(given["pad_token_id"] + 1)
        | {"context": given["max_position_embeddings"] - given["pad_token_id"] - 1}
    ),
    lambda cfg: _after_padding(cfg.context, at(cfg, "position.offset") or 0),
)
SEGMENTS = Part(lambda given: {"segments": given["type_vocab_size"]}, lambda cfg: {"type_vocab_size": cfg.segments})
TABLE = Part(
    lambda given: {"table": given["embedding_size"] if given["embedding_size"] != given["hidden_size"] else None},
    lambda cfg: {"embedding_size": cfg.table_width},
)
BERT_HEADS = of_bert("Bert") | {
    "BertForPreTraining": {"pooler": "tanh", "heads": ["mlm", "nsp"]},
    "BertForNextSentencePrediction": {"pooler": "tanh", "heads": ["nsp"]},
}


def _bert(prefix: str, cfg: EncoderConfig) -> Table:
    return table(
        embeddings(prefix), layers(f"{prefix}encoder.layer.{{}}", *layer(BERT_QKV)), CLS, QA,
        scored(cfg, f"{prefix}pooler.dense"),
    )  # fmt: skip


BERT = Family(
    "bert", "BertModel", prefix="bert.", names=lambda cfg: _bert("bert.", cfg), sizes=SIZES, fixed=FIXED,
    defaults=DEFAULTS | {"vocab_size": 30522}, only=ONLY, parts=(POSITIONS, SEGMENTS, heads(BERT_HEADS)),
    drop=("position_ids",), model=EncoderConfig, repeats=TWICE,
)  # fmt: skip


def _ernie_tasks(given: Given) -> dict[str, Any]:
    return {"tasks": given.get("task_type_vocab_size", 3) if given.get("use_task_id") else 0}


ERNIE = Family(
    "ernie", "ErnieModel", prefix="ernie.", names=lambda cfg: _bert("ernie.", cfg), sizes=SIZES, fixed=FIXED,
    defaults=DEFAULTS | {"vocab_size": 30522}, only=ONLY,
    parts=(
        POSITIONS, SEGMENTS,
        Part(_ernie_tasks, lambda cfg: {"use_task_id": cfg.tasks > 0, "task_type_vocab_size": cfg.tasks or 3}),
        heads(of_bert("Ernie") | {
            "ErnieForPreTraining": {"pooler": "tanh", "heads": ["mlm", "nsp"]},
            "ErnieForNextSentencePrediction": {"pooler": "tanh", "heads": ["nsp"]},
        }),
    ),
    drop=("position_ids",), model=EncoderConfig, repeats=TWICE,
)  # fmt: skip


def roberta(kind: str, prefix: str) -> Family:
    """RoBERTa and the models trained as it was."""
    return Family(
        kind, f"{prefix}Model", prefix="roberta.",
        names=lambda cfg: table(
            embeddings("roberta."), layers("roberta.encoder.layer.{}", *layer(BERT_QKV)), LM_HEAD, QA,
            scored(cfg, "roberta.pooler.dense", "classifier.dense"),
        ),
        sizes=SIZES, fixed=FIXED, defaults=DEFAULTS | {"vocab_size": 50265, "pad_token_id": 1}, only=ONLY,
        parts=(AFTER_PADDING, SEGMENTS, heads(of_bert(prefix), mlm="gelu")), drop=("position_ids",), model=EncoderConfig,
        repeats=LM_TWICE,
    )  # fmt: skip


ROBERTA, XLM_ROBERTA, CAMEMBERT = (
    roberta("roberta", "Roberta"), roberta("xlm-roberta", "XLMRoberta"), roberta("camembert", "Camembert"),
)  # fmt: skip

MPNET = Family(
    "mpnet", "MPNetModel", prefix="mpnet.",
    names=lambda cfg: table(
        embeddings("mpnet."),
        tensor("mpnet.encoder.relative_attention_bias.weight", "relative.table"),
        layers(
            "mpnet.encoder.layer.{}",
            qkv("attention.attn.q", "attention.attn.k", "attention.attn.v"),
            linear("attention.attn.o", "attention.o", inputs=2), norm("attention.LayerNorm", "norm_attention"),
            linear("intermediate.dense", "ffn.up"), linear("output.dense", "ffn.down"), norm("output.LayerNorm", "norm_ffn"),
        ),
        LM_HEAD, QA, scored(cfg, "mpnet.pooler.dense", "classifier.dense"),
    ),
    sizes=SIZES | {"relative_attention_num_buckets": "relative.buckets"},
    fixed=FIXED | {"relative.kind": "t5", "relative.bidirectional": True, "segments": 0},
    defaults=DEFAULTS | {"vocab_size": 30527, "pad_token_id": 1, "relative_attention_num_buckets": 32},
    only={"tie_word_embeddings": True}, parts=(AFTER_PADDING, heads(of_bert("MPNet"), mlm="gelu")), drop=("position_ids",),
    model=EncoderConfig, repeats=LM_TWICE,
)  # fmt: skip

DISTILBERT = Family(
    "distilbert", "DistilBertModel", prefix="distilbert.",
    names=lambda cfg: table(
        embeddings("distilbert."),
        layers(
            "distilbert.transformer.layer.{}",
            qkv("attention.q_lin", "attention.k_lin", "attention.v_lin"),
            linear("attention.out_lin", "attention.o", inputs=2), norm("sa_layer_norm", "norm_attention"),
            linear("ffn.lin1", "ffn.up"), linear("ffn.lin2", "ffn.down"), norm("output_layer_norm", "norm_ffn"),
        ),
        mlm("vocab_transform", "vocab_layer_norm", "vocab_projector.bias"), QA, scored(cfg, "pre_classifier"),
    ),
    sizes={
        "vocab_size": "vocab", "dim": "embed", "n_layers": "num_layers", "n_heads": "block.attention.num_heads",
        "hidden_dim": "block.ffn.mlp", "activation": "block.ffn.activation",
    },
    fixed=FIXED | {"segments": 0, "block.norm.epsilon": 1e-12, "embedding_norm.epsilon": 1e-12},
    defaults={
        "vocab_size": 30522, "dim": 768, "n_layers": 6, "n_heads": 12, "hidden_dim": 3072, "activation": "gelu",
        "max_position_embeddings": 512, "tie_word_embeddings": True,
    },
    only={"tie_word_embeddings": True},
    parts=(POSITIONS, heads(of_bert("DistilBert", pooler=None, classifier="relu"), "activation")),
    drop=("position_ids",), model=EncoderConfig, repeats={"vocab_projector.weight": "embedding"},
)  # fmt: skip


def _albert_layers(given: Given) -> dict[str, Any]:
    count, groups = given["num_hidden_layers"], given["num_hidden_groups"]
    if count % groups:
        raise given.refuse("num_hidden_groups", f"must divide num_hidden_layers={count}")
    return {"num_layers": groups, "repeat": count // groups}


_ALBERT_LAYER = "albert.encoder.albert_layer_groups.{}.albert_layers.0"
ALBERT = Family(
    "albert", "AlbertModel", prefix="albert.",
    names=lambda cfg: table(
        embeddings("albert."), affine("albert.encoder.embedding_hidden_mapping_in", "projection"),
        layers(
            _ALBERT_LAYER, qkv("attention.query", "attention.key", "attention.value"),
            linear("attention.dense", "attention.o", inputs=2), norm("attention.LayerNorm", "norm_attention"),
            linear("ffn", "ffn.up"), linear("ffn_output", "ffn.down"), norm("full_layer_layer_norm", "norm_ffn"),
        ),
        mlm("predictions.dense", "predictions.LayerNorm", "predictions.bias"),
        affine("sop_classifier.classifier", "sop"), QA, scored(cfg, "albert.pooler"),
    ),
    sizes={k: v for k, v in SIZES.items() if k != "num_hidden_layers"},
    fixed=FIXED,
    defaults=DEFAULTS | {
        "vocab_size": 30000, "embedding_size": 128, "hidden_size": 4096, "num_hidden_groups": 1, "inner_group_num": 1,
        "num_attention_heads": 64, "intermediate_size": 16384, "hidden_act": "gelu_new",
    },
    only={"tie_word_embeddings": True, "inner_group_num": 1},
    parts=(
        POSITIONS, SEGMENTS,
        Part(_albert_layers, lambda cfg: {
            "num_hidden_layers": cfg.num_layers * cfg.repeat, "num_hidden_groups": cfg.num_layers,
        }),
        Part(lambda given: {"table": given["embedding_size"]}, lambda cfg: {"embedding_size": cfg.table_width}),
        heads(of_bert("Albert") | {"AlbertForPreTraining": {"pooler": "tanh", "heads": ["mlm", "sop"]}}),
    ),
    drop=("position_ids",), model=EncoderConfig,
    repeats={"predictions.decoder.weight": "embedding", "predictions.decoder.bias": "mlm.b"},
)  # fmt: skip

ELECTRA = Family(
    "electra", "ElectraModel", prefix="electra.",
    names=lambda cfg: table(
        embeddings("electra."), affine("electra.embeddings_project", "projection"),
        layers("electra.encoder.layer.{}", *layer(BERT_QKV)),
        affine("discriminator_predictions.dense", "rtd.projection"),
        affine("discriminator_predictions.dense_prediction", "rtd.scores"),
        mlm("generator_predictions.dense", "generator_predictions.LayerNorm", "generator_lm_head.bias"), QA,
        scored(cfg, "\0", "classifier.dense"),
    ),
    sizes=SIZES, fixed=FIXED, defaults=DEFAULTS | {
        "vocab_size": 30522, "embedding_size": 128, "hidden_size": 256, "num_attention_heads": 4,
        "intermediate_size": 1024,
    },
    only=ONLY | {"summary_type": "first", "summary_use_proj": True},
    parts=(POSITIONS, SEGMENTS, TABLE, heads(
        of_bert("Electra", pooler=None, classifier="gelu") | {"ElectraForPreTraining": {"heads": ["rtd"]}}, mlm="gelu"
    )),
    drop=("position_ids",), model=EncoderConfig, repeats={"generator_lm_head.weight": "embedding"},
)  # fmt: skip

# --- DeBERTa -------------------------------------------------------------------------------------------------------


def _disentangled(given: Given) -> dict[str, Any]:
    types = given.get("pos_att_type") or []
    types = [t.strip().lower() for t in types.split("|")] if isinstance(types, str) else types
    span, buckets = given.get("max_relative_positions", -1), given.get("position_buckets", -1)
    head_dim = given["hidden_size"] // given["num_attention_heads"]
    out = {
        "context": given["max_position_embeddings"],
        "position": {"kind": "learned"} if given["position_biased_input"] else {"kind": "none"},
        "block.attention.scale": (head_dim * (1 + len(types))) ** -0.5,
    }
    if not given["relative_attention"]:
        return out
    return out | {"relative": {
        "kind": "disentangled", "span": span if span > 0 else given["max_position_embeddings"],
        "buckets": buckets if buckets > 0 else None, "content_to_position": "c2p" in types,
        "position_to_content": "p2c" in types, "own_projections": not given.get("share_att_key", False),
        "norm": "layer_norm" in given.get("norm_rel_ebd", "none"),
    }}  # fmt: skip


def _disentangled_theirs(cfg: EncoderConfig) -> dict[str, Any]:
    relative, a = cfg.relative, cfg.block.attention
    out = {
        "max_position_embeddings": cfg.context, "position_biased_input": cfg.position.kind == "learned",
        "relative_attention": at(relative, "kind") == "disentangled",
    }  # fmt: skip
    if at(relative, "kind") != "disentangled":  # what the logits are divided by is all that is left of the kinds
        return out | {"pos_att_type": ["c2p", "p2c"][: round(a.scale**-2 / cfg.head_dim(a)) - 1]}
    kinds = {"c2p": relative.content_to_position, "p2c": relative.position_to_content}
    return out | {
        "max_relative_positions": relative.span, "position_buckets": relative.buckets or -1,
        "pos_att_type": [kind for kind, there in kinds.items() if there],
        "share_att_key": not relative.own_projections, "norm_rel_ebd": "layer_norm" if relative.norm else "none",
    }  # fmt: skip


DISENTANGLED = Part(_disentangled, _disentangled_theirs)
CONVOLUTION = Part(
    lambda given: {"convolution": {
        "width": given["conv_kernel_size"], "activation": ACTIVATIONS[given.get("conv_act", "tanh")],
        "groups": given.get("conv_groups", 1),
    } if given.get("conv_kernel_size", 0) > 0 else None},
    lambda cfg: {} if cfg.convolution is None else {
        "conv_kernel_size": cfg.convolution.width, "conv_groups": cfg.convolution.groups,
        "conv_act": ACTIVATIONS_OF_OURS[cfg.convolution.activation],
    },
)  # fmt: skip


def _deberta(attention: Table) -> Table:
    return table(
        embeddings("deberta."), layers("deberta.encoder.layer.{}", *layer(attention)),
        tensor("deberta.encoder.rel_embeddings.weight", "relative.table"),
        norm("deberta.encoder.LayerNorm", "relative.norm"),
        tensor("deberta.encoder.conv.conv.weight", "convolution.w", TURNED),
        tensor("deberta.encoder.conv.conv.bias", "convolution.b"),
        norm("deberta.encoder.conv.LayerNorm", "convolution.norm"), CLS, QA,
        affine("pooler.dense", "pooler"), affine("classifier", "classification"), affine("classifier", "tokens"),
    )  # fmt: skip


# A convolution's weight, [out, in, width] of theirs.
TURNED = Form(
    lambda theirs, shapes: [x.transpose(2, 1, 0).reshape(s) for x, s in zip(theirs, shapes, strict=True)],
    lambda ours: [x.transpose(2, 1, 0) for x in ours],
)
_DEBERTA = DEFAULTS | {
    "layer_norm_eps": 1e-7, "type_vocab_size": 0, "relative_attention": False, "position_biased_input": True,
}  # fmt: skip
_LEGACY = {"tie_word_embeddings": True, "legacy": True, "pooler_hidden_act": "gelu"}
DEBERTA = Family(
    "deberta", "DebertaModel", prefix="deberta.",
    names=_deberta(table(
        (Row(("attention.self.in_proj.weight",), tuple(f"attention.w_{n}" for n in "qkv"), by_head()),),
        tensor("attention.self.q_bias", "attention.b_q", FLAT), tensor("attention.self.v_bias", "attention.b_v", FLAT),
        linear("attention.self.pos_proj", "attention.relative.k"),
        linear("attention.self.pos_q_proj", "attention.relative.q"),
    )),
    sizes=SIZES, fixed=FIXED | {"block.attention.key_bias": False}, defaults=_DEBERTA | {"vocab_size": 50265},
    only=_LEGACY | {"talking_head": False},
    parts=(SEGMENTS, DISENTANGLED, heads(of_bert("Deberta", pooler=None, classifier="gelu"))),
    drop=("position_ids",), model=EncoderConfig, repeats=TWICE,
)  # fmt: skip
DEBERTA_V2 = Family(
    "deberta-v2", "DebertaV2Model", prefix="deberta.",
    names=_deberta(table(
        qkv("attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj"),
        linear("attention.self.pos_key_proj", "attention.relative.k"),
        linear("attention.self.pos_query_proj", "attention.relative.q"),
    )),
    sizes=SIZES, fixed=FIXED, defaults=_DEBERTA | {
        "vocab_size": 128100, "hidden_size": 1536, "num_hidden_layers": 24, "num_attention_heads": 24,
        "intermediate_size": 6144,
    },
    only=_LEGACY,
    parts=(SEGMENTS, DISENTANGLED, CONVOLUTION, heads(of_bert("DebertaV2", pooler=None, classifier="gelu"))),
    drop=("position_ids",), model=EncoderConfig, repeats=TWICE,
)  # fmt: skip

FAMILIES = (BERT, ROBERTA, XLM_ROBERTA, CAMEMBERT, DISTILBERT, ALBERT, ELECTRA, MPNET, ERNIE, DEBERTA, DEBERTA_V2)
