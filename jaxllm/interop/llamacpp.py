"""GGUF files as models: llama.cpp's architectures are families like those of transformers, with keys of their own.

Keys lose the name of the architecture: `llama.block_count` is `block_count`. What a file says by its tensors stands
among them: `FACTS` by which there are, and `DIVISORS`, of RoPE's frequencies, under their names.

Converters lay the rows of `attn_q` and `attn_k` of LLaMA and OLMo out so that the two elements that rotate together
follow one another; here they stand half a head apart, as the published weights have it. Of Gemma's norms they store
scale + 1.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.core.errors import CheckpointError, ConfigError
from jaxllm.interop import ggml, gguf
from jaxllm.interop.decoders import BIASES, LAYERNORM, LLAMA_FIXED
from jaxllm.interop.family import LAYERS, Family, Given, Part, at, differences, resolved
from jaxllm.interop.names import QKV, Form, Row, Table, fused, layers, linear, norm, table, tensor
from jaxllm.interop.vocabulary import tokenizer
from jaxllm.interop.weights import Weights, tensors_of
from jaxllm.models.config import AnyModel, DecoderConfig
from jaxllm.models.layers.position import frequencies
from jaxllm.models.positions import Llama3, RoPE

__all__ = ["ARCHITECTURES", "architecture", "open_model", "save_model", "tokenizer"]

# --- names ---------------------------------------------------------------------------------------------------------


def paired() -> Form:
    """Rows of each head in the order 0, H/2, 1, H/2 + 1, ..., in a matrix or a bias."""

    def ours(theirs, shapes):
        (x,), (*D, N, H) = theirs, shapes[0]
        split = x.reshape(N, H // 2, 2, *D).swapaxes(1, 2).reshape(N * H, *D)
        return [(split.T if D else split).reshape(shapes[0])]

    def back(ours):
        (x,) = ours
        *D, N, H = x.shape
        flat = x.reshape(*D, N * H)
        rows = flat.T if D else flat
        return [rows.reshape(N, 2, H // 2, *D).swapaxes(1, 2).reshape(N * H, *D)]

    return Form(ours, back)


def _paired(names: Table) -> Table:
    """The rows, with queries and keys laid out as LLaMA's converters do."""
    turned = {"attention.w_q", "attention.w_k", "attention.b_q", "attention.b_k"}
    return tuple(row._replace(form=paired()) if row.ours[0] in turned else row for row in names)


def _plus_one(names: Table) -> Table:
    """The rows, with scales of norms larger by one than ours (`unit_offset`)."""
    form = Form(lambda theirs, shapes: [theirs[0].reshape(shapes[0]) - 1], lambda ours: [ours[0].reshape(-1) + 1])
    return tuple(row._replace(form=form) if row.ours[0].endswith(".scale") else row for row in names)


OUTSIDE = table(tensor("token_embd.weight", "embedding"), norm("output_norm", "final_norm"), linear("output", "head"))
POSITIONS = tensor("position_embd.weight", "positions")
SEPARATE = table(*(linear(f"attn_{x}", f"attention.{x}") for x in "qkv"))
FUSED = fused("attn_qkv", QKV)
OUT = linear("attn_output", "attention.o", inputs=2)
PLAIN_FFN = table(linear("ffn_up", "ffn.up"), linear("ffn_down", "ffn.down"))
GATED_FFN = table(linear("ffn_gate", "ffn.gate"), PLAIN_FFN)
NORMS = table(norm("attn_norm", "norm_attention"), norm("ffn_norm", "norm_ffn"))
QK_NORMS = table(norm("attn_q_norm", "attention.q_norm"), norm("attn_k_norm", "attention.k_norm"))
SANDWICH = table(NORMS, norm("post_attention_norm", "post_attention"), norm("post_ffw_norm", "post_ffn"))


def _names(*rows: Table) -> Table:
    return table(OUTSIDE, layers("blk.{}", *rows))


def _falcon_names(cfg: DecoderConfig) -> Table:
    """Where each branch has a norm of its own, the second is that of attention."""
    norms = norm("attn_norm", "norm_attention")
    if getattr(cfg.block.placement, "norms", 1) == 2:
        norms = table(norm("attn_norm_2", "norm_attention"), norm("attn_norm", "norm_ffn"))
    return _names(FUSED, OUT, PLAIN_FFN, norms)


# --- keys ----------------------------------------------------------------------------------------------------------

SIZES = {
    "vocab_size": "vocab", "embedding_length": "embed", "block_count": "num_layers", "context_length": "context",
    "feed_forward_length": "block.ffn.mlp", "attention.head_count": "block.attention.num_heads",
    "attention.head_count_kv": "block.attention.num_kv_heads", "tied": "tie",
}  # fmt: skip
RMS = {"attention.layer_norm_rms_epsilon": "block.norm.epsilon"}
RMS_QK = {"attention.layer_norm_rms_epsilon": ("block.norm.epsilon", "block.attention.qk_norm.epsilon")}
LN = {"attention.layer_norm_epsilon": "block.norm.epsilon"}
BIASED = {"qkv_bias": "block.attention.bias", "out_bias": "block.attention.out_bias", "ffn_bias": "block.ffn.bias"}
FINAL_SOFTCAP = {"final_logit_softcapping": "logit_softcap"}
CLAMP = {"attention.clamp_kqv": "block.attention.clip"}


def _head_size(given: Given) -> int:
    return given.get("attention.key_length") or given["embedding_length"] // given["attention.head_count"]


def _sizes_of_heads(cfg: DecoderConfig) -> dict[str, Any]:
    H = cfg.block.attention.head_dim
    return {"attention.key_length": H, "attention.value_length": H}


HEADS = Part(lambda given: {"block.attention.head_dim": _head_size(given)}, _sizes_of_heads)


def _rope(given: Given) -> dict[str, Any]:
    size = _head_size(given)
    out: dict[str, Any] = {"kind": "rope", "theta": float(given.get("rope.freq_base", 10_000.0))}
    out["fraction"] = given.get("rope.dimension_count", size) / size
    original = given.get("rope.scaling.original_context_length") or given["context_length"]
    factor, attention = given.get("rope.scaling.factor"), given.get("rope.scaling.attn_factor", 1.0)
    if given.get("rope_freqs.weight"):
        out["scaling"] = _divided(given, out["theta"], given.get("rope.dimension_count", size))
    elif given.get("rope_factors_long.weight"):
        divisors = {name: given[f"rope_factors_{name}.weight"] for name in ("short", "long")}
        out["scaling"] = {"kind": "longrope", "original": original, "attention": attention, **divisors}
    elif (kind := given.get("rope.scaling.type", "none")) == "linear":
        out["scaling"] = {"kind": "linear", "factor": given["rope.scaling.factor"]}
    elif kind == "yarn":
        out["scaling"] = {"kind": "yarn", "factor": factor, "original": original}
        out["scaling"] |= {f"beta_{n}": given.get(f"rope.scaling.yarn_beta_{n}", x) for n, x in _BETAS.items()}
        if attention != 1:
            out["scaling"]["attention"] = attention * (0.1 * math.log(factor) + 1)
    elif kind != "none":
        raise given.refuse("rope.scaling.type", "known: none, linear, yarn")
    return {"position": out}


_BETAS = {"fast": 32.0, "slow": 1.0}


def _divided(given: Given, theta: float, rotary_dim: int) -> dict[str, Any]:
    """The scaling whose divisors a file lists: LLaMA 3's, if there is a length in training that explains them."""
    divisors = given["rope_freqs.weight"]
    told = given.get("rope.scaling.original_context_length")
    for original in [told] if told else [1 << n for n in range(4, 21)]:
        try:
            wanted = _divisors(theta, Llama3(factor=max(divisors), original=original), rotary_dim)
        except ValueError:  # a factor below 1
            break
        if len(wanted) == len(divisors) and np.allclose(wanted, divisors, rtol=1e-5, atol=0):
            return {"kind": "llama3", "factor": max(divisors), "original": original}
    return {"kind": "longrope", "short": divisors, "long": divisors, "original": given["context_length"]}


def _divisors(theta: float, scaling: Llama3, rotary_dim: int) -> list[float]:
    plain, scaled = (
        np.asarray(frequencies(RoPE(theta=theta, scaling=s), None, rotary_dim), np.float32) for s in (None, scaling)
    )
    return [float(x) for x in plain / scaled]


def _rope_keys(cfg: DecoderConfig) -> dict[str, Any]:
    a = cfg.block.attention
    rope = a.position
    if getattr(rope, "kind", None) != "rope":
        return {}  # what is read back differs, which is refused
    said = {"rope.freq_base": rope.theta, "rope.dimension_count": cfg.rotary_dim(a)}
    s = rope.scaling
    match s and s.kind:
        case "linear":
            said |= {"rope.scaling.type": "linear", "rope.scaling.factor": s.factor}
        case "yarn":
            said |= {"rope.scaling.type": "yarn", "rope.scaling.factor": s.factor}
            said |= {"rope.scaling.original_context_length": s.original}
            said |= {f"rope.scaling.yarn_beta_{n}": getattr(s, f"beta_{n}") for n in _BETAS}
            if s.attention is not None:
                said["rope.scaling.attn_factor"] = s.attention / (0.1 * math.log(s.factor) + 1)
        case "llama3":
            said["rope_freqs.weight"] = _divisors(rope.theta, s, cfg.rotary_dim(a))
            said["rope.scaling.original_context_length"] = s.original
        case "longrope" if s.short == s.long:
            said["rope_freqs.weight"] = list(s.long)
        case "longrope":
            said |= {"rope_factors_short.weight": list(s.short), "rope_factors_long.weight": list(s.long)}
            said |= {"rope.scaling.original_context_length": s.original, "rope.scaling.attn_factor": s.attention}
    return said


ROPE = (HEADS, Part(_rope, _rope_keys))


def _rope_of_pairs() -> tuple[Part, ...]:
    """RoPE of whole heads: the layout of `paired` tells nothing of a part of one."""

    def ours(given: Given) -> dict[str, Any]:
        if given.get("rope.dimension_count", _head_size(given)) != _head_size(given):
            raise given.refuse("rope.dimension_count", f"only whole heads, of {_head_size(given)}, are read")
        return _rope(given)

    return HEADS, Part(ours, _rope_keys)


def windows(every: int | None = None) -> Part:
    """Sliding windows of all layers, or of all but each `every`th, or as a list of true and false says."""

    def ours(given: Given) -> dict[str, Any]:
        L, window = given["block_count"], given.get("attention.sliding_window") or None
        pattern = given.get("attention.sliding_window_pattern", every)
        if isinstance(pattern, list):
            slides = pattern
        else:
            slides = [not pattern or (i + 1) % pattern > 0 for i in range(L)]
        if len(slides) != L:
            raise given.refuse("attention.sliding_window_pattern", f"there are {L} layers")
        return {LAYERS: [{"attention.window": window if slide else None} for slide in slides]}

    def theirs(cfg: DecoderConfig) -> dict[str, Any]:
        found = [cfg.layer(i).attention.window for i in range(cfg.num_layers)]
        slides = [window is not None for window in found]
        if not any(slides):
            return {}
        usual = [not every or (i + 1) % every > 0 for i in range(cfg.num_layers)]
        said = {"attention.sliding_window": next(window for window in found if window)}
        return said if slides == usual else said | {"attention.sliding_window_pattern": slides}

    return Part(ours, theirs)


def _gemma3_layers() -> Part:
    """Windows of all but every sixth layer, and another wavelength where they slide."""
    pattern = windows(6)
    base, swa = "rope.freq_base", "rope.freq_base_swa"

    def ours(given: Given) -> dict[str, Any]:
        full = _rope(Given({base: 1e6, **given}, {}, given.name))["position"]
        sliding = full | {"theta": float(given.get(swa, 10_000.0)), "scaling": None}
        rows = pattern.ours(given)[LAYERS]
        for row in rows:
            row["attention.position"] = full if row["attention.window"] is None else sliding
        return {"position": full, LAYERS: rows}

    def theirs(cfg: DecoderConfig) -> dict[str, Any]:
        every = [cfg.layer(i) for i in range(cfg.num_layers)]
        full = next((b for b in every if b.attention.window is None), every[0])
        sliding = next((b.attention.position for b in every if b.attention.window is not None), None)
        said = pattern.theirs(cfg) | _rope_keys(cfg.model_copy(update={"block": full}))
        return said | ({swa: sliding.theta} if sliding is not None else {})

    return Part(ours, theirs)


def _query_scale(layers_of_27b: int) -> Part:
    """What multiplies the logits: by the size of a head, but in the model of 27B by the width that heads share."""

    def usual(given: Mapping[str, Any]) -> float:
        width = given["embedding_length"] // given["attention.head_count"]
        return (width if given["block_count"] == layers_of_27b else given["attention.key_length"]) ** -0.5

    def ours(given: Given) -> dict[str, Any]:
        said = {**given, "attention.key_length": _head_size(given)}
        return {"block.attention.scale": given.get("attention.scale") or usual(said)}

    def theirs(cfg: DecoderConfig) -> dict[str, Any]:
        a = cfg.block.attention
        said = {"embedding_length": cfg.embed, "attention.head_count": a.num_heads, "block_count": cfg.num_layers}
        same = math.isclose(a.scale, usual(said | {"attention.key_length": a.head_dim}), rel_tol=1e-6)
        return {} if same else {"attention.scale": a.scale}

    return Part(ours, theirs)


EMBED_SCALE = Part(lambda given: {"embed_scale": math.sqrt(given["embedding_length"])}, lambda cfg: {})
RESIDUAL = Part(
    lambda given: {
        "block.placement": {"kind": "parallel", "norms": 2} if given["use_parallel_residual"] else {"kind": "pre"}
    },
    lambda cfg: {"use_parallel_residual": cfg.block.placement.kind == "parallel"},
)  # fmt: skip
TWO_NORMS = Part(
    lambda given: {"block.placement": {"kind": "parallel", "norms": 2 if given["two_norms"] else 1}},
    lambda cfg: {"two_norms": at(cfg, "block.placement.norms") == 2},
)

# --- architectures -------------------------------------------------------------------------------------------------


def _architecture(
    kind: str, names: Table | Callable[[DecoderConfig], Table], sizes: dict[str, Any], **more: Any
) -> Family:
    """A family whose keys are those of LLaMA, but for what is said."""
    standard = {"fixed": LLAMA_FIXED, "defaults": {"attention.head_count_kv": None}, "parts": (*ROPE, windows())}
    drop = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
    return Family(kind, kind, prefix="", names=names, sizes=SIZES | sizes, drop=drop, **standard | more)


GELU, TANH = {"block.ffn.activation": "gelu"}, {"block.ffn.activation": "gelu_tanh"}
OFFSET = LLAMA_FIXED | TANH | {"block.norm.unit_offset": True}
TIED = {"only": {"tied": True}}
KV_AS_HEADS = {"attention.head_count_kv": None}
LEARNED = LAYERNORM | BIASES | TANH | {"position.kind": "learned"}

ARCHITECTURES = {family.kind: family for family in (
    _architecture("llama", _names(_paired(SEPARATE), OUT, GATED_FFN, NORMS), RMS | BIASED,
                  parts=(*_rope_of_pairs(), windows())),
    _architecture("qwen2", _names(SEPARATE, OUT, GATED_FFN, NORMS), RMS,
                  fixed=LLAMA_FIXED | {"block.attention.bias": True}),
    _architecture("qwen3", _names(SEPARATE, OUT, GATED_FFN, NORMS, QK_NORMS), RMS_QK,
                  fixed=LLAMA_FIXED | {"block.attention.qk_norm.kind": "rmsnorm"}),
    _architecture("gemma", _plus_one(_names(SEPARATE, OUT, GATED_FFN, NORMS)), RMS, fixed=OFFSET,
                  parts=(*ROPE, windows(), EMBED_SCALE), **TIED),
    _architecture("gemma2", _plus_one(_names(SEPARATE, OUT, GATED_FFN, SANDWICH)),
                  RMS | {"attn_logit_softcapping": "block.attention.softcap"} | FINAL_SOFTCAP,
                  fixed=OFFSET | {"block.placement.kind": "sandwich"},
                  defaults={"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, **KV_AS_HEADS},
                  parts=(*ROPE, windows(2), EMBED_SCALE, _query_scale(46)), **TIED),
    _architecture("gemma3", _plus_one(_names(SEPARATE, OUT, GATED_FFN, SANDWICH, QK_NORMS)),
                  RMS_QK | FINAL_SOFTCAP,
                  fixed=OFFSET | {
                      "block.placement.kind": "sandwich", "block.attention.qk_norm.kind": "rmsnorm",
                      "block.attention.qk_norm.unit_offset": True,
                  },
                  defaults={"final_logit_softcapping": None, **KV_AS_HEADS},
                  parts=(HEADS, _gemma3_layers(), EMBED_SCALE, _query_scale(62))),
    _architecture("olmo", _names(_paired(SEPARATE), OUT, GATED_FFN), LN | CLAMP,
                  fixed=LLAMA_FIXED | {
                      "block.norm.kind": "layernorm", "block.norm.bias": False, "block.norm.scale": False,
                  },
                  defaults={"attention.clamp_kqv": None, **KV_AS_HEADS}, parts=(*_rope_of_pairs(), windows())),
    _architecture("olmo2", _names(SEPARATE, OUT, GATED_FFN, norm("post_attention_norm", "norm_attention"),
                                  norm("post_ffw_norm", "norm_ffn"), QK_NORMS), RMS_QK,
                  fixed=LLAMA_FIXED | {
                      "block.placement.kind": "res_post", "block.attention.qk_norm.kind": "rmsnorm",
                      "block.attention.qk_norm_over": "heads",
                  }),
    _architecture("phi2", _names(SEPARATE, OUT, PLAIN_FFN, norm("attn_norm", "norm_attention")), LN,
                  fixed=LAYERNORM | BIASES | TANH | {"block.placement.kind": "parallel", "head_bias": True}),
    _architecture("phi3", _names(FUSED, OUT, fused("ffn_up", ("ffn.gate", "ffn.up")),
                                 linear("ffn_down", "ffn.down"), NORMS), RMS),
    _architecture("starcoder2", _names(SEPARATE, OUT, PLAIN_FFN, NORMS), LN, fixed=LAYERNORM | BIASES | TANH),
    _architecture("gpt2", table(POSITIONS, _names(FUSED, OUT, PLAIN_FFN, NORMS)), LN, fixed=LEARNED, parts=(HEADS,)),
    _architecture("starcoder", table(POSITIONS, _names(FUSED, OUT, PLAIN_FFN, NORMS)), LN, fixed=LEARNED,
                  parts=(HEADS,)),
    _architecture("gptneox", _names(FUSED, OUT, PLAIN_FFN, NORMS), LN, fixed=LAYERNORM | BIASES | GELU,
                  parts=(*ROPE, windows(), RESIDUAL)),
    _architecture("falcon", _falcon_names, LN, fixed=LAYERNORM | GELU, parts=(*ROPE, windows(), TWO_NORMS)),
    _architecture("bloom", table(norm("token_embd_norm", "embedding_norm"), _names(FUSED, OUT, PLAIN_FFN, NORMS)),
                  {"attention.layer_norm_epsilon": ("block.norm.epsilon", "embedding_norm.epsilon")},
                  fixed=LAYERNORM | BIASES | TANH | {"position.kind": "alibi", "embedding_norm.kind": "layernorm"},
                  parts=(HEADS,)),
    _architecture("mpt", _names(FUSED, OUT, PLAIN_FFN, NORMS), LN | CLAMP,
                  fixed=LAYERNORM | GELU | {
                      "block.norm.bias": False, "position.kind": "alibi", "position.order": "odd_first",
                  },
                  defaults={"attention.clamp_kqv": None, **KV_AS_HEADS}, only={"attention.max_alibi_bias": 8.0},
                  parts=(HEADS,)),
)}  # fmt: skip
"""By `general.architecture`."""

OF_FAMILY = {
    "mistral": "llama", "gemma3_text": "gemma3", "phi": "phi2", "gpt_bigcode": "starcoder", "gpt_neox": "gptneox",
}  # fmt: skip
"""Families of Hugging Face whose architecture has another name."""


def architecture(cfg: AnyModel, family: str | None = None) -> Family:
    """The architecture of a model: that of its family, or else the first that has such a model.

    Raises:
      ConfigError: there is none.
    """
    if not isinstance(cfg, DecoderConfig):
        raise ConfigError(f"only decoders are written as GGUF, and this is a model of kind {cfg.kind}")
    if (kind := OF_FAMILY.get(family or "", family)) in ARCHITECTURES:
        ARCHITECTURES[kind].theirs(cfg)
        return ARCHITECTURES[kind]
    why = []
    for known in ARCHITECTURES.values():
        try:
            known.theirs(cfg)
        except ConfigError as e:
            why.append(str(e))
        else:
            return known
    raise ConfigError(
        "no architecture of llama.cpp that is known here has such a model; closest:\n  " + min(why, key=len)
    )


# --- files ---------------------------------------------------------------------------------------------------------


def open_model(path: str | Path) -> tuple[Family, DecoderConfig, Weights, gguf.GGUF]:
    """Family, config and weights of a GGUF file, which are float32 when they are asked for; and the file.

    Raises:
      CheckpointError: a file that is damaged; an architecture that is not known; one that asks for what is not here.
    """
    file = gguf.open_gguf(path)
    kind = file.metadata.get("general.architecture")
    if kind not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise CheckpointError(f"{path}: general.architecture={kind!r} is no architecture that is known here: {known}")
    family = ARCHITECTURES[kind]
    cfg = family.ours(keys(file, kind), str(path))
    return family, cfg, Weights(family, cfg, file, file.read, str(path)), file


def keys(file: gguf.GGUF, kind: str) -> Mapping[str, Any]:
    """The keys of its architecture, with what its tensors say beside them."""
    prefix = f"{kind}."
    said = {key.removeprefix(prefix): x for key, x in file.metadata.items() if key.startswith(prefix)}
    for name in DIVISORS:
        if name in file:
            if math.prod(file[name].shape) > 1 << 16:
                raise CheckpointError(
                    f"{file.path}: {name} has shape {file[name].shape}; no head has so many frequencies"
                )
            said[name] = file.read(name, np.float32).reshape(-1).tolist()
    rows = file["token_embd.weight"].shape[0] if "token_embd.weight" in file else None
    return said | {"vocab_size": rows} | {key: (name in file) == there for key, (name, there) in FACTS.items()}


DIVISORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
FACTS = {  # key -> a tensor, and whether it is there where the key is true
    "tied": ("output.weight", False), "two_norms": ("blk.0.attn_norm_2.weight", True),
    "qkv_bias": ("blk.0.attn_q.bias", True), "out_bias": ("blk.0.attn_output.bias", True),
    "ffn_bias": ("blk.0.ffn_up.bias", True),
}  # fmt: skip
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}  # general.file_type: what most tensors are


def save_model(
    path: str | Path,
    cfg: AnyModel,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
    kind: str,
    *,
    family: str | None = None,
    vocabulary: Mapping[str, Any],
) -> None:
    """Writes a model as llama.cpp has it, one tensor after the other.

    Vectors and learned positions are F32, as its converters leave them. Rows that are no whole blocks are F16, and the
    output head is Q8_0 in a file of Q4_0.

    Args:
      shapes: of the weights by logical name; `read(name)` gives the array when its turn comes.
      kind: F32, F16, BF16, Q8_0 or Q4_0, of matrices.
      family: as in `architecture`.
      vocabulary: the metadata of its tokenizer, as `vocabulary.metadata` makes them.

    Raises:
      ConfigError: no architecture has such a model.
      CheckpointError: a weight that `kind` cannot hold; the file cannot be written.
    """
    of = architecture(cfg, family)
    said = {key: x for key, x in of.theirs(cfg).items() if x is not None}
    if differs := differences(resolved(of.ours(said)), resolved(cfg)):
        raise ConfigError(f"no {of.kind} is like this model: {differs[0][0]} cannot be {differs[0][2]!r}")
    metadata = {"general.architecture": of.kind, "general.type": "model", "general.name": Path(path).stem}
    metadata |= {"general.file_type": FILE_TYPES[kind]}
    beside = ("architectures", "model_type", *FACTS, *DIVISORS)
    metadata |= {f"{of.kind}.{key}": x for key, x in said.items() if key not in beside} | dict(vocabulary)
    rows: dict[str, Row] = {}
    specs: dict[str, gguf.Spec] = {name: gguf.Spec((len(said[name]),)) for name in DIVISORS if name in said}
    for name, (shape, row, *_) in tensors_of(of, cfg, shapes).items():
        rows[name], specs[name] = row, gguf.Spec(shape)
    head = "token_embd.weight" if cfg.tie else "output.weight"

    def stored(name: str) -> str:
        if name == "position_embd.weight":
            return "F32"
        if specs[name].shape[-1] % ggml.KINDS[kind].block:
            return "F16"
        return "Q8_0" if kind == "Q4_0" and name == head else kind

    def produce(name: str) -> np.ndarray:
        if name in said:
            return np.asarray(said[name], np.float32)
        ours = [np.asarray(read(o)) for o in rows[name].ours]
        vector = len(specs[name].shape) == 1  # in full precision before one is added to it
        (made,) = rows[name].form.theirs([x.astype(np.float32) for x in ours] if vector else ours)
        return made

    gguf.write_gguf(path, metadata, specs, kinds={name: stored(name) for name in specs}, produce=produce)
