"""Tokenizers as the metadata of a GGUF file (`tokenizer.ggml.*`), read and written.

llama.cpp knows how text is split before byte pairs are merged by a name, `tokenizer.ggml.pre`; a tokenizer is written
if one that is known here splits as it does, and if what is read back gives the same ids.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxllm.core.errors import CheckpointError, ConfigError
from jaxllm.data.tokenizers.base import Spec, Tokenizer, byte_alphabet
from jaxllm.interop import gguf

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type
ROLES = {"bos": "bos_token_id", "eos": "eos_token_id", "pad": "padding_token_id"}

# --- how text is split ---------------------------------------------------------------------------------------------


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


# The patterns of the models' own tokenizers.
_GPT2 = _split(r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_DIGITS = {"type": "Digits", "individual_digits": True}
_FALCON = [
    {"type": "Punctuation", "behavior": "Contiguous"}, _GPT2, {"type": "Digits", "individual_digits": False},
    _split("[0-9][0-9][0-9]"),
]  # fmt: skip
_BLOOM = _split(" ?[^(\\s|[.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c])]+")
PRE: dict[str, tuple[list[dict[str, Any]], str | None]] = {
    "gpt-2": ([_GPT2], None), "smollm": ([_DIGITS, _GPT2], None), "llama-bpe": ([_split(_LLAMA3)], None),
    "qwen2": ([_split(_QWEN2)], "NFC"), "olmo": ([_GPT2], "NFC"), "falcon": (_FALCON, None), "bloom": ([_BLOOM], None),
    "default": ([_GPT2], None), "starcoder": ([_DIGITS, _GPT2], None), "llama3": ([_split(_LLAMA3)], None),
    "phi-2": ([_GPT2], None), "mpt": ([_GPT2], "NFC"), "dbrx": ([_split(_LLAMA3)], None),
}  # fmt: skip
"""`tokenizer.ggml.pre`: what is applied one after the other, and how text is normalised before that."""

_WHOLE = ("llama-bpe", "llama3")  # a word that is a token is not merged together (`ignore_merges`)


def _splits(node: dict[str, Any] | None) -> list[dict[str, Any]] | None:
    """The pre-tokenizer of a byte-level `tokenizer.json` as `PRE` has them; None for one that is not byte-level."""
    flat: list[dict[str, Any]] = []

    def walk(node: dict[str, Any]) -> None:
        if node["type"] == "Sequence":
            for inner in node["pretokenizers"]:
                walk(inner)
        elif node["type"] == "ByteLevel":
            flat.extend([_GPT2] if node.get("use_regex", True) else [])
            flat.append({"type": "ByteLevel", "add_prefix_space": node["add_prefix_space"]})
        else:
            flat.append(node)

    walk(node or {"type": "Sequence", "pretokenizers": []})
    level = {"type": "ByteLevel", "add_prefix_space": False}
    return [part for part in flat if part != level] if level in flat else None


# --- reading -------------------------------------------------------------------------------------------------------


def tokenizer(file: gguf.GGUF) -> tuple[Tokenizer, tuple[int, ...]]:
    """The tokenizer of a file, and the ids that it puts before every text.

    Raises:
      CheckpointError: a kind that is not known here, or none.
    """
    return read(file.metadata, str(file.path))


def read(metadata: Mapping[str, Any], name: str) -> tuple[Tokenizer, tuple[int, ...]]:
    """What `tokenizer` does, given metadata; `name` is what errors call the file."""
    said = {k.removeprefix("tokenizer.ggml."): v for k, v in metadata.items() if k.startswith("tokenizer.ggml.")}
    kind = said.get("model")
    if kind not in KINDS:
        raise CheckpointError(f"{name}: tokenizer.ggml.model={kind!r} is not known here; known: {', '.join(KINDS)}")
    try:
        made = _byte_pairs(said, name) if kind == "gpt2" else _sentencepiece(said, name)
    except (LookupError, TypeError, ValueError, AttributeError) as e:
        raise CheckpointError(f"{name}: its tokenizer.ggml metadata do not make a {kind} tokenizer ({e!r})") from None
    begins = said.get("add_bos_token", kind == "llama")
    return made, (made.bos_id,) if begins and made.bos_id is not None else ()


def ends(file: gguf.GGUF) -> tuple[int, ...]:
    """Ids that end what a model says, besides that of the end of a text: of a turn, of a message."""
    found = (file.metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eot", "eom"))
    return tuple(i for i in found if isinstance(i, int))


KINDS = (
    "gpt2",
    "llama",
    "t5",
)  # tokenizer.ggml.model: byte-level pairs, SentencePiece's pairs, SentencePiece's unigrams


def _byte_pairs(said: Mapping[str, Any], name: str) -> Tokenizer:
    """As a `tokenizer.json` of byte-level BPE."""
    from jaxllm.data.tokenizers.hf import HuggingFace

    pre = said.get("pre", "default")
    if pre not in PRE:
        raise CheckpointError(f"{name}: tokenizer.ggml.pre={pre!r} is not known here; known: {', '.join(PRE)}")
    splits, normal = PRE[pre]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    tokens = said["tokens"]
    kinds = said.get("token_type") or [NORMAL] * len(tokens)
    tree = {
        "version": "1.0", "truncation": None, "padding": None, "post_processor": None,
        "normalizer": normal and {"type": normal},
        "added_tokens": [
            {"id": i, "content": token, "special": kind == CONTROL, "single_word": False, "lstrip": False,
             "rstrip": False, "normalized": False}
            for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind in (CONTROL, USER)
        ],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, level]}, "decoder": level,
        "model": {
            "type": "BPE", "merges": said["merges"], "ignore_merges": pre in _WHOLE,
            "vocab": {token: i for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind != UNUSED},
        },
    }  # fmt: skip
    named = {role: tokens[said[key]] for role, key in ROLES.items() if 0 <= said.get(key, -1) < len(tokens)}
    return HuggingFace(Spec(kind="hf", **named), json.dumps(tree, ensure_ascii=False).encode(), name)


def _sentencepiece(said: Mapping[str, Any], name: str) -> Tokenizer:
    """As a SentencePiece model."""
    from sentencepiece import sentencepiece_model_pb2 as proto

    from jaxllm.data.tokenizers.spm import SentencePiece

    model = proto.ModelProto()
    kinds = said["token_type"]
    for text, score, kind in zip(said["tokens"], said["scores"], kinds, strict=True):
        model.pieces.add(piece=text, score=score, type=kind)
    trainer, normal = model.trainer_spec, model.normalizer_spec
    unigram = said["model"] == "t5"
    trainer.model_type = proto.TrainerSpec.UNIGRAM if unigram else proto.TrainerSpec.BPE
    trainer.vocab_size, trainer.byte_fallback = len(kinds), BYTE in kinds
    # Where a key is missing, llama.cpp takes these ids; here, if the piece is one of control.
    usual = {"pad": 0, "eos": 1} if unigram else {"bos": 1, "eos": 2}
    for role, key in ROLES.items():
        i = usual.get(role, -1)
        i = said.get(key, i if 0 <= i < len(kinds) and kinds[i] == CONTROL else -1)
        there = 0 <= i < len(kinds)
        setattr(trainer, f"{role}_id", i if there else -1)
        setattr(trainer, f"{role}_piece", said["tokens"][i] if there else "")  # by which the library finds it
    trainer.unk_id = kinds.index(UNKNOWN) if UNKNOWN in kinds else 0
    trainer.unk_piece = said["tokens"][trainer.unk_id]
    normal.name = "identity"
    normal.precompiled_charsmap = bytes(said.get("precompiled_charsmap", b""))
    normal.add_dummy_prefix = said.get("add_space_prefix", True)
    normal.remove_extra_whitespaces = said.get("remove_extra_whitespaces", False)
    return SentencePiece(Spec(kind="sentencepiece"), model.SerializeToString(), name)


# --- writing -------------------------------------------------------------------------------------------------------


def metadata(
    tokenizer: Tokenizer | None,
    start: Sequence[int],
    rows: int,
    templates: Mapping[str, str] = {},
    ends: Sequence[int] = (),
) -> dict[str, Any]:
    """The metadata of a tokenizer, which `read` gives back.

    Args:
      tokenizer: None: of a model that takes ids only.
      start: ids that every text begins with; there can be one.
      rows: of the embedding; there are as many tokens, the last of them unused.
      templates: of chats, by name; `default` is the model's own.
      ends: ids that end what the model says; the first that is not the tokenizer's own is the end of a turn.

    Raises:
      ConfigError: llama.cpp has no such tokenizer, or none that is known here.
    """
    if tokenizer is None:
        return {"tokenizer.ggml.model": "none"}
    kind, said = _described(tokenizer)
    missing = rows - len(said["tokens"])
    if missing < 0 or len(start) > 1:
        raise ConfigError(
            f"its tokenizer has {len(said['tokens'])} tokens and puts {tuple(start)} before every text; a GGUF file "
            f"has as many tokens as the embedding has rows, {rows}, and puts at most one before"
        )
    said["tokens"] += [f"[PAD{i}]" for i in range(rows - missing, rows)]
    said["token_type"] += [UNUSED] * missing
    if "scores" in said:
        said["scores"] += [-1000.0] * missing
    named = {key: getattr(tokenizer, f"{role}_id") for role, key in ROLES.items()}
    said |= {key: i for key, i in named.items() if i is not None}
    said |= {"bos_token_id": start[0]} if start else {}
    said["add_bos_token"] = bool(start)
    if turns := [i for i in ends if i != tokenizer.eos_id]:
        said["eot_token_id"] = turns[0]
    out = {f"tokenizer.ggml.{key}": x for key, x in {"model": kind, **said}.items()}
    _same_ids(tokenizer, tuple(start), out)
    for name, text in templates.items():
        out["tokenizer.chat_template" if name == "default" else f"tokenizer.chat_template.{name}"] = text
    if named := [name for name in templates if name != "default"]:
        out["tokenizer.chat_templates"] = named
    return out


PROBE = (
    "Hello world!  It's 1234567 o'clock,\tisn't IT?\n\n  def f(x): return x**2 # 3.14\r\n \n\n\nÄpfel naïve e\u0301 "
    "ﬁ ½ Привет, мир. 你好世界。 こんにちは नमस्ते 👩‍💻🙂 مرحبا! <tag a='b'>{}[]|~^`$+=  end "
)


def _same_ids(tokenizer: Tokenizer, start: tuple[int, ...], said: Mapping[str, Any]) -> None:
    """Returns if what is read back gives the same ids."""
    again, begins = read(said, "the GGUF file")
    probe = PROBE + " x".join(list(tokenizer.added)[:50])
    theirs, ours = again.encode(probe), tokenizer.encode(probe)
    if theirs != ours or begins != start:
        at = next(
            (i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), min(len(theirs), len(ours))
        )
        raise ConfigError(
            f"llama.cpp would split text otherwise than its tokenizer: {tokenizer.decode(ours[at : at + 3])!r} as "
            f"{again.decode(theirs[at : at + 3])!r}; convert to a Hugging Face folder"
        )


def _described(tokenizer: Tokenizer) -> tuple[str, dict[str, Any]]:
    """`tokenizer.ggml.model` and what belongs to it."""
    match tokenizer.spec.kind:
        case "byte":
            characters = {b: c for c, b in byte_alphabet().items()}
            tokens = [characters[b] for b in range(256)] + list(tokenizer.special)
            kinds = [NORMAL] * 256 + [CONTROL] * len(tokenizer.special)
            said = {"pre": "gpt-2", "tokens": tokens, "token_type": kinds, "merges": [], "add_space_prefix": False}
            return "gpt2", _with_added(said, tokenizer)
        case "sentencepiece":
            return _of_sentencepiece(tokenizer)
        case "hf":
            tree = json.loads(tokenizer.data)
            if tree["model"].get("type") == "BPE":
                return _of_byte_pairs(tree) if _splits(tree["pre_tokenizer"]) is not None else _of_merges(tree)
            what = f"of kind {tree['model'].get('type')} in tokenizer.json"
        case other:
            what = f"of kind {other}"
    raise ConfigError(
        f"a tokenizer {what} cannot be written as GGUF; known: byte, sentencepiece, and BPE in tokenizer.json; convert "
        "to a Hugging Face folder"
    )


def _with_added(said: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """With the tokens that were added to a vocabulary."""
    said["tokens"] += list(tokenizer.added)
    said["token_type"] += [USER] * len(tokenizer.added)
    if "scores" in said:
        said["scores"] += [0.0] * len(tokenizer.added)
    return said


def _tokens(tree: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    """Tokens and their types by id, of a `tokenizer.json`; ids that it leaves out are unused."""
    vocab, added = tree["model"]["vocab"], tree["added_tokens"]
    size = 1 + max([*vocab.values(), *(token["id"] for token in added)])
    tokens, kinds = [f"[PAD{i}]" for i in range(size)], [UNUSED] * size
    for token, i in vocab.items():
        tokens[i], kinds[i] = token, NORMAL
    for token in added:
        tokens[token["id"]], kinds[token["id"]] = token["content"], CONTROL if token["special"] else USER
    return tokens, kinds


def _merges(tree: Mapping[str, Any]) -> list[str]:
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in tree["model"]["merges"]]
    if odd := [pair for pair in pairs if len(pair) != 2 or " " in pair[0] + pair[1]]:
        raise ConfigError(f"its tokenizer merges {odd[0]}, and a GGUF file has a space between two tokens only")
    return [f"{a} {b}" for a, b in pairs]


def _of_byte_pairs(tree: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    splits, normal = _splits(tree["pre_tokenizer"]), (tree.get("normalizer") or {}).get("type")
    whole = tree["model"].get("ignore_merges", False)
    fits = [name for name, form in PRE.items() if form == (splits, normal) and (name in _WHOLE) == whole]
    if not fits:
        shown = json.dumps([normal, *splits], ensure_ascii=False)[:300]
        raise ConfigError(f"its tokenizer splits text as no tokenizer.ggml.pre that is known here does: {shown}")
    tokens, kinds = _tokens(tree)
    said = {"pre": fits[0], "tokens": tokens, "token_type": kinds, "merges": _merges(tree), "add_space_prefix": False}
    return "gpt2", said


def _of_merges(tree: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Of SentencePiece's byte pairs in a `tokenizer.json`: the earlier two tokens merge, the higher the score."""
    tokens, kinds = _tokens(tree)
    ids = {token: i for i, token in enumerate(tokens)}
    scores = [0.0] * len(tokens)
    for rank, pair in reversed(list(enumerate(_merges(tree)))):
        scores[ids[pair.replace(" ", "")]] = -float(rank)
    if (unknown := tree["model"].get("unk_token")) in ids:
        kinds[ids[unknown]] = UNKNOWN
    for i, token in enumerate(tokens):
        if kinds[i] == NORMAL and len(token) == 6 and token.startswith("<0x"):
            kinds[i] = BYTE
    parts = json.dumps([tree.get("normalizer"), tree.get("pre_tokenizer")], ensure_ascii=False)
    prefix = '"Prepend"' in parts or '"Metaspace"' in parts and '"prepend_scheme": "never"' not in parts
    return "llama", {
        "pre": "default", "tokens": tokens, "scores": scores, "token_type": kinds, "add_space_prefix": prefix,
    }  # fmt: skip


def _of_sentencepiece(tokenizer: Tokenizer) -> tuple[str, dict[str, Any]]:
    from sentencepiece import sentencepiece_model_pb2 as proto

    model = proto.ModelProto.FromString(tokenizer.data)
    normal, unigram = model.normalizer_spec, model.trainer_spec.model_type == proto.TrainerSpec.UNIGRAM
    said: dict[str, Any] = {
        "pre": "default", "tokens": [p.piece for p in model.pieces], "scores": [p.score for p in model.pieces],
        "token_type": [int(p.type) for p in model.pieces], "add_space_prefix": normal.add_dummy_prefix,
        "remove_extra_whitespaces": normal.remove_extra_whitespaces, "unknown_token_id": model.trainer_spec.unk_id,
    }  # fmt: skip
    if normal.precompiled_charsmap:
        said["precompiled_charsmap"] = np.frombuffer(normal.precompiled_charsmap, np.uint8)
    return "t5" if unigram else "llama", _with_added(said, tokenizer)
