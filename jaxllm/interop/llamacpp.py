"""GGUF files as models: llama.cpp's architectures are families like those of transformers, with keys of their own.

Keys lose the name of the architecture: `llama.block_count` is `block_count`. Converters lay the rows of `attn_q` and
`attn_k` of LLaMA out so that the two elements that rotate together follow one another; here they stand half a head
apart, as the published weights have it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxllm.core.errors import CheckpointError
from jaxllm.data.tokenizers.base import Spec, Tokenizer
from jaxllm.interop import gguf
from jaxllm.interop.decoders import LLAMA_FIXED
from jaxllm.interop.family import Family, Given, Part
from jaxllm.interop.names import Form, Table, layers, linear, norm, table, tensor
from jaxllm.interop.weights import Weights
from jaxllm.models.config import DecoderConfig

OUTSIDE = table(tensor("token_embd.weight", "embedding"), norm("output_norm", "final_norm"), linear("output", "head"))
PLAIN = table(
    *(linear(f"attn_{x}", f"attention.{x}") for x in "qkv"), linear("attn_output", "attention.o", inputs=2),
    *(linear(f"ffn_{x}", f"ffn.{x}") for x in ("gate", "up", "down")), norm("attn_norm", "norm_attention"),
    norm("ffn_norm", "norm_ffn"),
)  # fmt: skip


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


def _rope(given: Given) -> dict[str, Any]:
    if given.get("rope.scaling.type", "none") not in ("none", "linear"):
        raise given.refuse("rope.scaling.type", "known: none, linear")
    heads = given["attention.head_count"]
    size = given.get("attention.key_length") or given["embedding_length"] // heads
    out = {"kind": "rope", "theta": float(given.get("rope.freq_base", 10_000.0))}
    out["fraction"] = given.get("rope.dimension_count", size) / size
    if given.get("rope.scaling.type") == "linear":
        out["scaling"] = {"kind": "linear", "factor": given["rope.scaling.factor"]}
    return {"position": out, "block.attention.head_dim": size}


def _keys(cfg: DecoderConfig) -> dict[str, Any]:
    a = cfg.block.attention
    scaling = a.position.scaling
    said = {"rope.freq_base": a.position.theta, "rope.dimension_count": cfg.rotary_dim(a)}
    said |= {"attention.key_length": a.head_dim, "attention.value_length": a.head_dim}
    if scaling is not None and scaling.kind == "linear":
        said |= {"rope.scaling.type": "linear", "rope.scaling.factor": scaling.factor}
    return said


SIZES = {
    "vocab_size": "vocab", "embedding_length": "embed", "block_count": "num_layers", "context_length": "context",
    "feed_forward_length": "block.ffn.mlp", "attention.head_count": "block.attention.num_heads",
    "attention.head_count_kv": "block.attention.num_kv_heads",
    "attention.layer_norm_rms_epsilon": "block.norm.epsilon", "tied": "tie",
}  # fmt: skip


def _architecture(kind: str, *, paired: bool = False, norms: Table = (), **fixed: Any) -> Family:
    names = table(OUTSIDE, layers("blk.{}", _paired(PLAIN) if paired else PLAIN, norms))
    return Family(
        kind, kind, prefix="", names=names, sizes=SIZES, fixed=LLAMA_FIXED | fixed,
        defaults={"attention.head_count_kv": None}, parts=(Part(_rope, _keys),), drop=("rope_freqs.weight",),
    )  # fmt: skip


QK = table(norm("attn_q_norm", "attention.q_norm"), norm("attn_k_norm", "attention.k_norm"))
ARCHITECTURES = {family.kind: family for family in (
    _architecture("llama", paired=True),
    _architecture("qwen2", **{"block.attention.bias": True}),
    _architecture("qwen3", norms=QK, **{"block.attention.qk_norm": {"kind": "rmsnorm"}}),
)}  # fmt: skip


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
    if "rope_freqs.weight" in file:
        raise CheckpointError(f"{path}: frequencies of its own (rope_freqs.weight) are not read; take the safetensors")
    family = ARCHITECTURES[kind]
    cfg = family.ours(keys(file, kind), str(path))
    return family, cfg, Weights(family, cfg, file, file.read, str(path)), file


def keys(file: gguf.GGUF, kind: str) -> Mapping[str, Any]:
    """The keys of its architecture, with the size of its vocabulary and whether its head is the embedding."""
    prefix = f"{kind}."
    said = {key.removeprefix(prefix): x for key, x in file.metadata.items() if key.startswith(prefix)}
    rows = file["token_embd.weight"].shape[0] if "token_embd.weight" in file else None
    return said | {"vocab_size": rows, "tied": "output.weight" not in file}


# --- tokenizers ----------------------------------------------------------------------------------------------------

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type

# How text is split before byte pairs are merged, by tokenizer.ggml.pre: the patterns of the models' own tokenizers.
_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
PRE = {
    "default": (_GPT2, False), "gpt-2": (_GPT2, False), "smollm": (_GPT2, True), "starcoder": (_GPT2, True),
    "llama-bpe": (_LLAMA3, False), "llama3": (_LLAMA3, False), "qwen2": (_QWEN2, False),
}  # fmt: skip


def tokenizer(file: gguf.GGUF) -> tuple[Tokenizer, tuple[int, ...]]:
    """The tokenizer of a file, and the ids that it puts before every text.

    Raises:
      CheckpointError: a kind that is not known here.
    """
    said = {k.removeprefix("tokenizer.ggml."): v for k, v in file.metadata.items() if k.startswith("tokenizer.ggml.")}
    named = {
        role: said["tokens"][said[key]]
        for role, key in (("bos", "bos_token_id"), ("eos", "eos_token_id"), ("pad", "padding_token_id"))
        if said.get(key) is not None and 0 <= said[key] < len(said["tokens"])
    }
    match said.get("model"):
        case "gpt2":
            made, begins = _byte_pairs(said, named, file), said.get("add_bos_token", False)
        case "llama":
            made, begins = _sentencepiece(said), said.get("add_bos_token", True)
        case other:
            raise CheckpointError(f"{file.path}: tokenizer.ggml.model={other!r} is not known here; known: gpt2, llama")
    return made, (made.bos_id,) if begins and made.bos_id is not None else ()


def _byte_pairs(said: Mapping[str, Any], named: Mapping[str, str], file: gguf.GGUF) -> Tokenizer:
    """As a `tokenizer.json` of byte-level BPE."""
    from jaxllm.data.tokenizers.hf import HuggingFace

    pre = said.get("pre", "default")
    if pre not in PRE:
        raise CheckpointError(f"{file.path}: tokenizer.ggml.pre={pre!r} is not known here; known: {', '.join(PRE)}")
    pattern, digits = PRE[pre]
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    alone = [{"type": "Digits", "individual_digits": True}] if digits else []
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    kinds = said.get("token_type") or [NORMAL] * len(said["tokens"])
    tree = {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "added_tokens": [
            {"id": i, "content": token, "special": kind == CONTROL, "single_word": False, "lstrip": False,
             "rstrip": False, "normalized": False}
            for i, (token, kind) in enumerate(zip(said["tokens"], kinds, strict=True)) if kind in (CONTROL, USER)
        ],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*alone, split, level]}, "decoder": level,
        "model": {
            "type": "BPE", "vocab": {token: i for i, token in enumerate(said["tokens"])}, "merges": said["merges"],
            "ignore_merges": pre in ("llama-bpe", "llama3"),
        },
    }  # fmt: skip
    return HuggingFace(Spec(kind="hf", **named), json.dumps(tree, ensure_ascii=False).encode(), str(file.path))


def _sentencepiece(said: Mapping[str, Any]) -> Tokenizer:
    """As a SentencePiece model of byte pairs."""
    from sentencepiece import sentencepiece_model_pb2 as proto

    from jaxllm.data.tokenizers.spm import SentencePiece

    model = proto.ModelProto()
    for text, score, kind in zip(said["tokens"], said["scores"], said["token_type"], strict=True):
        model.pieces.add(piece=text, score=score, type=kind)
    trainer = model.trainer_spec
    trainer.model_type, trainer.vocab_size, trainer.byte_fallback = proto.TrainerSpec.BPE, len(said["tokens"]), True
    for key, default in (("bos", 1), ("eos", 2), ("unknown", 0), ("padding", -1)):
        found = said.get(f"{key}_token_id")
        setattr(
            trainer,
            {"unknown": "unk_id", "padding": "pad_id"}.get(key, f"{key}_id"),
            default if found is None else found,
        )
    model.normalizer_spec.add_dummy_prefix = said.get("add_space_prefix", True)
    model.normalizer_spec.remove_extra_whitespaces = said.get("remove_extra_whitespaces", False)
    model.normalizer_spec.name = "identity"
    return SentencePiece(Spec(kind="sentencepiece"), model.SerializeToString(), "tokenizer.ggml")
